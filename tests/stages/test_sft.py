"""Fine-tuning: what is learned and what is not, epochs, resume, refusals; and it learns to stop."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lyceum.batches.pack import TokenBatch
from lyceum.config import Recipe
from lyceum.corpus.records import Conversation, Message, write_records
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams
from lyceum.errors import CheckpointError, ConfigError, DataError, RunError, TrainingError
from lyceum.log import read_metrics
from lyceum.model.checkpoint import load_checkpoint, save_checkpoint
from lyceum.model.heads import ScoreModel
from lyceum.model.lora import load_adapters, merge
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import StageFolder, Work
from lyceum.stages import sft
from lyceum.stages.sft import SFT, SFTConfig, check_ends, epoch_steps, run
from lyceum.tokens.chat import ChatFormat, Rendered
from lyceum.tokens.tokenizer import Tokenizer
from lyceum.train import loop
from lyceum.train.losses import next_token_loss
from lyceum.train.stage import Step

WORDS = ("alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa", "theta")
SMALL = SFTConfig(epochs=2.0, batch_tokens=256, micro_tokens=128, log_every=2, save_every=3)


def conversation(draw: random.Random) -> Conversation:
    """Say a word back once or twice; now and then a second turn."""
    turns = []
    for _ in range(draw.choice((1, 1, 2))):
        word, times = draw.choice(WORDS), draw.choice((1, 2))
        turns += [
            Message("user", f"say {word} {'twice' if times == 2 else 'once'} please"),
            Message("assistant", " ".join([word] * times)),
        ]
    return Conversation(tuple(turns))


def conversations(seed: int, count: int) -> list[Conversation]:
    draw = random.Random(seed)
    return [conversation(draw) for _ in range(count)]


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    texts = [message.content for row in conversations(0, 200) for message in row.messages]
    return ChatFormat(Tokenizer.train([*texts, *["user\n", "assistant\n"] * 20], 320))


def model(chat: ChatFormat, width: int = 32, layers: int = 1) -> Decoder:
    torch.manual_seed(0)
    vocab_size = chat.tokenizer.vocab_size
    return Decoder(ModelSpec(vocab_size, layers, width, 2, 2, width // 2, 2 * width, context_length=64))


def begun(chat: ChatFormat, config: SFTConfig = SMALL, count: int = 40) -> SFT:
    stage = SFT(config)
    stage.tokenizer = chat.tokenizer
    stage.begin(model(chat), conversations(0, count), conversations(1, 8), chat, seed=3)
    return stage


@pytest.fixture(scope="module")
def inputs(chat: ChatFormat, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    write_records(folder / "lessons" / "train.jsonl", conversations(0, 40))
    write_records(folder / "lessons" / "valid.jsonl", conversations(1, 8))
    save_checkpoint(folder / "pretrain" / "checkpoint", model(chat), chat.tokenizer, {})
    return {"policy": folder / "pretrain", "lessons": folder / "lessons"}


def work_in(folder: Path, inputs: dict[str, Path]) -> Work:
    folder.mkdir(parents=True, exist_ok=True)
    return Work(StageFolder(folder), inputs, seed=7, recipe=Recipe("toy", 7, {}, (), Path("toy.toml")))


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "pick_device", lambda: torch.device("cpu"))


# -------------------------------------------------------------------------------- what is learned (known answer 12)


def learned(batch: TokenBatch, chat: ChatFormat) -> list[str]:
    """What each row's weighted targets spell."""
    rows = zip(batch.tokens_BT, batch.weights_BT, strict=True)
    return [chat.tokenizer.decode(tokens[weights > 0].tolist(), keep_special=True) for tokens, weights in rows]


def test_only_what_the_assistant_writes_and_its_end_is_learned(chat: ChatFormat) -> None:
    stage = begun(chat)
    wanted = sorted(
        "".join(message.content + "<|im_end|>" for message in row.messages if message.role == "assistant")
        for row in conversations(0, 40)
    )
    steps = list(stage.steps(0))[: stage.steps_per_epoch]
    batches = [batch for step in steps for batch in step.micro_batches]
    assert sorted(text for batch in batches for text in learned(batch, chat)) == wanted
    assert sum(step.tokens for step in steps) == sum(len(chat.render(row)) for row in conversations(0, 40))


