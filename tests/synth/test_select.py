"""Best-of-n: what is kept and what is left out, the control, the KL; and that what it writes can be learned from."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lyceum.config import Recipe
from lyceum.corpus.records import Conversation, Message, read_conversations, write_records
from lyceum.engine.engine import Engine
from lyceum.engine.sequence import Output
from lyceum.errors import CheckpointError, DataError
from lyceum.evals.metrics import best_of_n_kl
from lyceum.model.checkpoint import save_checkpoint
from lyceum.model.heads import ScoreModel
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import StageFolder, Work
from lyceum.synth.select import Choice, SelectConfig, choose, run, select, top
from lyceum.tokens.chat import ChatFormat
from lyceum.tokens.tokenizer import Tokenizer


def output(ids: list[int], finish: str = "stop") -> Output:
    return Output(0, ids, finish)  # type: ignore[arg-type]


def test_the_best_answer_that_ended_and_has_a_score_is_kept() -> None:
    answers = [[output([1]), output([2]), output([3], "length"), output([4])], [output([5], "length")], [output([6])]]
    scores = [[0.5, 2.0, 9.0, None], [1.0], [None]]
    found = choose(answers, scores, "best", random.Random(0))
    assert found[0] == Choice(0, answers[0][1], 2.0, 1.25) and found[1:] == [None, None]
    drawn = {choose(answers, scores, "random", random.Random(seed))[0].output.ids[0] for seed in range(20)}  # type: ignore[union-attr]
    assert drawn == {1, 2}


def test_the_top_share_is_by_score_and_that_of_the_control_by_lot() -> None:
    choices = [Choice(number, output([number]), score, 0.0) for number, score in enumerate([3.0, 1.0, 4.0, 2.0])]
    config = SelectConfig(top_share=0.5)
    assert [c.prompt for c in top(choices, config, random.Random(0))] == [0, 2]
    lots = [tuple(c.prompt for c in top(choices, replace(config, keep="random"), random.Random(s))) for s in range(30)]
    assert all(len(lot) == 2 for lot in lots) and len(set(lots)) == 6  # every pair of prompts turns up


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(Tokenizer.train(["say yes or no user assistant " * 20], 290))


def policy(chat: ChatFormat, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(ModelSpec(chat.tokenizer.vocab_size, 1, 32, 2, 2, 16, 64, 64, tied=False))
    with torch.no_grad():  # it ends about one reply in four at every token
        model.output_weight[chat.tokenizer.turn_end_id] = 0.0
        model.output_weight.mul_(2.0)
    return model


def questions(count: int) -> list[Conversation]:
    return [Conversation((Message("user", f"say {n}"),), meta={"n": n}) for n in range(count)]


def shortness(prompts: Any, responses: Any, meta: Any) -> list[float | None]:
    return [-float(len(response)) for response in responses]


CONFIG = SelectConfig(prompts=12, responses=8, max_response_tokens=16, max_batch=64)


def ending(chat: ChatFormat) -> Engine:
    model = policy(chat)
    hidden = model(torch.tensor([chat.prompt(questions(1)[0])]))[0, -1]
    with torch.no_grad():  # the end is likely wherever the state is like this one
        model.output_weight[chat.tokenizer.turn_end_id] = 0.13 * hidden
    return Engine(model, max_batch=64)


def test_scores_rise_with_n_and_the_control_is_as_good_as_the_draw(chat: ChatFormat) -> None:
    engine, asked = ending(chat), questions(24)
    rows, found = select(engine, chat, asked, shortness, CONFIG, seed=3)
    assert 0 < found["ended"] and found["score_kept"] > found["score_drawn"] + 1
    assert found["kl_bound"] == best_of_n_kl(8) and found["kept"] == len(rows)
    assert found["kept"] + found["none_ends"] + found["unscorable"] + found["too_long"] == 24
    again, _ = select(engine, chat, asked, shortness, CONFIG, seed=3)
    assert again == rows
    _, fewer = select(engine, chat, asked, shortness, replace(CONFIG, responses=2), seed=3)
    assert found["score_kept"] > fewer["score_kept"]
    _, control = select(engine, chat, asked, shortness, replace(CONFIG, keep="random"), seed=3)
    assert control["kl_bound"] == 0 and control["kept"] == found["kept"]
    assert abs(control["score_kept"] - control["score_drawn"]) < 0.5 * (found["score_kept"] - found["score_drawn"])
    for row in rows:
        assert row.messages[-1].role == "assistant" and row.messages[:-1] == asked[row.meta["n"]].messages


def test_what_cannot_be_answered_or_scored_is_counted(chat: ChatFormat) -> None:
    asked = [*questions(6), Conversation((Message("user", "say " * 60),))]

    def some(prompts: Any, responses: Any, meta: Any) -> list[float | None]:
        return [None if m["n"] == 2 else 1.0 for m in meta]

    _, found = select(ending(chat), chat, asked, some, replace(CONFIG, responses=16), seed=0)
    assert found["prompts"] == 7 and found["too_long"] == 1 and found["unscorable"] == 1
    with pytest.raises(DataError, match="none of 6 prompts has an answer to keep(.|\n)*hint: "):
        select(ending(chat), chat, questions(6), lambda p, r, m: [None] * len(r), CONFIG, seed=0)


def test_the_section_writes_conversations_split_by_prompt(chat: ChatFormat, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "sft" / "checkpoint", ending(chat).model, chat.tokenizer, {})
    judge = ScoreModel.from_decoder(policy(chat, 1))
    save_checkpoint(tmp_path / "reward" / "checkpoint", judge, chat.tokenizer, {"reward_centre": 0.0})
    write_records(tmp_path / "lessons" / "prompts.jsonl", questions(12))
    inputs = {
        name: tmp_path / folder for name, folder in (("policy", "sft"), ("reward", "reward"), ("lessons", "lessons"))
    }
    work = Work(StageFolder(tmp_path / "select"), inputs, 5, Recipe("toy", 5, {}, (), Path("toy.toml")))
    report = run(replace(CONFIG, valid_share=0.4), work)
    parts = {part: list(read_conversations(tmp_path / "select" / f"{part}.jsonl")) for part in ("train", "valid")}
    assert (len(parts["train"]), len(parts["valid"])) == (report["train"], report["valid"])
    assert report["train"] + report["valid"] == report["kept"] and "best of 8" in report["line"]
    asked = [row.meta["n"] for rows in parts.values() for row in rows]
    assert len(set(asked)) == len(asked) and all(row.meta["score"] for row in parts["train"])
    assert all(row.meta["origin"] == "model" for rows in parts.values() for row in rows)
    other = Tokenizer.train(["other words entirely " * 20], 280)
    save_checkpoint(tmp_path / "reward" / "checkpoint", judge, other, {})
    with pytest.raises(CheckpointError, match="another tokenizer"):
        run(CONFIG, work)
