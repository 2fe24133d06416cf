"""The Stage contract: what one stage of schooling says about itself, so that one loop can train them all.

A stage says where it starts, what its optimizer steps are made of, and what its losses are. Everything else
(accumulation, ranks, clipping, schedules, logging, validation, saving, resuming) lives once, in `lyceum.train.loop`.
A stage file is written in four parts: the paper, the config, the equations as pure functions, the Stage class.

The life of a run, as `run_stage` lives it:

    stage.start(work)                                  load inputs; fill trained, frozen, num_steps
    stage.load_state_dict(...)                         only when resuming; weights are restored by the loop
    for step in stage.steps(first):                    item n+1 is asked for only after update n
        counts = sum of stage.counts(micro_batch)      over micro-batches and ranks, before the first backward
        stage.before_step(step)                        an optional pass over the whole step
        for micro_batch in step.micro_batches:
            terms, metrics = stage.loss(micro_batch)   loss = sum over terms of weight * total / count
        ... gradients summed over ranks, clipped per trained module, optimizers stepped ...
        stage.after_step(metrics)                      adapt a coefficient; set stop
        stage.validate(), stage.samples()              now and then, and after the last step
    stage.save(folder); stage.report(final)

Why totals and counts instead of a mean: a mean of micro-batch means changes the objective as soon as micro-batches
hold different numbers of tokens. Dividing by one global count gives the same gradient however a step is cut.

Ranks: `steps` yields the micro-batches of *this* rank (see `lyceum.dist.share`); ranks may have different numbers of
them, even none. What a stage computes over a whole step (`steps`, `before_step`, `validate`) it reduces itself, with
`lyceum.dist`.

What it is not: a callback system. There are no hooks besides the methods below.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lyceum.config import setting, settings_of
from lyceum.train.optim import OptimizerSettings

if TYPE_CHECKING:
    from lyceum.run import Work

MicroBatch = TypeVar("MicroBatch")

# name -> (total, count): the loop sums both over micro-batches and ranks and shows total / count.
Metrics = dict[str, tuple[Tensor | float, float]]


@dataclass(frozen=True)
class TrainConfig:
    """Settings every stage has; a stage's own config dataclass inherits from this one and may override defaults."""

    lr: float = setting(3e-3, "peak learning rate of AdamW (embeddings, heads, norms)", low=0.0)
    matrix_lr: float = setting(0.02, "peak learning rate of Muon (matrices inside layers); 0 = AdamW at lr", low=0.0)
    weight_decay: float = setting(0.0, "decoupled weight decay of the matrices inside layers", low=0.0)
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW's two moment decays")
    eps: float = setting(1e-8, "AdamW's epsilon", low=0.0)
    warmup: float = setting(0.02, "share of the run over which the learning rate rises", low=0.0, high=1.0)
    decay: float = setting(0.6, "share of the run, at its end, over which it falls (0 = constant)", low=0.0, high=1.0)
    decay_shape: str = setting("linear", "how it falls", choices=("linear", "cosine"))
    final_lr: float = setting(0.0, "learning rate at the end, as a share of the peak", low=0.0, high=1.0)
    clip_norm: float = setting(1.0, "largest gradient norm of one trained module (0 = no clipping)", low=0.0)
    batch_tokens: int = setting(2048, "tokens in one optimizer step, over all ranks", low=1)
    micro_tokens: int = setting(2048, "tokens in one micro-batch, pads included", low=1)
    log_every: int = setting(10, "steps between lines of metrics.jsonl", low=1)
    norms_every: int = setting(1, "steps between lines with each term's own gradient norm: a pass back a term", low=1)
    save_every: int = setting(200, "steps between saves of the trainer state (0 = only at the end)", low=0)
    validate_every: int = setting(0, "steps between validations (0 = only at the end)", low=0)
    ema: float = setting(0.0, "decay of a running average of the weights, then what is saved", low=0.0, high=1.0)
    snapshots: tuple[float, ...] = setting((), "shares of the run at which the model is also saved, as snapshot-0.30")

    def optimizer(self, *, lr: float | None = None, matrix_lr: float | None = None) -> OptimizerSettings:
        """The optimizer settings of one trained module; `lr` and `matrix_lr` replace the config's (a critic's own)."""
        return OptimizerSettings(
            lr=self.lr if lr is None else lr,
            matrix_lr=self.matrix_lr if matrix_lr is None else matrix_lr,
            weight_decay=self.weight_decay,
            betas=self.betas,
            eps=self.eps,
        )


