"""Pretraining: bits per byte by hand, every byte counted once, rows shared over ranks, the run, infilling learned, and what is
refused."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lyceum import dist
from lyceum.batches.shards import Shards, write_shards
from lyceum.config import Recipe
from lyceum.corpus.pipeline import CorpusConfig
from lyceum.corpus.pipeline import run as corpus_run
from lyceum.corpus.records import Document, write_records
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams
from lyceum.errors import CheckpointError, ConfigError, DataError, TrainingError
from lyceum.log import read_metrics
from lyceum.model.checkpoint import load_checkpoint
from lyceum.model.lineage import read_model
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import StageFolder, Work
from lyceum.stages import pretrain
from lyceum.stages.pretrain import Pretrain, PretrainConfig, bits_per_byte, held_out, infill_rates, part_weights, run
from lyceum.tokens.infill import infill_prompt, parse_infill
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


def test_infill_rates_by_hand() -> None:
    assert infill_rates({"code": 0.5, "docs": 0.5}, 0.9) == {"code": 0.9}
    assert infill_rates({"text": 1.0}, 0.5) == {"text": 0.5} and infill_rates({"docs": 1.0}, 0.0) == {}
    for weights in ({"docs": 1.0}, {"code": 0.0, "docs": 1.0}):  # nothing would be infilled: said, not passed over
        with pytest.raises(ConfigError, match=r"infill_rate is 0.5, and only the part docs(.|\n)*hint: "):
            infill_rates(weights, 0.5)


# -------------------------------------------------------------------------------- steps


def all_rows(steps: Iterator[Step[Any]]) -> list[list[list[int]]]:
    return [[row for batch in step.micro_batches for row in batch.tokens_BT.tolist()] for step in steps]


@pytest.mark.parametrize("infill_rate", [0.0, 0.5])
def test_steps_from_the_middle_are_the_same_steps(inputs: dict[str, Path], tmp_path: Path, infill_rate: float) -> None:
    stage = started(tmp_path, inputs, replace(SMALL, infill_rate=infill_rate))
    assert all_rows(stage.steps(9)) == all_rows(stage.steps(0))[9:]
    assert stage.num_steps == 24 and all(step.tokens == 256 for step in stage.steps(22))


def test_infilled_steps_hold_as_many_rows_with_marks_in_all_parts_but_docs(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    plain = all_rows(started(tmp_path / "plain", inputs).steps(0))
    infilled = all_rows(started(tmp_path / "infilled", inputs, replace(SMALL, infill_rate=1.0)).steps(0))
    mark = Tokenizer.load(inputs["tokenizer"]).fim_middle_id
    changed = 0
    for before, after in zip(plain, infilled, strict=True):
        for row, other in zip(before, after, strict=True):
            assert len(other) == len(row) and mark not in row
            assert other == row or mark in other
            changed += other != row
    assert changed == pytest.approx(0.5 * sum(map(len, plain)), rel=0.1)  # the other half are docs


@pytest.mark.parametrize("infill_rate", [0.0, 0.5])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_and_a_restart_see_the_same_rows(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, infill_rate: float
) -> None:
    config = replace(SMALL, weights={"code": 3.0, "docs": 1.0}, infill_rate=infill_rate)
    before, after = (started(tmp_path / name, inputs, config) for name in "ab")  # killed after step 7
    alone = all_rows(before.steps(0))
    monkeypatch.setattr(dist, "world_size", lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        shares.append(all_rows(islice(before.steps(0), 7)) + all_rows(after.steps(7)))
    assert len(alone) == 24
    for whole, *parts in zip(alone, *shares, strict=True):
        assert sorted(whole) == sorted(row for part in parts for row in part)
        assert all(parts)


# -------------------------------------------------------------------------------- the mixture


def test_weights_decide_the_mixture_and_epochs_are_printed(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = started(tmp_path / "a", inputs, replace(SMALL, weights={"code": 3.0, "docs": 1.0}))
    rows = 24 * 8  # steps, rows a step
    sizes = stage.shards.parts
    counts = Counter(stage.stream.at(k)[0] for k in range(128))
    assert counts == {"code": 96, "docs": 32}
    assert sum(epochs * sizes[part] for part, epochs in stage.epochs.items()) == pytest.approx(rows)
    share = stage.epochs["code"] * sizes["code"] / rows
    said = capsys.readouterr().err
    assert f"code: {sizes['code'] * 32:,} tokens, {share:.1%} of the rows, {stage.epochs['code']:.3g} epochs" in said
    assert "warning" not in said
    stage = started(tmp_path / "b", inputs, replace(SMALL, weights={"docs": 2.0}))
    assert set(stage.epochs) == {"docs"}
    assert "not read, for want of a weight: code" in capsys.readouterr().err


def test_without_weights_docs_share_decides_as_ever(inputs: dict[str, Path], tmp_path: Path) -> None:
    one = started(tmp_path / "a", inputs, replace(SMALL, docs_share=0.25))
    other = started(tmp_path / "b", inputs, replace(SMALL, weights={"docs": 1.0, "code": 3.0}))
    assert all_rows(one.steps(0)) == all_rows(other.steps(0))


def test_more_than_four_epochs_of_a_part_are_warned_of(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for tokens, is_warned in ((4.5, True), (3.5, False)):
        sizes = started(tmp_path / "a", inputs, replace(SMALL, weights={"docs": 1.0})).shards.parts
        capsys.readouterr()
        config = replace(SMALL, tokens=round(tokens * sizes["docs"] * 32), weights={"docs": 1.0})
        started(tmp_path / f"{is_warned}", inputs, config)
        assert ("warning: docs is seen 4.4" in capsys.readouterr().err) == is_warned


def test_weights_that_the_corpus_does_not_fit_are_refused_before_anything_is_encoded(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(inputs["corpus"], corpus)
    (corpus / "report.json").write_text(json.dumps({"documents": {"train": {"docs": 200, "code": 200}}}))
    for weights, complaint in (({"dox": 1.0, "code": 1.0}, "no part 'dox'(.|\n)*'docs'"), ({"docs": 0.0}, "above 0")):
        with pytest.raises(ConfigError, match=complaint):
            run(replace(SMALL, weights=weights), work_in(tmp_path / "run", {**inputs, "corpus": corpus}))
    assert not (tmp_path / "run" / "shards").exists()
    with pytest.raises(DataError, match="'dox'"):  # a corpus of another tool has no report: the mixture says it
        run(replace(SMALL, weights={"dox": 1.0}), work_in(tmp_path / "other", inputs))


# -------------------------------------------------------------------------------- the run


def test_a_corpus_of_one_document_is_learned_with_its_end_held_out(inputs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(" ".join(row.text for row in documents(3, 200)), encoding="utf-8")
    config = CorpusConfig(packages=(), sources={"book": str(tmp_path / "book.txt")}, valid_share=0.1)
    corpus = work_in(tmp_path / "corpus", {})
    assert corpus_run(config, corpus)["documents"] == {"train": {"book": 1}, "valid": {"book": 1}}
    report = run(replace(SMALL, tokens=512), work_in(tmp_path / "run", {**inputs, "corpus": tmp_path / "corpus"}))
    assert report["bpb_book"] > 0 and set(report["epochs"]) == {"book"}


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


# -------------------------------------------------------------------------------- infilling is learned


class Digits(Pretrain):
    """Documents such as 333ddd: the letter follows from the digit; the digit only from what comes after it."""

    def start(self, work: Work) -> None:
        self.tokenizer, draw = Tokenizer.train([], 267), random.Random(0)
        texts = [str(digit) * 3 + "abcdefghij"[digit] * 3 for digit in (draw.randrange(10) for _ in range(4000))]
        write_shards(map(Document, texts), self.tokenizer, work.folder.path / "shards", self.config.row_tokens)
        spec, _ = ModelSpec.from_depth(1, vocab_size=267, width=64, context_length=64)
        self.begin(Decoder(spec), Shards(work.folder.path / "shards", self.tokenizer.fingerprint), {}, seed=work.seed)


def learned_digits(folder: Path, infill_rate: float) -> Digits:
    config = PretrainConfig(
        tokens=160 * 512, row_tokens=32, batch_tokens=512, micro_tokens=512, infill_rate=infill_rate, lr=0.02,
        matrix_lr=0.02,
    )  # fmt: skip
    stage = Digits(config)
    loop.run_stage(stage, work_in(folder, {}))
    return stage


@pytest.mark.slow
def test_a_middle_is_filled_from_its_suffix_and_not_without_it_nor_without_infill_training(tmp_path: Path) -> None:
    def nats(stage: Digits, prompts: list[list[int]]) -> float:
        """Mean -log p of the digit n after prompt n."""
        rows = [[*prompt, *stage.tokenizer.encode(str(digit))] for digit, prompt in enumerate(prompts)]
        return -sum(row[-1] for row in Engine(stage.model).score(rows)) / len(rows)

    stage, control = learned_digits(tmp_path / "infill", 0.5), learned_digits(tmp_path / "control", 0.0)
    asked = [infill_prompt("", letter * 3, stage.tokenizer) for letter in "abcdefghij"]
    guess = math.log(10)
    assert nats(stage, asked) < 0.25 * guess
    assert nats(stage, asked[1:] + asked[:1]) > guess  # another document's suffix misleads
    assert nats(stage, [[stage.tokenizer.end_id]] * 10) > 0.95 * guess  # from the left alone it can only be guessed
    assert nats(control, asked) > guess
    params = SamplingParams(max_tokens=8, temperature=0.0, stop_ids=(stage.tokenizer.end_id,))
    outputs = Engine(stage.model).generate(asked, params)
    middles = [
        parse_infill([*prompt, *output.ids], stage.tokenizer)[1] for prompt, output in zip(asked, outputs, strict=True)
    ]
    assert all(output.finish == "stop" for output in outputs)
    assert sum(middle == str(digit) * 3 for digit, middle in enumerate(middles)) >= 6  # how long the middle is, too


def test_each_line_tells_the_bits_per_byte_of_its_batch_and_the_share_of_the_limit(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    stage = started(tmp_path, inputs)
    batch = next(stage.steps(0)).micro_batches[0]
    terms, metrics = stage.loss(batch)
    text = b"".join(stage.tokenizer.token_bytes[token] for row in batch.tokens_BT.tolist() for token in row[1:])
    bits, num_bytes = metrics["bpb"]
    assert num_bytes == len(text) and float(bits) == pytest.approx(terms["text"].total.item() / math.log(2))
    run(SMALL, work_in(tmp_path / "run", inputs))
    line = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert 0.0 < line["bpb"] < 8.0 and line["share_of_limit"] > 0.0


# -------------------------------------------------------------------------------- a poisoned batch


def rows_of(stage: Pretrain, first: int, count: int) -> list[dict[str, Any]]:
    """Rows of the stream as they stand in the shards, and as bad-batch.jsonl should tell them."""
    places = [stage.stream.at(k) for k in range(first, first + count)]
    texts = [stage.tokenizer.decode(stage.shards.row(*place).tolist(), keep_special=True) for place in places]
    return [{"row": f"{part} row {row}", "text": text} for (part, row), text in zip(places, texts, strict=True)]


def test_a_batch_whose_loss_is_not_a_number_is_shown_by_its_rows(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = started(tmp_path / "seen", inputs)
    poisoned = [step for _, step in zip(range(14), stage.steps(0), strict=False)][13].micro_batches[1]
    real = pretrain.next_token_loss

    def loss(model: Any, tokens_BT: torch.Tensor, weights_BT: torch.Tensor) -> Any:
        total, count, metrics = real(model, tokens_BT, weights_BT)
        return total * (math.nan if torch.equal(tokens_BT, poisoned.tokens_BT) else 1.0), count, metrics

    monkeypatch.setattr(pretrain, "next_token_loss", loss)
    with pytest.raises(TrainingError, match=r"at step 14: loss.*after step 10 stands; .*holds its 4 rows") as caught:
        run(SMALL, work_in(tmp_path, inputs))
    expected = rows_of(stage, 13 * 8 + 4, 4)  # 8 rows a step, 4 a micro-batch
    assert read_metrics(tmp_path / "bad-batch.jsonl") == [{"step": 14, **row} for row in expected]
    assert expected[0]["row"] in str(caught.value)


def test_noise_in_the_text_is_a_spike_that_names_its_rows(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, tokens=68 * 128, batch_tokens=128, save_every=20, validate_every=0)
    real = pretrain.token_batch

    def poisoned(shards: Any, stream: Any, start: int, count: int, infill: Any = None) -> Any:
        batch = real(shards, stream, start, count, infill)
        noise = torch.randint(20, 300, batch.tokens_BT.shape, generator=torch.Generator().manual_seed(start))
        return replace(batch, tokens_BT=noise) if start >= 61 * 4 else batch

    clean, noisy = (work_in(tmp_path / name, inputs) for name in ("clean", "noisy"))
    recipe = replace(clean.recipe, watch={"spike": 5.0})
    run(config, replace(clean, recipe=recipe))  # the control: without the noise it does not stop
    monkeypatch.setattr(pretrain, "token_batch", poisoned)
    with pytest.raises(TrainingError, match=r"leapt at step 62 .*at step 64.*after step 60 stands"):
        run(config, replace(noisy, recipe=recipe))
    shown = [row for row in read_metrics(tmp_path / "noisy" / "bad-batch.jsonl") if row["step"] == 62]
    expected = rows_of(started(tmp_path / "seen", inputs, config), 61 * 4, 4)
    assert [row["row"] for row in shown] == [row["row"] for row in expected]
    assert all(row["text"] != real["text"] for row, real in zip(shown, expected, strict=True))  # what was learned from


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


# -------------------------------------------------------------------------------- going on from an earlier one


def go_on(folder: Path, inputs: dict[str, Path], start: Path, config: PretrainConfig = SMALL, **model: Any) -> Work:
    work = work_in(folder, {**inputs, "policy": start}, **model)
    run(config, work)
    return work


def test_a_second_section_goes_on_where_the_first_ended_on_other_text(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Base on documentation, then code on that model: it begins with the first one's weights, and a fresh one does not."""
    docs, code = replace(SMALL, weights={"docs": 1.0}), replace(SMALL, weights={"docs": 0.25, "code": 0.75})
    run(docs, work_in(tmp_path / "base", inputs))
    ended = load_checkpoint(tmp_path / "base" / "checkpoint").model.state_dict()
    begun, fresh = Pretrain(code), started(tmp_path / "fresh", inputs, code)
    begun.start(work_in(tmp_path / "begun", {**inputs, "policy": tmp_path / "base"}))
    assert all(torch.equal(tensor, ended[name]) for name, tensor in begun.model.state_dict().items())
    assert not torch.equal(fresh.model.output_weight, begun.model.output_weight)
    go_on(tmp_path / "code", inputs, tmp_path / "base", code)
    models = {name: read_model(tmp_path / name / "checkpoint") for name in ("base", "code")}
    assert models["code"].parent == models["base"].folder and models["code"].info["parent"] == "base/checkpoint"
    assert models["base"].parent is None and fresh.parent is None
    part = {"kind": "documents", "count": 200, "source": "corpus"}
    assert models["base"].learned_from == [{**part, "part": "docs", "tokens": 24 * 256}]
    both = {one["part"]: one for one in models["code"].learned_from}
    assert both["docs"]["count"] == both["code"]["count"] == 200
    assert both["docs"]["tokens"] + both["code"]["tokens"] == 24 * 256
    assert both["docs"]["tokens"] == pytest.approx(6 * 256, rel=0.1)


def test_a_model_of_another_shape_or_vocabulary_is_not_gone_on_with(inputs: dict[str, Path], tmp_path: Path) -> None:
    short = replace(SMALL, tokens=256)
    run(short, work_in(tmp_path / "base", inputs))
    with pytest.raises(ConfigError, match=r"another shape \(1 layers of width 64\)(.|\n)*hint: leave out \[model\]"):
        go_on(tmp_path / "wide", inputs, tmp_path / "base", short, width=128)
    work = work_in(tmp_path / "free", {**inputs, "policy": tmp_path / "base"})
    run(short, replace(work, recipe=replace(work.recipe, model={})))  # no [model]: the checkpoint's shape
    assert (
        load_checkpoint(tmp_path / "free" / "checkpoint").spec == load_checkpoint(tmp_path / "base" / "checkpoint").spec
    )
    other = tmp_path / "other"
    other.mkdir()
    Tokenizer.train(["other words entirely " * 20], 280).save(other)
    with pytest.raises(CheckpointError, match="another vocabulary"):
        go_on(tmp_path / "odd", {**inputs, "tokenizer": other}, tmp_path / "base", short)
