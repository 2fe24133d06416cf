"""The river: what runs, what is skipped, gone on with or moved aside, and what each wrong recipe is answered with."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import lyceum
from lyceum.cli import kinds, river
from lyceum.config import find_recipe, load_recipe
from lyceum.errors import ConfigError, LyceumError, RunError
from lyceum.run import Run, State, read_state, write_json

ALL = ["soil", "shoot", "tree", "graft", "fruit"]


def old(garden: Any) -> list[str]:
    folder = garden.folder / "old"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# -------------------------------------------------------------------------------- skip, resume, redo


def test_a_run_runs_every_section_in_order_with_its_settings(garden: Any) -> None:
    assert garden.run() == ALL
    report = json.loads((garden.folder / "tree" / "report.json").read_text())
    assert report == {"line": "tree is 2 big", "size": 2}
    assert all(read_state(garden.folder / name).finished for name in ALL)  # type: ignore[union-attr]


def test_a_finished_run_runs_nothing_again_and_shows_its_result(
    garden: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(river, "CAN_CHAT", ("tree",))
    garden.run()
    first = capsys.readouterr()
    assert garden.run() == []
    again = capsys.readouterr()
    assert again.out.splitlines()[-1] == first.out.splitlines()[-1] == f"talk to it: lyceum chat {garden.folder}"
    assert "[3/5] tree: done before" in again.err
    assert "tree is 2 big" in first.err and "[5/5] fruit: pick" in first.err


def test_a_section_that_was_stopped_is_gone_on_with_in_its_folder(
    garden: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(name: str) -> None:
        if name == "tree":
            (garden.folder / "tree" / "half").write_text("done")
            raise KeyboardInterrupt

    garden.before = stop
    with pytest.raises(KeyboardInterrupt):
        garden.run()
    assert garden.ran == ["soil", "shoot"]
    garden.before = lambda name: None
    assert garden.run() == ["tree", "graft", "fruit"]
    assert (garden.folder / "tree" / "half").read_text() == "done"
    assert "going on where it was" in capsys.readouterr().err
    assert old(garden) == []


def test_a_changed_section_and_all_that_flows_from_it_is_made_anew(garden: Any) -> None:
    garden.run()
    assert garden.run("tree.size=3") == ["tree"]  # graft starts from shoot, and fruit from graft, the nearest tree
    assert old(garden) == ["tree-1"]
    assert json.loads((garden.folder / "old" / "tree-1" / "made").read_text())[0] == 2
    assert garden.run("tree.size=3", "graft.size=5") == ["graft", "fruit"]
    assert garden.run("tree.size=4", "graft.size=5") == ["tree"]
    assert old(garden) == ["fruit-1", "graft-1", "tree-1", "tree-2"]
    assert garden.run("tree.size=4", "graft.size=5", "soil.size=9") == ALL


def test_writing_out_a_default_changes_nothing(garden: Any) -> None:
    garden.run()
    assert garden.run("soil.size=1", "graft.from=shoot") == []


def test_the_model_is_part_of_the_key_of_what_makes_it(garden: Any) -> None:
    garden.run()
    assert garden.run("model.depth=3") == ["shoot", "tree", "graft", "fruit"]


def test_the_seed_and_the_stages_version_are_part_of_the_key(garden: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    garden.run()
    seeds = {name: work.seed for name, work in garden.works.items()}
    assert len(set(seeds.values())) == len(ALL)
    assert garden.run("seed=1") == ALL
    assert garden.works["soil"].seed != seeds["soil"]
    monkeypatch.setattr(sys.modules["made_up.fruit"], "VERSION", 2)
    assert garden.run("seed=1") == ["fruit"]


def test_a_deleted_section_is_made_again_alone(garden: Any) -> None:
    garden.run()
    (garden.folder / "shoot" / "made").unlink()
    (garden.folder / "shoot" / "report.json").unlink()
    (garden.folder / "shoot" / "state.json").unlink()
    (garden.folder / "shoot").rmdir()
    assert garden.run() == ["shoot"]


def test_a_run_in_use_is_refused(garden: Any) -> None:
    with Run.open(load_recipe(garden.recipe), garden.runs), pytest.raises(RunError, match="in use"):
        garden.run()


# -------------------------------------------------------------------------------- inputs


def test_the_nearest_fitting_section_before_is_the_input(garden: Any) -> None:
    garden.run()
    inputs = {name: {role: path.name for role, path in work.inputs.items()} for name, work in garden.works.items()}
    assert inputs == {
        "soil": {},
        "shoot": {"soil": "soil"},
        "tree": {"policy": "shoot", "soil": "soil"},
        "graft": {"policy": "shoot", "soil": "soil"},
        "fruit": {"tree": "graft"},
    }


def test_an_optional_input_may_be_missing(garden: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kinds.KINDS, "shoot", kinds.Kind("sow", "made_up.shoot", "Config"))
    garden.recipe.write_text("name = 'garden'\n[shoot]\n[tree]\n")
    assert garden.run() == ["shoot", "tree"]
    assert list(garden.works["tree"].inputs) == ["policy"]


def test_what_is_needed_may_depend_on_the_settings(garden: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    soil = kinds.Input("soil", ("soil",), lambda config: config.size > 1)
    monkeypatch.setitem(kinds.KINDS, "shoot", kinds.Kind("sow", "made_up.shoot", "Config", (soil,)))
    garden.recipe.write_text("name = 'garden'\n[shoot]\nsize = 1\n")
    assert garden.run() == ["shoot"]
    garden.recipe.write_text("name = 'garden'\n[shoot]\nsize = 2\n")
    with pytest.raises(ConfigError, match="needs an earlier section of kind soil"):
        garden.run()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("[soil]\n[shoo]\n", ["unknown kind 'shoo'", "did you mean 'shoot'?"]),
        ("[soil]\nsise = 1\n", ["[soil]", "no setting 'sise'", "did you mean 'size'?"]),
        ("[soil]\nsize = -1\n", ["size is -1", "at least 0"]),
        ("[shoot]\n[soil]\n", ["[shoot]", "needs an earlier section of kind soil", "add [soil]"]),
        ("[soil]\n[shoot]\n[tree]\nfrom = 'shot'\n", ["from = 'shot'", "shoot or tree", "did you mean 'shoot'?"]),
        ("[soil]\n[tree]\nfrom = 'soil'\n", ["from = 'soil'", "add a section of kind shoot or tree"]),
        ("[soil]\nfrom = 'x'\n", ["a soil section starts from no model"]),
        ("[soil]\n[soil.old]\n", ["'old'"]),
        ("seed = 1\n", ["no sections"]),
    ],
)
def test_a_wrong_recipe_is_said_before_anything_runs(garden: Any, recipe: str, words: list[str]) -> None:
    garden.recipe.write_text(recipe)
    with pytest.raises(ConfigError) as caught:
        garden.run()
    for word in words:
        assert word in str(caught.value)
    assert not garden.runs.exists()


# -------------------------------------------------------------------------------- --from and --until


def test_only_what_lies_between_from_and_until_runs(garden: Any) -> None:
    assert garden.run(last="shoot") == ["soil", "shoot"]
    assert garden.run(first="tree", last="graft") == ["tree", "graft"]
    assert garden.run(first="tree", last="graft") == []
    assert garden.run(first="fruit") == ["fruit"]


def test_from_needs_what_it_starts_from_finished_and_unchanged(garden: Any) -> None:
    with pytest.raises(RunError, match="tree starts from shoot, which was never run") as caught:
        garden.run(first="tree")
    assert "--from shoot" in caught.value.hint
    garden.run()
    with pytest.raises(RunError, match="which has changed"):
        garden.run("shoot.size=4", first="tree")
    assert garden.ran == [] and old(garden) == []


def test_from_looks_at_unfinished_work_as_missing(garden: Any) -> None:
    def stop(name: str) -> None:
        if name == "shoot":
            raise KeyboardInterrupt

    garden.before = stop
    with pytest.raises(KeyboardInterrupt):
        garden.run()
    with pytest.raises(RunError, match="which is not finished"):
        garden.run(first="tree")


def test_a_section_starts_from_a_checkpoint_folder_made_elsewhere(garden: Any, tmp_path: Path) -> None:
    folder = tmp_path / "qwen"
    folder.mkdir()
    text = garden.recipe.read_text()
    garden.recipe.write_text(text.replace('from = "shoot"', f'from = "{folder}"'))
    with pytest.raises(ConfigError, match="is no earlier section of kind .* and no folder with a config.json"):
        garden.run()
    (folder / "config.json").write_text("{}")
    assert garden.run() == ALL
    assert garden.works["graft"].inputs["policy"] == folder
    garden.recipe.write_text((garden.folder / "recipe.toml").read_text())  # as resolved: the same section
    assert garden.run() == [] and garden.run(first="graft") == []
    garden.recipe.write_text(text)
    assert garden.run() == ["graft", "fruit"] and garden.works["graft"].inputs["policy"] == garden.folder / "shoot"


def test_from_and_until_take_a_kind_where_it_is_plain(garden: Any) -> None:
    steps = river.plan(load_recipe(garden.recipe))
    assert [step.name for step in river.choose(steps, "shoot", "shoot")] == ["shoot"]
    assert [step.name for step in river.choose(steps, "tree", "graft")] == ["tree", "graft"]  # a name before a kind
    with pytest.raises(ConfigError, match="no section of that name") as caught:
        river.choose(steps, "fruits")
    assert "did you mean 'fruit'?" in caught.value.hint
    with pytest.raises(ConfigError, match="comes after"):
        river.choose(steps, "fruit", "soil")


# -------------------------------------------------------------------------------- the record


def test_the_resolved_recipe_has_every_value_and_makes_the_same_run(garden: Any) -> None:
    garden.run("graft.size=7")
    resolved = load_recipe(garden.folder / "recipe.toml")
    assert resolved.model == {"depth": 2}
    assert {section.name: section.settings for section in resolved.sections} == {
        "soil": {"size": 1},
        "shoot": {"size": 1},
        "tree": {"size": 2},
        "graft": {"size": 7},
        "fruit": {"size": 1},
    }
    asked = river.plan(load_recipe(garden.recipe, ["graft.size=7"]))
    assert [step.key for step in river.plan(resolved)] == [step.key for step in asked]


def test_the_manifest_says_what_the_run_depended_on(garden: Any) -> None:
    garden.run()
    manifest = json.loads((garden.folder / "manifest.json").read_text())
    assert manifest["seeds"].keys() == manifest["keys"].keys() == set(ALL)
    assert {"threads", "ranks", "python", "packages", "machine", "command", "code"} <= manifest.keys()
    assert manifest["packages"]["torch"]


def test_other_conditions_than_the_run_was_begun_with_are_warned_of(
    garden: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    garden.run(last="shoot")
    place = garden.folder / "manifest.json"
    manifest = json.loads(place.read_text())
    place.write_text(json.dumps(manifest | {"packages": {"torch": "1.0"}}))
    capsys.readouterr()
    garden.run()
    assert "warning: this run was begun with torch 1.0" in capsys.readouterr().err


def test_a_mistake_of_ours_leaves_its_traceback_in_the_run(garden: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def break_down(name: str) -> None:
        raise ZeroDivisionError("ours")

    garden.before = break_down
    with pytest.raises(ZeroDivisionError):
        garden.run()
    assert "in break_down" in (garden.folder / "traceback.txt").read_text()
    assert "traceback.txt" in capsys.readouterr().err


def test_an_error_for_the_person_leaves_no_traceback(garden: Any) -> None:
    def break_down(name: str) -> None:
        raise LyceumError("not enough soil")

    garden.before = break_down
    with pytest.raises(LyceumError):
        garden.run()
    assert not (garden.folder / "traceback.txt").exists()


# -------------------------------------------------------------------------------- the closing display


def test_the_report_is_built_when_the_questions_were_asked_and_only_then(
    garden: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = types.ModuleType("made_up.report")
    built: list[Path] = []

    def build(folder: Path, recipe: Any, redraw: bool) -> dict[str, Any]:
        assert redraw  # made-up kinds are never remembered
        built.append(folder)
        return {"lines": ["the table", "report: here"], "path": folder / "report.html"}

    report.build = build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_up.report", report)
    monkeypatch.setattr(river, "REPORT", "made_up.report")
    kind = kinds.Kind("ask", "made_up.fruit", "Config", (kinds.Input("tree", ("tree",)),))
    monkeypatch.setitem(kinds.KINDS, "eval", kind)
    garden.recipe.write_text(garden.recipe.read_text().replace("[fruit]", "[eval]"))
    garden.run(last="graft")
    assert built == [] and "schooling so far: 0:00 for 4 of 5 sections" in capsys.readouterr().out
    garden.run()
    assert built == [garden.folder] and capsys.readouterr().out.startswith("the table\nreport: here\n")
    assert garden.run() == [] and len(built) == 2


SHOW = """
import sys
from lyceum.cli.main import main

