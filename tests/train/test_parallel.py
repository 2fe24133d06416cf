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
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lyceum
from lyceum.batches.shards import Shards, write_shards
from lyceum.config import Recipe
from lyceum.corpus.records import Conversation, Document, Message
from lyceum.errors import ConfigError
from lyceum.log import read_metrics
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import StageFolder, Work
from lyceum.stages.pretrain import Pretrain, PretrainConfig, held_out
from lyceum.stages.sft import SFT, SFTConfig
from lyceum.tokens.chat import ChatFormat
from lyceum.tokens.tokenizer import Tokenizer
from lyceum.train import loop
from lyceum.train.stage import Step

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
}


def decoder(double: bool, vocab_size: int) -> Decoder:
    torch.manual_seed(0)
    spec = ModelSpec(vocab_size, 2, 32, 4, 2, 8, 48, context_length=64, tied=not double)
    return Decoder(spec).to(torch.float64 if double else torch.float32)


class Steady:
    """What the tests need of a stage: it may die before a step, and it tells which rows each step read."""

    die_at: int | None = None

    def steps(self, first: int) -> Iterator[Step[Any]]:
        for number, step in enumerate(super().steps(first), first):  # type: ignore[misc]
            if number == self.die_at and os.environ.get("RANK") == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            yield step


class Text(Steady, Pretrain):
    double = True

    def start(self, work: Work) -> None:
        self.tokenizer = tokenizer = Tokenizer.train([], 267)
        shards = work.folder.path.with_name(work.folder.path.name + f"-shards-{os.environ.get('RANK', 0)}")
        write_shards((Document(text) for text in TEXTS), tokenizer, shards, self.config.row_tokens)
        valid = held_out(map(Document, TEXTS[:20]), tokenizer, self.config)
        self.begin(decoder(self.double, 267), Shards(shards, tokenizer.fingerprint), valid, seed=work.seed)


class Replies(Steady, SFT):
    double = True

    def start(self, work: Work) -> None:
        self.tokenizer, draw = Tokenizer.train([], 267), random.Random(0)
        rows = []
        for _ in range(60):
            word = draw.choice(("alpha", "be", "gamma"))
            rows.append(Conversation((Message("user", f"say {word}"), Message("assistant", word))))
        self.begin(decoder(self.double, 267), rows[:50], rows[50:], ChatFormat(self.tokenizer), seed=work.seed)


STAGES: dict[str, tuple[Any, Any]] = {"pretrain": (Text, PRETRAIN), "sft": (Replies, TUNED)}


def do(job: dict[str, Any]) -> None:
    """Trains one stage: kind, folder, and if they are there parallel, changes of its settings, double, die_at."""
    stage_class, config = STAGES[job["kind"]]
    stage = stage_class(replace(config, **job.get("changes", {})))
    stage.die_at, stage.double = job.get("die_at"), job.get("double", True)
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe("toy", 7, {}, (), Path("toy.toml"), parallel=job.get("parallel", {}))
    loop.run_stage(stage, Work(StageFolder(folder), {}, seed=7, recipe=recipe))


def start_ranks(jobs: list[dict[str, Any]], folder: Path, count: int = 2) -> list[subprocess.Popen[str]]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **address, "PYTHONPATH": str(Path(lyceum.__file__).parents[1])}
    command = [sys.executable, __file__, str(folder / "jobs.json")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen(command, env={**env, "RANK": str(rank)}, **pipes) for rank in range(count)]


def on_ranks(jobs: list[dict[str, Any]], folder: Path, count: int = 2) -> None:
    ranks = start_ranks(jobs, folder, count)
    try:
        said = [process.communicate(timeout=110)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0] * count, "\n".join(said)


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


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages in every mode on two ranks, and what begins there to be ended on one, from one pair of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    jobs = [
        {"kind": kind, "folder": str(folder / kind / mode), "parallel": table}
        for kind in STAGES
        for mode, table in MODES.items()
    ]
    on_ranks(jobs, folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "pick_device", lambda: torch.device("cpu"))
        for kind in STAGES:
            do({"kind": kind, "folder": str(folder / kind)})
    return folder


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", STAGES)
def test_two_ranks_have_the_gradients_and_weights_of_one(kind: str, mode: str, everything: Path, alone: Path) -> None:
    assert_same(everything / kind / mode, alone / kind, 1e-9)


if __name__ == "__main__":
    from lyceum import dist

    torch.set_num_threads(1)
    loop.pick_device = lambda: torch.device("cpu")
    dist.start()
    for one_job in json.loads(Path(sys.argv[1]).read_text()):
        do(one_job)
    dist.stop()
