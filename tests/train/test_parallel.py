"""One model over several ranks: the same gradients, weights and losses as on one, however it is cut; the state goes from any
number of ranks to any other; a rank that dies ends the others with a word, and the run goes on.

Run as a script it is one rank: `python test_parallel.py JOBS` under torchrun's environment does the jobs of a JSON file.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import lyceum
from lyceum import dist
from lyceum.batches.pairs import encode_rankings
from lyceum.batches.shards import Shards, write_shards
from lyceum.config import Recipe
from lyceum.corpus.records import Conversation, Document, Message, Ranking
from lyceum.errors import CheckpointError, ConfigError
from lyceum.log import read_metrics
from lyceum.model import checkpoint, hub, layers
from lyceum.model.heads import ScoreModel
from lyceum.model.lora import adapt
from lyceum.model.presets import GPT2
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import StageFolder, Work
from lyceum.stages.pretrain import Pretrain, PretrainConfig, held_out
from lyceum.stages.reward import Reward, RewardConfig
from lyceum.stages.sft import SFT, SFTConfig
from lyceum.tokens.chat import ChatFormat
from lyceum.tokens.tokenizer import Tokenizer
from lyceum.train import loop, parallel, state
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
RANKED = RewardConfig(batch_prompts=6, micro_tokens=200, save_every=2, validate_every=3, **SHARED)
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


class Scores(Mortal, Reward):
    double = True

    def start(self, work: Work) -> None:
        self.tokenizer, draw, rankings = Tokenizer.train([], 267), random.Random(0), []
        for _ in range(34):
            replies = tuple(Message("assistant", draw.choice("abc") * draw.randint(1, 6)) for _ in range(3))
            asked = Conversation((Message("user", draw.choice(("long", "short"))),))
            rankings.append(Ranking(asked, replies, (1.0, 2.0, 3.0)))
        chat = ChatFormat(self.tokenizer)
        train, valid = (encode_rankings(part, chat) for part in (rankings[:25], rankings[25:]))
        model = decoder(self.double, 267)
        score = ScoreModel(model, torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype)
        self.begin(score, train, valid, chat, seed=work.seed)


STAGES: dict[str, tuple[Any, Any]] = {
    "reward": (Scores, RANKED),
    "pretrain": (Text, PRETRAIN),
    "sft": (Replies, TUNED),
    "gpt": (Gpt, PRETRAIN),
    "adapters": (Replies, replace(TUNED, lora_rank=2)),
}


def do(job: dict[str, Any]) -> None:
    """Trains one stage: kind, folder, and if they are there machine, changes of its settings, double, die_at, silent,
    die_saving (which rank is killed in its second save, before a file of it is renamed), small_files, small_machine."""
    stage_class, config = STAGES[job["kind"]]
    stage = stage_class(replace(config, **job.get("changes", {})))
    stage.die_at, stage.silent, stage.double = job.get("die_at"), job.get("silent", False), job.get("double", True)
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    if job.get("die_saving") == dist.rank():
        state.os = SimpleNamespace(fsync=os.fsync, replace=second_time_deadly())  # type: ignore[attr-defined]
    parallel.ROOM = 1e-9 if job.get("small_machine") else 0.5
    checkpoint.SHARD_BYTES = 30_000 if job.get("small_files") else 5 * 10**9
    recipe = Recipe("toy", 7, {}, (), Path("toy.toml"), machine=job.get("machine", {}))
    loop.run_stage(stage, Work(StageFolder(folder), {}, seed=7, recipe=recipe))
    held = sum(local(weight).numel() for weight in stage.model.parameters())
    (folder / f"held-{dist.rank()}").write_text(str(held))


def second_time_deadly() -> Any:
    calls: list[Any] = []

    def replace(*paths: Path) -> None:
        calls.append(paths)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        os.replace(*paths)

    return replace


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


def saved_state(folder: Path) -> dict[str, Tensor]:
    """The trainer state put together from all files that its first one names; no number is there twice, none is missing."""
    found: dict[str, Tensor] = {}
    files = ["state.safetensors"]
    for name in files:
        with safe_open(folder / "trainer" / name, framework="pt") as file:
            header = json.loads(file.metadata()["lyceum"])
            files += header.get("parts", [])
            for key in file.keys():
                tensor, cut = file.get_tensor(key), header["pieces"].get(key)
                if cut is None:
                    assert key not in found
                    found[key] = tensor
                    continue
                whole = found.setdefault(key, torch.full(cut["shape"], torch.nan, dtype=tensor.dtype))
                place = tuple(slice(a, a + n) for a, n in zip(cut["start"], tensor.shape, strict=True))
                assert whole[place].isnan().all()
                whole[place] = tensor
    assert not any(tensor.isnan().any() for tensor in found.values())
    assert sorted(files) == sorted(path.name for path in (folder / "trainer").glob("state*"))
    return found


def saved_step(folder: Path) -> int:
    with safe_open(folder / "trainer" / "state.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["lyceum"])["step"]


def assert_same(one: Path, other: Path, tolerance: float) -> None:
    """Every logged number, and every weight, optimizer state and average of the trainer state."""
    for a, b in zip(*(read_metrics(folder / "metrics.jsonl") for folder in (one, other)), strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], abs=tolerance) for key in a if key not in loop.TIMINGS)
    mine, theirs = saved_state(one), saved_state(other)
    assert mine.keys() == theirs.keys()
    for name in mine.keys() - {"random"}:
        assert torch.allclose(mine[name], theirs[name], rtol=0, atol=tolerance), name
    saved = [hub.read_tensors(folder / "checkpoint")[0] for folder in (one, other)]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.allclose(saved[0][name], saved[1][name], rtol=0, atol=tolerance) for name in saved[0])


# -------------------------------------------------------------------------------- the same numbers


SINGLE = {"tokens": 20 * 128, "batch_tokens": 128, "save_every": 0, "validate_every": 0}  # in fp32, over 20 steps
BOTH = [
    *(("pretrain", mode) for mode in ("data", "shard", "tensor")),
    *(("sft", "tensor"), ("sft", "recompute"), ("reward", "shard")),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank makes of it; in `half` a run that stopped after 5 steps."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "pick_device", lambda: torch.device("cpu"))
        for kind in ("pretrain", "sft", "reward"):
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
    files = {"small_files": mode == "shard"}
    return {"kind": kind, "folder": str(folder / kind / mode), "machine": MODES[mode], **files}


def single(folder: Path, mode: str) -> dict[str, Any]:
    return {**job(folder, "pretrain", mode), "folder": str(folder / "single"), "changes": SINGLE, "double": False}


@pytest.mark.parametrize(("kind", "mode"), BOTH)
def test_two_ranks_have_the_gradients_and_weights_of_one(kind: str, mode: str, pair: Path, alone: Path) -> None:
    assert_same(pair / kind / mode, alone / kind, 1e-9)
    if kind != "reward":  # which answers no prompts
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
    more += [("reward", "data"), ("reward", "tensor"), ("reward", "recompute")]
    jobs = [{**job(tmp_path, *one), "small_machine": one == ("sft", "shard")} for one in more]
    said = on_ranks([*jobs, single(tmp_path, "tensor")], tmp_path)
    assert "no prompts are answered: 0.0 GB of weights are too much" in said
    assert [(tmp_path / kind / "shard" / "samples.jsonl").exists() for kind in ("gpt", "sft")] == [True, False]
    for kind, mode in more:
        if kind in ("gpt", "adapters") and not (alone / kind).exists():
            do({"kind": kind, "folder": str(alone / kind)})
        assert_same(tmp_path / kind / mode, alone / kind, 1e-9)
    assert_losses_within_a_thousandth(tmp_path / "single", alone / "single")


@pytest.mark.slow
def test_a_loss_of_two_terms_is_sharded_too(tmp_path: Path) -> None:
    both = {**job(tmp_path, "reward", "shard"), "changes": {"centring": 0.05}}
    on_ranks([both], tmp_path)
    do({**both, "folder": str(tmp_path / "alone"), "machine": {}})
    mine, theirs = (
        read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "reward/shard", tmp_path / "alone")
    )
    apart = {"grad_norm/ranking", "grad_norm/centring"}  # which only a whole model logs
    for a, b in zip(mine, theirs, strict=True):
        assert b.keys() - a.keys() == apart and "loss/centring" in a
        assert all(a[key] == pytest.approx(b[key], abs=1e-9) for key in a if key not in loop.TIMINGS)
    sharded, whole = saved_state(tmp_path / "reward/shard"), saved_state(tmp_path / "alone")
    assert all(torch.allclose(sharded[name], whole[name], rtol=0, atol=1e-9) for name in whole.keys() - {"random"})


@pytest.mark.slow
def test_four_ranks_as_a_grid_equal_one(alone: Path, tmp_path: Path) -> None:
    kinds = ("pretrain", "sft", "reward")
    on_ranks([job(tmp_path, kind, "grid") for kind in kinds], tmp_path, (0,) * 4)
    for kind in kinds:
        assert_same(tmp_path / kind / "grid", alone / kind, 1e-9)


# -------------------------------------------------------------------------------- resuming


def test_a_run_begun_on_one_rank_ends_on_two(pair: Path, alone: Path) -> None:
    assert_same(alone / "half", alone / "pretrain", 1e-9)


def test_a_killed_rank_ends_the_other_with_a_word_and_one_rank_goes_on(pair: Path, alone: Path) -> None:
    said = (pair / "said").read_text()
    assert "RunError: rank 0 of 2 lost another" in said and "hint: " in said
    do({"kind": "pretrain", "folder": str(pair / "killed")})
    assert_same(pair / "killed", alone / "pretrain", 1e-9)


def test_every_rank_writes_its_part_of_the_state_and_large_weights_are_several_files(pair: Path, alone: Path) -> None:
    one, shard, tensor = (saved_files(folder) for folder in (alone / "pretrain", *of_pretrain(pair, "shard", "tensor")))
    assert [len(one), len(shard), len(tensor)] == [1, 2, 2]
    assert max(shard) < 0.6 * one[0] and max(tensor) < 0.85 * one[0] and sum(tensor) < 1.1 * one[0]
    (whole,) = (alone / "pretrain" / "checkpoint").glob("*.safetensors")
    written = of_pretrain(pair, "shard")[0] / "checkpoint"
    index = json.loads((written / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in load_file(whole).values())
    files = sorted(path.name for path in written.glob("*.safetensors"))
    assert (
        files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)] and len(files) > 3
    )
    for name, file in index["weight_map"].items():
        assert name in load_file(written / file)


def of_pretrain(folder: Path, *modes: str) -> list[Path]:
    return [folder / "pretrain" / mode for mode in modes]


def saved_files(folder: Path) -> list[int]:
    """Bytes of the files of the trainer state."""
    return [path.stat().st_size for path in sorted((folder / "trainer").glob("state*"))]


def test_a_state_with_a_part_missing_or_of_another_shape_is_refused(pair: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pair / "pretrain" / "shard" / "trainer", tmp_path / "trainer")
    saved = state.SavedState(folder / state.STATE)
    name = "model/weights/model.layers.0.mlp.up_proj.weight"
    whole = torch.empty(48, 32, dtype=torch.float64)
    saved.copy_into({name: whole})
    assert torch.equal(whole, saved_state(pair / "pretrain" / "shard")[name])
    with pytest.raises(CheckpointError, match=r"up_proj.weight is \[48, 32\], the model's \[48, 16\]"):
        saved.copy_into({name: whole[:, :16]})
    with pytest.raises(CheckpointError, match="it lacks 3 numbers of model/weights/other"):
        saved.copy_into({"model/weights/other": torch.empty(3)})
    (part,) = folder.glob("state-*")
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=f"{part.name} cannot be read") as caught:
        state.SavedState(folder / state.STATE)
    assert "state.safetensors to train from the start" in caught.value.hint
    part.unlink()
    with pytest.raises(CheckpointError, match=f"{part.name} cannot be read"):
        state.SavedState(folder / state.STATE)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_killed_while_it_saves_leaves_the_older_state(killed: int, alone: Path, tmp_path: Path) -> None:
    dying = {**job(tmp_path, "pretrain", "shard"), "die_saving": killed}
    codes = (-signal.SIGKILL, 1) if killed == 0 else (1, -signal.SIGKILL)
    said = on_ranks([dying], tmp_path, codes)
    folder = tmp_path / "pretrain" / "shard"
    assert saved_step(folder) == 2 and state.SavedState(folder / "trainer" / state.STATE).header["tokens"] == 640
    left = {path.name for path in (folder / "trainer").iterdir()}
    assert {"state.safetensors", "state-2-1.safetensors", "state.safetensors.partial"} <= left
    assert ("state-4-1.safetensors" in left) == (killed == 0)  # rank 0 waits until all others are written
    if killed:
        assert "RunError: rank 0 of 2 lost another" in said
        do({"kind": "pretrain", "folder": str(folder)})
    else:
        on_ranks([{**dying, "die_saving": None, "machine": MODES["tensor"]}], tmp_path)
    assert_same(folder, alone / "pretrain", 1e-9)


@pytest.mark.slow
def test_a_state_of_four_ranks_goes_on_on_two_and_on_one(alone: Path, tmp_path: Path) -> None:
    kinds = ("pretrain", "reward")
    for kind in kinds:
        dying = {**job(tmp_path, kind, "grid"), "die_at": 3}
        on_ranks([dying], tmp_path, (1, -signal.SIGKILL, 1, 1))
        folder = tmp_path / kind / "grid"
        assert saved_step(folder) == 2 and len(saved_files(folder)) == 4
        shutil.copytree(folder, tmp_path / kind / "one")
    on_ranks([{**job(tmp_path, kind, "shard"), "folder": str(tmp_path / kind / "grid")} for kind in kinds], tmp_path)
    for kind in kinds:
        do({"kind": kind, "folder": str(tmp_path / kind / "one")})
        for name in ("grid", "one"):
            assert_same(tmp_path / kind / name, alone / kind, 1e-9)


@pytest.mark.slow
def test_a_state_of_one_rank_goes_on_on_four(alone: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        do({"kind": "reward", "folder": str(tmp_path / "half"), "die_at": 3})
    on_ranks([{**job(tmp_path, "reward", "grid"), "folder": str(tmp_path / "half")}], tmp_path, (0,) * 4)
    assert_same(tmp_path / "half", alone / "reward", 1e-9)


@pytest.mark.slow
def test_a_silent_rank_is_not_waited_for_longer_than_timeout_s(tmp_path: Path) -> None:
    machine = {"shard": True, "timeout_s": 3.0}
    ranks = start_ranks(
        [{**job(tmp_path, "pretrain", "shard"), "machine": machine, "die_at": 3, "silent": True}], tmp_path
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


def recipe_with(**machine: Any) -> Recipe:
    return Recipe("toy", 7, {}, (), Path("toy.toml"), machine=machine)


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
