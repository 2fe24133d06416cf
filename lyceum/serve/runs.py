"""The runs page: what the runs on this machine say, while they train.

| route | what it does |
|---|---|
| GET /api/runs | the runs of the folder, newest first: states, steps, results |
| GET /api/runs/{run} | one: sections, settings, results, and which curves tell how it went |
| GET /api/runs/{run}/sections/{section}/{file}?start=N | metrics or samples from a byte on: what has come since |
| GET /api/runs/{run}/beside/{other} | what differs between two: settings, and where each section ended |

The folder is that of the served run, or `--runs`. A run holds texts that a model was trained on, so a key needs the scope `runs`,
which a new one has only if it is given; without keys the server is its owner's alone (`lyceum.serve.guard`).

Nothing outside the folder is read, no link is followed, and every read is bounded (`lyceum.evals.runs.Bounds`). A page that
polls asks for a file from where it left off, so a long run costs its new lines. A file that became shorter, because a
resumed run cut it back, is given from its beginning.

What it is not: a way to start, stop or change a run.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from lyceum.evals.runs import (
    CURVES,
    Bounds,
    RunFacts,
    SectionFacts,
    is_run,
    read_on,
    read_run,
    settings_that_differ,
    shared_sections,
)
from lyceum.run import plain
from lyceum.serve.app import private
from lyceum.serve.refusals import Refusal

MOST_RUNS = 500  # in the list
NAME = re.compile(r"[^/\\\0]{1,200}")
FILES = {"metrics": "metrics.jsonl", "samples": "samples.jsonl"}
LIST_BYTES = 16 << 10  # of each section's metrics, for the list: its last lines
MOST_SHOWN = 4000  # characters of one entry of a report
Told = dict[str, Any]


class Shelf:
    """The runs of one folder."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()

    def runs(self) -> list[RunFacts]:
        """All of them, the newest first."""
        bounds = Bounds(self.folder, LIST_BYTES)
        names = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        found = [read_run(path, bounds) for path in names if path.is_dir() and bounds.allow(path) and is_run(path)]
        return sorted(found, key=lambda run: -run.when)[:MOST_RUNS]

    def run(self, name: str) -> RunFacts:
        """One of them. Raises Refusal where there is none of that name."""
        return read_run(self.path(name), Bounds(self.folder))

    def path(self, name: str) -> Path:
        """A run's folder. Raises Refusal where it is none, or leads elsewhere."""
        path = self.folder / name
        is_name = NAME.fullmatch(name) is not None and name not in (".", "..")
        if not (is_name and Bounds(self.folder).allow(path) and path.is_dir() and is_run(path)):
            raise Refusal(404, f"There is no run {name[:200]!r}.", param="run", code="not_found")
        return path

    def part(self, name: str, section: str, file: str, start: int) -> Told:
        """What a section's file says from a byte on. Raises Refusal."""
        path = self.path(name)
        if NAME.fullmatch(section) is None or section in (".", "..") or file not in FILES:
            raise Refusal(404, f"There is no {file[:200]!r} of {section[:200]!r}.", param="section", code="not_found")
        try:
            part = read_on(path / section / FILES[file], start, Bounds(self.folder))
        except OSError:
            raise Refusal(
                404, f"The {file} of {section!r} cannot be read.", param="section", code="not_found"
            ) from None
        return {"rows": part.rows, "start": part.start, "end": part.end, "anew": part.is_anew, "last": part.is_last}

    def beside(self, name: str, other: str) -> Told:
        """What differs between two."""
        runs = [self.run(name), self.run(other)]
        finals: dict[str, dict[str, list[Any]]] = {}
        for section in shared_sections(runs):
            ends = [next(s for s in run.sections if s.name == section).final() for run in runs]
            finals[section] = {key: [end.get(key) for end in ends] for key in dict.fromkeys(k for e in ends for k in e)}
        return {"runs": [name, other], "settings": settings_that_differ(runs), "final": finals}


def runs_routes(folder: Path | None) -> APIRouter:
    """The routes. folder: whose runs are shown; none, and there are none."""
    router = APIRouter(include_in_schema=False, default_response_class=Response)
    shelf = Shelf(folder) if folder is not None else None

    async def ask(work: Callable[[Shelf], Any]) -> Response:
        if shelf is None:
            raise Refusal(404, "This server shows no runs: start it with --runs FOLDER.", code="not_found")
        return private(plain(await asyncio.to_thread(work, shelf)))

    @router.get("/api/runs")
    async def listed(request: Request) -> Response:
        return await ask(lambda shelf: {"folder": shelf.folder.name, "runs": [_listed(run) for run in shelf.runs()]})

    @router.get("/api/runs/{run}")
    async def one(request: Request, run: str) -> Response:
        return await ask(lambda shelf: _whole(shelf.run(run)))

    @router.get("/api/runs/{run}/sections/{section}/{file}")
    async def part(request: Request, run: str, section: str, file: str, start: int = 0) -> Response:
        return await ask(lambda shelf: shelf.part(run, section, file, max(0, start)))

    @router.get("/api/runs/{run}/beside/{other}")
    async def beside(request: Request, run: str, other: str) -> Response:
        return await ask(lambda shelf: shelf.beside(run, other))

    return router


def _listed(run: RunFacts) -> Told:
    now = next((section for section in reversed(run.sections) if section.state != "waiting"), None)
    done = sum(section.state == "finished" for section in run.sections)
    told = {"name": run.name, "state": run.state, "when": run.when, "headline": run.headline}
    return {**told, "sections": len(run.sections), "finished": done, "now": None if now is None else _now(now)}


def _now(section: SectionFacts) -> Told:
    return {"section": section.name, "step": section.last("step"), "loss": section.last("loss")}


def _whole(run: RunFacts) -> Told:
    head = {"name": run.name, "state": run.state, "when": run.when, "headline": run.headline, "damage": run.damage}
    return {**head, "settings": run.settings, "sections": [_section(section) for section in run.sections]}


def _section(section: SectionFacts) -> Told:
    curves = [metric for metric, _ in CURVES.get(section.kind, ())]
    told: Mapping[str, Any] = {
        "name": section.name,
        "kind": section.kind,
        "state": section.state,
        "wall_s": section.wall_s,
    }
    return {**told, "final": section.final(), "report": _short(section.report), "curves": curves}


def _short(report: Mapping[str, Any]) -> Told:
    """What of a report fits on a page: the rest is in the run's own report.html."""
    found = {name: value for name, value in report.items() if len(json.dumps(plain(value))) <= MOST_SHOWN}
    return found | {name: "..." for name in report if name not in found}
