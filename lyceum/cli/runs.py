"""`lyceum runs`: what runs there are and how far each has come; two or more side by side.

    lyceum runs                          the runs in runs/, the newest last
    lyceum runs /disk/runs               those in another folder
    lyceum runs runs/demo                one run, section by section
    lyceum runs demo second              what differs: settings, results, and a metric over the steps
    lyceum runs demo second --section sft --metric loss/reply --json

What it is not: the reading of runs (`lyceum.evals.runs`), which the service's page shares.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lyceum.errors import UsageError, did_you_mean
from lyceum.evals.runs import RunFacts, SectionFacts, compare, facts_of, is_run, read_run
from lyceum.log import aligned, show_number, show_time

NUMBER = re.compile(r"-|-?\d[\d.,:/e+-]*|nan")


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
        facts: Any = [facts_of(run) for run in folders]
        lines = list_lines(folders) if folders else [f"{base} holds no run"]
    elif len(chosen) == 1:
        run = read_run(chosen[0])
        facts, lines = facts_of(run), one_lines(run)
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
