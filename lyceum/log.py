"""What a run says: log lines and progress bars for people, metrics.jsonl for everything else. Rank 0 only.

On a terminal lines and bars are drawn by rich; elsewhere they are plain lines, a bar one line every ten seconds, so
that a log file stays readable. Everything goes to the standard error: the standard output is for results.

    log.info("12,345 documents kept")
    with progress(total_tokens, "pretrain", unit="tok", done=resumed_tokens) as bar:
        bar.update(2048, loss=3.21)

It is not an experiment tracker: metrics are lines of JSON in the section's folder.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lyceum import dist
from lyceum.run import disk_errors, plain, write_lines

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_EVERY_S = 10.0  # how often a bar speaks when nobody is watching
SPEED_OVER_S = 30.0  # the window that the shown speed is taken over


class Log:
    """The one logger: lines for the person, printed by rank 0."""

    def __init__(self) -> None:
        self._console: Console | None = None

    @property
    def console(self) -> Console:
        """The terminal that lines and bars share, so that a line never breaks a bar."""
        if self._console is None:
            from rich.console import Console

            self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        return self._console

    def info(self, message: str) -> None:
        """Say something."""
        self._say(message, "")

    def warning(self, message: str) -> None:
        """Say something that deserves attention."""
        self._say(f"warning: {message}", "yellow")

    def title(self, message: str) -> None:
        """Say what begins now."""
        self._say(message, "bold")

    def _say(self, message: str, style: str) -> None:
        if not dist.is_main():
            return
        if is_terminal():
            self.console.print(message, style=style or None, markup=False)
        else:
            print(message, file=sys.stderr, flush=True)


log = Log()


def is_terminal() -> bool:
    """True if somebody watches the standard error."""
    return sys.stderr is not None and sys.stderr.isatty()


# -------------------------------------------------------------------------------- progress


class Progress:
    """One bar: how much is done, the speed over the last half minute, the time left, and the numbers it was given.

    The time left goes by the speed since the beginning, which holds pauses too: after a long validation the last half minute
    is nothing but a pause.

    Args:
        total: when it is full, in `unit`.
        unit: what is counted; empty if its speed is not to be shown.
        done: where it begins (a resumed run); not counted as speed.
    """

    def __init__(self, total: float, description: str, unit: str = "tok", done: float = 0.0) -> None:
        self.total, self.description, self.unit, self.done = total, description, unit, done
        self.shown: dict[str, Any] = {}
        self._begun = time.monotonic()
        self._from = done
        self._marks: list[tuple[float, float]] = [(self._begun, done)]  # (when, done) over the last SPEED_OVER_S

    def update(self, advance: float = 0.0, **shown: Any) -> None:
        """Count `advance` more units as done, and show these numbers from now on."""
        self.done += advance
        self.shown.update(shown)
        now = time.monotonic()
        self._marks.append((now, self.done))
        while len(self._marks) > 2 and now - self._marks[1][0] > SPEED_OVER_S:
            self._marks.pop(0)

    def speed(self) -> float:
        """Units a second over the last SPEED_OVER_S; 0 while unknown."""
        (start, done), (end, now_done) = self._marks[0], self._marks[-1]
        return (now_done - done) / (end - start) if end > start else 0.0

    def text(self) -> str:
        """The numbers beside the bar: `loss 3.210 | 12,345 tok/s | 1:23 left`."""
        parts = [f"{name} {show_number(value)}" for name, value in self.shown.items()]
        speed = self.speed()
        if speed > 0:
            if self.unit:
                parts.append(f"{speed:,.0f} {self.unit}/s" if speed >= 10 else f"{speed:.2g} {self.unit}/s")
            one_s = (self._marks[-1][0] - self._begun) / (self.done - self._from)
            parts.append(f"{show_time(max(0.0, self.total - self.done) * one_s)} left")
        return " | ".join(parts)

    def share(self) -> float:
        """How much of the whole is done, 0 to 1."""
        return min(1.0, self.done / self.total) if self.total > 0 else 1.0


class _PlainProgress(Progress):
    """A bar for a log file: a line now and then."""

    _spoke: float = 0.0

    def update(self, advance: float = 0.0, **shown: Any) -> None:
        super().update(advance, **shown)
        now = time.monotonic()
        self._spoke = self._spoke or self._begun
        if now - self._spoke >= PLAIN_EVERY_S:
            self._spoke = now
            log.info(f"{self.description} {self.share():4.0%} | {self.text()}")


class _DrawnProgress(Progress):
    """A bar for a terminal."""

    drawn: Any = None
    task: Any = None

    def update(self, advance: float = 0.0, **shown: Any) -> None:
        super().update(advance, **shown)
        self.drawn.update(self.task, completed=min(self.done, self.total), numbers=self.text())


@contextmanager
def progress(total: float, description: str, unit: str = "tok", done: float = 0.0) -> Iterator[Progress]:
    """A progress bar over `total` units for the length of the block; on a rank other than 0 it shows nothing.

    Args:
        total: the whole, in `unit`.
        description: what is being done.
        unit: what is counted, for the speed; empty if that is not to be shown.
        done: what was done before this process began.
    """
    if not dist.is_main():
        yield Progress(total, description, unit, done)
    elif not is_terminal():
        yield _PlainProgress(total, description, unit, done)
    else:
        from rich import progress as rich_progress
        from rich.table import Column

        columns = (
            "{task.description}",
            rich_progress.BarColumn(12),
            "{task.percentage:>3.0f}%",
            rich_progress.TextColumn("{task.fields[numbers]}", table_column=Column()),  # may go on in the next line
        )
        with rich_progress.Progress(*columns, console=log.console, transient=True) as drawn:
            bar = _DrawnProgress(total, description, unit, done)
            bar.drawn, bar.task = drawn, drawn.add_task(description, total=max(total, 1e-9), numbers="")
            yield bar


def shorten(text: Any, most: int = 60) -> str:
    """A text as one short piece of a line."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else line[: most - 3] + "..."


def aligned(rows: Sequence[Sequence[str]], is_right: Sequence[bool]) -> list[str]:
    """Rows of words as lines of a table; `is_right` says which columns stand to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(w.rjust(n) if r else w.ljust(n) for w, n, r in zip(row, widths, is_right, strict=True)).rstrip()
        for row in rows
    ]


def show_number(value: Any) -> str:
    """A number as people read it: thousands with commas, four significant digits below."""
    if isinstance(value, (bool, str)) or value is None:
        return str(value)
    number = float(value)
    if number == int(number) if math.isfinite(number) else False:
        return f"{int(number):,}"
    return f"{number:,.0f}" if abs(number) >= 10_000 else f"{number:.3f}" if abs(number) >= 0.001 else f"{number:.2e}"


def show_time(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = int(seconds + 0.5)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


# -------------------------------------------------------------------------------- metrics


class Metrics:
    """A section's metrics.jsonl: one line for each logged step, written by rank 0."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Add a line; a number that is not finite is written as null, since JSON has none."""
        if not dist.is_main():
            return
        line = json.dumps({"step": int(step), **plain(values)}, ensure_ascii=False)
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def cut_back(self, step: int) -> None:
        """Drop the lines after `step`, and a half-written last one: a resumed run writes them again."""
        if dist.is_main() and self.path.exists():
            kept = [json.dumps(line, ensure_ascii=False) for line in read_metrics(self.path) if line["step"] <= step]
            write_lines(self.path, kept)


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none if there is no file; a half-written last line (a killed run) is left out."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
