"""Replies that somebody watched as they were shown, with the keys they pressed: what live teaching leaves for the stages.

    for watched in read_watched("presses.jsonl"): ...

One JSON object a line, written by `lyceum feedback export --format presses`:

    {"prompt": {"messages": [...]}, "shown": [[0.0, 0.4, "Yes"], [0.4, 0.7, ","], ...], "presses": [[1.1, 1]], "meta": {...}}

`shown` and `presses` are what the function of a `[tamer]` section is given and what it returns: pieces of text with the seconds
in which each was the newest, and pairs (second, value).

What it is not: which piece a press means (`lyceum.engine.tamer`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lyceum.corpus.records import Conversation, Row
from lyceum.corpus.rows import read_rows
from lyceum.errors import DataError

Piece = tuple[float, float, str]  # from second, until second, text


@dataclass(frozen=True)
class Watched:
    """One reply: the prompt, its pieces as they were shown, and the presses, each a second and a value (1 good, -1 bad)."""

    prompt: Conversation
    shown: tuple[Piece, ...]
    presses: tuple[tuple[float, float], ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.shown:
            raise ValueError("nothing was shown")
        before = -math.inf
        for begin, end, _ in self.shown:
            if not before <= begin <= end < math.inf:
                raise ValueError("the pieces do not follow each other in time")
            before = begin
        if not all(math.isfinite(number) for press in self.presses for number in press):
            raise ValueError("a press has a second and a value, both finite")

    @property
    def text(self) -> str:
        """All that was shown."""
        return "".join(text for _, _, text in self.shown)

    def to_json(self) -> dict[str, Any]:
        row = {"prompt": self.prompt.to_json(), "shown": [list(piece) for piece in self.shown]}
        return {**row, "presses": [list(press) for press in self.presses], "meta": self.meta}

    @classmethod
    def from_json(cls, row: Row) -> Watched:
        shown = tuple((float(begin), float(end), str(text)) for begin, end, text in row["shown"])
        presses = tuple((float(time_s), float(value)) for time_s, value in row["presses"])
        return cls(Conversation.from_json(row["prompt"]), shown, presses, dict(row.get("meta") or {}))


def read_watched(path: str | Path) -> Iterator[Watched]:
    """The watched replies of one file. Raises DataError (file, line) for a row that is none."""
    for line, row in read_rows(path):
        try:
            found = Watched.from_json(row)
        except (ValueError, TypeError, KeyError, AttributeError, DataError) as error:
            hint = "a watched reply has: prompt, shown, presses (lyceum feedback export --format presses)"
            raise DataError(f"a row that is no watched reply: {error}", file=path, line=line, hint=hint) from None
        yield found