@dataclass
class Trained:
    """One module whose weights this stage changes.

    module: any nn.Module; each trained module has its own parameters (none shared between two entries).
    optimizer: peak learning rates and the rest, usually `config.optimizer()`.
    clip_norm: largest norm of this module's gradient; 0 = no clipping.
    save_as: folder name of its checkpoint inside the section folder, or None if it is not saved.
    """

    module: nn.Module
    optimizer: OptimizerSettings
    clip_norm: float = 1.0
    save_as: str | None = "checkpoint"


@dataclass
class Step(Generic[MicroBatch]):
    """What one optimizer update is made of.

    micro_batches: this rank's; they may be of different kinds (PPO's beside pretraining text).
    tokens: tokens of the whole step over all ranks, pads not counted: for the speed and the totals shown.
    can_resume: True if `state_dict()` after this step is all that is needed to go on from here. The trainer state is
        saved only there (PPO: True on the last minibatch of an iteration).
    """

    micro_batches: list[MicroBatch]
    tokens: int
    can_resume: bool = True


@dataclass
class Term:
    """One term of the loss of one micro-batch: a sum over its units (tokens, pairs, rows), not a mean.

    total: scalar tensor with gradient, the sum over the units that `counts` counted under the same name.
    weight: its coefficient in the loss. The loop backpropagates weight * total / (count over the whole step).
    """

    total: Tensor
    weight: float = 1.0