def test_a_conversation_learns_nothing_from_its_neighbours_in_a_batch(chat: ChatFormat) -> None:
    stage = begun(chat)
    batch = next(batch for step in stage.steps(0) for batch in step.micro_batches if len(batch.tokens_BT) > 2)
    together, _, _ = next_token_loss(stage.model, batch.tokens_BT, batch.weights_BT)
    alone = [
        next_token_loss(stage.model, tokens[None, :length], weights[None, :length])[0]
        for tokens, weights, length in zip(batch.tokens_BT, batch.weights_BT, batch.lengths_B.tolist(), strict=True)
    ]
    assert together.item() == pytest.approx(sum(alone).item(), rel=1e-5)
    changed = batch.tokens_BT.clone()
    changed[0] = changed[0].flip(0)
    weights = batch.weights_BT.clone()
    weights[0] = 0.0
    before, after = (next_token_loss(stage.model, tokens, weights)[0] for tokens in (batch.tokens_BT, changed))
    assert before.item() == after.item()


def test_a_message_weighs_what_its_record_says(chat: ChatFormat) -> None:
    messages = (Message("user", "say"), Message("assistant", "beta", weight=0.0), Message("user", "say"))
    row = Conversation((*messages, Message("assistant", "gamma", weight=0.5)))
    stage = SFT(SMALL)
    stage.begin(model(chat), [row], [], chat, seed=0)
    (batch,) = next(stage.steps(0)).micro_batches
    assert learned(batch, chat) == ["gamma<|im_end|>"]
    num_tokens = len(chat.tokenizer.encode("gamma")) + 1
    assert stage.counts(batch) == {"reply": 0.5 * num_tokens}


# -------------------------------------------------------------------------------- epochs


def test_an_epoch_visits_every_row_once_in_bounded_micro_batches() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(3, 60) for _ in range(101)]
    sizes = set()
    orders = []
    for epoch in range(4):
        steps = epoch_steps(lengths, micro_tokens=128, batch_tokens=512, seed=epoch)
        groups = [group for step in steps for group in step]
        assert sorted(row for group in groups for row in group) == list(range(101))
        assert all(len(group) * max(lengths[row] for row in group) <= 128 for group in groups)
        assert all(150 < sum(lengths[row] for group in step for row in group) < 900 for step in steps)
        sizes.add(len(steps))
        orders.append(steps)
    assert sizes == {round(sum(lengths) / 512)}
    assert orders[0] != orders[1] and orders[0] == epoch_steps(lengths, 128, 512, seed=0)


def test_a_micro_batch_tells_which_conversations_are_in_it(chat: ChatFormat) -> None:
    stage, given = begun(chat), conversations(0, 40)
    described = [row for step in stage.steps(0) for batch in step.micro_batches for row in stage.describe(batch)]
    assert len(described) >= 40
    for row in described:
        number = int(row["row"].split()[1])  # counted from 1, as lines are
        assert row["text"] == chat.tokenizer.decode(chat.render(given[number - 1]).ids, keep_special=True)


def test_a_batch_smaller_than_one_conversation_still_makes_steps() -> None:
    steps = epoch_steps([30, 15, 10], micro_tokens=8, batch_tokens=4, seed=0)
    assert sorted(steps, key=str) == [[[0]], [[1, 2]]]


def test_steps_from_the_middle_are_the_same_steps(chat: ChatFormat) -> None:
    def tokens(steps: Iterator[Step[Any]]) -> list[Any]:
        return [[batch.tokens_BT.tolist() for batch in step.micro_batches] for step in steps]

    stage = begun(chat)
    whole = tokens(stage.steps(0))
    assert len(whole) == stage.num_steps == 2 * stage.steps_per_epoch
    assert whole[: stage.steps_per_epoch] != whole[stage.steps_per_epoch :]
    for first in (1, stage.steps_per_epoch, stage.num_steps - 1):
        assert tokens(stage.steps(first)) == whole[first:]


# -------------------------------------------------------------------------------- the run


ADAPTERS = dataclasses.replace(SMALL, lora_rank=4, lora_alpha=8.0, lr=0.03)


