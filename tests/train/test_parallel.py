"""One model over several ranks: the same gradients, weights and losses as on one, however it is cut; the state goes from any
number of ranks to any other; a rank that dies ends the others with a word, and the run goes on.

Run as a script it is one rank: `python test_parallel.py JOBS` under torchrun's environment does the jobs of a JSON file.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lyceum
from lyceum import dist
from lyceum.batches.shards import Shards, write_shards
from lyceum.config import Recipe
from lyceum.corpus.records import Conversation, Document, Message
from lyceum.errors import ConfigError
from lyceum.log import read_metrics
from lyceum.model import layers
from lyceum.model.lora import adapt
from lyceum.model.presets import GPT2
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import StageFolder, Work
from lyceum.stages.pretrain import Pretrain, PretrainConfig, held_out
from lyceum.stages.sft import SFT, SFTConfig
from lyceum.tokens.chat import ChatFormat
from lyceum.tokens.tokenizer import Tokenizer
from lyceum.train import loop
from lyceum.train.machine import machine_config
from lyceum.train.parallel import Parallel, local, own
from lyceum.train.stage import Step, Trained

PATIENCE_S = 500.0  # two ranks take half a minute; a machine that does other work as well, many times that
pytestmark = pytest.mark.timeout(PATIENCE_S + 60)

TEXTS = [f"{n} and {n * 7 % 10} are {'near' if n % 3 else 'far'}." for n in range(300)]
SHARED: dict[str, Any] = {"log_every": 1, "weight_decay": 0.1, "ema": 0.5, "clip_norm": 0.3}
# 5 micro-batches a step: two ranks have 3 and 2 of them
PRETRAIN = PretrainConfig(
    tokens=6 * 320, row_tokens=32, batch_tokens=320, micro_tokens=64, save_every=2, validate_every=3, **SHARED
)
TUNED = SFTConfig(epochs=1.0, batch_tokens=320, micro_tokens=80, save_every=2, validate_every=3, **SHARED)
MODES: dict[str, dict[str, Any]] = {
    "data": {},
    "shard": {"shard": True},
    "tensor": {"tensor": 2},
    "recompute": {"shard": True, "recompute": True},
    "grid": {"shard": True, "tensor": 2, "recompute": True},
}


def decoder(double: bool, vocab_size: int, **words: Any) -> Decoder:
    torch.manual_seed(0)
    shape = {"num_layers": 2, "width": 32, "num_heads": 4, "num_kv_heads": 2, "head_width": 8, "ffn_width": 48}
    spec = ModelSpec(vocab_size, **{**shape, "context_length": 64, "tied": not double, **words})
    return Decoder(spec).to(torch.float64 if double else torch.float32)


class Mortal:
    """A stage whose last rank dies, or falls silent, before a step."""

    die_at: int | None = None
    silent = False

    def steps(self, first: int) -> Iterator[Step[Any]]:
        for number, step in enumerate(super().steps(first), first):  # type: ignore[misc]
            if number == self.die_at and dist.world_size() == 1:
                raise KeyboardInterrupt
            if number == self.die_at and dist.rank() == 1:
                os.kill(os.getpid(), signal.SIGSTOP if self.silent else signal.SIGKILL)
            yield step


class Text(Mortal, Pretrain):
    double = True

    def start(self, work: Work) -> None:
        self.tokenizer = tokenizer = Tokenizer.train([], 267)
        shards = work.folder.path.with_name(work.folder.path.name + f"-shards-{os.environ.get('RANK', 0)}")
        write_shards((Document(text) for text in TEXTS), tokenizer, shards, self.config.row_tokens)
        valid = held_out(map(Document, TEXTS[:20]), tokenizer, self.config)
        self.begin(decoder(self.double, 267), Shards(shards, tokenizer.fingerprint), valid, seed=work.seed)


class Gpt(Text):
    """As GPT-2 and GPT-3 are: biases everywhere, learned positions, an output layer tied to the embedding."""

    def begin(self, model: Decoder, shards: Shards, valid: Any, *, seed: int) -> None:
        super().begin(decoder(True, 267, **GPT2, num_kv_heads=4, qk_norm=False, tied=True), shards, valid, seed=seed)


class Replies(Mortal, SFT):
    double = True

    def start(self, work: Work) -> None:
        self.tokenizer, draw = Tokenizer.train([], 267), random.Random(0)
        rows = []
        for _ in range(60):
            word = draw.choice(("alpha", "be", "gamma"))
            rows.append(Conversation((Message("user", f"say {word}"), Message("assistant", word))))
        self.begin(decoder(self.double, 267), rows[:50], rows[50:], ChatFormat(self.tokenizer), seed=work.seed)


STAGES: dict[str, tuple[Any, Any]] = {
    "pretrain": (Text, PRETRAIN),
    "sft": (Replies, TUNED),
    "gpt": (Gpt, PRETRAIN),
    "adapters": (Replies, replace(TUNED, lora_rank=2)),
}


def do(job: dict[str, Any]) -> None:
    """Trains one stage: kind, folder, and if they are there parallel, changes of its settings, double, die_at, silent."""
    stage_class, config = STAGES[job["kind"]]
    stage = stage_class(replace(config, **job.get("changes", {})))
    stage.die_at, stage.silent, stage.double = job.get("die_at"), job.get("silent", False), job.get("double", True)
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe("toy", 7, {}, (), Path("toy.toml"), machine=job.get("machine", {}))
    loop.run_stage(stage, Work(StageFolder(folder), {}, seed=7, recipe=recipe))
    held = sum(local(weight).numel() for weight in stage.model.parameters())
    (folder / f"held-{dist.rank()}").write_text(str(held))


def start_ranks(jobs: list[dict[str, Any]], folder: Path, count: int = 2) -> list[subprocess.Popen[str]]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    env = {**os.environ, **address, "PYTHONPATH": str(Path(lyceum.__file__).parents[1])}
    command = [sys.executable, __file__, str(folder / "jobs.json")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen(command, env={**env, "RANK": str(rank)}, **pipes) for rank in range(count)]


def on_ranks(jobs: list[dict[str, Any]], folder: Path, codes: tuple[int, ...] = (0, 0)) -> str:
    """Does the jobs on as many ranks as there are `codes`, with which they must end; returns what rank 0 said."""
    ranks = start_ranks(jobs, folder, len(codes))
    try:
        said = [process.communicate(timeout=PATIENCE_S)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert tuple(process.returncode for process in ranks) == codes, "\n".join(said)
    return said[0]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "pick_device", lambda: torch.device("cpu"))


def assert_same(one: Path, other: Path, tolerance: float) -> None:
    """Every logged number, and every weight, optimizer state and average of the trainer state."""
    for a, b in zip(*(read_metrics(folder / "metrics.jsonl") for folder in (one, other)), strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], abs=tolerance) for key in a if key not in loop.TIMINGS)
    mine, theirs = (load_file(folder / "trainer" / "state.safetensors") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    for name in mine.keys() - {"random"}:
        assert torch.allclose(mine[name], theirs[name], rtol=0, atol=tolerance), name
    saved = [load_file(folder / "checkpoint" / "model.safetensors") for folder in (one, other)]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.allclose(saved[0][name], saved[1][name], rtol=0, atol=tolerance) for name in saved[0])


# -------------------------------------------------------------------------------- the same numbers


SINGLE = {"tokens": 20 * 128, "batch_tokens": 128, "save_every": 0, "validate_every": 0}  # in fp32, over 20 steps
BOTH = [("pretrain", mode) for mode in ("data", "shard", "tensor")] + [("sft", "tensor"), ("sft", "recompute")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank makes of it; in `half` a run that stopped after 5 steps."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "pick_device", lambda: torch.device("cpu"))
        for kind in ("pretrain", "sft"):
            do({"kind": kind, "folder": str(folder / kind)})
        do({"kind": "pretrain", "folder": str(folder / "single"), "changes": SINGLE, "double": False})
        with pytest.raises(KeyboardInterrupt):
            do({"kind": "pretrain", "folder": str(folder / "half"), "die_at": 5})
    return folder


@pytest.fixture(scope="module")
def pair(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one pair of processes makes of all of it, until the second is killed; what the first said is in `said`."""
    folder = tmp_path_factory.mktemp("pair")
    jobs = [job(folder, kind, mode) for kind, mode in BOTH]
    jobs.append(single(folder, "shard"))
    jobs.append({"kind": "pretrain", "folder": str(alone / "half"), "machine": MODES["tensor"]})
    jobs.append({"kind": "pretrain", "folder": str(folder / "killed"), "machine": MODES["shard"], "die_at": 5})
    (folder / "said").write_text(on_ranks(jobs, folder, (1, -signal.SIGKILL)))
    return folder


