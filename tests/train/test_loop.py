"""The loop: gradients by hand, resume bit for bit (also after kill -9), saves, snapshots, and what it refuses.

Run as a script, `python test_loop.py FOLDER SECONDS`, it trains the noisy stage with that pause before each step.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lyceum
from lyceum.config import Recipe
from lyceum.errors import CheckpointError, ResourceError, RunError, TrainingError
from lyceum.log import read_metrics
from lyceum.run import StageFolder, Work
from lyceum.train import loop, state
from lyceum.train.loop import run_stage
from lyceum.train.stage import Metrics, Stage, Step, Term, TrainConfig, Trained

CONFIG = TrainConfig(lr=0.01, matrix_lr=0.02, clip_norm=1.0, log_every=3, save_every=4, ema=0.8)


class Noisy(Stage[Tensor]):
    """Regression with dropout and drawn noise: its numbers depend on torch's random state, on a coefficient it adapts
    and on a tensor it keeps."""

    kind = "noisy"
    headline = "loss/error"

    def __init__(self, config: TrainConfig = CONFIG, num_steps: int = 20, resumable_every: int = 1) -> None:
        super().__init__(config)
        self.wanted_steps, self.resumable_every = num_steps, resumable_every
        self.crash_at: int | None = None
        self.pause_s = 0.0
        self.starts = 0

    def start(self, work: Work) -> None:
        self.starts += 1
        layers = nn.ModuleList([nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 4)])
        self.trained["net"] = Trained(nn.ModuleDict({"layers": layers}), self.config.optimizer())
        self.num_steps = self.wanted_steps
        self.scale, self.seen = 1.0, torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.trained["net"].module["layers"]:  # type: ignore[index]
            x = layer(x)
        return x

    def steps(self, first: int) -> Iterator[Step[Tensor]]:
        for number in range(first, self.num_steps):
            time.sleep(self.pause_s)
            if number == self.crash_at:
                raise KeyboardInterrupt
            rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(number))
            yield Step(list(rows.split(2)), tokens=6, can_resume=(number + 1) % self.resumable_every == 0)

    def counts(self, micro_batch: Tensor) -> dict[str, float]:
        return {"error": float(len(micro_batch)), "size": float(len(micro_batch))}

    def loss(self, micro_batch: Tensor) -> tuple[dict[str, Term], Metrics]:
        out = self.forward(micro_batch + 0.1 * torch.randn(micro_batch.shape))
        self.seen = self.seen + out.detach().sum(0)[:2]
        error = (out - micro_batch.flip(1)).square().sum()
        return {"error": Term(error), "size": Term(out.square().sum(), 0.1 * self.scale)}, {
            "mean": (out.detach().sum(), float(out.numel()))
        }

    def after_step(self, metrics: Mapping[str, float]) -> dict[str, float]:
        self.scale *= 1.0 + 0.01 * metrics["mean"]
        return {"scale": self.scale, "seen": float(self.seen.sum())}

    def validate(self) -> dict[str, float]:
        rows = torch.randn(6, 4)
        return {"error": float((self.forward(rows) - rows.flip(1)).square().mean())}

    def samples(self) -> list[dict[str, Any]]:
        return [{"prompt": "ones", "reply": self.forward(torch.ones(1, 4)).tolist(), "drawn": torch.rand(1).item()}]

    def report(self, final: Mapping[str, float]) -> dict[str, Any]:
        return {"valid_error": final["valid/error"]}

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scale, self.seen = state["scale"], state["seen"]

    def save(self, folder: Path, snapshot: str = "") -> None:
        save_file(self.trained["net"].module.state_dict(), folder / f"{snapshot or 'checkpoint'}.safetensors")


class Scalar(Stage[tuple[list[float], list[float]]]):
    """Two numbers u, v and two terms, small enough for pencil and paper: a = sum x * u, b = sum y * (u + v)."""

    kind = "scalar"

    def __init__(self, config: TrainConfig, micro_batches: list[tuple[list[float], list[float]]]) -> None:
        super().__init__(config)
        self.micro_batches = micro_batches

    def start(self, work: Work) -> None:
        module = nn.ParameterDict({"u": nn.Parameter(torch.zeros(1)), "v": nn.Parameter(torch.zeros(1))})
        self.trained["net"] = Trained(module, self.config.optimizer(), self.config.clip_norm)
        self.num_steps = 1

    def steps(self, first: int) -> Iterator[Step[Any]]:
        yield Step(self.micro_batches, tokens=1)

    def counts(self, micro_batch: Any) -> dict[str, float]:
        return {"a": float(len(micro_batch[0])), "b": float(len(micro_batch[1]))}

    def loss(self, micro_batch: Any) -> tuple[dict[str, Term], Metrics]:
        u, v = self.trained["net"].module.values()  # type: ignore[operator]
        a, b = sum(micro_batch[0]) * u.sum(), sum(micro_batch[1]) * (u + v).sum()
        return {"a": Term(a), "b": Term(b, weight=0.5)}, {}

    def save(self, folder: Path, snapshot: str = "") -> None:
        pass


def work_in(folder: Path, seed: int = 5) -> Work:
    folder.mkdir(parents=True, exist_ok=True)
    return Work(StageFolder(folder), {}, seed=seed, recipe=Recipe("toy", 5, {}, (), Path("toy.toml")))


def untimed(folder: Path) -> list[dict[str, Any]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in loop.TIMINGS} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """Equal bit for bit: every logged number, every sample, every weight."""
    assert untimed(one) == untimed(other)
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    for file in one.glob("*.safetensors"):
        mine, theirs = load_file(file), load_file(other / file.name)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), file.name


def crash(stage: Noisy, step: int, folder: Path) -> None:
    stage.crash_at = step
    with pytest.raises(KeyboardInterrupt):
        run_stage(stage, work_in(folder))


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "pick_device", lambda: torch.device("cpu"))


# -------------------------------------------------------------------------------- the gradient


def test_loss_and_gradient_norms_by_hand(tmp_path: Path) -> None:
    # a: total 6u over 3 units -> 2u.  b: total 10(u+v) over 5 units, weight 0.5 -> u+v.
    # d/du = 2 + 1 = 3, d/dv = 1; |a| = 2, |b| = sqrt(2), whole = sqrt(10).
    micro_batches = [([1.0, 2.0], [4.0]), ([3.0], [3.0, 1.0, 1.0, 1.0])]
    stage = Scalar(TrainConfig(lr=0.1, clip_norm=0.0, warmup=0.0, decay=0.0), micro_batches)
    run_stage(stage, work_in(tmp_path))
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["grad_norm/a"] == pytest.approx(2.0) and line["grad_norm/b"] == pytest.approx(math.sqrt(2.0))
    assert line["module_grad_norm/net"] == pytest.approx(math.sqrt(10.0))
    assert line["lr/net"] == pytest.approx(0.1)
    u, v = stage.trained["net"].module.values()  # type: ignore[operator]
    assert u.item() == pytest.approx(-0.1) and v.item() == pytest.approx(-0.1)  # AdamW's first step is lr * sign


class Cramped(Scalar):
    """Runs out of memory where a micro-batch holds more than two numbers, after it has done a part of the work."""

    def halves(self, micro_batch: Any) -> list[Any]:
        (x, y) = micro_batch
        cut = [(x[:1], []), (x[1:], y)] if len(x) > 1 else [(x, y[: len(y) // 2]), ([], y[len(y) // 2 :])]
        return cut if len(x) + len(y) > 1 else [micro_batch]

    def loss(self, micro_batch: Any) -> tuple[dict[str, Term], Metrics]:
        if len(micro_batch[0]) + len(micro_batch[1]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return super().loss(micro_batch)


def test_a_device_out_of_memory_gets_halves_and_the_same_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The same numbers as by hand above; the second micro-batch is too large, and so is a half of it.
    micro_batches = [([1.0], [4.0]), ([2.0, 3.0], [3.0, 1.0, 1.0, 1.0])]
    stage = Cramped(TrainConfig(lr=1.0, eps=1e6, clip_norm=0.0, warmup=0.0, decay=0.0), micro_batches)
    run_stage(stage, work_in(tmp_path))
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["grad_norm/a"] == pytest.approx(2.0) and line["grad_norm/b"] == pytest.approx(math.sqrt(2.0))
    u, v = stage.trained["net"].module.values()  # type: ignore[operator]
    assert -1e6 * u.item() == pytest.approx(3.0, rel=1e-4) and -1e6 * v.item() == pytest.approx(1.0, rel=1e-4)
    assert capsys.readouterr().err.count("out of memory; micro-batches are halved") == 1


def test_what_cannot_be_halved_is_told(tmp_path: Path) -> None:
    class Hopeless(Cramped):
        def halves(self, micro_batch: Any) -> list[Any]:
            return [micro_batch]

    with pytest.raises(ResourceError, match=r"smallest micro-batch .* Tried to allocate 2 GiB\.\nhint") as caught:
        run_stage(Hopeless(TrainConfig(), [([1.0], [4.0, 1.0])]), work_in(tmp_path))
    assert "lyceum plan" in caught.value.hint


def test_clipping_scales_the_whole_modules_gradient(tmp_path: Path) -> None:
    # With eps far above the gradient AdamW's step is lr * g / eps: it shows the gradient that the optimizer saw.
    config = TrainConfig(lr=1.0, eps=1e6, clip_norm=1.0, warmup=0.0, decay=0.0)
    stage = Scalar(config, [([2.0], [2.0])])
    run_stage(stage, work_in(tmp_path))
    u, v = stage.trained["net"].module.values()  # type: ignore[operator]
    assert -1e6 * u.item() == pytest.approx(3 / math.sqrt(10), rel=1e-4)
    assert -1e6 * v.item() == pytest.approx(1 / math.sqrt(10), rel=1e-4)


def test_term_by_term_steps_train_as_plain_steps_do(tmp_path: Path) -> None:
    for every in (1, 100):
        config = dataclasses.replace(CONFIG, log_every=every)
        run_stage(Noisy(config), work_in(tmp_path / str(every)))
    one, other = (load_file(tmp_path / every / "checkpoint.safetensors") for every in ("1", "100"))
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        run_stage(Noisy(num_steps=4), work_in(tmp_path / name, seed))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert untimed(tmp_path / "a") != untimed(tmp_path / "c")


# -------------------------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    run_stage(Noisy(dataclasses.replace(CONFIG, validate_every=7, snapshots=(0.3, 1.0))), work_in(folder))
    return folder


@pytest.mark.parametrize("step", [0, 2, 4, 10, 19])
def test_resumed_run_equals_straight_run_bit_for_bit(step: int, straight: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, validate_every=7, snapshots=(0.3, 1.0))
    crash(Noisy(config), step, tmp_path)
    crash(Noisy(config), max(step, 6), tmp_path)  # and once more
    report = run_stage(Noisy(config), work_in(tmp_path))
    assert_same_run(tmp_path, straight)
    assert report["tokens"] == 6 * 20 and report["steps"] == 20
    assert {file.name for file in tmp_path.glob("snapshot*")} == {
        "snapshot-0.30.safetensors",
        "snapshot-1.00.safetensors",
    }


def test_state_is_saved_only_where_the_stage_can_resume(tmp_path: Path) -> None:
    crash(Noisy(resumable_every=5), 9, tmp_path)
    resumed = Noisy(resumable_every=5)
    first: list[int] = []
    steps = resumed.steps
    resumed.steps = lambda start: (first.append(start), steps(start))[1]  # type: ignore[method-assign]
    run_stage(resumed, work_in(tmp_path))
    assert first == [5]
    run_stage(Noisy(), work_in(tmp_path / "straight"))
    assert untimed(tmp_path) == untimed(tmp_path / "straight")


def test_a_run_killed_at_random_steps_equals_straight_run_bit_for_bit(tmp_path: Path) -> None:
    draw = random.Random(2)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(lyceum.__file__).parents[1])}

    def attempt(pause_s: float, kill_after_step: int | None) -> int:
        with open(tmp_path / "said", "w") as said:
            command = [sys.executable, __file__, str(tmp_path / "killed"), str(pause_s)]
            process = subprocess.Popen(command, env=env, stdout=said, stderr=said)
        try:
            while kill_after_step is not None and process.poll() is None:
                logged = read_metrics(tmp_path / "killed" / "metrics.jsonl")
                if logged and logged[-1]["step"] >= kill_after_step:
                    time.sleep(draw.random() * 4 * pause_s)
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.001)
            return process.wait(timeout=60)
        finally:
            process.kill()
            process.wait()

    assert attempt(0.02, kill_after_step=draw.randint(20, 40)) == -signal.SIGKILL
    assert attempt(0.0, kill_after_step=None) == 0, (tmp_path / "said").read_text()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_stage(killable(), work_in(tmp_path / "straight"))
    finally:
        torch.set_num_threads(threads)
    assert_same_run(tmp_path / "killed", tmp_path / "straight")


def test_a_finished_run_is_not_started_again(tmp_path: Path) -> None:
    report = run_stage(Noisy(), work_in(tmp_path))
    again = Noisy()
    assert run_stage(again, work_in(tmp_path)) == report and again.starts == 0


def test_a_run_that_trained_to_its_end_but_was_not_marked_trains_no_step_again(tmp_path: Path) -> None:
    run_stage(Noisy(), work_in(tmp_path / "straight"))
    run_stage(Noisy(), work_in(tmp_path / "again"))
    (tmp_path / "again" / "trainer" / "finished.json").unlink()
    (tmp_path / "again" / "checkpoint.safetensors").unlink()
    stage = Noisy()
    stage.crash_at = 20  # the stage's steps are not even asked for
    run_stage(stage, work_in(tmp_path / "again"))
    assert_same_run(tmp_path / "again", tmp_path / "straight")


def test_another_number_of_threads_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash(Noisy(), 9, tmp_path)
    said: list[str] = []
    monkeypatch.setattr(loop.log, "warning", said.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    run_stage(Noisy(), work_in(tmp_path))
    assert len(said) == 1 and "threads 77 instead of" in said[0]


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    crash(Noisy(), 9, tmp_path)
    with pytest.raises(RunError, match=r"other settings \(lr\)"):
        run_stage(Noisy(dataclasses.replace(CONFIG, lr=0.5)), work_in(tmp_path))


def test_a_broken_state_is_named(tmp_path: Path) -> None:
    crash(Noisy(), 9, tmp_path)
    state = tmp_path / "trainer" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        run_stage(Noisy(), work_in(tmp_path))


def test_a_full_disk_while_saving_leaves_the_older_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash(Noisy(), 5, tmp_path)
    before = (tmp_path / "trainer" / "state.safetensors").read_bytes()

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state.os, "fsync", full)
    with pytest.raises(ResourceError, match="disk is full"):
        run_stage(Noisy(), work_in(tmp_path))
    assert (tmp_path / "trainer" / "state.safetensors").read_bytes() == before


# -------------------------------------------------------------------------------- beside the steps


def test_validation_and_samples_use_the_running_average_and_draw_no_random_numbers(tmp_path: Path) -> None:
    for name, every in (("often", 2), ("once", 0)):
        run_stage(Noisy(dataclasses.replace(CONFIG, validate_every=every)), work_in(tmp_path / name))
    often, once = untimed(tmp_path / "often"), untimed(tmp_path / "once")
    losses = {line["step"]: line["loss"] for line in often}
    assert all(losses[line["step"]] == line["loss"] for line in once)
    assert [line["step"] for line in often if "valid/error" in line] == list(range(2, 21, 2))
    sample = json.loads((tmp_path / "once" / "samples.jsonl").read_text())
    stage = Noisy()
    stage.start(work_in(tmp_path / "unused"))
    module = stage.trained["net"].module.eval()
    module.load_state_dict(load_file(tmp_path / "once" / "checkpoint.safetensors"))
    assert sample["reply"] == stage.forward(torch.ones(1, 4)).tolist()  # the saved weights are the averaged ones


def test_a_stage_can_stop_early(tmp_path: Path) -> None:
    class Sated(Noisy):
        def after_step(self, metrics: Mapping[str, float]) -> dict[str, float]:
            self.calls = getattr(self, "calls", 0) + 1
            self.stop = self.calls == 8
            return {}

    report = run_stage(Sated(), work_in(tmp_path))
    assert report["steps"] == 8
    last = untimed(tmp_path)[-1]
    assert last["step"] == 8 and "valid/error" in last


def test_report_names_the_headline_and_the_totals(tmp_path: Path) -> None:
    report = run_stage(Noisy(), work_in(tmp_path))
    assert report["line"].startswith("noisy: loss/error ") and "20 steps, 120 tokens in 0:0" in report["line"]
    assert report["final"]["loss"] == untimed(tmp_path)[-1]["loss"]
    assert report["valid_error"] == report["final"]["valid/error"]
    assert report["tokens_per_s"] == pytest.approx(120 / report["seconds"])


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_step_and_leaves_the_saved_state(value: float, tmp_path: Path) -> None:
    class Diverging(Noisy):
        def loss(self, micro_batch: Tensor) -> tuple[dict[str, Term], Metrics]:
            terms, metrics = super().loss(micro_batch)
            if self.ruined:
                terms["error"] = Term(terms["error"].total * value)
            return terms, metrics

        def steps(self, first: int) -> Iterator[Step[Tensor]]:
            for number, step in enumerate(super().steps(first), start=first):
                self.ruined = number == 6
                yield step

    with pytest.raises(TrainingError, match=r"step 7: loss.*after step 4 stands") as caught:
        run_stage(Diverging(), work_in(tmp_path))
    assert caught.value.hint
    run_stage(Noisy(), work_in(tmp_path))  # the saved state is whole
    run_stage(Noisy(), work_in(tmp_path / "straight"))
    assert_same_run(tmp_path, tmp_path / "straight")


def test_a_gradient_that_is_not_finite_is_refused_though_the_loss_is(tmp_path: Path) -> None:
    class Kinked(Noisy):
        def loss(self, micro_batch: Tensor) -> tuple[dict[str, Term], Metrics]:
            terms, metrics = super().loss(micro_batch)
            return {**terms, "error": Term((terms["error"].total * 0).sqrt())}, metrics  # 0, with a slope of infinity

    with pytest.raises(TrainingError, match="the gradient of net; no state was saved yet"):
        run_stage(Kinked(), work_in(tmp_path))


def test_a_term_without_units_is_refused_before_anything_is_divided(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="step 1 has nothing to learn from for b") as caught:
        run_stage(Scalar(TrainConfig(), [([1.0], []), ([2.0], [])]), work_in(tmp_path))
    assert caught.value.hint


def test_an_empty_step_and_an_empty_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="step 1 is empty"):
        run_stage(Scalar(TrainConfig(), []), work_in(tmp_path / "a"))
    with pytest.raises(TrainingError, match="not one step"):
        run_stage(Noisy(num_steps=0), work_in(tmp_path / "b"))


def killable() -> Noisy:
    return Noisy(dataclasses.replace(CONFIG, log_every=1, save_every=7), num_steps=60)


if __name__ == "__main__":
    torch.set_num_threads(1)
    loop.pick_device = lambda: torch.device("cpu")
    noisy = killable()
    noisy.pause_s = float(sys.argv[2])
    run_stage(noisy, work_in(Path(sys.argv[1])))
