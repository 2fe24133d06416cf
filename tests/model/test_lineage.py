"""Where models come from: parents found again wherever they lie, sizes as the shapes say, and strangers' words not believed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lyceum.config import Recipe
from lyceum.model.checkpoint import save_checkpoint
from lyceum.model.heads import ScoreModel
from lyceum.model.lineage import Model, ancestors, history, learned, read_model, read_models
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import StageFolder, Work, write_json

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a checkpoint's two small files at a path below the test's folder; no info: it was made elsewhere."""

    def write(place: str, info: Any = None) -> Path:
        write_json(tmp_path / place / "config.json", {})
        if info is not None:
            write_json(tmp_path / place / "lyceum.json", info)
        return (tmp_path / place).resolve()

    return write


def names(models: Any) -> list[str]:
    return [model.name for model in models]


# -------------------------------------------------------------------------------- parents


def test_a_model_is_followed_back_to_the_one_without_a_parent(make: Make) -> None:
    make("demo/pretrain/checkpoint", {"stage": "pretrain", "parent": None})
    make("demo/sft/checkpoint", {"stage": "sft", "section": "sft", "parent": "pretrain/checkpoint"})
    make("demo/sft/snapshot-0.30", {"stage": "sft", "section": "sft", "parent": "pretrain/checkpoint"})
    ppo = read_model(make("demo/ppo/checkpoint", {"stage": "ppo", "parent": "sft/checkpoint"}))
    assert names(ancestors(ppo)) == ["sft", "pretrain"] and ppo.lost_parent == ""
    snapshot = read_model(ppo.folder.parents[1] / "sft" / "snapshot-0.30")
    assert snapshot.name == "sft/snapshot-0.30" and snapshot.is_aside and names(ancestors(snapshot)) == ["pretrain"]


def test_one_made_after_its_recipe_finds_its_parent_and_never_itself(make: Make) -> None:
    """What feedback made lies deeper than a section, in a folder of the same name as the parent's, or beside it."""
    make("demo/ppo/checkpoint", {"stage": "ppo", "parent": None})
    deeper = read_model(make("demo/improved-1/ppo/checkpoint", {"stage": "ppo", "parent": "ppo/checkpoint"}))
    beside = read_model(make("demo/improved-2/checkpoint", {"stage": "preference", "parent": "ppo/checkpoint"}))
    assert deeper.parent == beside.parent == deeper.folder.parents[2] / "ppo" / "checkpoint"
    member = read_model(make("demo/reward/checkpoint/member-2", {"stage": "reward", "parent": "ppo/checkpoint"}))
    assert member.is_aside and member.parent == deeper.parent


@pytest.mark.parametrize("inside", [True, False])
def test_what_a_section_calls_its_start_is_found_again(make: Make, tmp_path: Path, inside: bool) -> None:
    start = make("one/sft/checkpoint", {"stage": "sft"})
    folder = StageFolder(tmp_path / ("one" if inside else "two") / "ppo")
    name = Work(folder, {}, 0, Recipe("toy", 0, {}, (), Path("toy.toml"))).name_of(start)
    assert name == ("sft/checkpoint" if inside else str(start))
    place = folder.checkpoint.relative_to(tmp_path).as_posix()
    assert read_model(make(place, {"stage": "ppo", "parent": name})).parent == start


def test_a_parent_that_is_gone_is_named_and_ends_the_line(make: Make) -> None:
    model = read_model(make("demo/sft/checkpoint", {"stage": "sft", "parent": "pretrain/checkpoint"}))
    assert model.parent is None and model.lost_parent == "pretrain/checkpoint" and not [*ancestors(model)]
    assert model.to_json()["lost_parent"] == "pretrain/checkpoint"


def test_a_circle_of_parents_ends(make: Make) -> None:
    make("demo/a/checkpoint", {"stage": "sft", "parent": "b/checkpoint"})
    make("demo/b/checkpoint", {"stage": "sft", "parent": "c/checkpoint"})
    c = read_model(make("demo/c/checkpoint", {"stage": "sft", "parent": "b/checkpoint"}))
    assert names(ancestors(c)) == ["b"]
    assert len(history(read_model(c.folder.parents[1] / "a" / "checkpoint"))) == 3


# -------------------------------------------------------------------------------- all of a run


