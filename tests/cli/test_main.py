"""The command line: it starts at once, and every way of going wrong has its words and its exit code."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lyceum.cli import chat, kinds, main, river
from lyceum.errors import LyceumError, ResourceError


def lyceum(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "lyceum", *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=60)


def test_help_lists_the_verbs_within_three_tenths_of_a_second() -> None:
    spent = []
    for _ in range(3):  # the processor's own seconds, so that a busy machine does not count
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = lyceum("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert shown.returncode == 0 and shown.stderr == ""
    for verb in ("run", "plan", "chat", "runs", "export", *kinds.KINDS):
        assert f"    {verb}" in shown.stdout
    assert min(spent) < 0.3


def test_no_verb_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([]) == 0
    assert "usage: lyceum" in capsys.readouterr().out


def test_a_broken_recipe_is_an_error_with_its_line_and_exit_2(tmp_path: Path) -> None:
    recipe = tmp_path / "bad.toml"
    recipe.write_text("[corpus]\nobjects = \n")
    told = lyceum("run", str(recipe), cwd=tmp_path)
    assert told.returncode == 2 and told.stdout == ""
    first, second = told.stderr.splitlines()
    assert first.startswith("error: ") and "bad.toml" in first and "line 2" in first
    assert second.startswith("hint: ")
    assert not (tmp_path / "runs").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    for words in (("--debug", "run", "none"), ("run", "none", "--debug")):
        told = lyceum(*words, cwd=tmp_path)
        assert told.returncode == 1 and "Traceback" in told.stderr and "ConfigError" in told.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rnu", "demo"], ["error: there is no verb 'rnu'", "hint: did you mean 'run'?"]),
        (["run"], ["error: the following arguments are required: RECIPE", "hint: lyceum run --help"]),
        (["run", "demo", "--form", "sft"], ["error: unrecognized arguments", "hint: lyceum --help"]),
        (["run", "no-such-recipe"], ["error: there is no recipe no-such-recipe"]),
        (["chat", "no-such-run"], ["error: there is no run or checkpoint no-such-run"]),
        (["chat", "x", "--temperature", "hot"], ["error: argument --temperature: invalid float value"]),
    ],
)
def test_a_wrong_command_is_an_error_and_a_hint(
    words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(words) == (1 if words[:2] == ["chat", "no-such-run"] else 2)
    shown = capsys.readouterr()
    assert shown.out == ""
    for line in expected:
        assert line in shown.err


def test_run_hands_on_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(river, "run_recipe", lambda recipe, **rest: asked.append((recipe, rest)))
    assert main.main(["run", "demo", "--set", "a.b=1", "--set", "seed=2", "--from", "sft", "--until", "ppo"]) == 0
    assert main.main(["sft", "demo", "--runs", "elsewhere"]) == 0
    assert asked == [
        (
            "demo",
            {"overrides": ["a.b=1", "seed=2"], "first": "sft", "last": "ppo", "runs_dir": "runs", "every_round": False},
        ),
        ("demo", {"overrides": [], "first": "sft", "last": "sft", "runs_dir": "elsewhere", "every_round": True}),
    ]


def test_chat_hands_on_what_was_asked_and_is_greedy_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(chat, "chat", lambda path, **rest: asked.append((path, rest)))
    assert main.main(["chat", "runs/demo", "-p", "hi", "--stage", "sft", "--save", "a.jsonl"]) == 0
    expected = {"prompt": "hi", "temperature": 0.0, "max_tokens": 256, "stage": "sft", "save": "a.jsonl", "lookup": []}
    assert asked == [("runs/demo", expected)]


def test_a_kind_is_a_verb_whose_help_lists_its_settings(garden: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main.main(["tree", "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "size = 1" in shown and "how big" in shown
    assert main.main(["soil", str(garden.recipe), "--runs", str(garden.runs)]) == 0
    assert garden.ran == ["soil"]
    assert main.main(["fruit", str(garden.recipe), "--runs", str(garden.runs)]) == 1
    assert "error: fruit starts from graft, which was never run" in capsys.readouterr().err


def test_ctrl_c_is_one_plain_line_and_130(garden: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(name: str) -> None:
        raise KeyboardInterrupt

    garden.before = stop
    assert main.main(["run", str(garden.recipe), "--runs", str(garden.runs)]) == 130
    assert capsys.readouterr().err.endswith("\nstopped; the same command goes on where it was\n")


def test_a_mistake_of_ours_is_told_without_a_traceback(garden: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def break_down(name: str) -> None:
        raise ZeroDivisionError("ours")

    garden.before = break_down
    assert main.main(["run", str(garden.recipe), "--runs", str(garden.runs)]) == 1
    shown = capsys.readouterr().err
    assert "error: ZeroDivisionError: ours\nhint: this looks like a mistake in lyceum itself" in shown
    assert "Traceback" not in shown
    with pytest.raises(ZeroDivisionError):
        main.main(["run", str(garden.recipe), "--runs", str(garden.runs), "--debug"])


def test_a_full_disk_in_a_run_is_told_and_freed_space_lets_it_go_on(
    garden: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(name: str) -> None:
        if name == "tree":
            raise OSError(errno.ENOSPC, "No space left on device", "shard-0.bin")

    garden.before = full
    words = ["run", str(garden.recipe), "--runs", str(garden.runs)]
    assert main.main(words) == 1
    shown = capsys.readouterr().err
    assert "error: the disk is full: shard-0.bin\nhint: free some space and start the same command again" in shown
    garden.before = lambda name: None
    garden.ran.clear()
    assert main.main(words) == 0
    assert garden.ran == ["tree", "graft", "fruit"]


@pytest.mark.parametrize(
    ("error", "kind", "word"),
    [
        (MemoryError(), ResourceError, "not enough memory"),
        (RuntimeError("[enforce fail] can't allocate memory: you tried\nmore"), ResourceError, "you tried"),
        (OSError(errno.ENOSPC, "No space left"), ResourceError, "disk is full"),
        (ValueError("x"), LyceumError, "ValueError: x"),
    ],
)
def test_errors_of_others_are_told_in_our_words(error: Exception, kind: type[LyceumError], word: str) -> None:
    told = main.as_lyceum_error(error)
    assert type(told) is kind and word in str(told) and "\nmore" not in told.message


def test_a_reader_that_leaves_early_is_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -m lyceum --help | head -c 1 > /dev/null"
    told = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, cwd=Path(__file__).resolve().parents[2]
    )
    assert told.stderr == ""
