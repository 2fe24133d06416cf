"""The reward model: which of several responses people prefer, as one number for each; the second step of InstructGPT.

The paper: L. Ouyang et al., "Training language models to follow instructions with human feedback" (2022), section 3.5,
after N. Stiennon et al. (2020). Symbols and names:

    r_theta(x, y)   score at the last real token of prompt + response + end of turn, by `last_scores`
    K               responses to one prompt, ranked; all C(K, 2) pairs of a prompt stand in one micro-batch
    y_w, y_l        better_P and worse_P of `lyceum.train.policy.ranking_pairs`

    loss(theta) = - mean over prompts of the mean over its pairs of log sigmoid(r(x, y_w) - r(x, y_l))        (eq. 1)

Each response is read once: K forward passes for a prompt, not C(K, 2) pairs of them. Pairs of one prompt are
correlated; spread over the data set they overfit within one epoch, so one or two epochs are all it gets.

Deviations, each with its reason:
- Ties make no pair and the mean is over the pairs that remain, so that a ranking with ties weighs as much as any other.
  With `ties = "half"` a tie is a pair that either one wins with probability one half, which draws the two scores together.
- It starts from the fine-tuned policy itself (the paper: a 6B model tuned on public sets): there is one size here.
- After training, scores are shifted *and* scaled so that a stated set of responses has mean 0 and standard deviation 1
  (Ziegler et al. 2019); the paper shifts only. PPO's coefficients then mean the same for every reward model. The scale
  is in `score.weight`; the centre, to be subtracted, stands in lyceum.json as `reward_centre`. Calibration and margins
  are reported in the units of training, where sigmoid(margin) is a probability: margin * `reward_scale`.
- With `members` above 1 it is trained that often, each time with another head and another order, and the scores are
  combined (`lyceum.model.ensemble`); the paper has one.

Run by `lyceum reward RECIPE`. What it is not: a judge of anything unlike what it was trained on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from lyceum import dist
from lyceum.batches.pack import bucket, pad
from lyceum.batches.pairs import (
    EncodedRanking,
    EncodedRankings,
    RankingBatch,
    encode_rankings,
    ranking_batches,
    read_files,
    split_rankings,
)
from lyceum.config import setting
from lyceum.corpus.records import read_rankings
from lyceum.engine.sampling import mix_seed
from lyceum.errors import CheckpointError, DataError, RunError, TrainingError
from lyceum.evals import agreement
from lyceum.evals.agreement import differences
from lyceum.log import log
from lyceum.model.branches import Branches, read
from lyceum.model.checkpoint import load_checkpoint, save_checkpoint
from lyceum.model.ensemble import AGGREGATES, MEMBER, Ensemble, join_members, load_members
from lyceum.model.heads import ScoreModel
from lyceum.model.lineage import learned
from lyceum.model.transformer import Decoder
from lyceum.run import StageFolder, checkpoint_in, mend
from lyceum.tokens.chat import ChatFormat
from lyceum.train import policy as algebra
from lyceum.train.loop import run_stage
from lyceum.train.parallel import gathered
from lyceum.train.stage import Metrics, Stage, Step, Term, TrainConfig, Trained

if TYPE_CHECKING:
    from lyceum.run import Work
    from lyceum.tokens.tokenizer import Tokenizer

VERSION = 2
SCORE_TOKENS = 8192  # read at once where nothing is learned, pads included
HEAD = "score.weight"  # the tensor that turns a hidden state into a score
SCORES = "scores.jsonl"  # of a section: what the model says of every response it was normalised or judged on

# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class RewardConfig(TrainConfig):
    """Settings of the reward model."""

    data: tuple[str, ...] = setting((), "files of rankings or pairs, in place of the section's before it")
    valid_share: float = setting(0.1, "share of the prompts of `data` kept for validation", low=0.0, high=0.9)
    stranger_share: float = setting(
        0.0, "share of the annotators of `data` whose rankings are for validation only", low=0.0, high=0.9
    )
    members: int = setting(1, "reward models trained, each from another head and in another order", low=1)
    aggregate: str = setting("mean", "how the members' scores become one", choices=AGGREGATES)
    deviations: float = setting(1.0, "of mean_less_deviations: standard deviations taken off the mean", low=0.0)

    epochs: int = setting(1, "passes over the rankings; more than two overfit", low=1)
    batch_prompts: int = setting(
        16, "prompts, with all their responses, in one optimizer step (InstructGPT: 64)", low=1
    )
    margin: float = setting(0.0, "how much better the better response must score before its loss is small", low=0.0)
    ties: str = setting("drop", "a tie makes no pair, or one that either wins by half", choices=("drop", "half"))
    centring: float = setting(0.0, "weight of a penalty on the squared sum of a pair's scores (0.01 is usual)", low=0.0)
    normalise_on: str = setting(
        "valid", "the rankings whose responses get mean 0 and standard deviation 1", choices=("valid", "train")
    )

    lr: float = setting(3e-4, "peak learning rate of AdamW", low=0.0)
    matrix_lr: float = setting(0.0, "peak learning rate of Muon; 0 = AdamW at lr", low=0.0)
    warmup: float = setting(0.05, "share of the run over which the learning rate rises", low=0.0, high=1.0)
    decay: float = setting(0.95, "share of the run, at its end, over which it falls (0 = constant)", low=0.0, high=1.0)
    decay_shape: str = setting("cosine", "how it falls", choices=("linear", "cosine"))
    final_lr: float = setting(0.1, "learning rate at the end, as a share of the peak", low=0.0, high=1.0)
    batch_tokens: int = setting(1, "not used: a step is `batch_prompts` prompts", low=1)


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Data:
    """Rankings to learn from and to judge by; of these `num_strangers` by strangers to training were of its prompts, and
    are in neither."""

    train: EncodedRankings
    valid: EncodedRankings
    num_strangers: int = 0


def read_data(config: RewardConfig, work: Work, chat: ChatFormat, context_length: int) -> Data:
    """The rankings of the section before, or those of `data`, split by prompt and by annotator.

    Raises:
        DataError: a file cannot be read, or nothing in it can be learned from. RunError: there is neither.
    """
    half = config.ties == "half"
    if config.data:
        named = read_files(config.data)
        kept, held, num_strangers = split_rankings(named, config.valid_share, config.stranger_share, work.seed)
        if not kept:
            raise DataError(
                f"none of {len(named)} rankings is left to train on", hint="lower valid_share or stranger_share"
            )
        place = ", ".join(config.data)
        train = encode_rankings(kept, chat, context_length, ties=half, path=place)
        valid = encode_rankings(held, chat, context_length, path=place) if held else NOTHING
        return Data(train, valid, num_strangers)
    if "rankings" not in work.inputs:
        raise RunError(
            "reward has nothing to learn from: no rankings section stands before it",
            hint="put a [rankings] section before it, or name files: data = ['pairs.jsonl']",
        )
    path, valid_path = (work.inputs["rankings"] / f"{part}.jsonl" for part in ("train", "valid"))
    train = encode_rankings(read_rankings(path), chat, context_length, ties=half, path=path)
    if not valid_path.exists() or not valid_path.stat().st_size:
        return Data(train, NOTHING)
    return Data(train, encode_rankings(read_rankings(valid_path), chat, context_length, path=valid_path))


NOTHING = EncodedRankings([], 0, 0)

# ---------------------------------------------------------------- equations (pairs and their loss: train/policy.py)


def last_scores(model: ScoreModel, tokens_BT: Tensor, lengths_B: Tensor, group_B: Tensor | None = None) -> Tensor:
    """The raw score (B,) at the last real token of each right-padded row; what rows of a group share is read once."""
    device = model.score.weight.device
    ends_B = torch.arange(len(lengths_B)) * tokens_BT.shape[1] + lengths_B.cpu() - 1
    branches = None if group_B is None else Branches.of(tokens_BT.to(device), lengths_B.to(device), group_B.to(device))
    return read(model, tokens_BT.to(device), ends_B.to(device), branches)


def pair_probabilities(batch: RankingBatch, pairs: algebra.Pairs) -> Tensor | None:
    """P(the one called better really is) from the probabilities of being best: p_w / (p_w + p_l) (Luce 1959); without
    them 1, or one half of a tie. None stands for 1 everywhere."""
    tied_P = batch.ranks_B[pairs.better_P] == batch.ranks_B[pairs.worse_P]
    if batch.probabilities_B is None:
        return torch.where(tied_P, 0.5, 1.0) if bool(tied_P.any()) else None
    better_P, worse_P = batch.probabilities_B[pairs.better_P], batch.probabilities_B[pairs.worse_P]
    stated_P = better_P / (better_P + worse_P)
    return torch.where(stated_P.isnan(), torch.where(tied_P, 0.5, 1.0), stated_P)


def required_margins(batch: RankingBatch, pairs: algebra.Pairs, margin: float) -> float | Tensor:
    """The margin that each pair has to win by: `margin` and what its ranking asks for beside it (Llama 2, eq. 2)."""
    own_G = torch.tensor([float(meta.get("margin") or 0.0) for meta in batch.meta])
    return margin + own_G[pairs.group_P] if bool(own_G.any()) else margin


# ---------------------------------------------------------------- a trained reward model, for use


@torch.no_grad()
def score_responses(
    model: ScoreModel, rows: Sequence[Sequence[int]], centre: float = 0.0, *, micro_tokens: int = SCORE_TOKENS
) -> list[float]:
    """Score of each row (prompt + response) at its last token, less `centre`; in the order of the rows."""
    scores = _scores_of(model, rows, _groups(rows, micro_tokens))
    return [scores[i] - centre for i in range(len(rows))]


def _groups(rows: Sequence[Sequence[int]], micro_tokens: int) -> list[list[int]]:
    lengths = [len(row) for row in rows]
    return bucket(lengths, max([micro_tokens, *lengths]), 0)


def _scores_of(model: ScoreModel, rows: Sequence[Sequence[int]], groups: Sequence[Sequence[int]]) -> dict[int, float]:
    """Number of a row -> its raw score."""
    scores: dict[int, float] = {}
    for group in groups:
        tokens_BT, lengths_B = pad([rows[i] for i in group], 0)
        scores |= zip(group, last_scores(model, tokens_BT, lengths_B).tolist(), strict=True)
    return scores


@dataclass
class RewardModel:
    """A reward model, or an ensemble of them, as a reward source: its scores have mean 0 and deviation 1 on the set it was
    normalised on.

    model, centre: of the one member, or of the first (which PPO's critic begins as). others: the further members' models
    and centres. ensemble: how all their scores are combined.
    """

    model: ScoreModel
    centre: float
    tokenizer: Any
    micro_tokens: int = SCORE_TOKENS
    others: list[tuple[ScoreModel, float]] = field(default_factory=list)
    ensemble: Ensemble = field(default_factory=Ensemble)

    @classmethod
    def load(
        cls, folder: Path | str, *, micro_tokens: int = SCORE_TOKENS, reads: Tokenizer | None = None
    ) -> RewardModel:
        """Opens the checkpoint that this stage saved.

        Args:
            reads: the tokenizer of the policy whose ids it is to score.

        Raises:
            CheckpointError: there is none, it holds another kind of model, or its tokenizer is another one than `reads`.
        """
        members, ensemble = load_members(folder)
        first = members[0]
        if reads is not None and (first.tokenizer is None or first.tokenizer.fingerprint != reads.fingerprint):
            raise CheckpointError(
                f"{folder} was trained with another tokenizer than the policy that it is to judge"
                if first.tokenizer is not None
                else f"{folder} has no tokenizer, so that nobody knows whether it reads this policy's ids",
                hint="train the reward model from this policy's own tokenizer",
            )
        others = [(member.model, member.centre) for member in members[1:]]
        return cls(first.model, first.centre, first.tokenizer, micro_tokens, others, ensemble)

    def modules(self) -> dict[str, ScoreModel]:
        """Name -> model of every member, for a stage's frozen modules."""
        others = {f"reward_{number}": model for number, (model, _) in enumerate(self.others, 2)}
        return {"reward": self.model, **others}

    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], meta: Sequence[dict[str, Any]] = ()
    ) -> list[float | None]:
        """The score of each response to its prompt, both as ids; a response without an end is scored where it stops.

        None for what it cannot score: a response without a token, and one that with its prompt is longer than the context.
        """
        context = self.model.decoder.spec.context_length
        pairs = zip(prompts, responses, strict=True)
        rows = [[*p, *r] if len(r) and len(p) + len(r) <= context else [] for p, r in pairs]
        fit = [row for row in rows if row]
        members = [(self.model, self.centre), *self.others]
        each = [score_responses(model, fit, centre, micro_tokens=self.micro_tokens) for model, centre in members]
        scores = iter(self.ensemble.combine(torch.tensor(each, dtype=torch.float64)).tolist())
        return [next(scores) if row else None for row in rows]


