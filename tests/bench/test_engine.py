"""The bench's own arithmetic by hand, and its workers: all give the same replies to the same prompts."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from lyceum import device

FOLDER = Path(__file__).resolve().parents[2] / "bench"
SPEC = importlib.util.spec_from_file_location("engine_bench", FOLDER / "engine.py")
assert SPEC is not None and SPEC.loader is not None
bench: Any = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = bench
SPEC.loader.exec_module(bench)


class Clockwork:
    """An engine that takes a millisecond a prompt token it has not seen last, and ten a step."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.prompts: list[list[int]] = []

    def seconds(self, prompts: list[list[int]], num_new: int) -> float:
        self.prompts += prompts
        known = len(self.seen) if prompts[0][: len(self.seen)] == self.seen else 0
        return 0.001 * (sum(map(len, prompts)) - known) + 0.01 * num_new

    def reply(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
        self.seen = prompts[0] + [0] * num_new
        return [[0] * num_new for _ in prompts]


def test_a_turns_figures_are_what_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.subprocess, "Popen", lambda command: argparse.Namespace(kill=int, wait=int))
    engine = Clockwork()
    figures = bench.one_turn(engine, 100, bench.Plan(1, (1, 8), 11, 200), 0)
    assert figures["decode_1"] == pytest.approx(100) and figures["decode_8"] == pytest.approx(800)
    assert figures["cold_s"] == pytest.approx(0.21) and figures["prefill"] == pytest.approx(200 / 0.21)
    assert figures["second_turn_s"] == pytest.approx(0.026)  # 16 new tokens and a step
    assert figures["second_turn_share"] == pytest.approx(0.026 / 0.258)
    assert figures["neighbour_slowdown"] == pytest.approx(1)
    again = Clockwork()
    bench.one_turn(again, 100, bench.Plan(1, (1, 8), 11, 200), 0)
    assert again.prompts == engine.prompts  # the same for every engine
    assert len({tuple(prompt) for prompt in engine.prompts}) == len(engine.prompts)  # none twice: nothing is remembered


def test_engines_of_one_model_give_the_same_replies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "prepare", lambda role: None)
    monkeypatch.setattr(bench, "SHAPES", {1: (2, 64, 2, 512)})
    spec = bench.make_model(1, tmp_path, ["q8_0"])
    assert (tmp_path / "q8_0.gguf").exists() and spec.ffn_width == 192
    prompts = [[5, 6, 7, 8], [100, 99, 98, 97]]
    replies = [
        runner(name, str(tmp_path)).generate(prompts, 6)
        for runner, name in (
            (bench.lyceum_runner, "lyceum"),
            (bench.lyceum_runner, "lyceum, unpacked"),
            (bench.transformers_runner, "transformers"),
        )
    ]
    assert replies[0] == replies[1] == replies[2]
    assert [len(reply) for reply in replies[0]] == [6, 6]


def test_the_bound_is_bandwidth_over_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "matmul_flops", lambda shapes, rows: 1e9)
    spec = argparse.Namespace(
        width=64, head_width=32, num_heads=2, num_kv_heads=1, ffn_width=128, num_layers=2, vocab_size=512
    )
    # a layer: qkv 64 x 128, o 64 x 64, three of 64 x 128; twice; the output layer 512 x 64
    weights = 2 * (64 * 128 + 64 * 64 + 3 * 64 * 128) + 512 * 64
    found = bench.bounds(spec)
    assert found["weight_mb"] == round(4 * weights / 1e6, 1)
    assert found["operations"] == pytest.approx(1e9 / (2 * weights))
    assert found["gb_per_s"] == pytest.approx(found["bandwidth"] * 4 * weights / 1e9, abs=0.1)
