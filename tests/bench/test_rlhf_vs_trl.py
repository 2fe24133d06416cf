"""The bench's own arithmetic by hand, its batches as TRL gets them, and our side of every stage, run for a few steps."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from lyceum import device

FILE = Path(__file__).resolve().parents[2] / "bench" / "rlhf_vs_trl.py"
SPEC = importlib.util.spec_from_file_location("rlhf_vs_trl", FILE)
assert SPEC is not None and SPEC.loader is not None
bench: Any = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = bench
SPEC.loader.exec_module(bench)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of the short run."""
    place = tmp_path_factory.mktemp("models")
    bench.make_models(place, bench.SHORT)
    return place


def test_turns_last_as_long_as_they_were_asked_to(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    clock = [100.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    asked = [{"seconds": 2.5, "steps": 1}, {"seconds": 0.0, "steps": 2}]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(line) + "\n" for line in asked)))
    turns = bench.Turns(warm=1)
    turns.begin()
    with pytest.raises(bench.Finished):
        for number in range(100):
            clock[0], turns.loss = clock[0] + 1.0, float(number)
            turns.tick()
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    # one to warm up; three of a second each until 2.5 have gone; two because two were asked for
    assert [line["seconds"] for line in told] == [[1.0], [1.0] * 3, [1.0] * 2]
    assert [loss for line in told for loss in line["losses"]] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_ratio_is_of_speeds_and_the_references_pass_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    class Clockwork:
        def __init__(self, name: str, python: str, folder: Path, size: Any, job: dict[str, Any]):
            self.is_ours = name == "lyceum"
            self.losses = [1.0, 2.0] if self.is_ours else [1.0, 2.25, 9.0]
            self.facts = {"memory_mb": 1.0, **({"reference_s": 0.05} if self.is_ours else {})}

        def ready(self) -> bool:
            return True

        def turn(self, seconds: float, steps: int = 1) -> dict[str, Any]:
            return {"seconds": [0.4, 9.9, 0.4] if self.is_ours else [1.6]}

        def finish(self) -> dict[str, Any]:
            return self.facts

    monkeypatch.setattr(bench, "Worker", Clockwork)
    monkeypatch.setattr(bench, "rows_for_trl", lambda *given: [])
    options = argparse.Namespace(
        trl="python", trl_ppo=None, tuned=False, trl_rows=16, rounds=3, seconds=1.0, short=False
    )
    found = bench.measure("dpo", tmp_path, bench.SHORT, options)
    # 8 pairs in 0.4 s, and 0.05 s of reference for each: 0.1 s a pair; TRL's are 0.2 s each
    assert found["lyceum"]["per_s"] == pytest.approx(10) and found["trl"]["per_s"] == pytest.approx(5)
    assert found["trl, tuned"]["ratio"] == pytest.approx(2)
    assert found["trl"]["loss_gap"] == pytest.approx(0.25) and found["trl"]["steps_compared"] == 2
    bench.show("dpo", found)
    assert "lyceum / trl: 2.00; losses of 2 steps differ by 2.5e-01" in capsys.readouterr().out


def test_trl_gets_our_batches_row_by_row(folder: Path) -> None:
    from transformers import AutoTokenizer

    size, reader = bench.SHORT, AutoTokenizer.from_pretrained(folder / "policy")
    written = list(bench.rows_for_trl("sft", folder, size))
    assert len(written) == bench.SAME_LOSSES * size.rows
    for row in written[:4]:  # the reply without the line's end behind it
        assert len(row["input_ids"]) == size.context
        assert row["completion_mask"] == [0] * size.prompt + [1] * (size.reply - 1) + [0]
    pairs = list(bench.rows_for_trl("reward9", folder, size))
    assert len(pairs) == 8 * (size.rows // 8) * 36 and len(pairs[0]["chosen_ids"]) == size.context
    stage, _ = bench.our_stage("dpo", folder, size, 0.0, 0, [])
    stage.start(None)
    (step,) = islice(stage.steps(0), 1)
    judged = [one for batch in step.micro_batches for one in batch.judged]
    for one, texts in zip(judged, bench.rows_for_trl("dpo", folder, size), strict=False):
        found = [reader(texts[name]).input_ids for name in ("prompt", "chosen", "rejected")]
        assert found == [one.prompt, *one.responses]


@pytest.mark.parametrize("kind", list(bench.CONTESTS))
def test_our_side_trains_and_stops_when_nobody_asks(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(device, "prepare", lambda role: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    for name in ("policy", "judge"):
        (tmp_path / name).symlink_to(folder / name)
    job = {"kind": kind, "seed": 0, "rate": 1e-3, "warm": 2, "folder": str(tmp_path), "size": vars(bench.SHORT)}
    assert bench.our_side(job) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith('{"')]
    told = json.loads(line)
    assert len(told["seconds"]) == len(told["losses"]) == 2 and min(told["seconds"]) > 0
    assert ("reference_s" in told["facts"]) == (kind == "dpo")
    if kind == "grpo":
        assert len(told["scores"]) == 2 and all(0.2 < score < 0.8 for score in told["scores"])
    if kind == "sft":  # transformers' loss of the same rows and the same weights
        from transformers import AutoModelForCausalLM

        rows = list(islice(bench.rows_for_trl("sft", folder, bench.SHORT), bench.SHORT.rows))
        ids, mask = (torch.tensor([row[name] for row in rows]) for name in ("input_ids", "completion_mask"))
        theirs = AutoModelForCausalLM.from_pretrained(folder / "policy")
        loss = theirs(input_ids=ids, labels=ids.masked_fill(mask == 0, -100)).loss
        assert told["losses"][0] == pytest.approx(loss.item(), abs=1e-5)


def test_the_reward_is_the_share_of_even_ids() -> None:
    assert bench.share_of_even([2, 4, 5, 7]) == 0.5 and bench.share_of_even([]) == 0.0
