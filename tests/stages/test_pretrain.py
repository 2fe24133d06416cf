"""Pretraining: bits per byte by hand, every byte counted once, rows shared over ranks, the run and what it refuses."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lyceum import dist
from lyceum.config import Recipe
from lyceum.corpus.records import Document, write_records
from lyceum.errors import ConfigError, DataError
from lyceum.log import read_metrics
from lyceum.model.checkpoint import load_checkpoint
from lyceum.run import StageFolder, Work
from lyceum.stages import pretrain
from lyceum.stages.pretrain import Pretrain, PretrainConfig, bits_per_byte, held_out, part_weights, run
from lyceum.tokens.tokenizer import Tokenizer
from lyceum.train import loop
from lyceum.train.stage import Step

SMALL = PretrainConfig(
    tokens=24 * 256, row_tokens=32, batch_tokens=256, micro_tokens=128, log_every=4, save_every=5, validate_every=10
)


def documents(seed: int, count: int) -> list[Document]:
    """Sentences and lines of code with something to learn in them, and one character that is two bytes."""
    draw = random.Random(seed)
    names = ["sorted", "len", "open", "print", "range"]
    rows = []
    for number in range(count):
        name = draw.choice(names)
        text = f"{name} returns the {name} of café {draw.randint(0, 9)}."
        code = f"def call_{name}(x):\n    return {name}(x)\n"
        rows.append(Document(text, meta={"part": "docs"}) if number % 2 else Document(code, meta={"part": "code"}))
    return rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    train = documents(0, 400)
    for part, rows in (("train", train), ("valid", documents(1, 30))):
        write_records(folder / "corpus" / f"documents-{part}.jsonl", rows)
    (folder / "tokenizer").mkdir()
    Tokenizer.train([row.text for row in train], 300).save(folder / "tokenizer")
    return {"corpus": folder / "corpus", "tokenizer": folder / "tokenizer"}


def work_in(folder: Path, inputs: dict[str, Path], **model: Any) -> Work:
    folder.mkdir(parents=True, exist_ok=True)
    table = {"depth": 1, "width": 64, "context_length": 64, **model}
    return Work(StageFolder(folder), inputs, seed=7, recipe=Recipe("toy", 7, table, (), Path("toy.toml")))


def started(folder: Path, inputs: dict[str, Path], config: PretrainConfig = SMALL) -> Pretrain:
    torch.manual_seed(0)
    stage = Pretrain(config)
    stage.start(work_in(folder, inputs))
    return stage


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "pick_device", lambda: torch.device("cpu"))


# -------------------------------------------------------------------------------- equations


def test_bits_per_byte_by_hand() -> None:
    assert bits_per_byte(nats=100 * math.log(256), num_bytes=100) == pytest.approx(8.0)  # one of 256, a byte each


def test_part_weights_by_hand() -> None:
    assert part_weights(["code", "docs"], 0.25) == {"code": 0.75, "docs": 0.25}
    assert part_weights(["code", "docs", "web"], 0.5) == {"code": 0.25, "docs": 0.5, "web": 0.25}
    assert part_weights(["code"], 0.5) == {"code": 1.0} and part_weights(["docs"], 0.5) == {"docs": 1.0}


def test_held_out_rows_hold_every_byte_once(inputs: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(inputs["tokenizer"])
    rows = documents(1, 30)
    found = held_out(rows, tokenizer, SMALL)
    for part, held in found.items():
        texts = [row.text for row in rows if row.meta["part"] == part]
        assert held.num_bytes == sum(len(text.encode()) for text in texts)
        targets = [
            batch.tokens_BT[row, at].item()
            for batch in held.batches
            for row, at in (batch.weights_BT > 0).nonzero().tolist()
        ]
        assert tokenizer.decode(targets) == "".join(texts)
        assert all(batch.tokens_BT.shape[1] <= 33 for batch in held.batches)


def test_a_uniform_model_spends_log2_of_the_vocabulary_on_each_token(inputs: dict[str, Path], tmp_path: Path) -> None:
    stage = started(tmp_path, inputs)
    nn.init.zeros_(stage.model.output_weight)
    tokenizer, found = stage.tokenizer, stage.validate()
    for part in ("docs", "code"):
        texts = [row.text for row in documents(1, 30) if row.meta["part"] == part]
        num_tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
        num_bytes = sum(len(text.encode()) for text in texts)
        assert found[f"bpb_{part}"] == pytest.approx(math.log2(tokenizer.vocab_size) * num_tokens / num_bytes, rel=1e-5)


# -------------------------------------------------------------------------------- steps


def all_rows(steps: Iterator[Step[Any]]) -> list[list[list[int]]]:
    return [[row for batch in step.micro_batches for row in batch.tokens_BT.tolist()] for step in steps]


def test_ranks_share_the_rows_of_each_step(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = started(tmp_path, inputs)
    alone = all_rows(stage.steps(0))
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        shares.append(all_rows(stage.steps(0)))
    for whole, *parts in zip(alone, *shares, strict=True):
        assert sorted(whole) == sorted(row for part in parts for row in part)
        assert all(parts)


def test_steps_from_the_middle_are_the_same_steps(inputs: dict[str, Path], tmp_path: Path) -> None:
    stage = started(tmp_path, inputs)
    assert all_rows(stage.steps(9)) == all_rows(stage.steps(0))[9:]
    assert stage.num_steps == 24 and all(step.tokens == 256 for step in stage.steps(22))


# -------------------------------------------------------------------------------- the run


@pytest.fixture(scope="module")
def finished(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("pretrain")
    return folder, run(SMALL, work_in(folder, inputs))


def test_the_run_learns_and_reports(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, report = finished
    lines = read_metrics(folder / "metrics.jsonl")
    assert report["bpb_docs"] < 0.7 * math.log2(300) / 2 and report["bpb_code"] < report["bpb_docs"]
    assert lines[-1]["loss/text"] < 0.6 * lines[0]["loss/text"]
    assert report["tokens"] == 24 * 256 and set(report["epochs"]) == {"docs", "code"}
    loaded = load_checkpoint(folder / "checkpoint")
    assert sum(p.numel() for p in loaded.model.parameters()) == report["params"]
    assert loaded.info["stage"] == "pretrain" and loaded.info["recipe"] == "toy"
    assert loaded.info["results"]["valid/bpb_docs"] == report["bpb_docs"]
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 3 * len(pretrain.PROMPTS)


def test_a_resumed_run_equals_the_straight_run_and_keeps_its_shards(
    finished: tuple[Path, dict[str, Any]],
    inputs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def killed_at_13(self: Pretrain, first: int) -> Iterator[Step[Any]]:
        for number, step in enumerate(whole(self, first), first):
            if number == 13:
                raise KeyboardInterrupt
            yield step

    whole = Pretrain.steps
    monkeypatch.setattr(Pretrain, "steps", killed_at_13)
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, work_in(tmp_path, inputs))
    monkeypatch.setattr(Pretrain, "steps", whole)
    written = (tmp_path / "shards" / "shards.json").stat().st_mtime_ns
    report = run(SMALL, work_in(tmp_path, inputs))
    assert (tmp_path / "shards" / "shards.json").stat().st_mtime_ns == written
    for one, other in zip(*(read_metrics(f / "metrics.jsonl") for f in (tmp_path, finished[0])), strict=True):
        assert {k: one[k] for k in one if k not in loop.TIMINGS} == {
            k: other[k] for k in other if k not in loop.TIMINGS
        }
    assert report["bpb_docs"] == finished[1]["bpb_docs"]


def test_a_device_out_of_memory_trains_on_with_smaller_micro_batches(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(SMALL, tokens=6 * 256, log_every=1, validate_every=0)
    run(replace(config, micro_tokens=64), work_in(tmp_path / "small", inputs))
    whole, passes = Pretrain.loss, []

    def cramped(self: Pretrain, micro_batch: Any) -> Any:
        passes.append(len(micro_batch.tokens_BT))
        if len(passes) == 6 or (len(passes) > 6 and passes[-1] > 2):  # in the middle of the third step
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, micro_batch)

    monkeypatch.setattr(Pretrain, "loss", cramped)
    run(config, work_in(tmp_path / "cramped", inputs))
    assert passes == [4] * 6 + [2] * 16 and capsys.readouterr().err.count("micro-batches are halved") == 1
    losses = [[line["loss"] for line in read_metrics(tmp_path / f / "metrics.jsonl")] for f in ("cramped", "small")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][-1] < losses[0][0]


# -------------------------------------------------------------------------------- refusals


def test_rows_longer_than_the_context_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="row_tokens is 32, the model's context_length 16"):
        run(SMALL, work_in(tmp_path, inputs, context_length=16))


def test_a_corpus_without_a_row_of_text_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    for name, rows in (("empty", []), ("short", [Document("hi", meta={"part": "docs"})])):
        for part in ("train", "valid"):
            write_records(tmp_path / name / f"documents-{part}.jsonl", rows)
        with pytest.raises(DataError) as caught:
            run(SMALL, work_in(tmp_path / f"{name}-run", {**inputs, "corpus": tmp_path / name}))
        assert caught.value.hint


# -------------------------------------------------------------------------------- its page


def test_the_page_lists_every_setting_of_its_own_with_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs" / "stages" / "pretrain.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", page.split("## Settings")[1], re.MULTILINE))
    own = PretrainConfig.__annotations__
    assert rows == {name: str(getattr(PretrainConfig(), name)) for name in own}
