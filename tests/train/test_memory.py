"""The memory that is planned is the memory that a short training takes.

Run as a script, `python test_memory.py FOLDER DEPTH WIDTH MICRO_TOKENS MATRIX_LR`, it trains such a model for a few
steps and prints what it planned, by how much the resident memory grew at most, and what was resident before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lyceum import device

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY, ROW_TOKENS = 2048, 128  # the demo's


def resident(name: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS now, VmHWM at its peak."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(name + ":")[1].split()[0])


def train(folder: Path, depth: int, width: int, micro_tokens: int, matrix_lr: float) -> None:
    """Trains through the real stage and loop, on rows of noise."""
    import numpy as np

    from lyceum.config import Recipe
    from lyceum.model.spec import ModelSpec
    from lyceum.model.transformer import Decoder
    from lyceum.run import StageFolder, Work
    from lyceum.stages.pretrain import Pretrain, PretrainConfig
    from lyceum.train import workers
    from lyceum.train.loop import run_stage
    from lyceum.train.memory import total, training_memory

    class Noise:
        parts = {"text": 1000}

        def __init__(self, vocab_size: int) -> None:
            self.vocab_size = vocab_size

        def row(self, part: str, index: int) -> Any:
            return np.random.default_rng(index).integers(self.vocab_size, size=ROW_TOKENS + 1)

    class Short(Pretrain):
        def start(self, work: Work) -> None:
            shape = (depth, VOCABULARY, width) if work.seed else (1, 64, 64)
            spec, _ = ModelSpec.from_depth(shape[0], vocab_size=shape[1], width=shape[2], context_length=192)
            self.tokenizer = SimpleNamespace(token_bytes=[b"x"] * shape[1])
            self.begin(Decoder(spec), Noise(shape[1]), {}, seed=0)  # type: ignore[arg-type]

        def samples(self) -> list[dict[str, Any]]:
            return []

        def save(self, folder: Path, snapshot: str = "") -> None:
            pass

    def run(seed: int, tokens: int, steps: int) -> None:
        config = PretrainConfig(tokens=steps * tokens, batch_tokens=tokens, micro_tokens=tokens, matrix_lr=matrix_lr)
        place = folder / str(seed)
        place.mkdir(parents=True)
        run_stage(Short(config), Work(StageFolder(place), {}, seed, Recipe("toy", 0, {}, (), Path("toy.toml"))))

    run(0, ROW_TOKENS, 1)  # what is loaded with the first step is no training's memory
    before = resident("VmRSS")
    run(1, micro_tokens, 8)
    spec, _ = ModelSpec.from_depth(depth, vocab_size=VOCABULARY, width=width)
    planned = total(
        training_memory(spec, micro_tokens, matrix_lr=matrix_lr, num_workers=workers.num_workers(micro_tokens))
    )
    print(json.dumps({"planned": planned, "grown": resident("VmHWM") - before, "before": before}))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell resident memory")
@pytest.mark.parametrize(
    ("depth", "width", "micro_tokens", "matrix_lr", "threads"),
    [
        (4, 128, 2048, 0.03, 1),
        (6, 192, 2048, 0.03, 1),
        *(
            pytest.param(*shape, marks=pytest.mark.slow)
            for shape in ((4, 128, 4096, 0.0, 1), (4, 128, 2048, 0.03, 2), (4, 256, 2048, 0.0, 2))
        ),
        *(
            pytest.param(4, 512, *rest, marks=pytest.mark.slow)
            for rest in ((2048, 0.0, 1), (2048, 0.03, 1), (256, 0.0, 1))
        ),
    ],
)
def test_planned_memory_is_within_fifteen_hundredths_of_what_a_short_training_takes(
    depth: int, width: int, micro_tokens: int, matrix_lr: float, threads: int, tmp_path: Path
) -> None:
    from lyceum.train.memory import BASE_BYTES

    command = [sys.executable, __file__, str(tmp_path), *map(str, (depth, width, micro_tokens, matrix_lr))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    told = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert found["planned"] == pytest.approx(found["grown"], rel=0.15), found
    assert found["before"] == pytest.approx(BASE_BYTES, rel=0.15), found


def test_activations_are_what_autograd_keeps() -> None:
    import torch

    from lyceum.model.spec import ModelSpec
    from lyceum.model.transformer import Decoder
    from lyceum.train.memory import kept_per_token

    for qk_norm in (True, False):
        spec, _ = ModelSpec.from_depth(4, vocab_size=512, qk_norm=qk_norm)
        decoder, tokens = Decoder(spec), torch.zeros(4, 128, dtype=torch.long)
        weights = {weight.untyped_storage().data_ptr() for weight in decoder.parameters()}
        kept: dict[int, int] = {}

        def count(tensor: torch.Tensor, weights: set[int] = weights, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            hidden = decoder(tokens)
        assert hidden.requires_grad
        assert 4 * tokens.numel() * kept_per_token(spec) == pytest.approx(sum(kept.values()), rel=0.1)


def test_parts_by_hand() -> None:
    from lyceum.model.spec import ModelSpec
    from lyceum.train.memory import added, cache_memory, frozen_memory, total, training_memory

    # one layer, width 64, two heads of 32, ffn 64, vocabulary 100: 7 matrices of 4,096, an embedding of 6,400, gains
    # 3 * 64 + 2 * 32 = 256: 35,328 weights, 28,672 of them matrices
    spec = ModelSpec(100, 1, 64, 2, 2, 32, 64, context_length=64)
    adamw = training_memory(spec, 128, matrix_lr=0.0, loss="score")
    assert (adamw["weights"], adamw["gradients"], adamw["optimizer"]) == (4 * 35328, 4 * 35328, 8 * 35328)
    # of one token: 4 * 64 + 3 * 64 + 3 * 64 + 4 * 64 in the layer, 3 * 64 outside, 8 * 64 on the way back
    assert adamw["activations"] == round(1.15 * 4 * 128 * (896 + 192 + 512)) and adamw["logits"] == 0
    muon = training_memory(spec, 128, ema=0.9, num_terms=3)
    assert muon["gradients"] == 4 * 4 * 35328
    assert muon["optimizer"] == 4 * (28672 + 2 * 6656 + 35328)
    # six copies of q, k, v and o are 1.15 * 4 * 6 * 4 * 4,096 = 452,198 bytes. Activations and logits of 128 tokens leave twice
    # as much; those of 64, 1.15 * 4 * 64 * 1,600 = 471,040 and 4 * (64 * 100 + 2 * 6,400 + 2 * 64 * 64) = 109,568, a part of
    # it; those of 16 nothing of use
    assert training_memory(spec, 64)["optimizer"] == 4 * 41_984 + 2 * 452_198 - 471_040 - 109_568
    assert training_memory(spec, 16)["optimizer"] == 4 * 41_984 + 452_198
    assert training_memory(spec, 128, num_workers=4, num_terms=3)["gradients"] == 16 * 4 * 35328
    assert training_memory(spec, 128, num_workers=2, num_terms=3)["gradients"] == 8 * 4 * 35328
    assert muon["logits"] == 4 * (128 * 100 + 2 * 6400 + 2 * 128 * 64)
    # 10 rows of 40 tokens reach 64: keys and values, 2 * 1 * 10 * 2 * 32 * 64 numbers
    assert cache_memory(spec, 10, 40) == {"cache": round(4 * 81920 * 1.15)}
    both = added(adamw, frozen_memory(spec))
    assert both["weights"] == 8 * 35328 and total(both) == total(adamw) + 4 * 35328


if __name__ == "__main__":
    device.prepare("test")
    depth, width, micro_tokens = map(int, sys.argv[2:5])
    train(Path(sys.argv[1]), depth, width, micro_tokens, float(sys.argv[5]))