@pytest.mark.parametrize("config", [SMALL, ADAPTERS], ids=["weights", "adapters"])
def test_the_run_learns_reports_and_resumes_bit_for_bit(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: SFTConfig
) -> None:
    report = run(config, work_in(tmp_path / "straight", inputs))
    lines = read_metrics(tmp_path / "straight" / "metrics.jsonl")
    assert lines[-1]["loss/reply"] < 0.95 * lines[0]["loss/reply"]
    assert report["conversations"] == 40 and report["dropped"] == 0 and report["epochs"] == 2.0
    assert report["valid_loss"] == lines[-1]["valid/loss"] and 0 <= report["valid_accuracy"] <= 1
    samples = (tmp_path / "straight" / "samples.jsonl").read_text()
    assert len(samples.splitlines()) == sft.NUM_SAMPLES and "please" in samples
    told = load_checkpoint(tmp_path / "straight" / "checkpoint").info
    assert told["parent"] == str(inputs["policy"] / "checkpoint")  # which lies in another folder than this run's
    assert told["learned_from"] == [{"kind": "conversations", "count": 40, "source": "lessons"}]

    whole = SFT.steps

    def killed_at_5(self: SFT, first: int) -> Iterator[Step[TokenBatch]]:
        for number, step in enumerate(whole(self, first), first):
            if number == 5:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(SFT, "steps", killed_at_5)
    with pytest.raises(KeyboardInterrupt):
        run(config, work_in(tmp_path / "killed", inputs))
    monkeypatch.setattr(SFT, "steps", whole)
    run(config, work_in(tmp_path / "killed", inputs))
    for one, other in zip(read_metrics(tmp_path / "killed" / "metrics.jsonl"), lines, strict=True):
        assert {k: one[k] for k in one if k not in loop.TIMINGS} == {
            k: other[k] for k in other if k not in loop.TIMINGS
        }


