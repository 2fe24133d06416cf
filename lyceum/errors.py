"""The errors a person can meet, and what to do about each.

    LyceumError                something went wrong that the user can understand        exit 1
    |- UsageError              the command was wrong                                    exit 2
    |  `- ConfigError          a recipe or a --set was wrong                            exit 2
    |- DataError               a file does not hold what it should; names file and line
    |- CheckpointError         a model folder cannot be read, or does not fit
    |- RunError                the run folder: locked, an earlier section missing, ...
    |- ResourceError           the machine ran out of something: disk, memory
    |- StoreError              the service's store cannot be opened, or cannot do what was asked
    |  `- NotFound             what was asked for is not in the store, or is somebody else's
    `- TrainingError           the numbers went wrong: NaN, nothing to learn from, a failed self-check

A message says what happened, with the value, and what was expected; the hint says the next step. The command line
prints both and no traceback (``--debug`` shows it). ``assert`` is only for our own mistakes, never for the user's.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class LyceumError(Exception):
    """An error for the person at the keyboard: what happened, and a hint with the next step."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class UsageError(LyceumError):
    """The command line asked for something that does not exist or makes no sense."""

    exit_code = 2


class ConfigError(UsageError):
    """A recipe, or a ``--set`` on top of it, is wrong."""


class DataError(LyceumError):
    """A data file does not hold what it should; the message begins with the file and the line.

    Args:
        file: the file at fault.
        line: its line, counted from 1.
    """

    def __init__(
        self, message: str, *, file: Path | str | None = None, line: int | None = None, hint: str = ""
    ) -> None:
        place = "" if file is None else f"{file}: " if line is None else f"{file} line {line}: "
        super().__init__(place + message, hint=hint)
        self.file = file
        self.line = line


class CheckpointError(LyceumError):
    """A model folder cannot be read, or does not fit what it is wanted for."""


class RunError(LyceumError):
    """The run folder is not in the state this command needs: locked, or an earlier section is missing or changed."""


class ResourceError(LyceumError):
    """The machine ran out of something: disk, memory."""


class StoreError(LyceumError):
    """The store of conversations and judgements cannot be opened, or cannot do what was asked."""


class NotFound(StoreError):
    """What was asked for is not in the store; what belongs to somebody else is not there either."""


class TrainingError(LyceumError):
    """Training cannot go on: a loss that is not a number, nothing to learn from, a failed self-check."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The hint for a name we do not know: its nearest neighbour if there is one, else all known names."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known here: {', '.join(known)}" if known else ""
