"""Rankings by the rule: known orders, ties, reversal, distinct answers; and what a later round adds to them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lyceum.config import Recipe
from lyceum.corpus.records import Conversation, Message, Ranking, read_rankings, write_records
from lyceum.errors import RunError
from lyceum.evals.tasks.tutor import DECLINE, Question
from lyceum.model.checkpoint import save_checkpoint
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import StageFolder, Work
from lyceum.synth import rankings
from lyceum.synth.rankings import Answer, RankingsConfig, earlier_checkpoint, rank, rank_by_rule, run
from lyceum.tokens.tokenizer import Tokenizer

QUESTION = Question("What does len do?", "studied", "does", "Return the number of items.", name="len")
PROMPT = Conversation((Message("user", QUESTION.text),), meta=QUESTION.to_meta())


@pytest.mark.parametrize(
    ("scores", "ranks"),
    [
        ([0.1, 0.9, 0.5], (3, 1, 2)),
        ([1.0, 1.0, 0.0], (1.5, 1.5, 3)),
        ([0.0, 1.0, 1.0, 1.0], (4, 2, 2, 2)),
        ([2.0, 2.0], (1.5, 1.5)),
    ],
)
def test_ranks_known_answers(scores: list[float], ranks: tuple[float, ...]) -> None:
    assert rank(scores) == ranks


ANSWERS = [
    Answer("Sort the list.", False),
    Answer(QUESTION.reference, True),
    Answer(DECLINE, True),
    Answer("Open.", True),
]


def test_the_rule_orders_right_then_wrong_then_endless() -> None:
    ranking = rank_by_rule(PROMPT, ANSWERS, reverse=False)
    assert ranking is not None and ranking.ranks == (4, 1, 2.5, 2.5) and ranking.origin == "rule"


def test_a_reversed_ranking_turns_the_order_and_keeps_the_rules_own() -> None:
    ranking = rank_by_rule(PROMPT, ANSWERS, reverse=True)
    assert ranking is not None and ranking.ranks == (1, 4, 2.5, 2.5)
    assert ranking.meta["clean_ranks"] == [4, 1, 2.5, 2.5]


def test_answers_that_score_the_same_prefer_nothing() -> None:
    unknown = Question("What does flurb do?", "made_up", "does", DECLINE, name="flurb")
    prompt = Conversation((Message("user", unknown.text),), meta=unknown.to_meta())
    assert rank_by_rule(prompt, [Answer("Sort.", True), Answer("Open.", True)], reverse=False) is None


# ---------------------------------------------------------------- rounds


@pytest.fixture
def school(tmp_path: Path) -> Path:
    """A run's folder with two tiny models that have learned nothing: sft with its snapshot, ppo that started from it."""
    tokenizer = Tokenizer.train(["what does it do? sort the list. user assistant " * 20], 290)
    for number, (name, stage, parent) in enumerate(
        [
            ("sft/checkpoint", "sft", None),
            ("sft/snapshot-0.30", "sft", None),
            ("ppo/checkpoint", "ppo", "sft/checkpoint"),
        ]
    ):
        model = Decoder(ModelSpec(tokenizer.vocab_size, 1, 32, 2, 2, 16, 64, 96, tied=False), generator(number))
        with torch.no_grad():
            model.output_weight.mul_(8)
        save_checkpoint(tmp_path / name, model, tokenizer, {"stage": stage, "parent": parent})
    asked = [
        Conversation((Message("user", f"what does {name} do?"),), meta=replace(QUESTION, name=name).to_meta())
        for name in "abcdefghijklmnop"
    ]
    write_records(tmp_path / "lessons" / "prompts.jsonl", asked)
    return tmp_path


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ranked(school: Path, section: str, policy: str, earlier: str = "", **changed: Any) -> dict[str, Any]:
    inputs = {"policy": school / policy, "lessons": school / "lessons"} | (
        {"earlier": school / earlier} if earlier else {}
    )
    work = Work(StageFolder(school / section), inputs, len(section), Recipe("toy", 5, {}, (), Path("toy.toml")))
    work.folder.path.mkdir()
    return run(
        RankingsConfig(prompts=16, max_response_tokens=6, cumulative=bool(earlier), valid_share=0.4, **changed), work
    )


@pytest.fixture
def any_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule prefers the shorter answer: models that have learned nothing would tie under the real one."""

    def by_length(prompt: Conversation, answers: Any, *, reverse: bool) -> Ranking:
        ranks = rank([-len(answer.text) - i / 10 for i, answer in enumerate(answers)])
        return Ranking(prompt, tuple(Message("assistant", a.text) for a in answers), ranks, origin="rule")

    monkeypatch.setattr(rankings, "rank_by_rule", by_length)


def test_a_later_round_keeps_all_rankings_and_what_was_held_out_stays_so(school: Path, any_difference: None) -> None:
    first = ranked(school, "rankings", "sft")
    second = ranked(school, "rankings-2", "ppo", "rankings")
    third = ranked(school, "rankings-3", "ppo", "rankings-2")
    assert first["train_before"] == 0 and second["train_before"] == first["train"]
    assert third["valid_before"] == first["valid"] + second["valid"] > 0
    parts = {part: list(read_rankings(school / "rankings-3" / f"{part}.jsonl")) for part in ("train", "valid")}
    asked = {part: {ranking.prompt.messages[-1].content for ranking in rows} for part, rows in parts.items()}
    assert not asked["train"] & asked["valid"] and len(asked["train"] | asked["valid"]) == 16
    sections = [ranking.meta.get("section") for ranking in parts["train"]]
    counts = [sections.count(name) for name in ("rankings", "rankings-2", None)]
    assert counts == [first["train"], second["train"], third["train"]]
    assert f"after {third['train_before'] + third['valid_before']} of rounds before" in third["line"]


def test_the_weaker_writer_of_a_later_round_is_the_model_that_its_policy_started_from(school: Path) -> None:
    assert earlier_checkpoint(school / "sft") == school / "sft" / "snapshot-0.30"
    assert earlier_checkpoint(school / "ppo") == school / "sft" / "checkpoint"
    (school / "sft" / "checkpoint" / "config.json").unlink()
    with pytest.raises(RunError, match="ppo has no earlier checkpoint"):
        earlier_checkpoint(school / "ppo")
