"""``lyceum feedback export``: what people said about answers, as files to learn from, with a word on what was left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from lyceum.errors import UsageError


@contextmanager
def store_packages() -> Iterator[None]:
    """Around imports of what reads a store: UsageError where the packages of the service are not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sqlalchemy":
            raise
        raise UsageError(
            "a store needs SQLAlchemy, which is not installed", hint="pip install 'lyceum[serve]'"
        ) from None


def reader() -> ModuleType:
    """The module that reads a store's feedback. Raises UsageError where the packages of the service are not installed."""
    with store_packages():
        from lyceum.serve import feedback
    return feedback


def export(place: str, to: str, format: str, held_out: float, voices: str) -> str:
    """Write the feedback of a run or a store; returns what was done, for a person.

    Raises:
        UsageError: the packages of the service are not installed; whatever `lyceum.serve.feedback.export` raises.
    """
    feedback = reader()
    done = feedback.export(place, to, format, held_out=held_out, voices=voices)
    lines = [f"{done.num_judgements} judgements, {done.num_records} {feedback.FORMATS[format].of}"]
    lines.append(f"{done.path}: {done.num_rows} rows")
    if done.held_out_path is not None:
        lines.append(f"{done.held_out_path}: {done.num_held_out} rows, held out by prompt")
    if done.left_out:
        lines.append("left out: " + ", ".join(f"{count} {reason}" for reason, count in sorted(done.left_out.items())))
    return "\n".join(lines)