def test_all_models_of_a_run_are_found_with_what_they_come_from_elsewhere(make: Make, tmp_path: Path) -> None:
    foreign = make("models/qwen")
    first = make("first/sft/checkpoint", {"stage": "sft", "parent": str(foreign)})
    make("first/reward/checkpoint", {"stage": "reward", "parent": "sft/checkpoint"})
    new = make("second/feedback/round-1/checkpoint", {"stage": "preference", "parent": str(first)})
    for place in ("old/sft-1/checkpoint", "ppo/checkpoint.partial", "ppo/checkpoint.previous"):
        make(f"second/{place}", {"stage": "sft"})
    found = read_models([tmp_path / "second"])
    assert [*found] == [new, first, foreign]  # no reward model: nothing here comes from it
    assert [model.stage for model in found.values()] == ["preference", "sft", ""] and found[foreign].name == "qwen"
    assert len(read_models([tmp_path])) == 4
    assert read_models([tmp_path / "second" / "old"]) and not read_models([tmp_path / "models"])


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"parent": 3, "stage": null, "settings": [], "results": 1}'])
def test_a_broken_note_is_a_model_made_elsewhere(make: Make, text: str) -> None:
    folder = make("demo/sft/checkpoint", {})
    (folder / "lyceum.json").write_text(text)
    model = read_models([folder])[folder]
    assert model.stage == model.result == "" and model.parent is None and not model.settings
    assert history(model) == [{"model": "sft", "stage": "", "data": []}]


# -------------------------------------------------------------------------------- what is said of one


def test_its_size_is_that_of_its_shape(tmp_path: Path) -> None:
    for name, is_tied in (("tied", True), ("untied", False)):
        spec = ModelSpec(96, 2, 32, 2, 1, head_width=16, ffn_width=64, context_length=32, tied=is_tied)
        save_checkpoint(tmp_path / name, Decoder(spec))
        assert read_model(tmp_path / name).num_parameters == spec.num_parameters()["total"]
    save_checkpoint(tmp_path / "judge", ScoreModel(Decoder(spec)))
    inside = spec.num_parameters()["total"] - spec.num_parameters()["head"]
    assert read_model(tmp_path / "judge").num_parameters == inside + 32  # the head's one row of weights


def test_broken_weights_have_no_size(tmp_path: Path) -> None:
    for number, content in enumerate(
        (b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]", b"\x09" + b"\0" * 7 + b'{"a": {}}')
    ):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "model.safetensors").write_bytes(content)
        assert read_model(tmp_path / str(number)).num_parameters == 0


def test_its_result_is_the_sections_sentence_or_its_validations(make: Make) -> None:
    folder = make("demo/sft/checkpoint", {"stage": "sft", "results": {"valid/loss": 1.25, "valid/accuracy": 0.5}})
    assert read_model(folder).result == "loss 1.25, accuracy 0.5"
    write_json(folder.parent / "report.json", {"line": "40 conversations"})
    assert read_model(folder).result == "40 conversations"


def test_only_what_is_worded_as_ours_is_believed_of_what_was_learned(make: Make) -> None:
    ours = [
        learned("documents", 12, "corpus", part="docs", tokens=2048, origins={}),
        learned("rankings", 7, "people.jsonl", origins={"human": 5, "rule": 2}),
    ]
    assert ours[0] == {"kind": "documents", "count": 12, "source": "corpus", "part": "docs", "tokens": 2048}
    strange = ["x", {}, {"kind": "secrets", "count": 1}, {"kind": "ratings", "count": "many"}, {"kind": "ratings"}]
    odd = {"kind": "scores", "count": 3, "source": None, "origins": {"human": "<b>"}, "tokens": "1", "more": "<script>"}
    folder = make("demo/sft/checkpoint", {"stage": "sft", "learned_from": [*strange, *ours, odd]})
    assert read_model(folder).learned_from == [*ours, {"kind": "scores", "count": 3, "source": ""}]
    assert Model(folder, {"learned_from": {"kind": "ratings"}}).learned_from == []


def test_what_is_told_to_others_names_no_folder(make: Make, tmp_path: Path) -> None:
    base = make("models/base")
    sft = make("a/sft/checkpoint", {"stage": "sft", "parent": str(base), "learned_from": [learned("ratings", 2, "t")]})
    ppo = read_model(make("b/ppo/checkpoint", {"stage": "ppo", "parent": str(sft)}))
    told = history(ppo)
    assert [(one["model"], one["stage"]) for one in told] == [("base", ""), ("sft", "sft"), ("ppo", "ppo")]
    assert told[1]["data"] == [{"kind": "ratings", "count": 2, "source": "t"}]
    assert str(tmp_path) not in json.dumps(told)


def test_it_is_read_without_torch() -> None:
    code = "import sys, lyceum.model.lineage, lyceum.cli.models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
