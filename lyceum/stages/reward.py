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
- It starts from the fine-tuned policy itself (the paper: a 6B model tuned on public sets): there is one size here.
- After training, scores are shifted *and* scaled so that a stated set of responses has mean 0 and standard deviation 1
  (Ziegler et al. 2019); the paper shifts only. PPO's coefficients then mean the same for every reward model. The scale
  is in `score.weight`; the centre, to be subtracted, stands in lyceum.json as `reward_centre`. Calibration and margins
  are reported in the units of training, where sigmoid(margin) is a probability: margin * `reward_scale`.

Run by `lyceum reward RECIPE`. What it is not: an ensemble, or a judge of anything unlike what it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from lyceum import dist
from lyceum.batches.pack import bucket, pad
from lyceum.batches.pairs import EncodedRanking, EncodedRankings, RankingBatch, encode_rankings, ranking_batches
from lyceum.config import setting
from lyceum.corpus.records import read_rankings
from lyceum.errors import CheckpointError, TrainingError
from lyceum.model.branches import Branches, read
from lyceum.model.checkpoint import load_checkpoint, save_checkpoint
from lyceum.model.heads import ScoreModel
from lyceum.model.transformer import Decoder
from lyceum.run import checkpoint_in
from lyceum.tokens.chat import ChatFormat
from lyceum.train import policy as algebra
from lyceum.train.loop import run_stage
from lyceum.train.parallel import gathered
from lyceum.train.stage import Metrics, Stage, Step, Term, TrainConfig, Trained

if TYPE_CHECKING:
    from lyceum.run import Work
    from lyceum.tokens.tokenizer import Tokenizer

VERSION = 1
SCORE_TOKENS = 8192  # read at once where nothing is learned, pads included
HEAD = "score.weight"  # the tensor that turns a hidden state into a score

# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class RewardConfig(TrainConfig):
    """Settings of the reward model."""

    epochs: int = setting(1, "passes over the rankings; more than two overfit", low=1)
    batch_prompts: int = setting(
        16, "prompts, with all their responses, in one optimizer step (InstructGPT: 64)", low=1
    )
    margin: float = setting(0.0, "how much better the better response must score before its loss is small", low=0.0)
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


# ---------------------------------------------------------------- equations (pairs and their loss: train/policy.py)


def last_scores(model: ScoreModel, tokens_BT: Tensor, lengths_B: Tensor, group_B: Tensor | None = None) -> Tensor:
    """The raw score (B,) at the last real token of each right-padded row; what rows of a group share is read once."""
    device = model.score.weight.device
    ends_B = torch.arange(len(lengths_B)) * tokens_BT.shape[1] + lengths_B.cpu() - 1
    branches = None if group_B is None else Branches.of(tokens_BT.to(device), lengths_B.to(device), group_B.to(device))
    return read(model, tokens_BT.to(device), ends_B.to(device), branches)


def pair_probabilities(batch: RankingBatch, pairs: algebra.Pairs) -> Tensor | None:
    """P(the better one really is) from the probabilities of being best: p_w / (p_w + p_l) (Luce 1959), or 1."""
    if batch.probabilities_B is None:
        return None
    better_P, worse_P = batch.probabilities_B[pairs.better_P], batch.probabilities_B[pairs.worse_P]
    return (better_P / (better_P + worse_P)).nan_to_num(nan=1.0)


def differences(values: Sequence[float], ranks: Sequence[float]) -> list[float]:
    """values[i] - values[j] for every pair that the ranks decide, i before j."""
    decided = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
    return [values[i] - values[j] for i, j in decided]