# ---------------------------------------------------------------- the stage


class Reward(Stage[RankingBatch]):
    """K-wise training of a reward model on rankings."""

    kind = "reward"
    headline = "accuracy"
    can_shard = True
    config: RewardConfig

    @property
    def model(self) -> ScoreModel:
        """What is trained."""
        return cast(ScoreModel, self.trained["reward"].module)

    def start(self, work: Work) -> None:
        """Puts a fresh head on the fine-tuned policy and reads the rankings."""
        source = checkpoint_in(work.inputs["policy"])
        loaded = load_checkpoint(source)
        if not isinstance(loaded.model, Decoder) or loaded.tokenizer is None:
            raise CheckpointError(
                f"{work.inputs['policy']} holds no language model with a tokenizer",
                hint="reward starts from an sft section",
            )
        self.tokenizer, self.parent = loaded.tokenizer, work.name_of(source)
        chat = ChatFormat(self.tokenizer)
        data = read_data(self.config, work, chat, loaded.spec.context_length)
        self.begin(ScoreModel.from_decoder(loaded.model), data.train, data.valid, chat, seed=work.seed)
        self.num_strangers = data.num_strangers
        files = [Path(path).name for path in self.config.data]
        place = ", ".join(files) if files else work.inputs["rankings"].name
        origins = Counter(ranking.origin for ranking in data.train.rankings)
        self.learned_from = [learned("rankings", len(data.train.rankings), place, origins=origins)]

    def begin(
        self, model: ScoreModel, train: EncodedRankings, valid: EncodedRankings, chat: ChatFormat, *, seed: int
    ) -> None:
        """Sets the stage from things in memory; `valid` may be empty."""
        self.train, self.valid, self.chat, self.seed = train, valid, chat, seed
        self.num_strangers = 0
        self.trained = {"reward": Trained(model, self.config.optimizer(), self.config.clip_norm)}
        self.steps_per_epoch = -(-len(train.rankings) // self.config.batch_prompts)
        self.num_steps = self.config.epochs * self.steps_per_epoch
        self.results: dict[str, Any] = {}

    def steps(self, first: int) -> Iterator[Step[RankingBatch]]:
        """Prompts in a new permutation each epoch; a step is a function of the seed and its number."""
        for number in range(first, self.num_steps):
            epoch, place = divmod(number, self.steps_per_epoch)
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.train.rankings))
            chosen = order[place * self.config.batch_prompts : (place + 1) * self.config.batch_prompts]
            part = replace(self.train, rankings=[self.train.rankings[i] for i in chosen])
            batches = ranking_batches(part, self.chat, self.config.micro_tokens, number)
            yield Step(dist.share(batches), tokens=sum(batch.num_tokens for batch in batches))

    def pairs(self, micro_batch: RankingBatch) -> algebra.Pairs:
        """The pairs that are learned from."""
        return algebra.ranking_pairs(micro_batch.ranks_B, micro_batch.group_B, ties=self.config.ties == "half")

    def counts(self, micro_batch: RankingBatch) -> dict[str, float]:
        """Prompts: each weighs the same, however many responses it has."""
        num_prompts = float(self.pairs(micro_batch).num_groups)
        return {"ranking": num_prompts, **({"centring": num_prompts} if self.config.centring else {})}

    def loss(self, micro_batch: RankingBatch) -> tuple[dict[str, Term], Metrics]:
        """The mean pair loss of each prompt, summed over prompts; one forward for each response."""
        score_B = last_scores(self.model, micro_batch.tokens_BT, micro_batch.lengths_B, micro_batch.group_B).cpu()
        pairs = self.pairs(micro_batch)
        margin = required_margins(micro_batch, pairs, self.config.margin)
        probability_P = pair_probabilities(micro_batch, pairs)
        total = algebra.ranking_loss(score_B, pairs, required_margin=margin, probability_P=probability_P)
        terms = {"ranking": Term(total)}
        if self.config.centring:  # Eisenstein et al. 2023: scores are free to drift together, and this keeps them at 0
            sums_P = score_B[pairs.better_P] + score_B[pairs.worse_P]
            terms["centring"] = Term((sums_P.square() * pairs.weight_P.to(sums_P.dtype)).sum(), self.config.centring)
        is_order_P = micro_batch.ranks_B[pairs.better_P] != micro_batch.ranks_B[pairs.worse_P]
        margin_P = (score_B[pairs.better_P] - score_B[pairs.worse_P]).detach()[is_order_P]
        num_pairs = float(len(margin_P))
        return terms, {
            "accuracy": ((margin_P > 0).sum() + 0.5 * (margin_P == 0).sum(), num_pairs),
            "margin": (margin_P.sum(), num_pairs),
            "score": (score_B.detach().sum(), float(len(score_B))),
        }

    def halves(self, micro_batch: RankingBatch) -> list[RankingBatch]:
        """Its prompts in two."""
        return micro_batch.halves()

    def describe(self, micro_batch: RankingBatch) -> list[dict[str, Any]]:
        """Where each ranking is from (its number from 1), and each of its responses with prompt and rank."""
        return micro_batch.described(self.chat.tokenizer)

    @torch.no_grad()
    def score_all(self, rankings: Sequence[EncodedRanking]) -> list[list[float]]:
        """Raw scores of every response, ranking by ranking, on every rank: each reads its share."""
        rows = [row for ranking in rankings for row in ranking.rows]
        groups = _groups(rows, SCORE_TOKENS)
        mine = dist.share(groups)
        scored = _scores_of(self.model, rows, mine)
        if len(mine) * dist.data_size() < len(groups):  # another rank reads one more; a sharded model's pass needs all
            _scores_of(self.model, rows, groups[:1])
        found = dict(dist.gather(list(scored.items())))
        rest = (found[i] for i in range(len(rows)))
        return [[next(rest) for _ in ranking.rows] for ranking in rankings]

    def validate(self) -> dict[str, float]:
        """Accuracy and loss on the validation rankings."""
        rankings = self.valid.rankings
        if not rankings:
            return {}
        pairs = zip(self.score_all(rankings), rankings, strict=True)
        margins = [torch.tensor(differences(scores, ranking.ranks)) for scores, ranking in pairs]
        right = sum(float((m > 0).sum() + 0.5 * (m == 0).sum()) for m in margins)
        loss = sum(float(algebra.pair_loss(m).mean()) for m in margins)
        return {"accuracy": right / sum(map(len, margins)), "loss": loss / len(margins)}

    def save(self, folder: Path, snapshot: str = "") -> None:
        """Normalises, judges and writes the reward model; the weights in training stay as they were."""
        stated, judged = parts_of(self.config, bool(self.valid.rankings))
        parts = {"train": self.train.rankings, "valid": self.valid.rankings}
        wanted = {stated} if snapshot else {stated, judged}
        scored = {part: agreement.scored_rankings(parts[part], self.score_all(parts[part])) for part in sorted(wanted)}
        flat = torch.tensor([score for one in scored[stated] for score in one.scores], dtype=torch.float64)
        centre, scale = float(flat.mean()), float(flat.std(unbiased=False))
        if not scale > 1e-6:
            raise TrainingError(
                "the reward model gives every response the same score",
                hint="raise lr, or look whether the rankings prefer anything that the responses show",
            )
        normalised = {
            "reward_centre": centre / scale,
            "reward_scale": scale,
            "normalised_on": f"rankings/{stated}.jsonl, {len(flat)} responses",
        }
        if not snapshot:
            about = {"judged_on_training_data": judged == "train"}
            self.results = {**agreement.judge(scored[judged]), **normalised, **about}
            if dist.is_main():
                agreement.write_scored(folder / SCORES, scored)

        def rescaled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor * (1 / scale) if name == HEAD else tensor for name, tensor in tensors.items()}

        info, place = {**self.info(), **normalised}, snapshot or self.trained["reward"].save_as
        if place is not None:
            save_checkpoint(folder / place, self.model, self.tokenizer, info, gather=gathered, change=rescaled)

    def report(self, final: Mapping[str, float]) -> dict[str, Any]:
        """Accuracies beside their baseline and ceiling, calibration, and what was left out."""
        strangers = {"known_prompts_of_strangers": self.num_strangers} if self.num_strangers else {}
        counts = {"train": self.train.counts(), "valid": self.valid.counts(), **strangers}
        return {"line": line_of(self.results), **self.results, "rankings": counts}


