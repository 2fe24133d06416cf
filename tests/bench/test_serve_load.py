"""The load's own arithmetic by hand, its verdict on figures that are wrong, and half a minute of the load itself."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).resolve().parents[2] / "bench" / "serve_load.py"
SPEC = importlib.util.spec_from_file_location("serve_load_bench", FILE)
assert SPEC is not None and SPEC.loader is not None
bench: Any = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = bench
SPEC.loader.exec_module(bench)

WELL: dict[str, Any] = {
    "errors": [], "refused": [7, 0, 0, 0], "tokens": [100, 100, 100, 100], "fair": 1.0,
    "second_quarter_mb": 300.0, "last_quarter_mb": 301.0, "before": {"sockets": 3.0}, "after": {"sockets": 3.0},
}  # fmt: skip


def test_fairness_is_jains_index() -> None:
    assert bench.jain([5, 5, 5, 5]) == 1.0 and bench.jain([9, 0, 0, 0]) == 0.25
    assert bench.jain([5, 1, 1, 1]) == pytest.approx(64 / (4 * 28))  # what shares by clients would be
    assert bench.jain([0, 0]) == 0.0


def test_what_does_not_hold_is_said() -> None:
    assert bench.judged(WELL) == []
    wrong: dict[str, Any] = {
        "errors": ["boom"], "refused": [0, 1, 0, 0], "fair": 0.57, "last_quarter_mb": 400.0, "after": {"sockets": 9.0},
    }  # fmt: skip
    for name, value in wrong.items():
        assert len(bench.judged({**WELL, name: value})) == 1, name


@pytest.mark.slow
def test_sixty_four_clients_with_random_disconnects_leave_the_server_well() -> None:
    command = [sys.executable, str(FILE), "--seconds", "25", "--warm", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["clients"] == 64 and figures["left"] > 10 and figures["requests"] > 200