assert main(sys.argv[1:]) == 0
print(sorted({"torch", "matplotlib", "numpy"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of runs with a finished demo in it, of which only what the closing display reads is there."""
    recipe = load_recipe(find_recipe("demo"))
    steps = river.plan(recipe)
    with Run.open(recipe, tmp_path / "runs") as run:
        river.record(run, recipe, steps)
        for step in steps:
            folder, _ = run.begin(step.name, State(step.key, step.section.kind, {}, step.inputs, finished=True))
            write_json(folder.report, {"line": f"{step.name} is done", "drops": {}})
        lines = [json.dumps({"step": step, "loss/text": 1.0 / step}) for step in (1, 2, 3)]
        (run.path / "pretrain" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "runs"


def shown(runs: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """What `lyceum run demo` says, with the modules it imported, and the processor's seconds that it took."""
    command = [sys.executable, "-c", SHOW, "run", "demo", "--runs", str(runs), *words]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = subprocess.run(command, capture_output=True, text=True, timeout=100)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert said.returncode == 0, said.stderr
    return said, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_finished_run_shows_its_result_at_once_and_draws_its_page_only_if_need_be(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    river.run_recipe("demo", runs_dir=finished)
    first = capsys.readouterr()
    assert "[9/9] eval: done before" in first.err and "talk to it: lyceum chat" in first.out
    page = finished / "demo" / "report.html"
    assert "<svg" in page.read_text() and "pretrain is done" in page.read_text()
    again, spent = shown(finished)
    assert again.stdout == first.out and again.stderr.splitlines()[-1] == "[]" and spent < 1.0
    (finished / "demo" / "pretrain" / "metrics.jsonl").write_text("")
    capsys.readouterr()
    river.run_recipe("demo", first="reward", last="reward", runs_dir=finished)
    assert capsys.readouterr().err.splitlines() == ["[7/9] reward: done before (0:00)"]
    assert "pretrain is done" in page.read_text() and "<svg" not in page.read_text()


def test_what_is_not_plainly_finished_is_not_taken_from_memory(
    finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    demo = find_recipe("demo")

    def is_shown(*overrides: str, first: str = "", last: str = "") -> bool:
        recipe = load_recipe(demo, overrides)
        return river._show_finished(recipe, finished / recipe.name, finished, first, last, False)

    assert is_shown() and is_shown(first="sft")
    for changed in ("sft.epochs=9", "model.depth=3", "seed=5", "watch.spike=3", "machine.recompute=true", "name=other"):
        assert not is_shown(changed), changed
    package = tmp_path / "lyceum"
    shutil.copytree(Path(lyceum.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(lyceum, "__file__", str(package / "__init__.py"))
    assert is_shown()
    changed_file = package / "stages" / "ppo.py"
    changed_file.write_text(changed_file.read_text() + "\n")
    assert not is_shown()
    monkeypatch.undo()
    (finished / "demo" / "ppo" / "state.json").unlink()
    assert not is_shown() and is_shown(last="reward")
    (finished / "demo" / "sft" / "state.json").unlink()
    with pytest.raises(RunError, match="reward starts from sft, which was never run"):
        is_shown(first="reward", last="reward")


# -------------------------------------------------------------------------------- the real table


def test_the_real_table_names_kinds_that_exist_and_come_before() -> None:
    seen: list[str] = []
    for name, kind in kinds.KINDS.items():
        for wanted in kind.inputs:
            assert set(wanted.kinds) <= {*kinds.KINDS}, name
            assert not wanted.needed or set(wanted.kinds) & {*seen, name}, f"{name} stands before its {wanted.role}"
        seen.append(name)


# -------------------------------------------------------------------------------- ranks

TWO_RANKS = """
import sys, types
from dataclasses import dataclass
from lyceum import dist
from lyceum.cli import kinds, river

@dataclass(frozen=True)
class Config:
    size: int = 1

def run(config, work):
    total = dist.sum_numbers({"rank": dist.rank() + 1.0})["rank"] if work.folder.path.name == "grow" else 0
    with open(sys.argv[1] + "/ran", "a") as file:
        print(work.folder.path.name, dist.rank(), total, file=file)
    return {"line": "done"}

for name in ("dig", "grow"):
    module = types.ModuleType("made_up." + name)
    module.run, module.Config = run, Config
    sys.modules[module.__name__] = module
river.KINDS = {
    "dig": kinds.Kind("", "made_up.dig", "Config"),
    "grow": kinds.Kind("", "made_up.grow", "Config", (kinds.Input("dig", ("dig",)),), every_rank=True),
}
for again in range(2):  # the second time finds all of it finished, on both ranks
    river.run_recipe(sys.argv[1] + "/two.toml", runs_dir=sys.argv[1] + "/runs")
"""


def test_under_torchrun_rank_0_decides_and_only_training_runs_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "two.toml").write_text("[dig]\n[grow]\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(tmp_path)], env={**os.environ, **group, "RANK": str(rank)}
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=100) for rank in ranks] == [0, 0]
    assert sorted((tmp_path / "ran").read_text().splitlines()) == ["dig 0 0", "grow 0 3.0", "grow 1 3.0"]


# -------------------------------------------------------------------------------- watching


def test_watching_otherwise_runs_nothing_again_and_stands_in_the_record(garden: Any) -> None:
    garden.run()
    assert garden.run("watch.spike=8", "watch.tensorboard=false") == []
    assert load_recipe(garden.folder / "recipe.toml").watch == {"spike": 8, "tensorboard": False}


def test_a_wrong_watch_table_is_refused_before_anything_runs(garden: Any) -> None:
    with pytest.raises(ConfigError, match=r"\[watch\] in .* has no setting 'spikes'"):
        garden.run("watch.spikes=8")
    assert garden.ran == []


# -------------------------------------------------------------------------------- a role that is played on request


def test_a_role_that_must_be_asked_for_is_played_only_then(garden: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pretraining goes on from an earlier pretraining only where the recipe says so."""
    soil = kinds.Input("soil", ("soil",))
    asked = kinds.Kind("sow", "made_up.shoot", "Config", (soil, kinds.Input("policy", ("shoot",), False, asked=True)))
    for place in (kinds, river):
        monkeypatch.setattr(place, "KINDS", {**place.KINDS, "shoot": asked})
    garden.recipe.write_text('[soil]\n[shoot.one]\n[shoot.two]\n[shoot.three]\nfrom = "one"\n')
    inputs = {step.name: step.inputs for step in river.plan(load_recipe(garden.recipe))}
    assert inputs["one"] == inputs["two"] == {"soil": "soil"}
    assert inputs["three"] == {"soil": "soil", "policy": "one"}
    assert kinds.KINDS["shoot"] is asked