def test_adapters_alone_are_trained_and_the_checkpoint_is_base_and_adapters_together(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    base = load_checkpoint(inputs["policy"] / "checkpoint").model
    stage = SFT(dataclasses.replace(ADAPTERS, snapshots=(0.5,), ema=0.5))
    loop.run_stage(stage, work_in(tmp_path, inputs))
    trained = dict(stage.model.named_parameters())
    assert all(torch.equal(weight, trained[name]) for name, weight in base.named_parameters())
    assert {name for name, weight in trained.items() if weight.requires_grad} == {n for n in trained if ".lora_" in n}
    load_adapters(tmp_path / "adapter", base)
    saved, snapshot = (load_checkpoint(tmp_path / name).model for name in ("checkpoint", "snapshot-0.50"))
    tokens = torch.arange(40)[None]
    adapted = base.logits(base(tokens))
    torch.testing.assert_close(saved.logits(saved(tokens)), adapted, rtol=0, atol=1e-5)
    assert (snapshot.logits(snapshot(tokens)) - adapted).abs().max() > 1e-3
    merge(base)
    merged, found = base.state_dict(), saved.state_dict()
    assert merged.keys() == found.keys() and all(torch.equal(merged[name], found[name]) for name in merged)


def test_a_run_starts_from_a_folder_of_another_family(
    chat: ChatFormat, inputs: dict[str, Path], tmp_path: Path
) -> None:
    spec = dataclasses.replace(model(chat).spec, qk_norm=False, biases=("q_proj", "k_proj", "v_proj"))
    save_checkpoint(tmp_path / "models" / "tiny-qwen2", Decoder(spec), chat.tokenizer, {})
    (tmp_path / "models" / "tiny-qwen2" / "lyceum.json").unlink()
    config = json.loads((tmp_path / "models" / "tiny-qwen2" / "config.json").read_text())
    assert config["model_type"] == "qwen2"
    run(SMALL, work_in(tmp_path / "run", {**inputs, "policy": tmp_path / "models" / "tiny-qwen2"}))
    saved = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert saved.spec == spec and saved.info["parent"] == "models/tiny-qwen2"


def test_a_device_out_of_memory_trains_on_with_smaller_micro_batches(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(dataclasses.replace(SMALL, epochs=1.0), work_in(tmp_path / "roomy", inputs))
    whole, widest = SFT.loss, []

    def cramped(self: SFT, micro_batch: TokenBatch) -> Any:
        widest.append(micro_batch.tokens_BT.numel())
        if widest[-1] > 64 and len(micro_batch.lengths_B) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, micro_batch)

    monkeypatch.setattr(SFT, "loss", cramped)
    run(dataclasses.replace(SMALL, epochs=1.0), work_in(tmp_path / "cramped", inputs))
    assert max(widest) > 64 and capsys.readouterr().err.count("micro-batches are halved") == 1
    losses = [[x["loss"] for x in read_metrics(tmp_path / f / "metrics.jsonl")] for f in ("cramped", "roomy")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) > 2


def test_too_long_conversations_are_counted_and_nothing_left_is_an_error(
    chat: ChatFormat, inputs: dict[str, Path], tmp_path: Path
) -> None:
    lengths = sorted(len(chat.render(row)) for row in conversations(0, 40))
    limit = lengths[20]
    report = run(dataclasses.replace(SMALL, max_tokens=limit), work_in(tmp_path / "some", inputs))
    assert report["dropped"] == sum(length > limit for length in lengths) > 0
    with pytest.raises(DataError, match="none of 40 conversations") as caught:
        run(dataclasses.replace(SMALL, max_tokens=4), work_in(tmp_path / "none", inputs))
    assert caught.value.hint


def test_a_run_without_validation_conversations_says_so(inputs: dict[str, Path], tmp_path: Path) -> None:
    write_records(tmp_path / "lessons" / "train.jsonl", conversations(0, 40))
    report = run(SMALL, work_in(tmp_path / "run", {**inputs, "lessons": tmp_path / "lessons"}))
    assert report["valid_loss"] is None and "no validation" in report["line"]


def test_a_reward_model_is_no_place_to_start_from(chat: ChatFormat, inputs: dict[str, Path], tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "reward" / "checkpoint", ScoreModel.from_decoder(model(chat)), chat.tokenizer, {})
    with pytest.raises(CheckpointError, match="no language model"):
        run(SMALL, work_in(tmp_path / "run", {**inputs, "policy": tmp_path / "reward"}))


# -------------------------------------------------------------------------------- noise (NEFTune)


NOISY = dataclasses.replace(SMALL, neftune_alpha=5.0)


def test_noise_has_the_stated_norm_is_zero_on_pads_and_belongs_to_its_row() -> None:
    lengths, seeds, width, alpha = torch.tensor([40, 7, 90]), [11, 12, 13], 64, 5.0
    noise = sft.embedding_noise(lengths, seeds, 100, width, alpha)
    for row, length in enumerate(lengths.tolist()):
        # uniform in (-1, 1) has the variance 1/3: the norm is alpha / sqrt(3), whatever the length
        assert noise[row].norm().item() == pytest.approx(alpha / 3**0.5, rel=0.05)
        assert noise[row].abs().max() <= alpha / (length * width) ** 0.5 and not noise[row, length:].any()
        alone = sft.embedding_noise(lengths[row : row + 1], seeds[row : row + 1], length, width, alpha)
        assert torch.equal(alone[0], noise[row, :length])
    assert not torch.equal(noise[0, :7], noise[1, :7])


def test_noise_is_added_to_the_embeddings_while_training_and_never_while_evaluating(chat: ChatFormat) -> None:
    plain, noisy = begun(chat), begun(chat, NOISY)
    assert plain.validate() == noisy.validate() and plain.samples() == noisy.samples()
    (one, *_), (other, *_) = (next(stage.steps(0)).micro_batches for stage in (plain, noisy))
    assert torch.equal(one.tokens_BT, other.tokens_BT)
    before = plain.loss(one)[0]["reply"].total.item()
    assert noisy.loss(other)[0]["reply"].total.item() != before
    embedded = plain.model.model.embed_tokens(other.tokens_BT[:, :-1])  # the same by hand: a model that is fed vectors
    added = sft.embedding_noise(other.lengths_B, other.seeds, other.tokens_BT.shape[1], plain.model.spec.width, 5.0)
    given = embedded + added[:, :-1]
    plain.model.model.embed_tokens.register_forward_hook(lambda *_: given)
    by_hand = next_token_loss(plain.model, other.tokens_BT, other.weights_BT)[0]
    assert noisy.loss(other)[0]["reply"].total.item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_noise_is_another_in_every_step_and_the_same_in_any_cut(chat: ChatFormat) -> None:
    stage = begun(chat, dataclasses.replace(NOISY, micro_tokens=256))
    steps = list(stage.steps(0))
    seeds = [seed for step in steps for batch in step.micro_batches for seed in batch.seeds]
    assert len(set(seeds)) == len(seeds) == 2 * 40
    (batch, *_) = (batch for batch in steps[0].micro_batches if len(batch.lengths_B) > 1)
    whole = stage.loss(batch)[0]["reply"].total.item()
    assert sum(stage.loss(half)[0]["reply"].total.item() for half in batch.halves()) == pytest.approx(whole, rel=1e-5)


# -------------------------------------------------------------------------------- validation that decides


class Scripted(SFT):
    """Fine-tuning whose validation losses are given."""

    losses: tuple[float, ...] = ()
    seen = 0

    def validate(self) -> dict[str, float]:
        given = self.losses[self.seen]
        self.seen += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sft, "mean_loss", lambda model, batches: {"loss": given, "accuracy": 0.5})
            return super().validate()