class Stage(ABC, Generic[MicroBatch]):
    """A stage of schooling: where it starts, what its steps are made of, what its losses are.

    Attributes a subclass sets on the class:
        kind: the section kind, as in the recipe ("sft").
        headline: the one metric shown in the progress bar, named as in metrics.jsonl ("loss/sft"); `also_shown`:
            others beside it.
        can_shard: its model may be sharded (`lyceum.train.parallel`): there is one trained module, and every pass of it
            goes through `loss`, or is made equally often on every rank (`validate`, `save`).
    Attributes `start` fills:
        trained: name -> Trained.  frozen: name -> module; the loop turns gradients off and moves them to the device.
        num_steps: number of optimizer steps of the whole run; the schedule's progress is (step + 0.5) / num_steps.
        tokenizer: saved with the checkpoints.  parent: the checkpoint the stage started from, as
            lyceum.json names it ("sft/checkpoint").  learned_from: what it learns from, as `lyceum.model.lineage.learned`
            words it.
        flops_per_token: floating point operations to train on one of a step's tokens, for the share of the machine's
            limit that is shown; 0 = not known, not shown.
    Set by the loop: device, before `start`; origin (recipe, section, seed, and at a save step and results).
    Set by `after_step` or `validate`, if at all: stop.
    """

    kind: str = ""
    headline: str = "loss"
    also_shown: tuple[str, ...] = ()
    can_shard: bool = False

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.trained: dict[str, Trained] = {}
        self.frozen: dict[str, nn.Module] = {}
        self.num_steps = 0
        self.flops_per_token = 0.0
        self.tokenizer: Any = None
        self.parent: str | None = None
        self.learned_from: list[dict[str, Any]] = []
        self.device = torch.device("cpu")
        self.origin: dict[str, Any] = {}
        self.stop = False

    @abstractmethod
    def start(self, work: Work) -> None:
        """Loads the inputs and fills trained, frozen, num_steps and tokenizer.

        Called once, with torch already seeded from `work.seed`, equally on every rank: what it builds must not depend
        on the rank. When a run resumes, it is called all the same and the loop then restores the weights.

        Raises: DataError, CheckpointError or TrainingError if there is nothing to train on.
        """

    @abstractmethod
    def steps(self, first: int) -> Iterator[Step[MicroBatch]]:
        """Yields steps `first`, `first + 1`, ... up to `num_steps`, lazily: item n+1 is asked for only after update n.

        That is what lets PPO sample rollouts here: before the first minibatch of an iteration the policy has every
        earlier update. `first` is 0 or the number of steps done when the trainer state was saved, so it always
        follows a step with can_resume. The items must be a pure function of the seed, `first` and the restored state.
        """

    @abstractmethod
    def counts(self, micro_batch: MicroBatch) -> dict[str, float]:
        """Term -> number of units in this micro-batch (tokens with weight, pairs, rows); the terms `loss` gives.

        The loop sums over micro-batches and ranks before the first backward and divides by the sums. A term whose sum
        is 0 over the whole step is a TrainingError.
        """

    @abstractmethod
    def loss(self, micro_batch: MicroBatch) -> tuple[dict[str, Term], Metrics]:
        """The loss terms of one micro-batch and its metrics as name -> (total, count).

        A micro-batch gives only the terms it has. A metric (total, count) is shown as the sum of totals over the sum of
        counts; the loss terms themselves are shown as `loss/<term>` without being repeated here.

        A term whose gradient is not that of its value (GradCache) gives `surrogate + (value - surrogate).detach()`.
        """

    def halves(self, micro_batch: MicroBatch) -> list[MicroBatch]:
        """The micro-batch in two, for a device out of memory or for threads; one that cannot be cut is returned as it is.

        A stage that cuts promises that `loss` is a function of weights and micro-batch alone: threads call it at once.
        """
        return [micro_batch]

    def before_step(self, step: Step[MicroBatch]) -> None:
        """A pass over the whole step before its first backward (GradCache: representations, with saved RNG states)."""
        return None

    def after_step(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Called after every update with the step's metrics over all ranks, equal on every rank.

        Adapts coefficients (what it changes belongs into `state_dict`) or sets `self.stop = True` to end the run after
        this step.

        Returns: further metrics for this step's line.
        """
        return {}

    def validate(self) -> dict[str, float]:
        """Numbers on held-out data over all ranks, written as `valid/<name>`; called on every rank without gradient.

        May set `self.stop = True`, equally on every rank, to end the run here.
        """
        return {}

    def samples(self) -> list[dict[str, Any]]:
        """What the model now makes of a few fixed prompts, as JSON rows; called on rank 0 after each validation."""
        return []

    def describe(self, micro_batch: MicroBatch) -> list[dict[str, Any]]:
        """The rows of a micro-batch for a person, as JSON: `row`, where it is from, and `text`; asked for when the loss
        is not finite or has leapt."""
        return []

    def report(self, final: Mapping[str, float]) -> dict[str, Any]:
        """The stage's results for report.json, from the last metrics (keys as in metrics.jsonl); must hold no tensors.

        "line", if given, is the one sentence shown when the stage ends.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart besides weights, optimizer and RNG: JSON values, or tensors at the top level."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        return None

    def save(self, folder: Path, snapshot: str = "") -> None:
        """Writes the checkpoint folders into the section folder; called on rank 0, and where `can_shard` on every rank.

        There `save_checkpoint` puts the weights together and rank 0 writes them; what else is written, rank 0 alone must.

        snapshot: empty for the final checkpoints (each Trained under its save_as); otherwise the folder name under
            which the module saved as "checkpoint" is written, and only that one.
        """
        from lyceum.model.checkpoint import Decoder, ScoreModel, save_checkpoint
        from lyceum.train.parallel import gathered

        for trained in self.trained.values():
            if trained.save_as is None or (snapshot and trained.save_as != "checkpoint"):
                continue
            assert isinstance(trained.module, (Decoder, ScoreModel)), "a stage with another model saves it itself"
            place = folder / (snapshot or trained.save_as)
            save_checkpoint(place, trained.module, self.tokenizer, self.info(), gather=gathered)

    def info(self) -> dict[str, Any]:
        """What lyceum.json says about the checkpoint: parent, stage, recipe, settings, what was learned from, results."""
        fingerprint = getattr(self.tokenizer, "fingerprint", None)
        made_from = {"parent": self.parent, "learned_from": self.learned_from, "tokenizer": fingerprint}
        return {"stage": self.kind, **made_from, **self.origin, "settings": settings_of(self.config)}
