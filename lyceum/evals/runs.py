"""What the runs of a folder say of themselves: states, metrics, samples, reports; and what differs between some of them.

    run = read_run(Path("runs/demo"))                    # as `lyceum runs` shows it
    part = read_on(Path("runs/demo/sft/metrics.jsonl"), start=1024)    # what has come since, as the page reads it

All of it is read from the run folders, so it works while a run goes on, and on one that was killed or broken: what cannot be
read is left out and the run is called damaged. A run counts as going on while its section's clock, written every few
seconds, is fresh.

For a server, `Bounds` holds every read to a folder and to a size: no link is followed, nothing but plain files is opened,
and of a long file only the end is read.

What it is not: a judge. It compares numbers, and two runs of one seed each do not say which settings are better.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from lyceum.config import load_recipe
from lyceum.errors import LyceumError, UsageError, did_you_mean
from lyceum.run import HEARTBEAT_S, read_manifest, read_state

FRESH_S = 4 * HEARTBEAT_S  # a clock older than this has stopped
NUM_ROWS = 10  # steps of a metric in a comparison
MANIFEST = ("code", "threads", "ranks", "python", "packages")  # conditions that numbers depend on
PART_BYTES = 256 << 10  # of a growing file, in one part
SMALL_BYTES = 4 << 20  # most of a file that is read whole
MAX_LINE = 64 << 10  # bytes of a line that is looked at

ON_POLICY = (
    ("objective/scores", "reward"),
    ("objective/kl", "KL from where it began, nats a reply"),
    ("tokens/end_rate", "share of replies that end"),
    ("tokens/response_length", "tokens a reply"),
)
# section kind -> the curves that tell how it went: (metric in metrics.jsonl, title)
CURVES = {
    "pretrain": (
        ("loss/text", "loss, nats a token"),
        ("valid/bpb_docs", "docs, bits a byte"),
        ("valid/bpb_code", "code, bits a byte"),
    ),
    "sft": (("loss/reply", "loss, nats a token"), ("valid/accuracy", "validation, share of tokens right")),
    "reward": (("loss/ranking", "K-wise loss"), ("accuracy", "pairs in the ranked order")),
    "preference": (
        ("loss/preference", "loss"),
        ("rewards/margins", "reward of better less worse"),
        ("rewards/accuracies", "pairs in the ranked order"),
        ("logps/chosen", "log-probability of better"),
    ),
    "ppo": ON_POLICY,
    "tamer": (*ON_POLICY, ("tamer/presses", "presses of the trainer")),
    "grpo": ON_POLICY,
}


@dataclass(frozen=True)
class Bounds:
    """What a server may read: plain files in `folder`, which is a resolved path; of metrics only the last `most` bytes."""

    folder: Path
    most: int = PART_BYTES

    def allow(self, path: Path) -> bool:
        """Whether a path lies in the folder, without any link on the way."""
        return path.is_relative_to(self.folder) and path.resolve() == path


@dataclass
class SectionFacts:
    """What one section's folder says."""

    name: str
    kind: str = ""
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


# -------------------------------------------------------------------------------- files


def open_plain(path: Path, bounds: Bounds | None = None) -> BinaryIO:
    """Open a plain file; with bounds only one that they allow. Raises OSError."""
    if bounds is not None and not bounds.allow(path):
        raise PermissionError(f"{path} leads out of its folder")
    no_link = os.O_NOFOLLOW if bounds is not None else 0  # between the look above and now, too
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | no_link)  # a pipe would be waited for
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no plain file")
    return os.fdopen(descriptor, "rb")


def read_small(path: Path, bounds: Bounds | None = None) -> str:
    """A file's text; with bounds at most SMALL_BYTES of it. Raises OSError."""
    with open_plain(path, bounds) as file:
        if bounds is not None and os.fstat(file.fileno()).st_size > SMALL_BYTES:
            raise OSError(f"{path} is larger than {SMALL_BYTES} bytes")
        return file.read().decode("utf-8", "replace")


def read_end(path: Path, bounds: Bounds | None = None) -> tuple[str, bool]:
    """A file's text from where a line begins, and whether that is all of it; with bounds its last bytes. Raises OSError."""
    with open_plain(path, bounds) as file:
        size = os.fstat(file.fileno()).st_size
        if bounds is None or size <= bounds.most:
            return file.read().decode("utf-8", "replace"), True
        file.seek(size - bounds.most)
        return file.read(bounds.most).partition(b"\n")[2].decode("utf-8", "replace"), False


@dataclass(frozen=True)
class Part:
    """Whole lines of JSON from a growing file. start, end: bytes; is_anew: the file is shorter than where was left off (a
    resumed run cuts it back), so this begins at its beginning. is_last: there was no more."""

    rows: list[dict[str, Any]]
    start: int
    end: int
    is_anew: bool
    is_last: bool


def read_on(path: Path, start: int, bounds: Bounds | None = None) -> Part:
    """The next lines of a file of JSON lines, from a byte where a line begins; at most PART_BYTES. A line that is no object is
    passed over. No file is an empty part. Raises OSError."""
    try:
        file = open_plain(path, bounds)
    except FileNotFoundError:
        return Part([], 0, 0, start > 0, True)
    with file:
        size = os.fstat(file.fileno()).st_size
        is_anew = start > size
        start = 0 if is_anew else start
        file.seek(start)
        content = file.read(PART_BYTES)
    whole = content[: content.rfind(b"\n") + 1]
    if not whole and len(content) == PART_BYTES:  # a line longer than a part: passed over, piece by piece
        return Part([], start, start + len(content), is_anew, False)
    rows = []
    for line in whole.splitlines():
        try:
            found = json.loads(line) if len(line) <= MAX_LINE else None
        except ValueError:
            continue
        if isinstance(found, dict):
            rows.append(found)
    end = start + len(whole)
    return Part(rows, start, end, is_anew, len(content) < PART_BYTES)