EARLY = dataclasses.replace(SMALL, patience=2, validate_every=1, save_every=1)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_ends_when_no_validation_was_better_and_keeps_the_best_model(
    inputs: dict[str, Path], tmp_path: Path, rank: int
) -> None:
    stage = Scripted(dataclasses.replace(EARLY, lora_rank=rank))
    stage.losses = (3.0, 2.0, 2.5, 1.5, 1.6, 1.5, 1.4)  # the sixth is not better, and the second in a row
    report = loop.run_stage(stage, work_in(tmp_path, inputs))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and stage.num_steps > 7
    assert report["stopped_early"] and report["best_loss"] == 1.5 and report["epochs"] < 2.0
    saved = load_checkpoint(tmp_path / "checkpoint")
    assert saved.info["step"] == 4 and saved.info["best_loss"] == 1.5
    shorter = SFT(dataclasses.replace(SMALL, validate_every=1, lora_rank=rank))  # the same run, looked at after step 4
    kept: list[dict[str, torch.Tensor]] = []
    shorter.samples = lambda: (
        kept.append(  # type: ignore[method-assign]
            {name: weight.clone() for name, weight in shorter.model.state_dict().items()}
        )
        or []
    )
    loop.run_stage(shorter, work_in(tmp_path / "shorter", inputs))
    if not rank:
        assert all(torch.equal(weight, kept[3][name]) for name, weight in saved.model.state_dict().items())
    else:
        base = load_checkpoint(inputs["policy"] / "checkpoint").model
        load_adapters(tmp_path / "adapter", base)
        adapters = {name: weight for name, weight in base.state_dict().items() if ".lora_" in name}
        assert adapters and all(torch.equal(weight, kept[3][name]) for name, weight in adapters.items())


def test_waiting_survives_a_kill(inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(EARLY, patience=1, validate_every=2, save_every=3, lr=0.03, matrix_lr=0.1, epochs=8.0)
    straight = run(config, work_in(tmp_path / "straight", inputs))
    whole, ends = SFT.steps, read_metrics(tmp_path / "straight" / "metrics.jsonl")[-1]["step"]

    def killed(self: SFT, first: int) -> Iterator[Step[TokenBatch]]:
        for number, step in enumerate(whole(self, first), first):
            if number == ends - 1:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(SFT, "steps", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, work_in(tmp_path / "killed", inputs))
    monkeypatch.setattr(SFT, "steps", whole)
    report = run(config, work_in(tmp_path / "killed", inputs))
    assert report["best_loss"] == straight["best_loss"] and report["stopped_early"] == straight["stopped_early"]
    saved, other = (load_checkpoint(tmp_path / name / "checkpoint").model for name in ("straight", "killed"))
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in saved.state_dict().items())


def test_the_reward_model_can_be_what_patience_waits_for(
    chat: ChatFormat, inputs: dict[str, Path], tmp_path: Path
) -> None:
    config = dataclasses.replace(EARLY, best_by="reward", patience=9)
    with pytest.raises(RunError, match="no reward section stands before this one"):
        run(config, work_in(tmp_path / "none", inputs))
    judge = ScoreModel.from_decoder(model(chat))
    save_checkpoint(tmp_path / "reward" / "checkpoint", judge, chat.tokenizer, {"reward_centre": 0.0})
    report = run(config, work_in(tmp_path / "run", {**inputs, "reward": tmp_path / "reward"}))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert report["best_reward"] == max(line["valid/reward"] for line in lines)
    assert all(0 <= line["valid/ended"] <= 1 for line in lines)
    best = next(line["step"] for line in lines if line["valid/reward"] == report["best_reward"])
    assert load_checkpoint(tmp_path / "run" / "checkpoint").info["step"] == best


