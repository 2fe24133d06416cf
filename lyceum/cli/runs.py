"""`lyceum runs`: what runs there are and how far each has come; two or more side by side.

    lyceum runs                          the runs in runs/, the newest last
    lyceum runs /disk/runs               those in another folder
    lyceum runs runs/demo                one run, section by section
    lyceum runs demo second              what differs: settings, results, and a metric over the steps
    lyceum runs demo second --section sft --metric loss/reply --json

All of it is read from the run folders, so it works while a run goes on, and on one that was killed or broken: what
cannot be read is left out and the run is called damaged. A run counts as going on while its section's clock, written
every few seconds, is fresh.

What it is not: a judge. It compares numbers, and two runs of one seed each do not say which settings are better.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lyceum.config import load_recipe
from lyceum.errors import LyceumError, UsageError, did_you_mean
from lyceum.log import aligned, show_number, show_time
from lyceum.run import HEARTBEAT_S, read_manifest, read_state

FRESH_S = 4 * HEARTBEAT_S  # a clock older than this has stopped
NUM_ROWS = 10  # steps shown of a metric
NUMBER = re.compile(r"-|-?\d[\d.,:/e+-]*|nan")
MANIFEST = ("code", "threads", "ranks", "python", "packages")  # conditions that numbers depend on


@dataclass
class SectionFacts:
    """What one section's folder says."""

    name: str
    state: str = "waiting"  # waiting, running, stopped, finished
    wall_s: float = 0.0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    def last(self, metric: str) -> Any:
        """The last logged value of a metric; None if there is none."""
        return next((line[metric] for line in reversed(self.metrics) if line.get(metric) is not None), None)

    def final(self) -> dict[str, Any]:
        """The last value of every metric, by name."""
        return {name: value for line in self.metrics for name, value in line.items() if value is not None}


@dataclass
class RunFacts:
    """What one run's folder says; `headline` is the result of the last section that has one, `damage` names the files that
    cannot be read."""

    path: Path
    sections: list[SectionFacts] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    headline: str = ""
    when: float = 0.0
    damage: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def state(self) -> str:
        """Finished, running, stopped, failed (a traceback lies there) or damaged."""
        states = {section.state for section in self.sections}
        if "running" in states:
            return "running"
        if (self.path / "traceback.txt").exists():
            return "failed"
        if self.damage or not states:
            return "damaged"
        return "finished" if states == {"finished"} else "stopped"

    def trained(self) -> list[SectionFacts]:
        """The sections that have logged steps."""
        return [section for section in self.sections if section.metrics]


# -------------------------------------------------------------------------------- reading


def is_run(path: Path) -> bool:
    """True for a folder that a run has made, or begun to make."""
    return any((path / name).exists() for name in ("manifest.json", "recipe.toml", "run.lock"))


def read_run(path: Path) -> RunFacts:
    """Everything that `path` says of its run; never raises for what is missing or broken."""
    run = RunFacts(path)
    names: list[str] = []
    try:
        recipe = load_recipe(path / "recipe.toml")
        names = [section.name for section in recipe.sections]
        tables = {"model": recipe.model, **{section.name: section.settings for section in recipe.sections}}
        run.settings = {f"{table}.{key}": v for table, values in tables.items() for key, v in values.items()}
        run.settings["seed"] = recipe.seed
    except LyceumError:
        run.damage.append("recipe.toml")
    manifest = read_manifest(path)
    run.settings |= {key: manifest[key] for key in MANIFEST if key in manifest}
    found = sorted(path.glob("*/state.json"), key=lambda file: file.stat().st_mtime)
    for file in found:
        run.when = max(run.when, file.stat().st_mtime)
        if file.parent.name not in names:
            names.append(file.parent.name)
    run.sections = [_read_section(run, path / name) for name in names]
    run.headline = next(
        (s.name + ": " + str(s.report["line"]) for s in reversed(run.sections) if "line" in s.report), ""
    )
    run.when = run.when or path.stat().st_mtime
    return run


