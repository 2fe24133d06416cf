"""Rounds: a recipe's rankings and what learns from them, repeated; what each starts from, and where a killed one goes on."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lyceum.cli import kinds, river
from lyceum.cli.kinds import Input, Kind
from lyceum.config import ROUND, find_recipe, load_recipe, setting
from lyceum.errors import ConfigError, RunError

RECIPE = """
name = "garden"
rounds = 2
[sft]
[rankings]
size = 3
[reward]
[ppo]
[eval]
"""
SCHOOL = {
    "sft": (),
    "rankings": (Input("policy", ("sft", "ppo", "grpo")), Input("earlier", ("rankings",), only_if="cumulative")),
    "reward": (Input("policy", ("sft",)), Input("rankings", ("rankings",))),
    "ppo": (Input("policy", ("sft",)), Input("reward", ("reward",))),
    "grpo": (Input("policy", ("sft", "ppo", "grpo")), Input("reward", ("reward",))),
    "eval": (Input("sft", ("sft",)), Input("ppo", ("ppo",), every=True)),
}


@dataclass(frozen=True)
class Config:
    """The settings of every made-up kind."""

    size: int = setting(1, "how big", low=0)
    cumulative: bool = setting(False, "as in rankings")


@pytest.fixture
def school(garden: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The garden with the real kinds' names and inputs, and nothing in them."""
    table = {}
    for name, inputs in SCHOOL.items():
        module = types.ModuleType(f"made_up.{name}")
        module.run, module.Config, module.VERSION = garden.entry, Config, 1  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        table[name] = Kind("", module.__name__, "Config", inputs)
    for place in (kinds, river):
        monkeypatch.setattr(place, "KINDS", table)
    monkeypatch.setattr(river, "_check_memory", lambda *given: None)  # made-up sections have no shape
    monkeypatch.setattr(river, "REPORT", "made_up.report")
    report = types.ModuleType("made_up.report")
    report.build = lambda *a, **k: {"lines": [], "path": "report.html"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_up.report", report)
    garden.recipe.write_text(RECIPE)
    return garden


def inputs_of(school: Any, name: str) -> dict[str, str]:
    return {role: path.name for role, path in school.works[name].inputs.items()}


def test_a_round_ranks_the_newest_policy_learns_from_all_rankings_and_starts_where_the_first_did(school: Any) -> None:
    assert school.run() == ["sft", "rankings", "reward", "ppo", "rankings-2", "reward-2", "ppo-2", "eval"]
    assert inputs_of(school, "rankings") == {"policy": "sft"}
    assert inputs_of(school, "rankings-2") == {"policy": "ppo", "earlier": "rankings"}
    assert inputs_of(school, "reward-2") == {"policy": "sft", "rankings": "rankings-2"}
    assert inputs_of(school, "ppo-2") == {"policy": "sft", "reward": "reward-2"}
    assert inputs_of(school, "eval") == {"sft": "sft", "ppo": "ppo-2", "ppo:ppo": "ppo"}
    sections = {section.name: section.settings for section in load_recipe(school.recipe).sections}
    assert sections["rankings"] == {"size": 3} and sections["rankings-2"] == {"size": 3, "cumulative": True}
    assert school.works["ppo-2"].seed != school.works["ppo"].seed


def test_three_rounds_each_know_all_before(school: Any) -> None:
    school.run("rounds=3")
    assert inputs_of(school, "rankings-3") == {"policy": "ppo-2", "earlier": "rankings-2"}
    assert inputs_of(school, "eval") == {"sft": "sft", "ppo": "ppo-3", "ppo:ppo": "ppo", "ppo:ppo-2": "ppo-2"}


def test_one_more_round_keeps_what_the_earlier_ones_made(school: Any) -> None:
    school.run("rounds=1")
    assert school.run() == ["rankings-2", "reward-2", "ppo-2", "eval"]
    assert school.run("rounds=3") == ["rankings-3", "reward-3", "ppo-3", "eval"]
    assert school.run("rounds=3") == []


def test_a_run_stopped_in_the_second_round_goes_on_there(school: Any) -> None:
    first = ["sft", "rankings", "reward", "ppo"]
    for stopped, ran in (
        ("rankings-2", first),
        ("reward-2", ["rankings-2"]),
        ("ppo-2", ["reward-2"]),
        ("eval", ["ppo-2"]),
    ):

        def stop(name: str, stopped: str = stopped) -> None:
            if name == stopped:
                (school.folder / name / "half").write_text("done")
                raise KeyboardInterrupt

        school.before = stop
        with pytest.raises(KeyboardInterrupt):
            school.run()
        school.before = lambda name: None
        assert school.ran == ran
    assert school.run() == ["eval"] and (school.folder / "rankings-2" / "half").exists()
    assert not (school.folder / "old").exists()


def test_a_setting_holds_in_all_rounds_and_an_override_may_name_one(school: Any) -> None:
    school.run()
    assert school.run("ppo-2.size=5") == ["ppo-2", "eval"]
    assert school.run("ppo.size=4", "ppo-2.size=5") == ["ppo", "rankings-2", "reward-2", "ppo-2", "eval"]
    sizes = {s.name: s.settings.get("size") for s in load_recipe(school.recipe, ["ppo.size=4"]).sections}
    assert sizes["ppo"] == sizes["ppo-2"] == 4
    recipe = load_recipe(school.recipe, ["ppo-2.from=elsewhere", "rankings-2.cumulative=false"])
    assert recipe.section("ppo-2").source == "elsewhere"  # type: ignore[union-attr]
    assert recipe.section("rankings-2").settings == {"size": 3, "cumulative": False}  # type: ignore[union-attr]


def test_rankings_of_the_newest_policy_alone_need_none_before(school: Any) -> None:
    school.run("rankings-2.cumulative=false")
    assert inputs_of(school, "rankings-2") == {"policy": "ppo"}


def test_a_policy_that_started_from_a_repeated_one_starts_from_its_repetition(school: Any) -> None:
    school.recipe.write_text(RECIPE.replace("[ppo]", "[ppo]\n[grpo]\n[grpo.own]\nfrom = 'sft'\n"))
    school.run()
    starts = {name: inputs_of(school, name)["policy"] for name in ("grpo", "grpo-2", "own", "own-2", "rankings-2")}
    assert starts == {"grpo": "ppo", "grpo-2": "ppo-2", "own": "sft", "own-2": "sft", "rankings-2": "own"}


def test_the_resolved_recipe_of_rounds_makes_the_same_run(school: Any) -> None:
    school.run()
    resolved = load_recipe(school.folder / "recipe.toml")
    asked = river.plan(load_recipe(school.recipe))
    assert [step.key for step in river.plan(resolved)] == [step.key for step in asked]
    assert [step.inputs for step in river.plan(resolved)] == [step.inputs for step in asked]


def test_from_and_until_name_rounds(school: Any) -> None:
    assert school.run(last="ppo") == ["sft", "rankings", "reward", "ppo"]
    with pytest.raises(RunError, match="ppo-2 starts from reward-2, which was never run"):
        school.run(first="ppo-2")
    assert school.run(first="rankings-2", last="reward-2") == ["rankings-2", "reward-2"]


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("rounds = 0\n[sft]\n", "rounds is 0; it must be at least 1"),
        ("rounds = 'two'\n[sft]\n", 'rounds is "two"; expected a whole number'),
        ("rounds = 2\n[sft]\n[reward]\n[ppo]\n", "lacks what a round is made of"),
        ("rounds = 2\n[sft]\n[rankings]\n[reward]\n", "lacks what a round is made of"),
        (
            RECIPE.replace("[eval]", "[sft.ppo-2]"),
            "has a section 'ppo-2', which is what rounds = 2 calls one of its own",
        ),
    ],
)
def test_rounds_that_cannot_be_are_refused(school: Any, recipe: str, words: str) -> None:
    school.recipe.write_text(recipe)
    with pytest.raises(ConfigError) as caught:
        school.run()
    assert words in str(caught.value)


