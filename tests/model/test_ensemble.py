"""Ensembles of reward models: scores combined by hand, a folder that others open member by member, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from lyceum.errors import CheckpointError
from lyceum.model.checkpoint import load_checkpoint, save_checkpoint
from lyceum.model.ensemble import Ensemble, join_members, load_members
from lyceum.model.heads import ScoreModel
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder

SPEC = ModelSpec(32, 1, 32, 2, 2, 16, 64, 64)
SCORES = torch.tensor([[1.0, 0.0, -2.0], [3.0, 0.0, 2.0]], dtype=torch.float64)


def score_model(seed: int) -> ScoreModel:
    generator = torch.Generator().manual_seed(seed)
    return ScoreModel(Decoder(SPEC, generator), generator)


def saved(folder: Path, ensemble: Ensemble) -> Path:
    """An ensemble's folder, member n of seed n."""
    for number in range(1, ensemble.size + 1):
        save_checkpoint(folder / f"single-{number}", score_model(number), info={"reward_centre": 0.1 * number})
    singles = [folder / f"single-{number}" for number in range(1, ensemble.size + 1)]
    join_members(folder / "checkpoint", singles, ensemble)
    return folder / "checkpoint"


@pytest.mark.parametrize(
    ("ensemble", "expected"),
    [
        (Ensemble(2, "mean"), [2.0, 0.0, 0.0]),
        (Ensemble(2, "min"), [1.0, 0.0, -2.0]),
        (Ensemble(2, "mean_less_deviations"), [1.0, 0.0, -2.0]),  # deviations of the two: 1, 0, 2
        (Ensemble(2, "mean_less_deviations", 0.5), [1.5, 0.0, -1.0]),
        (Ensemble(2, "mean", centre=1.0, scale=2.0), [0.5, -0.5, -0.5]),
    ],
)
def test_scores_are_combined_by_hand(ensemble: Ensemble, expected: list[float]) -> None:
    assert ensemble.combine(SCORES).tolist() == expected


@pytest.mark.parametrize("aggregate", ["mean", "min", "mean_less_deviations"])
def test_the_combined_score_is_normalised_and_of_one_member_its_own(aggregate: str) -> None:
    ensemble = Ensemble(2, aggregate).normalised_on(SCORES)
    combined = ensemble.combine(SCORES)
    assert float(combined.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(combined.std(unbiased=False)) == pytest.approx(1.0)
    assert torch.equal(Ensemble(1, aggregate).combine(SCORES[:1]), SCORES[0])


@pytest.mark.parametrize("aggregate", ["mean", "min", "mean_less_deviations"])
def test_what_one_member_cannot_score_the_ensemble_cannot(aggregate: str) -> None:
    unknown = SCORES.clone()
    unknown[1, 1] = math.nan
    assert Ensemble(2, aggregate).combine(unknown).isnan().tolist() == [False, True, False]


def test_every_member_is_a_folder_of_its_own_that_transformers_opens(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = saved(tmp_path, Ensemble(3, "min"))
    tokens = torch.tensor([[3, 4, 5, 6]])
    members, ensemble = load_members(folder)
    assert ensemble == Ensemble(3, "min") and len(members) == 3
    for number, (place, member) in enumerate(zip(("", "member-2", "member-3"), members, strict=True), 1):
        theirs = AutoModelForSequenceClassification.from_pretrained(folder / place).eval()

        with torch.no_grad():
            expected = score_model(number)(tokens)[0, -1]
            assert float(theirs(tokens).logits) == pytest.approx(float(expected), abs=1e-5)
            assert float(member.model(tokens)[0, -1]) == float(expected)
        assert member.centre == pytest.approx(0.1 * number)


def test_joining_again_gives_the_same_folder_and_a_single_model_is_an_ensemble_of_one(tmp_path: Path) -> None:
    folder = saved(tmp_path, Ensemble(2, "mean"))
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    join_members(folder, [folder, tmp_path / "single-2"], Ensemble(2, "mean"))
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    alone, ensemble = load_members(folder / "member-2")
    assert ensemble == Ensemble() and len(alone) == 1


def test_a_folder_that_is_no_whole_ensemble_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "language", Decoder(SPEC))
    with pytest.raises(CheckpointError, match="not a reward model"):
        load_members(tmp_path / "language")
    folder = saved(tmp_path, Ensemble(2, "mean"))
    (folder / "member-2").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="there is no checkpoint folder .*member-2"):
        load_members(folder)
    info = json.loads((folder / "lyceum.json").read_text())
    for wrong in ({"size": 2, "aggregate": "median"}, {"count": 2}):
        (folder / "lyceum.json").write_text(json.dumps({**info, "ensemble": wrong}))
        with pytest.raises(CheckpointError, match="not understood of its ensemble"):
            load_members(folder)
    assert isinstance(load_checkpoint(folder).model, ScoreModel)
