"""Watching: what is refused, what trackers are given, that they stop nothing, and when a loss has leapt."""

from __future__ import annotations

import dataclasses
import math
import random
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lyceum.config import Recipe
from lyceum.errors import ConfigError, TrainingError
from lyceum.log import read_metrics
from lyceum.run import StageFolder, Work
from lyceum.train import loop, watch
from lyceum.train.loop import run_stage
from lyceum.train.stage import Metrics, Stage, Step, Term, TrainConfig, Trained
from lyceum.train.watch import SPIKE_AFTER, SPIKE_STEPS, Spike, watch_config

CONFIG = TrainConfig(lr=1e-4, matrix_lr=0.0, log_every=5, save_every=10)


class Row(Stage[Tensor]):
    """Learns nothing much from rows of numbers; one can be poisoned."""

    kind = "row"
    poison: dict[int, float] = {}  # step -> factor of its loss
    crash_at = 0

    def __init__(self, num_steps: int = 30) -> None:
        super().__init__(CONFIG)
        self.wanted_steps = num_steps

    def start(self, work: Work) -> None:
        self.trained["net"] = Trained(torch.nn.Linear(8, 8), self.config.optimizer())
        self.num_steps = self.wanted_steps

    def steps(self, first: int) -> Iterator[Step[Tensor]]:
        for number in range(first, self.num_steps):
            if number + 1 == self.crash_at:
                raise KeyboardInterrupt
            rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(number))
            self.now = number + 1
            yield Step(list(rows.split(2)), tokens=4)

    def counts(self, micro_batch: Tensor) -> dict[str, float]:
        return {"row": float(len(micro_batch))}

    def loss(self, micro_batch: Tensor) -> tuple[dict[str, Term], Metrics]:
        total = (self.trained["net"].module(micro_batch) - micro_batch).square().sum()
        return {"row": Term(total * self.poison.get(self.now, 1.0))}, {}

    def describe(self, micro_batch: Tensor) -> list[dict[str, Any]]:
        return [{"row": f"row {row[0]:.4f}", "text": row.tolist()} for row in micro_batch]

    def save(self, folder: Path, snapshot: str = "") -> None:
        pass


def work_in(folder: Path, **table: Any) -> Work:
    folder.mkdir(parents=True, exist_ok=True)
    return Work(StageFolder(folder), {}, seed=5, recipe=Recipe("toy", 5, {}, (), Path("toy.toml"), table))


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "pick_device", lambda: torch.device("cpu"))


# -------------------------------------------------------------------------------- the table


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"tensorbord": True}, "did you mean 'tensorboard'"),
        ({"wandb": True}, 'expected a text in "quotes"'),
        ({"spike": -1.0}, "at least 0"),
    ],
)
def test_a_wrong_table_is_refused(table: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        watch_config(Recipe("toy", 5, {}, (), Path("toy.toml"), table))
    assert said in str(caught.value) and "[watch] in toy.toml" in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("tensorboard", True), ("wandb", "project")])
def test_a_package_that_is_missing_is_said_before_a_step_is_trained(
    name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch.importlib.util, "find_spec", lambda wanted: None)
    with pytest.raises(ConfigError, match=f"asks for {name}") as caught:
        run_stage(Row(), work_in(tmp_path, **{name: value}))
    assert "pip install 'lyceum[watch]'" in caught.value.hint and not list(tmp_path.iterdir())
    run_stage(Row(1), work_in(tmp_path))  # nobody asked for it