def test_replies_without_an_end_score_what_no_reward_model_is_asked(chat: ChatFormat) -> None:
    stage = begun(chat)
    asked: list[int] = []

    def judge(prompts: Any, responses: Any, meta: Any) -> list[float | None]:
        asked.append(len(responses))
        return [1.0] * len(responses)

    stage.judge = judge
    numbers = stage.validate()
    assert asked == [8] and numbers["reward"] == pytest.approx(numbers["ended"] - 3.0 * (1 - numbers["ended"]))


def test_replies_that_cannot_be_scored_are_counted_and_in_no_mean(chat: ChatFormat) -> None:
    stage = begun(chat)
    stage.judge = lambda prompts, responses, meta: [None, *[-3.0] * (len(responses) - 1)]
    numbers = stage.validate()
    assert numbers["unscored"] == 1 and numbers["reward"] == pytest.approx(-3.0)
    stage.judge = lambda prompts, responses, meta: [None] * len(responses)
    with pytest.raises(TrainingError, match="could score no reply"):
        stage.validate()


def test_patience_without_anything_to_wait_for_is_refused(chat: ChatFormat) -> None:
    with pytest.raises(ConfigError, match="validate_every = 0"):
        SFTConfig(patience=2)
    with pytest.raises(TrainingError, match="no conversations to validate on"):
        SFT(EARLY).begin(model(chat), conversations(0, 8), [], chat, seed=0)


# -------------------------------------------------------------------------------- stopping


def without_ends(rows: Sequence[Rendered], chat: ChatFormat) -> list[Rendered]:
    """What masking the padding token does where it is the end token too: the end has no loss weight."""
    ends = chat.stop_ids
    return [Rendered(r.ids, [0.0 if i in ends else w for i, w in zip(r.ids, r.weights, strict=True)]) for r in rows]


def test_a_turn_whose_end_is_not_learned_is_refused(chat: ChatFormat) -> None:
    rows = [chat.render(row) for row in conversations(0, 3)]
    check_ends(rows, chat)
    with pytest.raises(TrainingError, match="conversation 1 the end of the turn has no loss weight"):
        check_ends([rows[0], *without_ends(rows[1:], chat)], chat)


def test_a_padding_token_that_ends_a_turn_is_refused(chat: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat.tokenizer, "pad_id", chat.tokenizer.turn_end_id)
    with pytest.raises(TrainingError, match="padding token is also an end token"):
        check_ends([], chat)


@pytest.mark.slow
def test_fine_tuning_teaches_to_stop_and_masking_the_end_does_not(
    chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, held = conversations(0, 400), conversations(1, 60)
    config = SFTConfig(epochs=6.0, batch_tokens=512, micro_tokens=512, lr=0.01, matrix_lr=0.02)
    prompts = [chat.prompt(Conversation(row.messages[:-1])) for row in held]

    class InMemory(SFT):
        def start(self, work: Work) -> None:
            self.tokenizer = chat.tokenizer
            self.begin(model(chat, width=64, layers=2), train, [], chat, seed=0)

    def share_that_ends(folder: Path) -> tuple[float, float]:
        stage = InMemory(config)
        loop.run_stage(stage, work_in(folder, {}))
        params = SamplingParams(max_tokens=16, temperature=0.0, stop_ids=chat.stop_ids)
        outputs = Engine(stage.model).generate(prompts, params)
        ends = [output.finish == "stop" for output in outputs]
        right = [
            chat.parse(output.ids).content == row.messages[-1].content
            for output, row in zip(outputs, held, strict=True)
        ]
        return sum(ends) / len(ends), sum(right) / len(right)

    ends, right = share_that_ends(tmp_path / "taught")
    assert ends > 0.95 and right > 0.8

    monkeypatch.setattr(sft, "check_ends", lambda rendered, chat: None)
    render = ChatFormat.render
    monkeypatch.setattr(ChatFormat, "render", lambda self, row: without_ends([render(self, row)], self)[0])
    prompts = [chat.prompt(Conversation(row.messages[:-1])) for row in held]
    ends, _ = share_that_ends(tmp_path / "control")
    assert ends < 0.3


# -------------------------------------------------------------------------------- its page


def test_the_page_lists_every_setting_of_its_own_with_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs" / "stages" / "sft.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", page.split("## Settings")[1], re.MULTILINE))
    own = SFTConfig.__annotations__
    assert rows == {name: str(getattr(SFTConfig(), name)) or '""' for name in own}
