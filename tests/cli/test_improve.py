"""`lyceum improve`: what is learned from, from where, when it is offered; and a whole improvement of a tiny run, twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("sqlalchemy", reason="needs the extra lyceum[serve]")

from lyceum.cli import improve, judgements, river
from lyceum.cli.chat import find_checkpoint
from lyceum.cli.judgements import JudgementsConfig, of_thumbs
from lyceum.cli.main import main
from lyceum.cli.serve import run_folder
from lyceum.config import Recipe, load_recipe
from lyceum.corpus.records import Conversation, Message, Rating, read_conversations, read_rankings
from lyceum.errors import DataError, RunError, StoreError, UsageError
from lyceum.model.checkpoint import load_checkpoint, save_checkpoint
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import (
    OFFER,
    Offer,
    StageFolder,
    State,
    Work,
    read_offer,
    read_state,
    write_json,
    write_state,
    write_text,
)
from lyceum.serve.feedback import is_held_out
from lyceum.serve.store import Store
from lyceum.tokens.tokenizer import Tokenizer

TINY = ("preference.epochs=1", "preference.batch_prompts=8", "compare.max_response_tokens=8", "compare.prompts=8")


def new_run(folder: Path, toml: str = "") -> Path:
    """A run whose recipe has been made as far as fine-tuning, of a model of random weights."""
    tokenizer = Tokenizer.train(["user\nassistant\nsystem\ntool\n yes no what is it " * 40], 300)
    spec = ModelSpec(tokenizer.vocab_size, 2, 32, 4, 2, head_width=8, ffn_width=64, context_length=64)
    stage = StageFolder(folder / "sft")
    save_checkpoint(stage.checkpoint, Decoder(spec, torch.Generator().manual_seed(0)), tokenizer)
    write_state(stage, State("key-of-sft", "sft", {}, {}, finished=True))
    write_text(folder / "recipe.toml", f'name = "tiny"\nseed = 4\n[sft]\n{toml}')
    write_json(folder / "manifest.json", {"keys": {"sft": "key-of-sft"}})
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return new_run(tmp_path / "tiny")


def judge(run: Path, first: int, last: int, best: str = "yes", consent: bool = True) -> None:
    """Somebody compares two answers to each of so many questions."""
    store = Store.open(run)
    for number in range(first, last):
        chat = store.new("ann")
        asked = store.say("ann", chat.id, None, "user", f"what is it {number}")
        answers = {
            text: store.say("ann", chat.id, asked.id, "assistant", text, model="tiny").id for text in ("yes", "no")
        }
        store.judgements.compare("ann", list(answers.values()), answers[best], consent=consent)
    store.close()


def work_in(folder: Path) -> Work:
    folder.mkdir(parents=True, exist_ok=True)
    return Work(StageFolder(folder), {}, 1, Recipe("test", 0, {}, (), folder / "test.toml"))


# -- what is read ------------------------------------------------------------------------------------------------------


def test_judgements_are_split_by_prompt_as_an_export_is(run: Path, tmp_path: Path) -> None:
    judge(run, 0, 24)
    judge(run, 0, 8, best="no")  # other conversations that begin alike: on the side of the first
    judge(run, 90, 93, consent=False)
    work = work_in(tmp_path / "judgements")
    report = judgements.run(JudgementsConfig(store=str(run), held_out=0.4, least=20), work)
    parts = {part: list(read_rankings(work.folder.path / f"{part}.jsonl")) for part in ("train", "valid")}
    for part, rows in parts.items():
        assert all(is_held_out(row.prompt, 0.4) is (part == "valid") for row in rows)
        assert report[part]["rankings"] == len(rows) >= report[part]["prompts"] > 0
    assert (
        sum(map(len, parts.values())) == 32 and report["left_out"] == {"no_consent": 3} and report["judgements"] == 35
    )
    prompts = list(read_conversations(work.folder.path / "prompts.jsonl"))
    assert len(prompts) == report["train"]["prompts"]
    assert not any(is_held_out(prompt, 0.4) for prompt in prompts)


def test_too_little_feedback_says_how_much_there_is_and_is_needed(run: Path, tmp_path: Path) -> None:
    work = work_in(tmp_path / "judgements")
    with pytest.raises(StoreError, match="no store"):
        judgements.run(JudgementsConfig(store=str(run)), work)
    with pytest.raises(UsageError, match="names no store"):
        judgements.run(JudgementsConfig(), work)
    judge(run, 0, 12)
    judge(run, 20, 23, consent=False)
    with pytest.raises(DataError, match="12 prompts have a ranking, and 40 are needed") as error:
        judgements.run(JudgementsConfig(store=str(run)), work)
    assert "15 judgements so far; left out: 3 no_consent" in error.value.hint
    with pytest.raises(DataError, match="of 12 prompts are held out"):
        judgements.run(JudgementsConfig(store=str(run), least=10, held_out=0.0), work)
    assert not list(work.folder.path.iterdir())


def test_different_thumbs_of_one_person_for_one_prompt_order_its_answers() -> None:
    def thumb(question: str, answer: str, value: float, who: str = "ann") -> Rating:
        prompt = Conversation((Message("user", question),))
        return Rating(prompt, Message("assistant", answer), value, meta={"annotator": who})

    found = of_thumbs([
        thumb("a", "good", 1.0), thumb("a", "bad", 0.0), thumb("a", "worse", 0.0),
        thumb("b", "good", 1.0), thumb("b", "too", 1.0),
        thumb("c", "good", 1.0), thumb("c", "bad", 0.0, "bob"),
        thumb("d", "same", 1.0), thumb("d", "same", 0.0),
    ])  # fmt: skip
    (one,) = found
    assert [said.content for said in one.responses] == ["good", "bad", "worse"] and one.ranks == (1.0, 2.0, 2.0)


# -- from where, and with which settings -------------------------------------------------------------------------------


def test_settings_are_the_recipes_own_where_it_has_them(tmp_path: Path) -> None:
    toml = '[preference]\nlr = 0.5\ndata = "mine.jsonl"\n[ppo]\niterations = 3\nrewards = { exact = 1.0 }\nptx_coef = 0.5\n'
    run = new_run(tmp_path / "own", toml)
    start = run / "sft" / "checkpoint"
    recipe = load_recipe(run / "recipe.toml")
    dpo = improve.recipe_of(recipe, run, 3, "dpo", start, {"store": "x"})
    assert dpo["preference"] == {"from": str(start), "lr": 0.5}
    assert (dpo["name"], dpo["seed"], dpo["within"]) == ("3", 7, str(run))
    assert list(dpo)[-3:] == ["judgements", "preference", "compare"]
    ppo = improve.recipe_of(recipe, run, 1, "ppo", start, {"store": "x"})
    assert ppo["ppo"] == {"from": str(start), "iterations": 3, "rewards": {}, "dense": "", "ptx_coef": 0.0}
    assert ppo["reward"] == {"from": str(start), **improve.DEFAULTS["reward"]}


def test_every_improvements_recipe_is_one(run: Path, tmp_path: Path) -> None:
    from lyceum.config import to_toml

    pretrain = StageFolder(run / "pretrain")
    pretrain.path.mkdir()
    write_state(pretrain, State("key", "pretrain", {}, {}, finished=True))
    write_text(
        run / "recipe.toml",
        'name = "tiny"\n[corpus]\n[lessons]\n[tokenizer]\n[pretrain]\n[sft]\n[ppo]\nptx_coef = 0.02\n',
    )
    start = run / "sft" / "checkpoint"
    for method, sections in (("dpo", ["preference"]), ("ppo", ["reward", "ppo"])):
        tables = improve.recipe_of(load_recipe(run / "recipe.toml"), run, 1, method, start, {"store": str(run)})
        write_text(tmp_path / "one.toml", to_toml(tables))
        steps = {step.name: step for step in river.plan(load_recipe(tmp_path / "one.toml"))}
        assert list(steps) == ["judgements", *sections, "compare"]
        assert steps[sections[-1]].inputs["policy"] == str(start) and steps["compare"].inputs["policy"] == sections[-1]
    assert steps["ppo"].inputs["pretrain"] == str(pretrain.path.resolve())  # of the run that it stands within
    assert steps["ppo"].inputs["lessons"] == steps["reward"].inputs["rankings"] == "judgements"


# -- what is offered ---------------------------------------------------------------------------------------------------


def compared(run: Path, number: int, is_better: bool) -> None:
    folder = run / "improve" / str(number)
    found = {"is_better": is_better, "why": "because", "line": "because", "examples": [], "implicit": 0.5}
    write_json(folder / "compare" / "report.json", found)
    (folder / "preference" / "checkpoint").mkdir(parents=True)
    (folder / "preference" / "checkpoint" / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("offer", "is_better", "is_offered"),
    [("better", True, True), ("better", False, False), ("always", False, True), ("never", True, False)],
)
def test_what_is_offered(run: Path, offer: str, is_better: bool, is_offered: bool) -> None:
    compared(run, 1, is_better)
    own = find_checkpoint(run).checkpoint
    text = improve.close(run, 1, "preference", own, offer)
    assert ("not offered" not in text) is is_offered
    closed = json.loads((run / "improve" / "1" / "improve.json").read_text())
    assert closed["is_offered"] is is_offered and closed["why"] == "because" and "examples" not in closed
    found = find_checkpoint(run).checkpoint
    assert found == (run / "improve/1/preference/checkpoint" if is_offered else own)
    assert find_checkpoint(run, "sft").checkpoint == find_checkpoint(run, takes_offer=False).checkpoint == own
    assert improve.next_number(run) == 2


def test_all_offers_go_back_to_the_runs_own_section(run: Path) -> None:
    for number in (1, 2):
        compared(run, number, True)
        improve.close(run, number, "preference", find_checkpoint(run).checkpoint, "better")
    offer = read_offer(run)
    assert offer is not None and offer.checkpoint == "improve/2/preference/checkpoint"
    assert (offer.section, offer.key) == ("sft", "key-of-sft")
    write_json(run / "manifest.json", {"keys": {"sft": "another"}})  # the recipe was changed and run again
    write_state(StageFolder(run / "sft"), State("another", "sft", {}, {}, finished=True))
    choice = find_checkpoint(run)
    assert choice.checkpoint == run / "sft" / "checkpoint" and "before the recipe changed" in choice.words
    with pytest.raises(RunError, match="knows no section"):
        improve.root_of(run, run / "elsewhere" / "checkpoint")


def test_the_store_is_that_of_the_outer_run(run: Path) -> None:
    inner = run / "improve" / "1"
    write_text(inner / "recipe.toml", 'name = "1"\n[sft]\n')
    assert run_folder(inner / "preference" / "checkpoint") == run.resolve()


def test_a_command_that_makes_no_sense_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for words, text in (
        ([str(tmp_path / "nowhere")], "is no run's folder"),
        ([str(run), "--method", "dpp"], "there is no --method dpp"),
        ([str(run), "--offer", "mostly"], "there is no --offer mostly"),
    ):
        assert main(["improve", *words]) == 2
        assert text in capsys.readouterr().err


def stood_in(run: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The river reads judgements, trains nothing, and finds nothing better; returns the improvements it was asked for."""
    made: list[str] = []

    def run_recipe(recipe: Path, *, overrides: tuple[str, ...], runs_dir: Path) -> None:
        section = load_recipe(recipe).section("judgements")
        report = judgements.run(JudgementsConfig(**section.settings), work_in(recipe.parent / "judgements"))
        write_json(recipe.parent / "judgements" / "report.json", report)
        compared(run, int(recipe.parent.name), False)
        made.append(recipe.parent.name)

    monkeypatch.setattr(river, "run_recipe", run_recipe)
    return made


