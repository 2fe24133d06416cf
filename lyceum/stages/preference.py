"""Direct preference learning: the policy itself learns which response is better, with no reward model and no sampling.

The papers: R. Rafailov et al., "Direct Preference Optimization" (2023), and its kin, which `lyceum.train.preference` names
with their equations. Symbols and names:

    pi_theta, pi_ref        trained["model"]; its log-probabilities in `reference_B`, computed once before the first step
    beta log pi/pi_ref      the implicit reward of a response, by `Objective.reward`
    y_w, y_l                rows better_P and worse_P of a batch's `Sides`
    z_0                     KTO's estimate of the KL: `self.kl`, over the whole step

One stage, many methods: `algorithm` names a preset, and a setting left alone takes the preset's number.

Deviations, each with its reason:
- A ranking of K responses is one batch element with one forward pass for each response; the loss is the mean over its
  pairs, then over prompts (the papers: pairs). At K = 2 this is theirs; above, a pair's correlation costs no epochs.
- KTO's z_0 is measured on other prompts' responses as in the paper, but who is given whose is drawn once for the whole
  run, not in each batch (so that the reference's part is computed once), and the mean is over the step and all ranks.
- ORPO's likelihood term is a mean over the tokens of the whole step, not over responses, as in fine-tuning.
- The default learning rate is for models of a few million weights; the papers' are 5e-7 to 5e-6 for billions.

Run by `lyceum preference RECIPE`. What it is not: on-policy. What the policy comes to say may lie where no ranking was, and
the implicit reward knows nothing there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from lyceum import dist
from lyceum.batches import preferences
from lyceum.batches.pack import bucket_groups
from lyceum.batches.preferences import Encoded, Judged, PreferenceBatch
from lyceum.config import setting
from lyceum.corpus.records import format_of, read_rankings, read_ratings
from lyceum.corpus.rows import read_rows
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams, mix_seed
from lyceum.errors import CheckpointError, RunError, TrainingError
from lyceum.log import log
from lyceum.model.checkpoint import load_checkpoint
from lyceum.model.lineage import learned
from lyceum.model.transformer import Decoder
from lyceum.run import checkpoint_in
from lyceum.stages.adapters import save_policy, trained_policy
from lyceum.stages.reference_logprobs import with_reference
from lyceum.tokens.chat import ChatFormat
from lyceum.train.loop import run_stage
from lyceum.train.preference import PRESETS, Objective, objective, response_logprobs
from lyceum.train.stage import Metrics, Stage, Step, Term, TrainConfig

if TYPE_CHECKING:
    from lyceum.run import Work

VERSION = 1
NUM_SAMPLES, SAMPLE_TOKENS = 4, 64
TIE = 1e-5  # rewards closer than this are equal but for rounding: at the reference every pair is
FIRST_GAP = 1e-4  # nats a token by which policy and reference may differ before the first update

# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class PreferenceConfig(TrainConfig):
    """Settings of direct preference learning; a number of -1 (beta: 0) is the algorithm's own."""

    algorithm: str = setting("dpo", "the method", choices=tuple(PRESETS))
    beta: float = setting(0.0, "scale of the implicit reward: the smaller, the further from the reference", low=0.0)
    margin: float = setting(-1.0, "how much better the better response must be before its loss is small", low=-1.0)
    label_smoothing: float = setting(-1.0, "probability that a preference is the wrong way round", low=-1.0, high=1.0)
    nll: float = setting(-1.0, "weight of the best responses' negative log-likelihood beside the loss", low=-1.0)
    good_weight: float = setting(1.0, "kto: weight of good responses", low=0.0)
    bad_weight: float = setting(1.0, "kto: weight of bad responses", low=0.0)

    data: str = setting("", "a file of rankings, or of ratings for kto, in place of the section's before it")
    valid_data: str = setting("", "a file of the same kind to validate on, in place of a share of `data`")
    valid_share: float = setting(0.1, "share of the prompts of `data` kept for validation", low=0.0, high=0.9)
    pairs: str = setting("all", "pairs of a ranking: all, or of its best and its worst", choices=preferences.PAIRS)
    good_from: float = setting(0.5, "kto: a rating of at least this is good")

    epochs: int = setting(1, "passes over the prompts", low=1)
    batch_prompts: int = setting(16, "prompts (kto: responses) in one optimizer step", low=1)
    lora_rank: int = setting(0, "rank of low-rank adapters, trained in place of the weights; 0 = the weights", low=0)
    lora_alpha: float = setting(16.0, "what the adapters write is scaled by lora_alpha / lora_rank", low=0.0)

    lr: float = setting(1e-4, "peak learning rate of AdamW", low=0.0)
    matrix_lr: float = setting(0.0, "peak learning rate of Muon; 0 = AdamW at lr", low=0.0)
    warmup: float = setting(0.1, "share of the run over which the learning rate rises", low=0.0, high=1.0)
    decay: float = setting(0.9, "share of the run, at its end, over which it falls (0 = constant)", low=0.0, high=1.0)
    micro_tokens: int = setting(4096, "tokens in one micro-batch, pads included", low=1)
    batch_tokens: int = setting(1, "not used: a step is `batch_prompts` prompts", low=1)

    def __post_init__(self) -> None:
        self.objective()  # what makes no sense is refused with the recipe, not when its turn has come

    def objective(self) -> Objective:
        """The method that these settings ask for; ConfigError if they make no sense together."""
        given = {"beta": self.beta or -1.0, "margin": self.margin, "label_smoothing": self.label_smoothing}
        changes = {name: value for name, value in (*given.items(), ("nll", self.nll)) if value >= 0}
        return objective(self.algorithm, **changes, good_weight=self.good_weight, bad_weight=self.bad_weight)


