"""The bench's own arithmetic by hand, and that its examples are ones; that it runs is seen by
`python bench/serve_training.py RUN --short`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

SPEC = importlib.util.spec_from_file_location(
    "serve_training_bench", Path(__file__).resolve().parents[2] / "bench" / "serve_training.py"
)
assert SPEC is not None and SPEC.loader is not None
bench: Any = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = bench
SPEC.loader.exec_module(bench)


def test_the_ratio_is_that_of_the_medians() -> None:
    turns = [(0.002, 0.003), (0.004, 0.009), (0.003, 0.006)]
    assert bench.compared(turns) == {"alone_ms": 3.0, "beside_ms": 6.0, "ratio": 2.0}


def test_the_job_of_the_bench_learns_from_examples_that_the_server_takes(tmp_path: Path) -> None:
    from lyceum.serve.files.checks import check_examples
    from lyceum.serve.limits import Limits

    (tmp_path / "chats").write_bytes(bench.conversations(30))
    found = check_examples(tmp_path / "chats", Limits(), None)
    assert (found.kind, found.lines) == ("supervised", 30)