def job(folder: Path, kind: str, mode: str) -> dict[str, Any]:
    return {"kind": kind, "folder": str(folder / kind / mode), "machine": MODES[mode]}


def single(folder: Path, mode: str) -> dict[str, Any]:
    return {**job(folder, "pretrain", mode), "folder": str(folder / "single"), "changes": SINGLE, "double": False}


@pytest.mark.parametrize(("kind", "mode"), BOTH)
def test_two_ranks_have_the_gradients_and_weights_of_one(kind: str, mode: str, pair: Path, alone: Path) -> None:
    assert_same(pair / kind / mode, alone / kind, 1e-9)
    assert (pair / kind / mode / "samples.jsonl").read_text() == (alone / kind / "samples.jsonl").read_text()


def test_each_rank_holds_its_share_of_the_weights(pair: Path, alone: Path) -> None:
    full = int((alone / "pretrain" / "held-0").read_text())
    held = {
        mode: [int((pair / "pretrain" / mode / f"held-{rank}").read_text()) for rank in (0, 1)]
        for kind, mode in BOTH
        if kind == "pretrain"
    }
    assert held["data"] == [full, full]
    assert sum(held["shard"]) == full and max(held["shard"]) < 0.52 * full
    layers = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)  # q, k and v, o; gate, up and down
    assert held["tensor"] == [full - layers // 2] * 2


def assert_losses_within_a_thousandth(one: Path, other: Path) -> None:
    found = [[line["loss"] for line in read_metrics(folder / "metrics.jsonl")] for folder in (one, other)]
    assert len(found[0]) == 20 and found[0] == pytest.approx(found[1], abs=1e-3)


def test_losses_in_fp32_stay_within_a_thousandth_over_20_steps(pair: Path, alone: Path) -> None:
    assert_losses_within_a_thousandth(pair / "single", alone / "single")


@pytest.mark.slow
def test_gpt2s_architecture_and_adapters_too(alone: Path, tmp_path: Path) -> None:
    more = [("gpt", "shard"), ("gpt", "tensor"), ("adapters", "shard"), ("pretrain", "recompute"), ("sft", "shard")]
    on_ranks([*(job(tmp_path, *one) for one in more), single(tmp_path, "tensor")], tmp_path)
    for kind, mode in more:
        if kind in ("gpt", "adapters") and not (alone / kind).exists():
            do({"kind": kind, "folder": str(alone / kind)})
        assert_same(tmp_path / kind / mode, alone / kind, 1e-9)
    assert_losses_within_a_thousandth(tmp_path / "single", alone / "single")


@pytest.mark.slow
def test_four_ranks_as_a_grid_equal_one(alone: Path, tmp_path: Path) -> None:
    on_ranks([job(tmp_path, kind, "grid") for kind in ("pretrain", "sft")], tmp_path, (0,) * 4)
    for kind in ("pretrain", "sft"):
        assert_same(tmp_path / kind / "grid", alone / kind, 1e-9)


# -------------------------------------------------------------------------------- resuming


def test_a_run_begun_on_one_rank_ends_on_two(pair: Path, alone: Path) -> None:
    assert_same(alone / "half", alone / "pretrain", 1e-9)


def test_a_killed_rank_ends_the_other_with_a_word_and_one_rank_goes_on(pair: Path, alone: Path) -> None:
    said = (pair / "said").read_text()
    assert "RunError: rank 0 of 2 lost another" in said and "hint: " in said
    do({"kind": "pretrain", "folder": str(pair / "killed")})
    assert_same(pair / "killed", alone / "pretrain", 1e-9)


@pytest.mark.slow
def test_a_silent_rank_is_not_waited_for_longer_than_timeout_s(tmp_path: Path) -> None:
    parallel = {"shard": True, "timeout_s": 3.0}
    ranks = start_ranks(
        [{**job(tmp_path, "pretrain", "shard"), "machine": parallel, "die_at": 3, "silent": True}], tmp_path
    )
    try:
        said = ranks[0].communicate(timeout=PATIENCE_S)[0]
        assert ranks[0].returncode == 1
        assert "RunError: rank 0 of 2 lost another, which ended or was silent too long" in said
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


# -------------------------------------------------------------------------------- precision, compiling


def loss_lines(folder: Path, **machine: Any) -> list[float]:
    do({"kind": "pretrain", "folder": str(folder), "changes": SINGLE, "double": False, "machine": machine})
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


def test_in_bf16_a_run_learns_as_in_fp32_and_is_told_apart(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "pick_device", lambda: torch.device("cpu"))
    fp32 = [line["loss"] for line in read_metrics(alone / "single" / "metrics.jsonl")]
    assert loss_lines(tmp_path / "auto") == fp32  # on a CPU auto is fp32
    bf16 = loss_lines(tmp_path / "bf16", precision="bf16")
    assert bf16 != fp32 and bf16 == pytest.approx(fp32, rel=0.02)


@pytest.mark.slow
def test_compiled_layers_train_as_plain_ones_do(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "pick_device", lambda: torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what it deprecates in itself
        compiled = loss_lines(tmp_path, compile="yes")
    plain = [line["loss"] for line in read_metrics(alone / "single" / "metrics.jsonl")]
    assert compiled == pytest.approx(plain, abs=1e-3)
    assert any(frames["ok"] > 0 for name, frames in torch._dynamo.utils.counters.items() if name == "frames")


def test_compiling_waits_for_a_run_that_is_long_enough_and_for_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Text(PRETRAIN)
    stage.trained = {"model": Trained(decoder(False, 64), PRETRAIN.optimizer())}
    stage.device, stage.num_steps = torch.device("cpu"), 10

    def compiles(flops: float, **machine: Any) -> bool:
        stage.flops_per_token = flops
        return Parallel(machine_config(recipe_with(**machine)), None)._compiles(stage)

    plain = 1e14 / (10 * PRETRAIN.batch_tokens)
    assert [compiles(0.9 * plain), compiles(1.1 * plain), compiles(1.1 * plain, compile="no")] == [False, True, False]
    assert compiles(1.0, compile="yes") and not compiles(0.0, compile="yes")  # 0: a stage with rows of many lengths
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not compiles(1.1 * plain)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler, and there is none of c\+\+"):
        compiles(1.0, compile="yes")


# -------------------------------------------------------------------------------- refusals


def recipe_with(**parallel: Any) -> Recipe:
    return Recipe("toy", 7, {}, (), Path("toy.toml"), machine=parallel)


def test_a_wrong_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"\[machine\] in toy.toml has no setting 'shards'(.|\n)*'shard'"):
        machine_config(recipe_with(shards=True))
    with pytest.raises(ConfigError, match="tensor is 3, and the 1 ranks are no multiple"):
        machine_config(recipe_with(tensor=3))
    monkeypatch.setattr(dist, "world_size", lambda: 6)
    assert machine_config(recipe_with(tensor=3)).is_sharded


def test_one_rank_has_nothing_to_shard() -> None:
    assert not machine_config(recipe_with(shard=True)).is_sharded
    full = torch.ones(3, 2)
    assert own(full, full) is full and local(full) is full


@pytest.mark.parametrize(
    ("tensor", "lora", "complaint"),
    [(4, 0, "the 2 heads of self_attn.k_proj"), (2, 2, "no plain matrix but a LoraLinear")],
)
def test_what_cannot_be_cut_is_told(tensor: int, lora: int, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 4)
    stage = Text(PRETRAIN)
    model = decoder(True, 64)
    if lora:
        adapt(model, lora, 4.0)
    stage.trained = {"model": Trained(model, PRETRAIN.optimizer())}
    with pytest.raises(ConfigError, match=complaint):
        Parallel(machine_config(recipe_with(tensor=tensor)), {"tensor": None}).put_on(stage)
    stage.can_shard = False
    with pytest.raises(ConfigError, match="pretrain can only be trained with a whole one"):
        Parallel(machine_config(recipe_with(shard=True)), None).put_on(stage)


if __name__ == "__main__":
    torch.set_num_threads(1)
    layers.MIN_NUMBERS = 1  # the CPU's hand-written forms wherever they may be used; one rank alone has the plain ones
    loop.pick_device = lambda: torch.device("cpu")
    dist.start()
    for one_job in json.loads(Path(sys.argv[1]).read_text()):
        do(one_job)
    dist.stop()
