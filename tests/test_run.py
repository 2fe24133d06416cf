"""The run folder: files are whole or not there, one process holds it, changed sections move to old/."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest

from lyceum import run as run_module
from lyceum.config import Recipe
from lyceum.errors import ResourceError, RunError
from lyceum.run import (
    OFFER,
    Offer,
    Run,
    StageFolder,
    State,
    fresh_folder,
    mend,
    offered,
    package_versions,
    read_offer,
    read_state,
    timed,
    write_json,
    write_lines,
    write_text,
)

RECIPE = Recipe("demo", 1, {}, (), Path("demo.toml"))


def state(key: str, **rest: object) -> State:
    return State(key, "sft", {}, {}, **rest)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------- writing


def test_text_is_written_whole_and_ends_in_one_newline(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "é\nb")
    assert path.read_bytes() == "é\nb\n".encode()
    write_text(path, "c\n")
    assert path.read_text() == "c\n"
    assert list(path.parent.iterdir()) == [path]


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_lines(path, ["old"])

    def rows() -> Iterator[str]:
        yield "new"
        raise ValueError("row 2 is broken")

    with pytest.raises(ValueError, match="row 2"):
        write_lines(path, rows())
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_null_for_what_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(
        path,
        {"loss": math.nan, "top": [math.inf, 1.5], "path": Path("a"), "n": numpy.int64(7), "ok": True, "name": "é"},
    )
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "loss": None,
        "top": [None, 1.5],
        "path": "a",
        "n": 7,
        "ok": True,
        "name": "é",
    }


def test_a_full_disk_names_the_file_and_says_that_the_run_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.jsonl"
    write_lines(path, ["old"])

    def full(old: object, new: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_module.os, "replace", full)
    with pytest.raises(ResourceError) as caught:
        write_lines(path, ["new"])
    assert str(path) in str(caught.value)
    assert "goes on where it was" in caught.value.hint
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_library_that_words_a_full_disk_in_its_own_way_is_understood(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="checkpoint"), fresh_folder(tmp_path / "checkpoint"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert list(tmp_path.iterdir()) == []


def test_a_fresh_folder_takes_the_place_of_the_old_one_only_when_it_is_done(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with fresh_folder(path) as folder:
        (folder / "a").write_text("1")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), fresh_folder(path) as folder:
        (folder / "b").write_text("2")
        raise KeyboardInterrupt
    assert [file.name for file in path.iterdir()] == ["a"]
    with fresh_folder(path) as folder:
        (folder / "c").write_text("3")
    assert [file.name for file in path.iterdir()] == ["c"]
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


def test_a_fresh_folder_leaves_its_neighbours_half_written_files_alone(tmp_path: Path) -> None:
    def rows() -> Iterator[str]:
        yield "1"
        with fresh_folder(tmp_path / "shards"):
            pass
        yield "2"

    write_lines(tmp_path / "rows.jsonl", rows())
    assert (tmp_path / "rows.jsonl").read_text() == "1\n2\n"


def test_what_a_killed_writer_left_is_mended(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.previous").mkdir()  # killed between the two renames: the previous one is all there is
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer.previous").mkdir()  # killed before the replaced one was removed
    (tmp_path / "shards.partial").mkdir()
    (tmp_path / "train.jsonl.partial").write_text("half a li")
    mend(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint", "trainer"]
    mend(tmp_path / "nothing here")


# -------------------------------------------------------------------------------- sections


def test_the_names_in_a_section_folder_are_these(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path)
    assert [p.name for p in (folder.checkpoint, folder.trainer, folder.metrics, folder.samples, folder.report)] == [
        "checkpoint",
        "trainer",
        "metrics.jsonl",
        "samples.jsonl",
        "report.json",
    ]


def test_a_section_is_gone_on_with_under_its_key_and_retired_under_another(tmp_path: Path) -> None:
    with Run.open(RECIPE, tmp_path) as run:
        folder, resumes = run.begin("sft", state("k1"))
        assert not resumes
        (folder.path / "work").write_text("first")
        folder, resumes = run.begin("sft", state("k1"))
        assert resumes and (folder.path / "work").read_text() == "first"
        for key in ("k2", "k3"):
            folder, resumes = run.begin("sft", state(key))
            assert not resumes and not (folder.path / "work").exists()
        assert sorted(p.name for p in (run.path / "old").iterdir()) == ["sft-1", "sft-2"]
        assert (run.path / "old" / "sft-1" / "work").read_text() == "first"


def test_a_section_killed_before_its_first_word_leaves_nothing_to_retire(tmp_path: Path) -> None:
    with Run.open(RECIPE, tmp_path) as run:
        (run.path / "sft").mkdir()
        _, resumes = run.begin("sft", state("k1"))
        assert not resumes and not (run.path / "old").exists()


def test_a_folder_that_is_not_ours_is_retired_not_overwritten(tmp_path: Path) -> None:
    with Run.open(RECIPE, tmp_path) as run:
        (run.path / "sft").mkdir()
        (run.path / "sft" / "mine").write_text("keep")
        run.begin("sft", state("k1"))
        assert (run.path / "old" / "sft-1" / "mine").read_text() == "keep"


def test_time_adds_up_over_interrupted_work_and_only_the_end_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(run_module.time, "monotonic", lambda: now[0])
    with Run.open(RECIPE, tmp_path) as run:
        folder, _ = run.begin("sft", state("k"))
        with pytest.raises(KeyboardInterrupt), timed(folder, state("k")):
            now[0] += 3
            raise KeyboardInterrupt
        between = read_state(folder.path)
        assert between is not None and not between.finished and between.wall_s == 3
        assert not run.is_finished("sft", "k")
        run.begin("sft", state("k"))
        with timed(folder, state("k")):
            now[0] += 4
        after = read_state(folder.path)
        assert after is not None and after.wall_s == 7 and after.peak_memory_gb > 0.001
        assert run.is_finished("sft", "k") and not run.is_finished("sft", "other")


def test_a_working_section_keeps_its_account_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "HEARTBEAT_S", 0.01)
    with Run.open(RECIPE, tmp_path) as run:
        folder, _ = run.begin("sft", state("k"))
        with timed(folder, state("k")):
            for _ in range(500):  # as a kill would find it
                found = read_state(folder.path)
                if found is not None and found.wall_s > 0:
                    break
                run_module.time.sleep(0.01)
            else:
                pytest.fail("the section's seconds were not written while it worked")
            assert not found.finished


def test_a_broken_state_file_counts_as_none(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    (tmp_path / "state.json").write_text('{"key": "k", "ki')
    assert read_state(tmp_path) is None
    (tmp_path / "state.json").write_text('{"unknown": 1}')
    assert read_state(tmp_path) is None


# -------------------------------------------------------------------------------- the lock

HOLD = """
import sys, time
from pathlib import Path
from lyceum.config import Recipe
from lyceum.run import Run
with Run.open(Recipe("demo", 1, {}, (), Path("demo.toml")), sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_held_run_names_its_holder_and_a_killed_holder_lets_go(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            with pytest.raises(RunError, match=f"in use by another process .pid {holder.pid}."):
                Run.open(RECIPE, tmp_path)
        finally:
            holder.send_signal(signal.SIGKILL)
    with Run.open(RECIPE, tmp_path) as run:
        assert (run.path / "run.lock").read_text() == f"{os.getpid()}\n"


def test_a_closed_run_can_be_opened_again_in_the_same_process(tmp_path: Path) -> None:
    with Run.open(RECIPE, tmp_path):
        with pytest.raises(RunError):
            Run.open(RECIPE, tmp_path)
    Run.open(RECIPE, tmp_path).close()


def test_versions_of_what_decides_the_numbers_are_known() -> None:
    assert {"torch", "numpy"} <= package_versions().keys()


def test_an_offer_stands_as_long_as_what_it_goes_back_to_and_its_folder(tmp_path: Path) -> None:
    assert offered(tmp_path) == (None, "") and read_offer(tmp_path) is None
    offer = Offer("improve/1/preference/checkpoint", "ppo", "k1", "now")
    write_json(tmp_path / OFFER, vars(offer))
    assert read_offer(tmp_path) == offer and "is not there" in offered(tmp_path)[1]
    write_json(tmp_path / offer.checkpoint / "config.json", {})
    assert offered(tmp_path) == (tmp_path / offer.checkpoint, "")
    write_json(tmp_path / "manifest.json", {"keys": {"ppo": "k1"}})
    assert offered(tmp_path)[0] is not None
    write_json(tmp_path / "manifest.json", {"keys": {"ppo": "k2"}})
    assert offered(tmp_path)[0] is None and "before the recipe changed" in offered(tmp_path)[1]
    (tmp_path / OFFER).write_text("{")
    assert offered(tmp_path)[0] is None and "cannot be read" in offered(tmp_path)[1]