# -------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_holds_what_metrics_jsonl_does_also_after_a_restart(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    crashed = Row()
    crashed.crash_at = 28  # saved after step 20, logged until 25
    with pytest.raises(KeyboardInterrupt):
        run_stage(crashed, work_in(tmp_path, tensorboard=True))
    run_stage(Row(), work_in(tmp_path, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    written = {line["step"]: line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")}
    assert [event.step for event in events] == list(written) == [1, 5, 10, 15, 20, 25, 30]
    assert [event.value for event in events] == pytest.approx(list(written.values()), rel=1e-6)


# -------------------------------------------------------------------------------- wandb


class FakeWandb(types.ModuleType):
    """What of wandb we use; `broken` names the calls that fail."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.broken: set[str] = set()
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended: list[int] = []

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def _call(self, name: str) -> None:
        if name in self.broken:
            raise ConnectionError(f"no network in {name}")

    def init(self, **options: Any) -> FakeWandb:
        self.inits.append(options)
        self._call("offline" if options.get("mode") == "offline" else "init")
        return self

    def teardown(self) -> None:
        self._call("teardown")

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._call("log")
        self.logged.append((step, numbers))

    def finish(self, exit_code: int) -> None:
        self._call("finish")
        self.ended.append(exit_code)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(watch.importlib.util, "find_spec", lambda wanted: fake)
    return fake


def test_wandb_is_given_every_logged_line_and_a_resumed_run_goes_on_under_its_id(
    tmp_path: Path, wandb: FakeWandb
) -> None:
    crashed = Row()
    crashed.crash_at = 28
    with pytest.raises(KeyboardInterrupt):
        run_stage(crashed, work_in(tmp_path, wandb="school"))
    run_stage(Row(), work_in(tmp_path, wandb="school"))
    first, second = wandb.inits
    assert first["project"] == "school" and first["config"]["lr"] == CONFIG.lr
    assert first["id"] == second["id"] and len(first["id"]) == 16
    assert wandb.ended == [1, 0]
    assert [step for step, _ in wandb.logged] == [1, 5, 10, 15, 20, 25, 25, 30]
    assert [numbers["loss"] for _, numbers in wandb.logged[:5]] == losses(tmp_path)[:5]


@pytest.mark.parametrize("broken", ["init", "init offline", "log", "finish", "init teardown"])
def test_a_wandb_that_fails_stops_nothing(
    broken: str, tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(watch.log, "warning", said.append)
    run_stage(Row(), work_in(tmp_path / "straight"))
    wandb.broken = set(broken.split())
    run_stage(Row(), work_in(tmp_path / "watched", wandb="school"))
    assert losses(tmp_path / "watched") == losses(tmp_path / "straight")
    assert said and all("no network" in line for line in said)
    kept_offline = broken == "init"
    assert (wandb.inits[-1].get("mode") == "offline") == (kept_offline or broken == "init offline")
    assert bool(wandb.logged) == (broken in ("init", "finish"))


# -------------------------------------------------------------------------------- spikes


def see(spike: Spike, *values: float) -> list[bool]:
    return [spike.see(value) for value in values]


def test_mean_and_deviation_by_hand() -> None:
    spike = Spike(2.0)
    see(spike, 1.0, 3.0, 5.0)
    assert spike.state["mean"] == pytest.approx(3.0)
    assert spike.state["variance"] == pytest.approx(8.0 / 3.0)  # (4 + 0 + 4) / 3
    assert spike.threshold() == pytest.approx(3.0 + 2.0 * math.sqrt(8.0 / 3.0))


def test_a_loss_that_leaps_and_stays_up_is_a_spike_and_one_bad_batch_is_not() -> None:
    draw = random.Random(0)
    noise = [4.0 + draw.gauss(0.0, 0.1) for _ in range(SPIKE_AFTER)]
    spike = Spike(6.0)
    assert not any(see(spike, *noise))
    mean = spike.state["mean"]
    assert see(spike, 9.0, 9.0, 4.0, 9.0, 9.0, 9.0) == [False] * 5 + [True]
    assert spike.state["mean"] == pytest.approx(mean, abs=0.01)  # what is too high does not count


def test_a_falling_loss_a_wandering_one_and_a_new_run_are_no_spikes() -> None:
    draw = random.Random(1)
    falling = [10.0 * 0.99**step + draw.gauss(0.0, 0.05) for step in range(1000)]
    assert not any(see(Spike(6.0), *falling))
    assert not any(see(Spike(6.0), 1.0, 9.0, 9.0, 9.0, 9.0))  # there is no mean yet
    assert not any(see(Spike(6.0), *[1.0] * 200, *[1.05] * 20))  # 5 % of a loss that never moved
    assert any(see(Spike(6.0), *[1.0] * 200, *[1.07] * 20))
    assert not any(see(Spike(0.0), *[1.0] * 200, *[100.0] * 20))  # not asked for


def test_a_spike_stops_the_run_with_a_state_from_before_it_and_shows_its_rows(tmp_path: Path) -> None:
    class Poisoned(Row):
        poison = dict.fromkeys(range(68, 80), 50.0)  # a state would be due after step 70

    with pytest.raises(
        TrainingError, match=r"leapt at step 68 and stays up: .* at step 70.*after step 60 stands"
    ) as caught:
        run_stage(Poisoned(100), work_in(tmp_path, spike=8.0))
    assert "watch.spike" in caught.value.hint
    shown = read_metrics(tmp_path / "bad-batch.jsonl")
    assert [row["step"] for row in shown] == [n for n in range(67, 71) for _ in range(4)]  # and the step before
    first = torch.randn(4, 8, generator=torch.Generator().manual_seed(66))[0]
    assert shown[0]["text"] == pytest.approx(first.tolist()) and shown[0]["row"] in str(caught.value)

    with pytest.raises(TrainingError, match="leapt at step 68"):  # as the straight run judged, the resumed one does
        run_stage(Poisoned(100), work_in(tmp_path, spike=8.0))
    report = run_stage(Poisoned(100), work_in(tmp_path, spike=0.0))  # the person's decision
    assert report["steps"] == 100
    run_stage(Poisoned(100), work_in(tmp_path / "unwatched"))
    assert losses(tmp_path) == losses(tmp_path / "unwatched")


def test_a_loss_that_is_not_finite_shows_the_micro_batch_at_fault(tmp_path: Path) -> None:
    class Poisoned(Row):
        def loss(self, micro_batch: Tensor) -> tuple[dict[str, Term], Metrics]:
            terms, metrics = super().loss(micro_batch)
            wanted = torch.randn(4, 8, generator=torch.Generator().manual_seed(6))[2:]
            is_second = torch.equal(micro_batch, wanted)
            return ({"row": Term(terms["row"].total * math.nan)} if is_second else terms), metrics

    with pytest.raises(TrainingError, match=r"at step 7: loss.*bad-batch\.jsonl holds its 2 rows") as caught:
        run_stage(Poisoned(), work_in(tmp_path))
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(6))
    shown = read_metrics(tmp_path / "bad-batch.jsonl")
    assert [row["text"] for row in shown] == rows[2:].tolist() and {row["step"] for row in shown} == {7}
    assert f"row {rows[2, 0]:.4f}" in str(caught.value)


# -------------------------------------------------------------------------------- the console


def test_the_line_tells_step_loss_speed_share_of_the_limit_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lyceum import log as log_module

    class Known(Row):
        also_shown = ("bpb",)

        def start(self, work: Work) -> None:
            super().start(work)
            self.flops_per_token = 1e6

        def loss(self, micro_batch: Tensor) -> tuple[dict[str, Term], Metrics]:
            return super().loss(micro_batch)[0], {"bpb": (3.0, 2.0)}

        def validate(self) -> dict[str, float]:
            return {"error": 0.125}

        def samples(self) -> list[dict[str, Any]]:
            return [{"prompt": "two\nlines", "reply": "x" * 100}]

    monkeypatch.setattr(log_module, "PLAIN_EVERY_S", 0.0)
    monkeypatch.setattr(loop, "matmul_flops", lambda shapes, rows, dtype: 1e12 if shapes == [(8, 8)] else 0.0)
    report = run_stage(Known(), work_in(tmp_path))
    said = capsys.readouterr().err
    line = next(line for line in said.splitlines() if "step 20/30" in line)
    assert line.startswith("row  67% | step 20/30 | loss ") and line.endswith(" left")
    assert " | bpb 1.500 | tok/s " in line and "% | 0:0" in line and "of limit" in line
    assert f"  step 30: error 0.125 | two lines -> {'x' * 57}..." in said.splitlines()
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["share_of_limit"] == pytest.approx(last["tokens_per_s"] * 1e6 / 1e12)
    assert report["share_of_limit"] == pytest.approx(report["tokens_per_s"] * 1e-6)


def test_measuring_the_machine_changes_no_number_of_the_run(tmp_path: Path) -> None:
    class Drawing(Row):
        def loss(self, micro_batch: Tensor) -> tuple[dict[str, Term], Metrics]:
            return super().loss(micro_batch + torch.randn(micro_batch.shape))

    class Measured(Drawing):
        def start(self, work: Work) -> None:
            super().start(work)
            self.flops_per_token = 1e6

    reports = [run_stage(stage, work_in(tmp_path / stage.__class__.__name__)) for stage in (Drawing(), Measured())]
    assert losses(tmp_path / "Drawing") == losses(tmp_path / "Measured")
    assert "limit_flops" not in reports[0] and reports[1]["limit_flops"] > 0


def test_the_default_watches_nothing() -> None:
    assert dataclasses.asdict(watch_config(Recipe("toy", 5, {}, (), Path("toy.toml")))) == {
        "tensorboard": False,
        "wandb": "",
        "spike": 0.0,
    }
    assert SPIKE_STEPS > 1