def test_without_new_feedback_the_last_result_stands(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = stood_in(run, monkeypatch)
    judge(run, 0, 24)
    own = find_checkpoint(run).checkpoint
    first = improve.improve(run, least=20, held_out=0.4)
    for _ in range(2):
        said = improve.improve(run, least=20, held_out=0.4)
        assert (
            said == f"nothing new was said since improvement 1, whose result stands; --again trains once more\n{first}"
        )
    judge(run, 90, 93, consent=False)  # nothing that may be learned from
    assert "nothing new" in improve.improve(run, least=20, held_out=0.4) and made == ["1"]
    assert find_checkpoint(run).checkpoint == own
    assert "offered: improve/1/preference/checkpoint" in improve.improve(run, least=20, held_out=0.4, offer="always")
    assert find_checkpoint(run).checkpoint == run / "improve/1/preference/checkpoint" and made == ["1"]
    before = (run / OFFER).stat().st_mtime_ns
    assert "because\noffered: improve/1" in improve.improve(run, least=20, held_out=0.4, offer="never")
    assert (run / OFFER).stat().st_mtime_ns == before and made == ["1"]
    assert "nothing new" not in improve.improve(run, least=20, held_out=0.4, again=True) and made == ["1", "2"]
    assert "nothing new" in improve.improve(run, least=20, held_out=0.4) and made == ["1", "2"]


def test_what_is_new_is_learned_from(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = stood_in(run, monkeypatch), {"held_out": 0.4, "least": 20}
    judge(run, 0, 24)
    improve.improve(run, **asked)
    for more in ({"held_out": 0.3}, {"overrides": ("compare.prompts=3",)}, {"method": "ppo"}, {}):
        assert "nothing new" not in improve.improve(run, **{**asked, **more})
    judge(run, 0, 1, best="no")
    assert "nothing new" not in improve.improve(run, **asked)
    write_text(run / "recipe.toml", 'name = "tiny"\nseed = 4\n[sft]\n[preference]\nlr = 0.5\n')
    assert "nothing new" not in improve.improve(run, **asked)
    assert made == ["1", "2", "3", "4", "5", "6", "7"] and "nothing new" in improve.improve(run, **asked)


def test_an_improvement_that_was_under_way_is_not_taken_for_a_repetition(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stood_in(run, monkeypatch)
    judge(run, 0, 24)
    improve.improve(run, least=20, held_out=0.4)
    (run / "improve" / "2").mkdir()
    improve.improve(run, least=20, held_out=0.4)
    assert made == ["1", "2"]


# -- the whole of it ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_improved_twice_goes_on_from_the_first_with_all_that_was_said(run: Path) -> None:
    own = find_checkpoint(run).checkpoint
    judge(run, 0, 40)
    improve.improve(run, offer="always", least=20, held_out=0.4, overrides=TINY)
    first = run / "improve" / "1"
    assert read_state(first / "preference").inputs["policy"] == str(own.resolve())
    assert find_checkpoint(run).checkpoint == first / "preference" / "checkpoint"
    judge(run, 40, 60)
    improve.improve(run, offer="always", least=20, held_out=0.4, overrides=TINY)
    second = run / "improve" / "2"
    assert read_state(second / "preference").inputs["policy"] == str((first / "preference" / "checkpoint").resolve())
    counts = [
        json.loads((folder / "judgements" / "report.json").read_text())["judgements"] for folder in (first, second)
    ]
    assert counts == [40, 60]
    weights = [
        next(load_checkpoint(folder).model.parameters())
        for folder in (own, first / "preference" / "checkpoint", find_checkpoint(run).checkpoint)
    ]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert "held-out pairs" in (first / "report.html").read_text()


@pytest.mark.slow
def test_a_killed_improvement_goes_on_with_what_it_had_read(run: Path) -> None:
    """kill -9 while it trains; what is said meanwhile waits for the next improvement."""
    judge(run, 0, 60)
    words = ["improve", str(run), "--least", "20", "--held-out", "0.3", "--offer", "always"]
    for setting in ("preference.epochs=40", "preference.save_every=5", "preference.batch_prompts=4", *TINY[2:]):
        words += ["--set", setting]
    process = subprocess.Popen([sys.executable, "-m", "lyceum", *words], env=os.environ)
    stage = run / "improve" / "1" / "preference"
    end = time.monotonic() + 120
    while not (stage / "trainer").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_state(stage) is not None and not read_state(stage).finished and improve.next_number(run) == 1
    judge(run, 60, 70)
    assert main(words) == 0
    report = json.loads((run / "improve" / "1" / "judgements" / "report.json").read_text())
    assert report["judgements"] == 60 and read_state(stage).finished and improve.next_number(run) == 2
    assert not (run / "improve" / "1" / "old").exists()  # nothing was made anew


@pytest.mark.slow
def test_ppo_learns_from_a_reward_model_of_what_was_said(run: Path) -> None:
    judge(run, 0, 60)
    small = ("ppo.iterations=2", "ppo.prompts_per_iteration=8", "ppo.max_response_tokens=8", "ppo.lr=1e-3", *TINY[2:])
    assert "offered: improve/1/ppo/checkpoint" in improve.improve(
        run, method="ppo", offer="always", least=20, held_out=0.3, overrides=small
    )
    closed = json.loads((run / "improve" / "1" / "improve.json").read_text())
    assert 0 <= closed["judge"] <= 1 and 0 <= closed["preferred"] <= 1
    assert Offer(**json.loads((run / OFFER).read_text())).checkpoint == "improve/1/ppo/checkpoint"
