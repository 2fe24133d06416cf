"""The bench's own arithmetic by hand, and one tiny run whose loss is computed again from its checkpoint."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lyceum.model.checkpoint import load_checkpoint

FILE = Path(__file__).resolve().parents[2] / "bench" / "time_to_loss.py"
SPEC = importlib.util.spec_from_file_location("time_to_loss", FILE)
assert SPEC is not None and SPEC.loader is not None
bench: Any = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = bench  # where dataclasses look for it
SPEC.loader.exec_module(bench)


def test_nanogpts_clock_leaves_out_what_evaluation_takes() -> None:
    lines = [
        (3.0, "tokens per iteration will be: 768"),
        (5.0, "step 0: train loss 4.2, val loss 4.3"),
        (5.1, "iter 0: loss 4.25, time 2100.00ms, mfu -100.00%"),  # 2 s beyond the median of 100 ms
        (5.2, "iter 1: loss 4.0, time 100.00ms, mfu -100.00%"),
        (5.3, "iter 2: loss 3.0, time 100.00ms, mfu -100.00%"),
        (7.3, "step 3: train loss 1.9, val loss 1.95"),
        (7.4, "iter 3: loss 1.9, time 2100.00ms, mfu -100.00%"),
        (7.5, "iter 4: loss 1.8, time 100.00ms, mfu -100.00%"),
        (9.5, "step 5: train loss 1.7, val loss 1.75"),
        (9.6, "iter 5: loss 1.7, time 2100.00ms, mfu -100.00%"),
        (9.7, "iter 6: loss 1.7, time 100.00ms, mfu -100.00%"),
    ]
    found = [(point["iteration"], round(point["seconds"], 6), point["loss"]) for point in bench.read_nanogpt(lines)]
    # three iterations end at 5.3, less the 2 s of the first evaluation; five at 7.5, less 4 s
    assert found == [(3, 3.3, 1.95), (5, 3.5, 1.75)]


def test_a_peer_without_an_estimate_is_an_error() -> None:
    with pytest.raises(SystemExit, match="no estimate"):
        bench.read_nanogpt([(1.0, "Traceback (most recent call last):")])
    with pytest.raises(SystemExit, match="no estimate"):
        bench.read_nanogpt([(1.0, "step 0: train loss 4.2, val loss 4.3")])


@pytest.mark.parametrize("block", [4, 5, 7, 30])
def test_every_token_but_the_first_is_a_target_once(block: int) -> None:
    ids = torch.arange(26) ** 2
    seen: list[int] = []

    def mean_loss(inputs: torch.Tensor, targets: torch.Tensor) -> float:
        assert inputs.shape == targets.shape and inputs.shape[1] <= block
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        seen.extend(targets.flatten().tolist())
        return float(targets.double().mean())

    assert bench.blocks_loss(mean_loss, ids, block) == pytest.approx(float(ids[1:].double().mean()))
    assert sorted(seen) == ids[1:].tolist()


def test_what_counts_as_reached_by_hand() -> None:
    def line(name: str, seconds: float, losses: list[float], vocabulary: int = bench.CHARACTERS) -> dict[str, Any]:
        runs = [{"nats_per_character": loss, "tokens": 10} for loss in losses]
        return {"name": name, "seconds": seconds, "runs": runs, "vocabulary": vocabulary}

    lines = [line("one seed fails", 5, [1.8, 1.9]), line("BPE", 6, [1.5], 1024), line("slow", 20, [1.7])]
    lines.append(line("good", 10, [1.88, 1.86]))
    assert bench.time_to(1.88, lines) == {"line": "good", "seconds": 10, "tokens": 10}
    assert bench.time_to(1.6, lines) is None
    curve = [{"seconds": 1.0, "loss": 3.0}, {"seconds": 2.0, "loss": 1.89}, {"seconds": 3.0, "loss": 1.87}]
    assert bench.first_below(1.9, curve) == 2.0
    assert bench.first_below(1.5, curve) == 3.0  # the whole run, where it is never reached
    found = bench.lowest_within(15, lines, {1.88: {"curve": curve}})
    assert found == {"characters": pytest.approx(1.85), "BPE": 1.5, "nanoGPT": 1.87}
    assert bench.lowest_within(1, lines, {}) == {"characters": None, "BPE": None, "nanoGPT": None}


def test_a_run_measures_the_whole_held_out_text_and_its_own_time(tmp_path: Path) -> None:
    text = "".join(f"{n} times {n % 7} is {n * (n % 7)}.\n" for n in range(300))
    (tmp_path / "input.txt").write_text(text, encoding="utf-8")
    options = argparse.Namespace(data=tmp_path, threads=1)
    line = bench.Line("tiny", bench.shape(1, 64), bench.settings(32, 512, 0.02), tokens=4096)
    run = bench.run_line(line, "shakespeare", 0, options, tmp_path)
    loaded = load_checkpoint(tmp_path / "tiny-0" / "pretrain" / "checkpoint")
    end = loaded.tokenizer.end_id
    assert loaded.spec.vocab_size == bench.CHARACTERS
    ids = torch.tensor([end, *loaded.tokenizer.encode(text[int(len(text) * 0.9) :]), end])
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 32):
            row = ids[start : start + 33]
            logits = loaded.model.logits(loaded.model(row[None, :-1]))[0]
            total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    assert run["nats_per_character"] == pytest.approx(total / (len(ids) - 2), rel=1e-4)
    assert run["nats_per_character"] < math.log(bench.CHARACTERS) / 1.5  # it has learned something
    assert run["tokens"] == run["curve"][-1]["tokens"] == 4096
    spent = run["spent_s"]
    assert run["seconds"] == pytest.approx(sum(spent.values()) - spent["validation"] - spent["saving"])
    assert run["startup_s"] == pytest.approx(run["seconds"] - spent["training"])
    assert spent["training"] > 0 and spent["validation"] > 0