def _read_section(run: RunFacts, folder: Path) -> SectionFacts:
    facts = SectionFacts(folder.name)
    if not folder.is_dir():
        return facts
    state, clock = read_state(folder), folder / "state.json"
    if state is None:
        run.damage.append(f"{folder.name}/state.json")
    else:
        is_fresh = time.time() - clock.stat().st_mtime < FRESH_S
        facts.state = "finished" if state.finished else "running" if is_fresh else "stopped"
        facts.wall_s = state.wall_s
    facts.report = _read_json(run, folder / "report.json")
    try:
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return facts
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            facts.metrics.append({"step": int(json.loads(line)["step"]), **json.loads(line)})
        except (ValueError, TypeError, KeyError):
            if number < text.count("\n") + 1:  # a half-written last line is only a killed run's
                run.damage.append(f"{folder.name}/metrics.jsonl line {number}")
    return facts


def _read_json(run: RunFacts, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        run.damage.append(path.relative_to(run.path).as_posix())
        return {}
    return found


# -------------------------------------------------------------------------------- showing


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of words as aligned lines; a column of numbers stands to the right."""
    is_right = [all(NUMBER.fullmatch(row[column]) for row in rows[1:]) for column in range(len(rows[0]))]
    return aligned(rows, is_right)


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return show_number(value)
    return value if isinstance(value, str) else json.dumps(value)


def list_lines(runs: Sequence[RunFacts]) -> list[str]:
    """One line for each run, and what it came to below."""
    rows = [["run", "state", "sections", "last", "step", "loss", "tokens", "tok/s", "time", "when"]]
    for run in runs:
        done = sum(section.state == "finished" for section in run.sections)
        now = next((s for s in reversed(run.sections) if s.state != "waiting"), SectionFacts("-"))
        trained = run.trained()
        last = trained[-1] if trained else SectionFacts("-")
        tokens = sum(section.last("tokens") or 0 for section in trained)
        numbers = [last.last("step"), last.last("loss"), tokens or None, _whole(last.last("tokens_per_s"))]
        spent = show_time(sum(section.wall_s for section in run.sections))
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.when))
        rows.append([run.name, run.state, f"{done}/{len(run.sections)}", now.name, *map(_show, numbers), spent, when])
    lines = table(rows)
    for run in runs:
        lines += [f"{run.name}: {run.headline}"] * bool(run.headline)
        lines += [f"{run.name}: cannot read {', '.join(run.damage)}"] * bool(run.damage)
    return lines


def one_lines(run: RunFacts) -> list[str]:
    """One run, section by section."""
    rows = [["section", "state", "step", "loss", "tokens", "tok/s", "time", "result"]]
    for section in run.sections:
        numbers = [section.last("step"), section.last("loss"), section.last("tokens")]
        speed = _show(_whole(section.last("tokens_per_s")))
        line = str(section.report.get("line", ""))
        rows.append([section.name, section.state, *map(_show, numbers), speed, show_time(section.wall_s), line])
    return [f"{run.name}: {run.state}", *table(rows), *[f"cannot read {file}" for file in run.damage]]


def compare(runs: Sequence[RunFacts], section: str = "", metric: str = "loss") -> dict[str, Any]:
    """What differs between runs: settings, final metrics of every section that all have trained, a metric over steps.

    Args:
        section: whose metric over the steps; by default the first that all have trained.
        metric: its name, as in metrics.jsonl.

    Raises:
        UsageError: not all runs have trained that section, or logged that metric.
    """
    names = [run.name for run in runs]
    shared = [s.name for s in runs[0].trained() if all(s.name in {t.name for t in r.trained()} for r in runs)]
    if section and section not in shared:
        raise UsageError(
            f"not every one of {', '.join(names)} has trained {section}", hint=did_you_mean(section, shared)
        )
    settings = {}
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        values = [run.settings.get(key) for run in runs]
        if any(value != values[0] for value in values):
            settings[key] = values
    finals = {}
    for name in shared:
        each = [next(s for s in run.sections if s.name == name).final() for run in runs]
        finals[name] = {key: [final.get(key) for final in each] for key in dict.fromkeys(k for f in each for k in f)}
    section = section or next(iter(shared), "")
    found: dict[str, Any] = {"runs": names, "settings": settings, "final": finals, "section": section, "metric": metric}
    if section:
        found["steps"] = _over_steps([next(s for s in run.sections if s.name == section) for run in runs], metric)
    return found


def _over_steps(sections: Sequence[SectionFacts], metric: str) -> list[list[Any]]:
    """[step, value in each run] for NUM_ROWS steps; a value is the last one logged at or before the step."""
    curves = [[(line["step"], line[metric]) for line in s.metrics if line.get(metric) is not None] for s in sections]
    if not all(curves):
        known = {name for section in sections for line in section.metrics for name in line}
        raise UsageError(
            f"{sections[0].name} has logged no {metric} in one of the runs", hint=did_you_mean(metric, known)
        )
    steps = sorted({step for curve in curves for step, _ in curve})
    chosen = [steps[round(i * (len(steps) - 1) / (NUM_ROWS - 1))] for i in range(NUM_ROWS)]
    rows = []
    for step in dict.fromkeys(chosen):
        until = [[value for at, value in curve if at <= step] for curve in curves]
        ended = [step > curve[-1][0] for curve in curves]
        rows.append([step, *[v[-1] if v and not e else None for v, e in zip(until, ended, strict=True)]])
    return rows


def compare_lines(found: Mapping[str, Any]) -> list[str]:
    """What `compare` found, for people."""
    names = found["runs"]

    def block(title: str, values: Mapping[str, Sequence[Any]]) -> list[str]:
        return table([[title, *names], *[[key, *map(_show, row)] for key, row in values.items()]]) + [""]

    lines = block("settings that differ", found["settings"]) if found["settings"] else ["no setting differs", ""]
    for name, finals in found["final"].items():
        lines += block(f"{name}, at its end", finals)
    if not found["section"]:
        return [*lines, "no section has been trained in all of them"]
    over = {f"{row[0]:,}": row[1:] for row in found["steps"]}
    return lines + block(f"{found['section']}: {found['metric']} at step", over)[:-1]


def _whole(number: Any) -> Any:
    return None if number is None else round(number)


# -------------------------------------------------------------------------------- the verb


def runs(paths: Sequence[str], *, section: str = "", metric: str = "loss", as_json: bool = False) -> None:
    """List the runs of a folder, show one, or compare several.

    Raises:
        UsageError: there is no such run or folder.
    """
    chosen, base = [], Path("runs")
    for number, given in enumerate(paths):
        path = Path(given)
        if number == 0 and path.is_dir() and not is_run(path):
            base = path
        else:
            chosen.append(_find(given, base))
    if not chosen:
        if not base.is_dir():
            raise UsageError(f"there is no folder {base}", hint="give the folder that holds the runs, or one run")
        folders = sorted((read_run(path) for path in base.iterdir() if is_run(path)), key=lambda run: run.when)
        facts: Any = [_as_json(run) for run in folders]
        lines = list_lines(folders) if folders else [f"{base} holds no run"]
    elif len(chosen) == 1:
        run = read_run(chosen[0])
        facts, lines = _as_json(run), one_lines(run)
    else:
        facts = compare([read_run(path) for path in chosen], section, metric)
        lines = compare_lines(facts)
    print(json.dumps(facts, ensure_ascii=False) if as_json else "\n".join(lines))


def _find(given: str, base: Path) -> Path:
    for path in (base / given, Path(given)):
        if is_run(path):
            return path
    known = [path.name for path in base.iterdir() if is_run(path)] if base.is_dir() else []
    raise UsageError(f"there is no run {given}", hint=did_you_mean(given, known) or "give a run's folder: runs/demo")


def _as_json(run: RunFacts) -> dict[str, Any]:
    sections = [
        {"name": s.name, "state": s.state, "wall_s": s.wall_s, "final": s.final(), "line": s.report.get("line")}
        for s in run.sections
    ]
    head = {"name": run.name, "path": str(run.path), "state": run.state, "when": run.when, "headline": run.headline}
    return {**head, "damage": run.damage, "sections": sections, "settings": run.settings}