# ---------------------------------------------------------------- data (equations: train/preference.py)


def read_judged(path: Path, config: PreferenceConfig, chat: ChatFormat, context_length: int) -> Encoded:
    """What a file of rankings (or ratings, for kto) holds, as the method learns from it.

    Raises:
        DataError: the file cannot be read, holds something else, or nothing that can be learned from.
    """
    if config.objective().is_paired:
        return preferences.encode_rankings(read_rankings(path), chat, context_length, config.pairs)
    first = next(iter(read_rows(path)), (0, None))[1]
    if format_of(first) in ("rating", "KTO label"):
        return preferences.encode_ratings(read_ratings(path), chat, context_length, config.good_from)
    rated = preferences.ratings_of(read_rankings(path), config.pairs)
    return preferences.encode_ratings(rated, chat, context_length)


# ---------------------------------------------------------------- the stage


class Preference(Stage[PreferenceBatch]):
    """One policy, trained on judged responses."""

    kind = "preference"
    headline = "rewards/margins"
    also_shown = ("rewards/accuracies",)
    config: PreferenceConfig

    def __init__(self, config: PreferenceConfig) -> None:
        super().__init__(config)
        self.objective = config.objective()
        self.kl = 0.0  # KTO's z_0 of the step at hand
        self.is_proven = False  # before the first update, the policy was found to be the reference

    @property
    def model(self) -> Decoder:
        """What is trained."""
        return cast(Decoder, self.trained["model"].module)

    # -- where it starts

    def start(self, work: Work) -> None:
        """Loads the policy and reads what was judged."""
        config, folder = self.config, checkpoint_in(work.inputs["policy"])
        loaded = load_checkpoint(folder)
        if not isinstance(loaded.model, Decoder) or loaded.tokenizer is None:
            raise CheckpointError(
                f"{folder} holds no language model with a tokenizer", hint="preference starts from an sft section"
            )
        self.tokenizer, self.parent = loaded.tokenizer, work.name_of(folder)
        chat, context = ChatFormat(loaded.tokenizer), loaded.spec.context_length
        valid = Encoded([])
        if config.data:
            train = read_judged(Path(config.data), config, chat, context)
            if config.valid_data:
                valid = read_judged(Path(config.valid_data), config, chat, context)
            else:
                kept, held = preferences.split_by_prompt(train.judged, config.valid_share, work.seed)
                train, valid = replace(train, judged=kept), Encoded(held)
        elif "rankings" in work.inputs:
            train = read_judged(work.inputs["rankings"] / "train.jsonl", config, chat, context)
            path = work.inputs["rankings"] / "valid.jsonl"
            if path.exists() and path.stat().st_size > 0:
                valid = read_judged(path, config, chat, context)
        else:
            raise RunError(
                "preference has nothing to learn from: no rankings section stands before it",
                hint="put a [rankings] section before it, or name a file: data = 'pairs.jsonl'",
            )
        self.begin(loaded.model, train, valid, chat, seed=work.seed, folder=work.folder.path)
        kind, source = ("rankings" if self.objective.is_paired else "ratings"), config.data or work.inputs["rankings"]
        origins = Counter(judged.origin for judged in train.judged)
        self.learned_from = [learned(kind, len(train.judged), Path(source).name, origins=origins)]

    def begin(
        self,
        model: Decoder,
        train: Encoded,
        valid: Encoded,
        chat: ChatFormat,
        *,
        seed: int,
        folder: Path | None = None,
    ) -> None:
        """Sets the stage from things in memory; `valid` may be empty.

        Args:
            folder: where the reference's log-probabilities are kept; None keeps them in memory only.
        """
        config, context = self.config, model.spec.context_length
        self.chat, self.seed, self.encoded, self.pad_id = chat, seed, (train, valid), chat.tokenizer.pad_id
        judged = [*train.judged, *valid.judged]
        if not train.judged:
            raise TrainingError(
                "every prompt was kept for validation", hint="lower valid_share, or have more than one prompt judged"
            )
        if not self.objective.is_paired:
            parts = ((train.judged, 1), (valid.judged, 2))
            judged = [
                one
                for part, salt in parts
                for one in preferences.add_strangers(part, context, mix_seed(seed, salt) % 2**32)
            ]
            self._say_balance(train.judged)
        if self.objective.uses_reference:
            model = model.to(self.device)
            judged = with_reference(model, judged, micro_tokens=config.micro_tokens, folder=folder)
        self.train, self.valid = judged[: len(train.judged)], judged[len(train.judged) :]
        self.trained = {"model": trained_policy(model, config, config.lora_rank, config.lora_alpha)}
        self.steps_per_epoch = -(-len(self.train) // config.batch_prompts)
        self.num_steps = config.epochs * self.steps_per_epoch

    def _say_balance(self, judged: Sequence[Judged]) -> None:
        good = sum(bool(one.best) for one in judged)
        bad = len(judged) - good
        weights = self.objective.good_weight * good, self.objective.bad_weight * bad
        log.info(
            f"  {good:,} good and {bad:,} bad responses, together of the weights {weights[0]:g} and {weights[1]:g}"
        )
        if not min(weights) or not 0.5 <= weights[0] / weights[1] <= 2:
            log.warning("good and bad responses weigh unequally: kto wants good_weight and bad_weight to level them")

    # -- what its steps are made of

    def steps(self, first: int) -> Iterator[Step[PreferenceBatch]]:
        """Prompts in a new permutation each epoch; a step is a function of the seed and its number."""
        size, self.is_proven = self.config.batch_prompts, first > 0 or not self.objective.uses_reference
        for number in range(first, self.num_steps):
            epoch, place = divmod(number, self.steps_per_epoch)
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.train))
            chosen = [self.train[i] for i in order[place * size : (place + 1) * size]]
            yield Step(self._batches(chosen, number), tokens=sum(one.num_tokens for one in chosen))

    def _batches(self, judged: Sequence[Judged], seed: int) -> list[PreferenceBatch]:
        """This rank's micro-batches of what is given."""
        widths, sizes = [one.width for one in judged], [len(one.responses) for one in judged]
        groups = bucket_groups(widths, sizes, self.config.micro_tokens, seed) if judged else []
        return [preferences.collate([judged[i] for i in group], self.pad_id) for group in dist.share(groups)]

    def before_step(self, step: Step[PreferenceBatch]) -> None:
        """Before the first update, proves that the policy is the reference; for KTO, measures the KL over the step."""
        if not self.is_proven:
            self._check_reference(step.micro_batches[:1])
            self.is_proven = True
        if not self.objective.is_paired:
            self.kl = self._measure_kl(step.micro_batches)

    @torch.no_grad()
    def _check_reference(self, batches: Sequence[PreferenceBatch]) -> None:
        for batch in batches:
            logp_R = self._logprobs(batch).detach().double()
            gap = float(((logp_R - batch.reference_B).abs() / (batch.lengths_B - batch.starts_B)).max())
            if not gap <= FIRST_GAP:
                raise TrainingError(
                    f"before the first update policy and reference differ by {gap:.2g} nats a token: every reward would "
                    "be wrong",
                    hint="remove reference.safetensors from the section's folder; the passes must be without dropout",
                )

    @torch.no_grad()
    def _measure_kl(self, batches: Sequence[PreferenceBatch]) -> float:
        """z_0: the mean log ratio of other prompts' responses over the batches of all ranks, at least 0."""
        sums = {"total": 0.0, "count": 0.0}
        for part in (batch.strangers() for batch in batches):
            if part is not None:
                logp_R = self._logprobs(part).double()
                sums["total"] += float((logp_R - part.reference_B).sum())
                sums["count"] += len(part.judged)
        sums = dist.sum_numbers(sums)
        return max(0.0, sums["total"] / sums["count"]) if sums["count"] else 0.0

    # -- its losses

    def counts(self, micro_batch: PreferenceBatch) -> dict[str, float]:
        """Prompts (kto: responses), which weigh the same; and the best responses' tokens, if they are learned."""
        counts = {"preference": float(len(micro_batch.judged))}
        if self.objective.nll:
            lengths_B = micro_batch.lengths_B - micro_batch.starts_B
            counts["nll"] = float(lengths_B[micro_batch.best_B].sum())
        return counts

    def loss(self, micro_batch: PreferenceBatch) -> tuple[dict[str, Term], Metrics]:
        """The method's loss, and the likelihood term if it has one; one forward pass for each response."""
        batch, sides = micro_batch, micro_batch.sides
        logp_R = self._logprobs(batch)
        length_R = batch.lengths_B - batch.starts_B
        reward_R = self.objective.reward(logp_R, batch.reference_B, length_R)
        terms = {
            "preference": Term(self.objective.loss(reward_R, sides, self.objective, self.kl), self.objective.weight)
        }
        if self.objective.nll:
            terms["nll"] = Term(-logp_R[batch.best_B].sum(), self.objective.nll)
        reward_R, logp_R = reward_R.detach(), logp_R.detach()
        metrics: Metrics = {}
        for name, rows in (("chosen", sides.better_P), ("rejected", sides.worse_P)):
            if count := float(len(rows)):
                metrics[f"rewards/{name}"] = (reward_R[rows].sum(), count)
                metrics[f"logps/{name}"] = (logp_R[rows].sum(), count)
                metrics[f"tokens/{name}"] = (length_R[rows].sum(), count)
        if self.objective.is_paired:
            margin_P = reward_R[sides.better_P] - reward_R[sides.worse_P]
            right = (margin_P > TIE).sum() + 0.5 * (margin_P.abs() <= TIE).sum()
            metrics["rewards/accuracies"] = (right, float(len(margin_P)))
        return terms, metrics

    def _logprobs(self, batch: PreferenceBatch) -> Tensor:
        return response_logprobs(self.model, batch.tokens_BT, batch.starts_B, batch.lengths_B, batch.group_B).cpu()

    def halves(self, micro_batch: PreferenceBatch) -> list[PreferenceBatch]:
        """Its prompts in two."""
        return micro_batch.halves()

    def after_step(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The margin between the two sides' mean rewards and, of KTO, the KL."""
        return {**margins(metrics), **({} if self.objective.is_paired else {"kl": self.kl})}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The loss and the same metrics on what was kept for validation, over all ranks."""
        batches, before = self._batches(self.valid, 0), self.kl
        if not self.objective.is_paired:
            self.kl = self._measure_kl(batches)
        sums: dict[str, list[float]] = {}
        for batch in batches:
            terms, metrics = self.loss(batch)
            counts = self.counts(batch)
            found = {f"loss/{name}": (term.total, counts[name]) for name, term in terms.items()} | metrics
            found = {name: pair for name, pair in found.items() if not name.startswith("tokens/")}
            for name, (total, count) in found.items():
                pair = sums.setdefault(name, [0.0, 0.0])
                pair[0], pair[1] = pair[0] + float(total), pair[1] + count
        values = {name: total / count for name, (total, count) in dist.sum_pairs(sums).items() if count}
        kl = {} if self.objective.is_paired or not values else {"kl": self.kl}
        self.kl = before
        return {**values, **margins(values), **kl}

    # -- what it tells

    def samples(self) -> list[dict[str, Any]]:
        """Greedy replies to the first few prompts, beside the best response that was ranked; none without a tokenizer."""
        if self.tokenizer is None:
            return []
        shown = preferences.asked(self.valid or self.train, NUM_SAMPLES)
        room = self.model.spec.context_length - max(len(one.prompt) for one in shown)
        params = SamplingParams(min(SAMPLE_TOKENS, room), temperature=0.0, stop_ids=self.chat.stop_ids)
        outputs = Engine(self.model, max_batch=NUM_SAMPLES).generate([one.prompt for one in shown], params)
        return [
            {
                "prompt": self.tokenizer.decode(one.prompt),
                "reply": self.chat.parse(output.ids).content,
                "ended": output.finish == "stop",
                "chosen": self.chat.parse(one.responses[one.best[0]]).content if one.best else None,
            }
            for one, output in zip(shown, outputs, strict=True)
        ]

    def describe(self, micro_batch: PreferenceBatch) -> list[dict[str, Any]]:
        """The ranking's number in its file, from 1, the response's in it, and its text."""
        return micro_batch.described(self.chat.tokenizer)

    def save(self, folder: Path, snapshot: str = "") -> None:
        """Writes the checkpoint; of adapters the merged weights, and at the end also the adapters alone."""
        save_policy(self, folder, snapshot or "checkpoint", adapters=not snapshot)

    def report(self, final: Mapping[str, float]) -> dict[str, Any]:
        """How far the rewards of better and worse responses have come apart, and what was left out."""
        part = "valid/" if "valid/rewards/margins" in final else ""
        right, apart = final.get(f"{part}rewards/accuracies"), final.get(f"{part}rewards/margins")
        said = (
            f"{right:.1%} of {'held-out' if part else 'the last'} pairs in the ranked order, "
            if right is not None
            else ""
        )
        names = ("kept", "empty_responses")
        kept = [
            (len(judged), found.num_empty) for judged, found in zip((self.train, self.valid), self.encoded, strict=True)
        ]
        return {
            "line": f"{self.config.algorithm}: {said}margin {apart if apart is not None else float('nan'):.3f}",
            "algorithm": self.config.algorithm,
            "objective": {
                name: getattr(self.objective, name)
                for name in ("beta", "margin", "label_smoothing", "weight", "nll", "good_weight", "bad_weight")
            },
            "judged": {
                part: {**dict(zip(names, numbers, strict=True)), **found.left_out}
                for part, numbers, found in zip(("train", "valid"), kept, self.encoded, strict=True)
            },
        }


def margins(values: Mapping[str, float]) -> dict[str, float]:
    """The mean reward of what was preferred less that of what was not, where there are both."""
    if not {"rewards/chosen", "rewards/rejected"} <= values.keys():
        return {}
    return {"rewards/margins": values["rewards/chosen"] - values["rewards/rejected"]}


def run(config: PreferenceConfig, work: Work) -> dict[str, Any]:
    """Trains the policy of `work.inputs["policy"]` on `work.inputs["rankings"]`, or on the file `data`; returns the report.

    Raises:
        ConfigError: settings that make no sense together. DataError: nothing to learn from. RunError: no data at all.
    """
    return run_stage(Preference(config), work)
