"""The bench on a handful of pairs: every pair is in one part or counted, and its figures are those of the run it made."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).resolve().parents[2] / "bench" / "preferences_real.py"
SPEC = importlib.util.spec_from_file_location("preferences_real", FILE)
assert SPEC is not None and SPEC.loader is not None
bench: Any = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = bench
SPEC.loader.exec_module(bench)


def pairs(path: Path, count: int, words: str) -> str:
    rows = [
        {"prompt": f"{words} {n}?", "chosen": f"it is {n}, yes" + ", yes" * (n % 3), "rejected": "no"}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
def test_figures_are_of_held_out_pairs_whole_and_by_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [pairs(tmp_path / "one.jsonl", 60, "what is it"), pairs(tmp_path / "two.jsonl", 40, "and this")]
    small = "--seeds 1 --depth 1 --width 64 --vocab 300 --context 128 --tokens 4096 --threads 1 --epochs 2".split()
    assert bench.main([*files, *small]) == 0
    printed = capsys.readouterr().out.splitlines()
    (result,) = json.loads(printed[-1])["results"]
    counts = result["rankings"]
    assert counts["train"]["kept"] + counts["valid"]["kept"] == 100
    whole = result["by_file"].pop("all, length by file")
    assert whole["pairs"] == result["pairs"] and whole["accuracy_noisy"] == pytest.approx(result["accuracy_noisy"])
    assert sum(part["pairs"] for part in result["by_file"].values()) == result["pairs"] == counts["valid"]["kept"]
    right = sum(part["pairs"] * part["accuracy_noisy"] for part in result["by_file"].values())
    assert right / result["pairs"] == pytest.approx(result["accuracy_noisy"])
    assert result["length_baseline"] == 1.0 and result["baseline_prefers"] == "longer"  # what was chosen is longer
    assert any("above length beyond its interval in 0 of 1" in line for line in printed)
    assert str(tmp_path) not in printed[-1]