def test_a_verb_is_a_section_of_every_round_as_far_as_what_it_starts_from_is_there(
    school: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def verb(kind: str) -> list[str]:
        school.ran.clear()
        words = {"overrides": ["rounds=3"], "first": kind, "last": kind, "every_round": True}
        river.run_recipe(school.recipe, runs_dir=school.runs, **words)
        return list(school.ran)

    assert [verb(kind) for kind in ("sft", "rankings", "reward")] == [["sft"], ["rankings"], ["reward"]]
    assert verb("ppo") == ["ppo"]
    assert "later rounds wait: ppo-2 starts from reward-2, which was never run" in capsys.readouterr().err
    assert [verb(kind) for kind in ("rankings", "reward", "ppo")] == [["rankings-2"], ["reward-2"], ["ppo-2"]]
    school.run("rounds=3")
    assert verb("ppo") == []


def test_an_override_of_a_round_that_is_not_there_says_so(school: Any) -> None:
    with pytest.raises(ConfigError, match="no section 'ppo-3'"):
        school.run("ppo-3.size=1")


def test_the_real_smoke_recipe_has_rounds_and_every_kind_of_a_round_is_one(tmp_path: Path) -> None:
    assert set(ROUND) <= set(kinds.KINDS)
    steps = {step.name: step for step in river.plan(load_recipe(find_recipe("smoke"), ["rounds=2"]))}
    assert steps["rankings-2"].config.cumulative and steps["rankings-2"].inputs["policy"] == "ppo"
    assert steps["ppo-2"].inputs["policy"] == steps["reward-2"].inputs["policy"] == "sft"
    assert steps["eval"].inputs["shaped"] == "ppo-2" and steps["eval"].inputs["shaped:ppo"] == "ppo"