def accuracy(by_prompt: Sequence[Sequence[float]], *, samples: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Share of pairs with a positive difference (an exact 0 counts half), with a 95 % bootstrap interval over prompts.

    Pairs of one prompt share its responses, so prompts are drawn, not pairs (Efron & Tibshirani 1993, chapter 13).

    Returns:
        (accuracy, low, high); NaN without any pair.
    """
    right = np.array([sum((d > 0) + 0.5 * (d == 0) for d in ds) for ds in by_prompt], dtype=np.float64)
    pairs = np.array([len(ds) for ds in by_prompt], dtype=np.float64)
    if pairs.sum() == 0:
        return (float("nan"),) * 3
    draws = np.random.default_rng(seed).integers(0, len(pairs), (samples, len(pairs)))
    drawn = right[draws].sum(1) / np.maximum(pairs[draws].sum(1), 1.0)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(right.sum() / pairs.sum()), float(low), float(high)


def calibration_error(margins: Sequence[float], bins: int = 10) -> float:
    """Expected calibration error of the stated preference probabilities sigmoid(|margin|), in equal bins from 0.5 to 1.

    Source: Guo et al. 2017, eq. 3; the confidence of a preference is that of the response it favours.
    """
    margin = np.asarray(margins, dtype=np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    right = (margin > 0) + 0.5 * (margin == 0)
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = [abs((right - confidence)[which == b].sum()) for b in range(bins)]
    return float(sum(gaps) / max(len(margin), 1))


def length_correlation(scores: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]) -> float:
    """Pearson correlation of score and length within prompts (their own means taken off); 0 if either is constant."""
    x = np.concatenate([np.asarray(v, dtype=np.float64) - np.mean(v) for v in lengths])
    y = np.concatenate([np.asarray(v, dtype=np.float64) - np.mean(v) for v in scores])
    scale = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / scale) if scale > 1e-12 else 0.0


def judge(scores: Sequence[Sequence[float]], rankings: Sequence[EncodedRanking]) -> dict[str, Any]:
    """How well scores, in the units of training, agree with rankings, and with what they could be mistaken for.

    `accuracy_clean` and `noisy_ceiling` (what an annotator without noise would reach against the noisy ranks) are there
    for the rankings that carry `meta["clean_ranks"]`. `length_baseline` is the better of "longer" and "shorter".
    """
    lengths = [[len(row) for row in ranking.rows] for ranking in rankings]
    noisy = [differences(s, r.ranks) for s, r in zip(scores, rankings, strict=True)]
    by_length = accuracy([differences(n, r.ranks) for n, r in zip(lengths, rankings, strict=True)])[0]
    margins = [margin for ds in noisy for margin in ds]
    counts, edges = np.histogram(np.clip(margins, -4.99, 4.99), bins=20, range=(-5.0, 5.0))
    right, low, high = accuracy(noisy)
    found: dict[str, Any] = {
        "accuracy_noisy": right,
        "accuracy_noisy_interval": [low, high],
        "length_baseline": max(by_length, 1 - by_length),
        "calibration_error": calibration_error(margins),
        "margins": {"edges": edges.tolist(), "counts": counts.tolist()},
        "length_correlation": length_correlation(scores, lengths),
        "pairs": len(margins),
        "prompts": len(rankings),
    }
    known = [i for i, ranking in enumerate(rankings) if ranking.meta.get("clean_ranks")]
    if known:
        clean = [rankings[i].meta["clean_ranks"] for i in known]
        right, low, high = accuracy([differences(scores[i], ranks) for i, ranks in zip(known, clean, strict=True)])
        best = [[-rank for rank in ranks] for ranks in clean]
        by_length = accuracy([differences(lengths[i], ranks) for i, ranks in zip(known, clean, strict=True)])[0]
        found |= {
            "accuracy_clean": right,
            "accuracy_clean_interval": [low, high],
            "length_baseline_clean": max(by_length, 1 - by_length),
            "noisy_ceiling": accuracy([differences(b, rankings[i].ranks) for i, b in zip(known, best, strict=True)])[0],
        }
    return found


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
    """A reward model as a reward source: its scores have mean 0 and deviation 1 on the set it was normalised on."""

    model: ScoreModel
    centre: float
    tokenizer: Any
    micro_tokens: int = SCORE_TOKENS

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
        loaded = load_checkpoint(folder)
        if not isinstance(loaded.model, ScoreModel):
            raise CheckpointError(f"{folder} holds a language model, not a reward model", hint="name a reward section")
        if reads is not None and loaded.tokenizer.fingerprint != reads.fingerprint:
            raise CheckpointError(
                f"{folder} was trained with another tokenizer than the policy that it is to judge",
                hint="train the reward model from this policy's own tokenizer",
            )
        return cls(loaded.model, float(loaded.info.get("reward_centre", 0.0)), loaded.tokenizer, micro_tokens)

    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], meta: Sequence[dict[str, Any]] = ()
    ) -> list[float | None]:
        """The score of each response to its prompt, both as ids."""
        rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        return list(score_responses(self.model, rows, self.centre, micro_tokens=self.micro_tokens))


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
        if not isinstance(loaded.model, Decoder):
            raise CheckpointError(
                f"{work.inputs['policy']} holds no language model", hint="reward starts from an sft section"
            )
        self.tokenizer, self.parent = loaded.tokenizer, f"{source.parent.name}/{source.name}"
        chat, context = ChatFormat(self.tokenizer), loaded.spec.context_length
        folder = work.inputs["rankings"]
        train = encode_rankings(read_rankings(folder / "train.jsonl"), chat, context)
        valid_path = folder / "valid.jsonl"
        has_valid = valid_path.exists() and valid_path.stat().st_size > 0
        valid = encode_rankings(read_rankings(valid_path), chat, context) if has_valid else EncodedRankings([], 0, 0)
        self.begin(ScoreModel.from_decoder(loaded.model), train, valid, chat, seed=work.seed)

    def begin(
        self, model: ScoreModel, train: EncodedRankings, valid: EncodedRankings, chat: ChatFormat, *, seed: int
    ) -> None:
        """Sets the stage from things in memory; `valid` may be empty."""
        self.train, self.valid, self.chat, self.seed = train, valid, chat, seed
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

    def counts(self, micro_batch: RankingBatch) -> dict[str, float]:
        """Prompts: each weighs the same, however many responses it has."""
        num_prompts = float(algebra.ranking_pairs(micro_batch.ranks_B, micro_batch.group_B).num_groups)
        return {"ranking": num_prompts, **({"centring": num_prompts} if self.config.centring else {})}

    def loss(self, micro_batch: RankingBatch) -> tuple[dict[str, Term], Metrics]:
        """The mean pair loss of each prompt, summed over prompts; one forward for each response."""
        score_B = last_scores(self.model, micro_batch.tokens_BT, micro_batch.lengths_B, micro_batch.group_B).cpu()
        pairs = algebra.ranking_pairs(micro_batch.ranks_B, micro_batch.group_B)
        probability_P = pair_probabilities(micro_batch, pairs)
        total = algebra.ranking_loss(score_B, pairs, required_margin=self.config.margin, probability_P=probability_P)
        terms = {"ranking": Term(total)}
        if self.config.centring:  # Eisenstein et al. 2023: scores are free to drift together, and this keeps them at 0
            sums_P = score_B[pairs.better_P] + score_B[pairs.worse_P]
            terms["centring"] = Term((sums_P.square() * pairs.weight_P.to(sums_P.dtype)).sum(), self.config.centring)
        margin_P = (score_B[pairs.better_P] - score_B[pairs.worse_P]).detach()
        num_pairs = float(len(pairs))
        return terms, {
            "accuracy": ((margin_P > 0).sum() + 0.5 * (margin_P == 0).sum(), num_pairs),
            "margin": (margin_P.sum(), num_pairs),
            "score": (score_B.detach().sum(), float(len(score_B))),
        }

    def halves(self, micro_batch: RankingBatch) -> list[RankingBatch]:
        """Its prompts in two."""
        return micro_batch.halves()

    def describe(self, micro_batch: RankingBatch) -> list[dict[str, Any]]:
        """The ranking's number in the rankings' train.jsonl, from 1, and each of its responses with prompt and rank."""
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
        use_valid = bool(self.valid.rankings) and self.config.normalise_on == "valid"
        scores = self.score_all((self.valid if use_valid else self.train).rankings)
        flat = torch.tensor([score for row in scores for score in row], dtype=torch.float64)
        centre, scale = float(flat.mean()), float(flat.std(unbiased=False))
        if not scale > 1e-6:
            raise TrainingError(
                "the reward model gives every response the same score",
                hint="raise lr, or look whether the rankings prefer anything that the responses show",
            )
        normalised = {
            "reward_centre": centre / scale,
            "reward_scale": scale,
            "normalised_on": f"rankings/{'valid' if use_valid else 'train'}.jsonl, {len(flat)} responses",
        }
        if not snapshot:
            judged = self.valid.rankings or self.train.rankings
            self.results = {
                **judge(self.score_all(judged), judged),
                **normalised,
                "judged_on_training_data": not self.valid.rankings,
            }

        def rescaled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor * (1 / scale) if name == HEAD else tensor for name, tensor in tensors.items()}

        info, place = {**self.info(), **normalised}, snapshot or self.trained["reward"].save_as
        if place is not None:
            save_checkpoint(folder / place, self.model, self.tokenizer, info, gather=gathered, change=rescaled)

    def report(self, final: Mapping[str, float]) -> dict[str, Any]:
        """Accuracies beside their baseline and ceiling, calibration, and what was left out."""
        found = self.results
        clean = f", {found['accuracy_clean']:.1%} of clean ones" if "accuracy_clean" in found else ""
        return {
            "line": f"orders {found['accuracy_noisy']:.1%} of held-out pairs as ranked{clean}; "
            f"by length alone {found['length_baseline']:.1%}",
            **found,
            "rankings": {
                part: {"kept": len(rankings.rankings), "all_ties": rankings.num_tied, "too_long": rankings.num_too_long}
                for part, rankings in (("train", self.train), ("valid", self.valid))
            },
        }


def run(config: RewardConfig, work: Work) -> dict[str, Any]:
    """Trains a reward model on `work.inputs["rankings"]` from `work.inputs["policy"]`; returns the report."""
    return run_stage(Reward(config), work)