def parts_of(config: RewardConfig, has_valid: bool) -> tuple[str, str]:
    """The parts of the rankings that scores are normalised on, and that the model is judged by."""
    judged = "valid" if has_valid else "train"
    return judged if config.normalise_on == "valid" else "train", judged


def line_of(found: Mapping[str, Any]) -> str:
    """The sentence that is shown when a reward model is done."""
    clean = f", {found['accuracy_clean']:.1%} of clean ones" if "accuracy_clean" in found else ""
    which = "training" if found["judged_on_training_data"] else "held-out"
    return (
        f"orders {found['accuracy_noisy']:.1%} of {which} pairs as ranked{clean}; "
        f"by length alone {found['length_baseline']:.1%}"
    )


# ---------------------------------------------------------------- an ensemble


def train_members(config: RewardConfig, work: Work) -> list[tuple[Path, dict[str, Any]]]:
    """Trains the members one after the other, each as a section would be; the first in the section's own folder.

    Returns:
        Folder and report of each.
    """
    found = []
    for number in range(1, config.members + 1):
        folder, seed = work.folder, work.seed
        if number > 1:
            folder, seed = StageFolder(work.folder.path / f"{MEMBER}{number}"), mix_seed(work.seed, number)
            if dist.is_main():
                folder.path.mkdir(exist_ok=True)
                mend(folder.path)
            dist.barrier()
        log.info(f"  member {number} of {config.members}")
        found.append((folder.path, run_stage(Reward(config), replace(work, folder=folder, seed=seed))))
    return found


def run(config: RewardConfig, work: Work) -> dict[str, Any]:
    """Trains a reward model, or several, on rankings from `work.inputs["policy"]`; returns the report."""
    if config.members == 1:
        return run_stage(Reward(config), work)
    members = train_members(config, work)
    report: dict[str, Any] = {}
    if dist.is_main():
        reports = [report for _, report in members]
        said = [agreement.read_scored(path / SCORES) for path, _ in members]
        wanted = Ensemble(config.members, config.aggregate, config.deviations)
        ensemble, found = agreement.judge_members(said, reports, wanted, *parts_of(config, "valid" in said[0]))
        join_members(work.folder.checkpoint, [path / "checkpoint" for path, _ in members], ensemble)
        sums = {key: sum(report[key] for report in reports) for key in ("steps", "tokens", "seconds")}
        report = {**reports[0], **sums, **found}
        report["line"] = f"{config.members} members, {config.aggregate}: {line_of(report)}"
    dist.barrier()
    return report
