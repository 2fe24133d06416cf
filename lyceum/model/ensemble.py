"""Several reward models as one: how their scores become one number, and how they lie in one checkpoint folder.

    checkpoint/              the first member, a Hugging Face folder as of any reward model
      lyceum.json            "ensemble": how many members there are, and how their scores are combined
      member-2/, member-3/   the others, each a Hugging Face folder of its own

Why: members that began with other heads and read the rankings in another order agree where the data decided, and differ
where they had to guess. A policy that learns from one reward model finds what that one alone overrates; the least of
several scores, or their mean less their spread, pays less for it (T. Coste et al., "Reward model ensembles help mitigate
overoptimization", 2023; J. Eisenstein et al., "Helping or herding?", 2023).

Deviation: Coste et al. subtract the variance among the members; here it is the standard deviation, as in Eisenstein et
al., so that its coefficient has no unit.

What it is not: proof against what all members get wrong alike, as they began from the same policy.

Shapes: M members, R responses.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lyceum.errors import CheckpointError
from lyceum.model import hub
from lyceum.model.checkpoint import Loaded, load_checkpoint
from lyceum.model.heads import ScoreModel
from lyceum.run import fresh_folder, write_json

AGGREGATES = ("mean", "min", "mean_less_deviations")
MEMBER = "member-"  # folder of a further member, with its number


@dataclass(frozen=True)
class Ensemble:
    """How the scores of `size` members, each normalised by itself, become one normalised score.

    Args:
        size: members.
        aggregate: ``mean``, ``min``, or ``mean_less_deviations``: the mean less `deviations` standard deviations.
        deviations: how many.
        centre, scale: mean and standard deviation of the combined scores on the stated set of responses.
    """

    size: int = 1
    aggregate: str = "mean"
    deviations: float = 1.0
    centre: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.aggregate not in AGGREGATES:
            raise ValueError(f"aggregate {self.aggregate!r} is none of {', '.join(AGGREGATES)}")

    def combine(self, score_MR: Tensor) -> Tensor:
        """One score (R,) of each response; NaN where a member's is. Of one member it is that member's, to the last bit.

        Source: Coste et al. 2023, section 3.2 (mean, worst case, uncertainty weighted); the spread is that among these
        members, divided by M.
        """
        combined_R = score_MR.amin(0) if self.aggregate == "min" else score_MR.mean(0)
        if self.aggregate == "mean_less_deviations":
            combined_R = combined_R - self.deviations * score_MR.std(0, unbiased=False)
        return (combined_R - self.centre) / self.scale

    def normalised_on(self, score_MR: Tensor) -> Ensemble:
        """The same, with combined scores of mean 0 and standard deviation 1 on these responses."""
        combined_R = replace(self, centre=0.0, scale=1.0).combine(score_MR)
        return replace(self, centre=float(combined_R.mean()), scale=float(combined_R.std(unbiased=False)))


@dataclass(frozen=True)
class Member:
    """One reward model: its score less `centre` has mean 0 and deviation 1; `tokenizer` is None where it brought none."""

    model: ScoreModel
    centre: float
    tokenizer: Any


def load_members(folder: Path | str) -> tuple[list[Member], Ensemble]:
    """Opens a reward model's folder, of one member or of several.

    Returns:
        The members, and how their scores are combined.

    Raises:
        CheckpointError: there is none, a member is missing or has another tokenizer, or it holds another kind of model.
    """
    folder = Path(folder)
    loaded = [load_checkpoint(folder)]
    try:
        ensemble = Ensemble(**loaded[0].info.get("ensemble", {}))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / 'lyceum.json'} says what is not understood of its ensemble: {error}", hint=hub.COPY_AGAIN
        ) from None
    loaded += [load_checkpoint(folder / f"{MEMBER}{number}") for number in range(2, ensemble.size + 1)]
    if len({getattr(one.tokenizer, "fingerprint", None) for one in loaded}) > 1:
        raise CheckpointError(f"the members in {folder} have different tokenizers", hint=hub.COPY_AGAIN)
    return [_member(one, folder) for one in loaded], ensemble


def _member(loaded: Loaded, folder: Path) -> Member:
    if not isinstance(loaded.model, ScoreModel):
        raise CheckpointError(f"{folder} holds a language model, not a reward model", hint="name a reward section")
    return Member(loaded.model, float(loaded.info.get("reward_centre", 0.0)), loaded.tokenizer)


def join_members(folder: Path, members: Sequence[Path], ensemble: Ensemble) -> None:
    """Writes one reward model's folder of its members' folders, whole or not at all; the first may be `folder` itself."""
    assert len(members) == ensemble.size
    with fresh_folder(folder) as fresh:
        for number, member in enumerate(members, 1):
            place = fresh if number == 1 else fresh / f"{MEMBER}{number}"
            shutil.copytree(member, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns(f"{MEMBER}*"))
        info = hub.read_json(fresh / "lyceum.json")
        write_json(fresh / "lyceum.json", {**info, "ensemble": asdict(ensemble)})