# -------------------------------------------------------------------------------- runs


def is_run(path: Path) -> bool:
    """True for a folder that a run has made, or begun to make."""
    return any((path / name).exists() for name in ("manifest.json", "recipe.toml", "run.lock"))


def read_run(path: Path, bounds: Bounds | None = None) -> RunFacts:
    """Everything that `path` says of its run; never raises for what is missing or broken."""
    run = RunFacts(path)
    names: list[str] = []
    kinds: dict[str, str] = {}
    try:
        with open_plain(path / "recipe.toml", bounds):
            recipe = load_recipe(path / "recipe.toml")
        names = [section.name for section in recipe.sections]
        kinds = {section.name: section.kind for section in recipe.sections}
        tables = {"model": recipe.model, **{section.name: section.settings for section in recipe.sections}}
        run.settings = {f"{table}.{key}": v for table, values in tables.items() for key, v in values.items()}
        run.settings["seed"] = recipe.seed
    except (LyceumError, OSError):
        run.damage.append("recipe.toml")
    manifest = read_manifest(path) if _may(path / "manifest.json", bounds) else {}
    run.settings |= {key: manifest[key] for key in MANIFEST if key in manifest}
    found = [file for file in path.glob("*/state.json") if _may(file, bounds)]
    for file in sorted(found, key=lambda file: file.stat().st_mtime):
        run.when = max(run.when, file.stat().st_mtime)
        if file.parent.name not in names:
            names.append(file.parent.name)
    run.sections = [_read_section(run, path / name, kinds.get(name, ""), bounds) for name in names]
    run.headline = next(
        (s.name + ": " + str(s.report["line"]) for s in reversed(run.sections) if "line" in s.report), ""
    )
    run.when = run.when or path.stat().st_mtime
    return run


def _may(path: Path, bounds: Bounds | None) -> bool:
    return bounds is None or bounds.allow(path)


def _read_section(run: RunFacts, folder: Path, kind: str, bounds: Bounds | None) -> SectionFacts:
    facts = SectionFacts(folder.name, kind)
    if not folder.is_dir() or not _may(folder, bounds):
        return facts
    clock = folder / "state.json"
    state = read_state(folder) if _may(clock, bounds) else None
    if state is None:
        run.damage.append(f"{folder.name}/state.json")
    else:
        is_fresh = time.time() - clock.stat().st_mtime < FRESH_S
        facts.state = "finished" if state.finished else "running" if is_fresh else "stopped"
        facts.wall_s, facts.kind = state.wall_s, kind or state.kind
    facts.report = _read_json(run, folder / "report.json", bounds)
    try:
        text, is_whole = read_end(folder / "metrics.jsonl", bounds)
    except OSError:
        return facts
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            facts.metrics.append({"step": int(json.loads(line)["step"]), **json.loads(line)})
        except (ValueError, TypeError, KeyError):
            if number < text.count("\n") + 1:  # a half-written last line is only a killed run's
                run.damage.append(f"{folder.name}/metrics.jsonl" + (f" line {number}" if is_whole else ""))
    return facts


def _read_json(run: RunFacts, path: Path, bounds: Bounds | None) -> dict[str, Any]:
    try:
        found = json.loads(read_small(path, bounds))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        run.damage.append(path.relative_to(run.path).as_posix())
        return {}
    return found


# -------------------------------------------------------------------------------- several


def compare(runs: Sequence[RunFacts], section: str = "", metric: str = "loss") -> dict[str, Any]:
    """What differs between runs: settings, final metrics of every section that all have trained, a metric over steps.

    Args:
        section: whose metric over the steps; by default the first that all have trained.
        metric: its name, as in metrics.jsonl.

    Raises:
        UsageError: not all runs have trained that section, or logged that metric.
    """
    names = [run.name for run in runs]
    shared = shared_sections(runs)
    if section and section not in shared:
        raise UsageError(
            f"not every one of {', '.join(names)} has trained {section}", hint=did_you_mean(section, shared)
        )
    finals = {}
    for name in shared:
        each = [next(s for s in run.sections if s.name == name).final() for run in runs]
        finals[name] = {key: [final.get(key) for final in each] for key in dict.fromkeys(k for f in each for k in f)}
    section = section or next(iter(shared), "")
    found: dict[str, Any] = {"runs": names, "settings": settings_that_differ(runs), "final": finals}
    found |= {"section": section, "metric": metric}
    if section:
        found["steps"] = _over_steps([next(s for s in run.sections if s.name == section) for run in runs], metric)
    return found


def shared_sections(runs: Sequence[RunFacts]) -> list[str]:
    """The sections that all have trained."""
    return [s.name for s in runs[0].trained() if all(s.name in {t.name for t in run.trained()} for run in runs)]


def settings_that_differ(runs: Sequence[RunFacts]) -> dict[str, list[Any]]:
    """Setting -> its value in each run; None where a run has none."""
    found = {}
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        values = [run.settings.get(key) for run in runs]
        if any(value != values[0] for value in values):
            found[key] = values
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


def facts_of(run: RunFacts) -> Mapping[str, Any]:
    """A run's facts, but for its curves."""
    sections = [
        {"name": s.name, "state": s.state, "wall_s": s.wall_s, "final": s.final(), "line": s.report.get("line")}
        for s in run.sections
    ]
    head = {"name": run.name, "path": str(run.path), "state": run.state, "when": run.when, "headline": run.headline}
    return {**head, "damage": run.damage, "sections": sections, "settings": run.settings}
