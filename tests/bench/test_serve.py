"""The bench's own arithmetic by hand; that it runs is seen by `python bench/serve.py --short`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SPEC = importlib.util.spec_from_file_location("serve_bench", Path(__file__).resolve().parents[2] / "bench" / "serve.py")
assert SPEC is not None and SPEC.loader is not None
bench: Any = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = bench
SPEC.loader.exec_module(bench)


def test_the_overhead_of_a_token_is_what_the_clock_says() -> None:
    # asked for at 0; events at 5, 6, 6, 8 ms: three steps in 3 ms. The engine alone: three steps in 1.5 ms
    stream, steps = [0.0, 0.005, 0.006, 0.006, 0.008], [0.0, 0.0005, 0.001, 0.0015]
    found = bench.compared([([stream], steps)])
    assert found == pytest.approx({"http_ms": 1.0, "engine_ms": 0.5, "overhead_ms": 0.5, "first_token_ms": 5.0})
    assert bench.compared([([stream, stream], steps)])["overhead_ms"] == pytest.approx(0.25)  # two tokens a step
    slow = [time * 9 for time in stream]
    three = [([stream], steps), ([slow], steps), ([stream], steps)]
    assert bench.compared(three)["overhead_ms"] == pytest.approx(0.5)  # the median turn's


def test_the_null_model_says_one_letter_for_ever() -> None:
    engine, tokenizer = bench.null_engine(20, 2, 0.0)
    times = bench.alone(engine, tokenizer.encode("user\n"), 2, 20)
    assert len(times) == 20 and times == sorted(times)
