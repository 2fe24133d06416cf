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
- The checkpoint is the last one unless `patience` is set; then it is that of the best validation, by loss or, as in the
  paper, by a reward model, for which a reward section must stand before this one.
- A conversation has all its turns in one row and every assistant turn is learned.

The padding token is never the end token, and the stage refuses to begin if an end is not learned: a model that is not
taught its end never stops (the commonest complaint about peers).

With `lora_rank` low-rank adapters (`lyceum.model.lora`) are trained in place of the weights; the checkpoint is merged.
With `neftune_alpha` the embeddings get noise while training (N. Jain et al., "NEFTune: Noisy embeddings improve instruction
finetuning", 2023), by `embedding_noise`.

Run by `lyceum sft RECIPE`. What it is not: packing of several conversations into one row; rows hold one each and are
bucketed by length.

Shapes: B rows, T positions, D width.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lyceum import dist
from lyceum.batches.pack import Fitted, TokenBatch, bucket, collate, fit
from lyceum.config import setting
from lyceum.corpus.records import Conversation, read_conversations
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams, mix_seed
from lyceum.engine.sequence import Output
from lyceum.errors import CheckpointError, ConfigError, RunError, TrainingError
from lyceum.log import log
from lyceum.model.checkpoint import load_checkpoint
from lyceum.model.lineage import learned
from lyceum.model.transformer import Decoder
from lyceum.run import checkpoint_in, fresh_folder
from lyceum.stages.adapters import save_policy, trained_policy
from lyceum.stages.reward import RewardModel
from lyceum.tokens.chat import ChatFormat, Rendered
from lyceum.train.loop import run_stage
from lyceum.train.losses import mean_loss, next_token_loss
from lyceum.train.parallel import is_piece
from lyceum.train.stage import Metrics, Stage, Step, Term, TrainConfig

if TYPE_CHECKING:
    from lyceum.run import Work

VERSION = 1
NUM_SAMPLES = 6
SAMPLE_TOKENS = 64
NUM_JUDGED = 64  # validation questions whose replies the reward model scores
UNFINISHED_SCORE = -3.0  # of a reply without an end, which the reward model never saw: as PPO's missing_end_score
BEST = "best"  # folder of the checkpoint with the best validation so far

# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """Settings of supervised fine-tuning."""

    data: str = setting("", "a file of conversations, in place of the lessons before it")
    valid_data: str = setting("", "a file of conversations to validate on, beside `data`; empty = none")
    epochs: float = setting(4.0, "passes over the conversations: the run's length", low=0.0)
    max_tokens: int = setting(0, "longest conversation that is learned from; 0 = the model's context length", low=0)

    lora_rank: int = setting(0, "rank of low-rank adapters, trained in place of the weights; 0 = the weights", low=0)
    lora_alpha: float = setting(16.0, "what the adapters write is scaled by lora_alpha / lora_rank", low=0.0)

    neftune_alpha: float = setting(0.0, "noise on the embeddings while training (5 to 15 is usual); 0 = none", low=0.0)
    patience: int = setting(
        0,
        "validations without a better one that end the run, whose best model is kept; 0 = run on, keep the last",
        low=0,
    )
    best_by: str = setting(
        "loss", "what patience waits for: a lower validation loss, or a better reward", choices=("loss", "reward")
    )

    matrix_lr: float = setting(0.01, "peak learning rate of Muon (matrices inside layers); 0 = AdamW at lr", low=0.0)
    lr: float = setting(3e-3, "peak learning rate of AdamW (embeddings, norms)", low=0.0)
    warmup: float = setting(0.0, "share of the run over which the learning rate rises", low=0.0, high=1.0)
    decay: float = setting(1.0, "share of the run, at its end, over which it falls (0 = constant)", low=0.0, high=1.0)
    decay_shape: str = setting("cosine", "how it falls", choices=("linear", "cosine"))
    final_lr: float = setting(0.1, "learning rate at the end, as a share of the peak", low=0.0, high=1.0)

    def __post_init__(self) -> None:
        if self.patience and not self.validate_every:
            raise ConfigError(
                f"patience = {self.patience} counts validations, and validate_every = 0 makes one at the end only",
                hint="set validate_every to the steps between validations",
            )


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


def unanswered(conversations: Iterable[Conversation]) -> list[tuple[Conversation, Conversation]]:
    """Each conversation that ends with the assistant's answer, beside the same without that answer."""
    ending = (c for c in conversations if c.messages[-1].role == "assistant" and len(c.messages) > 1)
    return [(c, replace(c, messages=c.messages[:-1])) for c in ending]


def embedding_noise(lengths_B: Tensor, seeds: Sequence[int], num_positions: int, width: int, alpha: float) -> Tensor:
    """NEFTune's noise: (alpha / sqrt(L D)) e with e uniform in (-1, 1), so that its norm is about alpha / sqrt(3).

    A row's noise is a function of its seed alone, and L is its own number of real tokens (the paper: of the padded
    batch), so that neither batch mates nor ranks change it.

    Args:
        lengths_B: real tokens of each row. seeds: one a row. num_positions: T. width: D.

    Returns:
        noise_BTD, 0 on the pads. Source: Jain et al. 2023, algorithm 1.
    """
    noise_BTD = torch.zeros(len(seeds), num_positions, width)
    generator = torch.Generator()
    for row, (seed, length) in enumerate(zip(seeds, lengths_B.tolist(), strict=True)):
        generator.manual_seed(seed)
        uniform_TD = torch.rand(length, width, generator=generator).mul_(2).sub_(1)
        noise_BTD[row, :length] = uniform_TD.mul_(alpha / math.sqrt(length * width))
    return noise_BTD


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

    def __init__(self, config: SFTConfig) -> None:
        super().__init__(config)
        self.best = -math.inf  # the best validation so far, larger is better
        self.num_worse = 0  # validations since
        self.updates = 0
        self.folder: Path | None = None
        self.source = "lessons"  # the name of what is learned from
        self.judge: Callable[..., list[float | None]] | None = None

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
        self.tokenizer, self.parent = loaded.tokenizer, work.name_of(folder)
        train_path, valid_path = self._files(work)
        self.source = train_path.name if self.config.data else train_path.parent.name
        train = list(read_conversations(train_path))
        has_valid = valid_path is not None and valid_path.exists() and valid_path.stat().st_size > 0
        valid = list(read_conversations(valid_path)) if valid_path is not None and has_valid else []
        self.folder = work.folder.path
        if self.config.best_by == "reward":
            self.judge = self._load_judge(work)
        self.begin(loaded.model, train, valid, ChatFormat(loaded.tokenizer), seed=work.seed)
        origins = Counter(str(c.meta["origin"]) for c in map(train.__getitem__, self.train.kept) if "origin" in c.meta)
        self.learned_from = [learned("conversations", len(self.lengths), self.source, origins=origins)]

    def _files(self, work: Work) -> tuple[Path, Path | None]:
        """What is learned from, and what is validated on."""
        if self.config.data:
            return Path(self.config.data), Path(self.config.valid_data) if self.config.valid_data else None
        if "lessons" not in work.inputs:
            raise RunError(
                "sft has nothing to learn from: no lessons section stands before it",
                hint="put a [lessons] section before it, or name a file: data = 'chats.jsonl'",
            )
        return work.inputs["lessons"] / "train.jsonl", work.inputs["lessons"] / "valid.jsonl"

    def _load_judge(self, work: Work) -> Callable[..., list[float | None]]:
        if "reward" not in work.inputs:
            raise RunError(
                "best_by = 'reward' needs a reward model, and no reward section stands before this one",
                hint="put a [reward] section before it, or set best_by = 'loss'",
            )
        folder = work.inputs["reward"] / "checkpoint"
        source = RewardModel.load(folder, micro_tokens=self.config.micro_tokens, reads=self.tokenizer)
        self.frozen |= source.modules()
        return source.score

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
            DataError: no conversation fits or has anything to learn. TrainingError: an end is not learned, or patience
            has no validation to wait for.
        """
        if self.config.patience and not valid:
            raise TrainingError(
                "patience waits for a better validation, and there are no conversations to validate on",
                hint="give the lessons a valid.jsonl, or set patience = 0",
            )
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
        asked = [valid[number] for number in held.kept]
        self.shown = asked[:NUM_SAMPLES]
        self.questions = [question for _, question in unanswered(asked)][:NUM_JUDGED]
        self.steps_per_epoch = len(self._epoch(0))
        self.num_steps = max(1, round(config.epochs * self.steps_per_epoch))
        self.trained = {"model": trained_policy(model, config, config.lora_rank, config.lora_alpha)}
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
                    self.updates = number + 1
                    tokens = sum(self.lengths[row] for group in groups for row in group)
                    yield Step([self._collate(group, pad_id, number) for group in dist.share(groups)], tokens=tokens)

    def _collate(self, rows: Sequence[int], pad_id: int, step: int) -> TokenBatch:
        names = [f"conversation {self.train.kept[row] + 1} of {self.source}" for row in rows]
        seeds = [mix_seed(self.seed, step, row) for row in rows] if self.config.neftune_alpha else ()
        return collate([self.train.rendered[row] for row in rows], pad_id, names, seeds)

    def counts(self, micro_batch: TokenBatch) -> dict[str, float]:
        """Target tokens: what the assistant writes, by weight."""
        return {"reply": micro_batch.num_targets}

    def loss(self, micro_batch: TokenBatch) -> tuple[dict[str, Term], Metrics]:
        """Cross-entropy of the assistant's tokens, in nats."""
        noise_BTD = None
        if micro_batch.seeds:
            positions, width = micro_batch.tokens_BT.shape[1], self.model.spec.width
            alpha = self.config.neftune_alpha
            noise_BTD = embedding_noise(micro_batch.lengths_B, micro_batch.seeds, positions, width, alpha)
        total, _, metrics = next_token_loss(self.model, micro_batch.tokens_BT, micro_batch.weights_BT, noise_BTD)
        return {"reply": Term(total)}, metrics

    def halves(self, micro_batch: TokenBatch) -> list[TokenBatch]:
        """Its rows in two."""
        return micro_batch.halves()

    def validate(self) -> dict[str, float]:
        """Loss per target token and accuracy on the validation conversations, and the reward of replies to them.

        Keeps the model if it is the best so far.
        """
        numbers = {**mean_loss(self.model, self.valid), **(self._judged() if self.judge else {})}
        if self.config.patience:
            by = self.config.best_by
            value = numbers["reward"] if by == "reward" else -numbers["loss"]
            is_best = value > self.best
            self.best, self.num_worse = (value, 0) if is_best else (self.best, self.num_worse + 1)
            self.stop = self.num_worse >= self.config.patience
            if is_best and self.folder is not None:
                info = {**self.info(), "step": self.updates, f"best_{by}": numbers[by]}
                save_policy(self, self.folder, BEST, info=info)
        return numbers

    def _judged(self) -> dict[str, float]:
        """Mean score of greedy replies to validation questions and the share of them that end, over all ranks; `unscored` is
        the number that could not be scored, if there is one."""
        if is_piece(self.model.output_weight):
            raise ConfigError(
                "best_by = 'reward' samples replies, which a sharded model cannot", hint="set best_by = 'loss'"
            )
        assert self.judge is not None
        questions = dist.share(self.questions)
        prompts, outputs = self._replies(questions)
        scores = self.judge(prompts, [output.ids for output in outputs], [question.meta for question in questions])
        sums = {"reward": 0.0, "ended": 0.0, "replies": 0.0, "unscored": 0.0}
        for score, output in zip(scores, outputs, strict=True):
            ended = output.finish == "stop"
            if score is not None:
                sums["reward"] += score if ended else UNFINISHED_SCORE
                sums["ended"] += ended
                sums["replies"] += 1
            else:
                sums["unscored"] += 1
        sums = dist.sum_numbers(sums)
        if not sums["replies"]:
            raise TrainingError(
                "the reward model could score no reply to a validation question",
                hint="best_by = 'reward' needs validation conversations that end with the assistant's message",
            )
        left_out = {"unscored": sums["unscored"]} if sums["unscored"] else {}
        return {name: sums[name] / sums["replies"] for name in ("reward", "ended")} | left_out

    def _replies(self, questions: Sequence[Conversation]) -> tuple[list[list[int]], list[Output]]:
        """The prompts of some questions, and greedy replies to them."""
        prompts = [self.chat.prompt(question) for question in questions]
        params = SamplingParams(SAMPLE_TOKENS, temperature=0.0, stop_ids=self.chat.stop_ids)
        return prompts, Engine(self.model).generate(prompts, params) if prompts else []

    def samples(self) -> list[dict[str, Any]]:
        """Greedy replies to the last question of a few validation conversations."""
        asked = unanswered(self.shown)
        _, outputs = self._replies([question for _, question in asked])
        return [
            {
                "prompt": question.messages[-1].content,
                "reply": self.chat.parse(output.ids).content,
                "ended": output.finish == "stop",
                "reference": conversation.messages[-1].content,
            }
            for (conversation, question), output in zip(asked, outputs, strict=True)
        ]

    def describe(self, micro_batch: TokenBatch) -> list[dict[str, Any]]:
        """The conversation's number in the lessons' train.jsonl, from 1, and its text."""
        return micro_batch.described(self.chat.tokenizer)

    def save(self, folder: Path, snapshot: str = "") -> None:
        """Writes the checkpoint, with patience the best one; of adapters merged, and at the end also them alone."""
        best = folder / BEST
        if not snapshot and self.config.patience and best.exists():
            if dist.is_main():
                with fresh_folder(folder / "checkpoint") as fresh:
                    shutil.copytree(best, fresh, dirs_exist_ok=True)
            return
        save_policy(self, folder, snapshot or "checkpoint", adapters=not snapshot)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, the best validation, and how many have been worse since."""
        return {"updates": self.updates, "best": self.best, "num_worse": self.num_worse}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.updates = int(state["updates"])
        self.best, self.num_worse = float(state["best"]), int(state["num_worse"])

    def report(self, final: Mapping[str, float]) -> dict[str, Any]:
        """Validation loss and accuracy, and what was learned from."""
        loss, accuracy = final.get("valid/loss"), final.get("valid/accuracy")
        said = f"validation loss {loss:.3f}, token accuracy {accuracy:.3f}" if loss is not None else "no validation"
        line = f"{len(self.lengths):,} conversations, {self.updates / self.steps_per_epoch:.1f} epochs, {said}"
        by, sign = self.config.best_by, 1.0 if self.config.best_by == "reward" else -1.0
        return {
            **({f"best_{by}": sign * self.best, "stopped_early": self.stop} if self.config.patience else {}),
            "line": line,
            "valid_loss": loss,
            "valid_accuracy": accuracy,
            "conversations": len(self.lengths),
            "dropped": self.train.num_dropped,
            "without_targets": self.train.num_without_targets,
            "epochs": self.updates / self.steps_per_epoch,
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
