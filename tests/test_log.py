"""Lines, bars and metrics: who sees them, and what a resumed run finds."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest

from lyceum import log as log_module
from lyceum.errors import ResourceError
from lyceum.log import Log, Metrics, Progress, log, progress, read_metrics, show_number, show_time


class Clock:
    """A clock that the test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(log_module.time, "monotonic", clock)
    return clock


# -------------------------------------------------------------------------------- lines


def test_lines_go_to_the_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    log.info("12 documents [kept]")
    log.warning("3 dropped")
    assert capsys.readouterr() == ("", "12 documents [kept]\nwarning: 3 dropped\n")


def test_only_rank_0_speaks_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(log_module, "PLAIN_EVERY_S", 0.0)
    log.info("x")
    with progress(10, "sft") as bar:
        bar.update(5, loss=1.0)
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write(1, {"loss": 1.0})
    metrics.cut_back(0)
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------- bars


def test_a_bar_in_a_log_file_is_a_line_every_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(1000, "sft", unit="tok") as bar:
        for _ in range(25):  # 25 seconds of 20 tokens each
            clock.now += 1
            bar.update(20, loss=2.5)
    assert capsys.readouterr().err.splitlines() == [
        "sft  20% | loss 2.500 | 20 tok/s | 0:40 left",
        "sft  40% | loss 2.500 | 20 tok/s | 0:30 left",
    ]


def test_what_was_done_before_counts_for_the_bar_but_not_for_the_speed(clock: Clock) -> None:
    bar = Progress(1000, "sft", done=500)
    assert (bar.speed(), bar.share(), bar.text()) == (0.0, 0.5, "")
    clock.now += 10
    bar.update(100)
    assert (bar.speed(), bar.share(), bar.text()) == (10.0, 0.6, "10 tok/s | 0:40 left")


def test_the_speed_is_of_the_last_half_minute(clock: Clock) -> None:
    bar = Progress(10_000, "sft")
    for second in range(100):
        clock.now += 1
        bar.update(100 if second < 50 else 10)
    assert bar.speed() == 10.0


def test_after_a_pause_the_time_left_goes_by_the_whole_and_not_by_the_pause(clock: Clock) -> None:
    bar = Progress(1000, "sft")
    for _ in range(4):
        clock.now += 10
        bar.update(100)
    clock.now += 40  # a validation, longer than what the speed is taken over
    bar.update(1)
    assert bar.text().endswith("| 2:00 left"), bar.text()


def test_a_bar_over_nothing_is_full() -> None:
    assert Progress(0, "sft").share() == 1.0


def test_on_a_terminal_the_bar_is_drawn_with_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    screen = io.StringIO()
    shown = Log()
    shown._console = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(log_module, "log", shown)
    monkeypatch.setattr(log_module, "is_terminal", lambda: True)
    with progress(10, "pretrain") as bar:
        bar.update(5, loss=3.25)
        shown.info("a line between")
    text = screen.getvalue()
    assert "pretrain" in text and "loss 3.250" in text and "50%" in text and "a line between" in text


def test_on_a_narrow_terminal_no_number_is_cut_off(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    from rich.console import Console

    screen = io.StringIO()
    shown = Log()
    shown._console = Console(file=screen, force_terminal=True, width=80)
    monkeypatch.setattr(log_module, "log", shown)
    monkeypatch.setattr(log_module, "is_terminal", lambda: True)
    with progress(23_000, "pretrain", unit="") as bar:
        clock.now += 60
        bar.update(11_500, step="11,500/23,000", **{"loss/text": 3.25, "bpb": 1.5, "tok/s": 50_123, "of limit": "41%"})
    assert bar.text() == "step 11,500/23,000 | loss/text 3.250 | bpb 1.500 | tok/s 50,123 | of limit 41% | 1:00 left"
    drawn = " ".join(screen.getvalue().split())
    assert all(part in drawn for part in bar.text().split(" | "))  # in two lines, without a speed in steps


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (12345, "12,345"),
        (2.0, "2"),
        (0.5, "0.500"),
        (12345.6, "12,346"),
        (1.5e-5, "1.50e-05"),
        (math.nan, "nan"),
        ("x", "x"),
        (None, "None"),
    ],
)
def test_numbers_are_shown_as_people_read_them(value: object, text: str) -> None:
    assert show_number(value) == text


def test_times_are_shown_as_a_clock() -> None:
    assert [show_time(s) for s in (0, 59.6, 61, 3600, 36_061)] == ["0:00", "1:00", "1:01", "1:00:00", "10:01:01"]


# -------------------------------------------------------------------------------- metrics


def test_metrics_are_read_as_they_were_written(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "sft" / "metrics.jsonl")
    metrics.write(1, {"loss": 2.5, "lr": {"matrix": 0.1}, "note": "é"})
    metrics.write(2, {"loss": math.nan})
    assert read_metrics(metrics.path) == [
        {"step": 1, "loss": 2.5, "lr": {"matrix": 0.1}, "note": "é"},
        {"step": 2, "loss": None},
    ]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_one_element_tensor_is_written_as_its_number(tmp_path: Path) -> None:
    import torch

    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write(1, {"loss": torch.tensor(0.5), "tokens": torch.tensor(7)})
    assert json.loads(metrics.path.read_text()) == {"step": 1, "loss": 0.5, "tokens": 7.0}


def test_a_resumed_run_cuts_the_metrics_back_to_its_checkpoint(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        metrics.write(step, {"loss": step / 8})
    with open(metrics.path, "a") as file:
        file.write('{"step": 6, "lo')  # killed while it wrote
    assert [line["step"] for line in read_metrics(metrics.path)] == [1, 2, 3, 4, 5]
    metrics.cut_back(3)
    metrics.write(4, {"loss": 9.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(metrics.path)] == [
        (1, 0.125),
        (2, 0.25),
        (3, 0.375),
        (4, 9.0),
    ]
    Metrics(tmp_path / "none.jsonl").cut_back(3)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="the disk is full: could not write /dev/full"):
        Metrics("/dev/full").write(1, {"loss": 1.0})
