"""Supervised fine-tuning: learn to answer from written conversations.

The paper: L. Ouyang et al., "Training language models to follow instructions with human feedback" (2022), sections 3.1
(step 1) and 3.5, appendix C.1. Symbols and names:

    demonstrations D           conversations of lessons/train.jsonl, rendered by `lyceum.tokens.chat`
    -log p(y | x), y from D    next_token_loss: weight 1 on what the assistant writes *and its end token*, 0 elsewhere
    16 epochs, cosine to 10 %  epochs, decay_shape, final_lr

Deviations, each with its reason:
- The loss is a mean over the target tokens of the whole step, not over conversations: a mean of means would weigh a
  token by the length of its neighbours.
- No residual dropout (the paper: 0.2): the model's architecture has none; fewer epochs do its work.
- The checkpoint is the last one, not that with the best reward-model score: there is no reward model yet.
- A conversation has all its turns in one row and every assistant turn is learned.

The padding token is never the end token, and the stage refuses to begin if an end is not learned: a model that is not
taught its end never stops (the commonest complaint about peers).

With `lora_rank` low-rank adapters (`lyceum.model.lora`) are trained in place of the weights; the checkpoint is merged.

Run by `lyceum sft RECIPE`. What it is not: packing of several conversations into one row; rows hold one each and are
bucketed by length.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lyceum import dist
from lyceum.batches.pack import Fitted, TokenBatch, bucket, collate, fit
from lyceum.config import setting
from lyceum.corpus.records import Conversation, read_conversations
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams, mix_seed
from lyceum.errors import CheckpointError, TrainingError
from lyceum.log import log
from lyceum.model.checkpoint import load_checkpoint, save_checkpoint
from lyceum.model.lora import adapt, merged_tensors, save_adapters
from lyceum.model.transformer import Decoder
from lyceum.run import checkpoint_in
from lyceum.tokens.chat import ChatFormat, Rendered
from lyceum.train.loop import run_stage
from lyceum.train.losses import mean_loss, next_token_loss
from lyceum.train.parallel import gathered
from lyceum.train.stage import Metrics, Stage, Step, Term, TrainConfig, Trained

if TYPE_CHECKING:
    from lyceum.run import Work

VERSION = 1
NUM_SAMPLES = 6
SAMPLE_TOKENS = 64

# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """Settings of supervised fine-tuning."""

    epochs: float = setting(4.0, "passes over the conversations: the run's length", low=0.0)
    max_tokens: int = setting(0, "longest conversation that is learned from; 0 = the model's context length", low=0)

    lora_rank: int = setting(0, "rank of low-rank adapters, trained in place of the weights; 0 = the weights", low=0)
    lora_alpha: float = setting(16.0, "what the adapters write is scaled by lora_alpha / lora_rank", low=0.0)

    matrix_lr: float = setting(0.01, "peak learning rate of Muon (matrices inside layers); 0 = AdamW at lr", low=0.0)
    lr: float = setting(3e-3, "peak learning rate of AdamW (embeddings, norms)", low=0.0)
    warmup: float = setting(0.0, "share of the run over which the learning rate rises", low=0.0, high=1.0)
    decay: float = setting(1.0, "share of the run, at its end, over which it falls (0 = constant)", low=0.0, high=1.0)
    decay_shape: str = setting("cosine", "how it falls", choices=("linear", "cosine"))
    final_lr: float = setting(0.1, "learning rate at the end, as a share of the peak", low=0.0, high=1.0)


# ---------------------------------------------------------------- equations


def epoch_steps(lengths: Sequence[int], micro_tokens: int, batch_tokens: int, seed: int) -> list[list[list[int]]]:
    """One epoch as steps of micro-batches of row numbers: every row once, in an order that only `seed` decides.

    Rows of one micro-batch have similar lengths, and rows x longest row is at most `micro_tokens` (or the longest row).
    The number of steps depends on the lengths alone: all tokens / batch_tokens, so a step has about batch_tokens.

    Args:
        lengths: tokens of each row.
    """
    groups = bucket(lengths, max(min(micro_tokens, batch_tokens), max(lengths)), seed)
    num_steps = min(len(groups), max(1, round(sum(lengths) / batch_tokens)))
    edges = [round(number * len(groups) / num_steps) for number in range(num_steps + 1)]
    return [groups[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def check_ends(rendered: Sequence[Rendered], chat: ChatFormat) -> None:
    """Refuses conversations whose turns do not teach their end.

    Raises:
        TrainingError: a conversation in which something is learned, but no end token; or an end token that is the pad.
    """
    tokenizer = chat.tokenizer
    if tokenizer.pad_id in chat.stop_ids:
        raise TrainingError(
            "the padding token is also an end token: the end would never be learned",
            hint="use a tokenizer whose padding token is its own",
        )
    for number, row in enumerate(rendered):
        taught = any(token == tokenizer.turn_end_id and w > 0 for token, w in zip(row.ids, row.weights, strict=True))
        if not taught:
            raise TrainingError(
                f"in conversation {number} the end of the turn has no loss weight: the model would not learn to stop",
                hint="give the assistant's message its weight as a whole, and do not cut conversations",
            )


# ---------------------------------------------------------------- the stage


class SFT(Stage[TokenBatch]):
    """Next-token prediction on what the assistant writes."""

    kind = "sft"
    headline = "loss/reply"
    can_shard = True
    config: SFTConfig

    @property
    def model(self) -> Decoder:
        """What is trained."""
        return cast(Decoder, self.trained["model"].module)

    def start(self, work: Work) -> None:
        """Loads the pretrained model and renders the conversations."""
        folder = checkpoint_in(work.inputs["policy"])
        loaded = load_checkpoint(folder)
        if not isinstance(loaded.model, Decoder) or loaded.tokenizer is None:
            raise CheckpointError(
                f"{folder} holds no language model with a tokenizer", hint="sft starts from a pretrain or sft section"
            )
        self.tokenizer, self.parent = loaded.tokenizer, f"{folder.parent.name}/{folder.name}"
        train = read_conversations(work.inputs["lessons"] / "train.jsonl")
        valid_path = work.inputs["lessons"] / "valid.jsonl"
        has_valid = valid_path.exists() and valid_path.stat().st_size > 0
        valid = list(read_conversations(valid_path)) if has_valid else []
        self.begin(loaded.model, list(train), valid, ChatFormat(loaded.tokenizer), seed=work.seed)

    def begin(
        self,
        model: Decoder,
        train: Sequence[Conversation],
        valid: Sequence[Conversation],
        chat: ChatFormat,
        *,
        seed: int,
    ) -> None:
        """Sets the stage from things in memory; `valid` may be empty.

        Raises:
            DataError: no conversation fits or has anything to learn. TrainingError: an end is not learned.
        """
        config, context = self.config, model.spec.context_length
        longest = min(config.max_tokens or context, context)
        self.chat, self.seed = chat, seed
        self.train = fit(map(chat.render, train), longest)
        check_ends(self.train.rendered, chat)
        self.lengths = [len(row) for row in self.train.rendered]
        held = fit(map(chat.render, valid), longest) if valid else Fitted([], [])
        lengths = [len(row) for row in held.rendered]
        groups = bucket(lengths, max([config.micro_tokens, *lengths]), 0)
        self.valid = [collate([held.rendered[row] for row in group], chat.tokenizer.pad_id) for group in groups]
        self.shown = [valid[number] for number in held.kept[:NUM_SAMPLES]]
        self.steps_per_epoch = len(self._epoch(0))
        self.num_steps = max(1, round(config.epochs * self.steps_per_epoch))
        optimizer = config.optimizer()
        if config.lora_rank:
            adapt(model, config.lora_rank, config.lora_alpha)
            optimizer = config.optimizer(matrix_lr=0.0)  # AdamW, as in Hu et al.: with Muon they were never tried here
            num_trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
            log.info(f"  adapters of rank {config.lora_rank}: {num_trained:,} numbers are trained")
        self.trained = {"model": Trained(model, optimizer, config.clip_norm)}
        log.info(f"  {len(self.lengths):,} conversations, {sum(self.lengths):,} tokens an epoch")

    def _epoch(self, epoch: int) -> list[list[list[int]]]:
        config = self.config
        return epoch_steps(self.lengths, config.micro_tokens, config.batch_tokens, mix_seed(self.seed, epoch))

    def steps(self, first: int) -> Iterator[Step[TokenBatch]]:
        """The order of an epoch is a function of (seed, epoch) alone; ranks share the micro-batches of a step."""
        pad_id = self.chat.tokenizer.pad_id
        for epoch in range(first // self.steps_per_epoch, -(-self.num_steps // self.steps_per_epoch)):
            start = epoch * self.steps_per_epoch
            for number, groups in enumerate(self._epoch(epoch), start):
                if first <= number < self.num_steps:
                    tokens = sum(self.lengths[row] for group in groups for row in group)
                    yield Step([self._collate(group, pad_id) for group in dist.share(groups)], tokens=tokens)

    def _collate(self, rows: Sequence[int], pad_id: int) -> TokenBatch:
        names = [f"conversation {self.train.kept[row] + 1} of lessons" for row in rows]
        return collate([self.train.rendered[row] for row in rows], pad_id, names)

    def counts(self, micro_batch: TokenBatch) -> dict[str, float]:
        """Target tokens: what the assistant writes, by weight."""
        return {"reply": micro_batch.num_targets}

    def loss(self, micro_batch: TokenBatch) -> tuple[dict[str, Term], Metrics]:
        """Cross-entropy of the assistant's tokens, in nats."""
        total, _, metrics = next_token_loss(self.model, micro_batch.tokens_BT, micro_batch.weights_BT)
        return {"reply": Term(total)}, metrics

    def halves(self, micro_batch: TokenBatch) -> list[TokenBatch]:
        """Its rows in two."""
        return micro_batch.halves()

    def validate(self) -> dict[str, float]:
        """Loss per target token and token accuracy on the validation conversations."""
        return mean_loss(self.model, self.valid)

    def samples(self) -> list[dict[str, Any]]:
        """Greedy replies to the last question of a few validation conversations."""
        asked = [c for c in self.shown if c.messages[-1].role == "assistant" and len(c.messages) > 1]
        questions = [replace(c, messages=c.messages[:-1]) for c in asked]
        prompts = [self.chat.prompt(question) for question in questions]
        room = self.model.spec.context_length - max(map(len, prompts), default=0)
        params = SamplingParams(
            max_tokens=max(0, min(SAMPLE_TOKENS, room)), temperature=0.0, stop_ids=self.chat.stop_ids
        )
        outputs = Engine(self.model).generate(prompts, params) if prompts else []
        return [
            {
                "prompt": question.messages[-1].content,
                "reply": self.chat.parse(output.ids).content,
                "ended": output.finish == "stop",
                "reference": conversation.messages[-1].content,
            }
            for conversation, question, output in zip(asked, questions, outputs, strict=True)
        ]

    def describe(self, micro_batch: TokenBatch) -> list[dict[str, Any]]:
        """The conversation's number in the lessons' train.jsonl, from 1, and its text."""
        return micro_batch.described(self.chat.tokenizer)

    def save(self, folder: Path, snapshot: str = "") -> None:
        """Writes the checkpoint; of adapters the merged weights, and at the end also the adapters alone."""
        if not self.config.lora_rank:
            return super().save(folder, snapshot)
        if not snapshot:
            save_adapters(folder / "adapter", self.model, self.parent or "", gather=gathered)
        merge = partial(merged_tensors, scale=self.config.lora_alpha / self.config.lora_rank)
        place = folder / (snapshot or "checkpoint")
        save_checkpoint(place, self.model, self.tokenizer, self.info(), gather=gathered, change=merge)

    def report(self, final: Mapping[str, float]) -> dict[str, Any]:
        """Validation loss and accuracy, and what was learned from."""
        loss, accuracy = final.get("valid/loss"), final.get("valid/accuracy")
        said = f"validation loss {loss:.3f}, token accuracy {accuracy:.3f}" if loss is not None else "no validation"
        line = f"{len(self.lengths):,} conversations, {self.num_steps / self.steps_per_epoch:.1f} epochs, {said}"
        return {
            "line": line,
            "valid_loss": loss,
            "valid_accuracy": accuracy,
            "conversations": len(self.lengths),
            "dropped": self.train.num_dropped,
            "without_targets": self.train.num_without_targets,
            "epochs": self.num_steps / self.steps_per_epoch,
        }


def run(config: SFTConfig, work: Work) -> dict[str, Any]:
    """Fine-tunes the model of `work.inputs["policy"]` on the conversations of `work.inputs["lessons"]`.

    Returns:
        The report: valid_loss, valid_accuracy, conversations, dropped, epochs, tokens, speed, and the last metrics.

    Raises:
        DataError: nothing fits or has anything to learn. TrainingError: the end of a turn would not be learned.
        CheckpointError: there is no language model to start from.
    """
    return run_stage(SFT(config), work)
