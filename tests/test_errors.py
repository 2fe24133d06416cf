"""Errors are for the person: the message, the hint, the exit code."""

from __future__ import annotations

import pytest

from lyceum import errors


def test_an_error_reads_as_message_and_hint() -> None:
    error = errors.LyceumError("the loss is nan", hint="lower the learning rate")
    assert str(error) == "the loss is nan\nhint: lower the learning rate"
    assert str(errors.LyceumError("no hint")) == "no hint"


def test_usage_errors_exit_2_and_failures_exit_1() -> None:
    assert errors.UsageError("x").exit_code == errors.ConfigError("x").exit_code == 2
    for kind in (errors.DataError, errors.CheckpointError, errors.RunError, errors.ResourceError, errors.TrainingError):
        assert kind("x").exit_code == 1
        assert issubclass(kind, errors.LyceumError)


@pytest.mark.parametrize(
    ("file", "line", "text"),
    [(None, None, "no role"), ("a.jsonl", None, "a.jsonl: no role"), ("a.jsonl", 7, "a.jsonl line 7: no role")],
)
def test_a_data_error_names_file_and_line(file: str | None, line: int | None, text: str) -> None:
    error = errors.DataError("no role", file=file, line=line)
    assert (str(error), error.file, error.line) == (text, file, line)


def test_an_unknown_name_is_answered_with_its_nearest_neighbour() -> None:
    assert errors.did_you_mean("epoch", ["lr", "epochs"]) == "did you mean 'epochs'?"
    assert errors.did_you_mean("zzz", ["lr", "epochs"]) == "known here: epochs, lr"
    assert errors.did_you_mean("zzz", []) == ""
