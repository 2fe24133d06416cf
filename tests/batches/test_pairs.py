"""Oracles: rows written out by hand, and what must hold for any set of rankings."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from lyceum.batches.pairs import encode_rankings, ranking_batches, read_files, read_prompts, split_rankings
from lyceum.corpus.records import Conversation, Message, Ranking, write_records
from lyceum.errors import ConfigError, DataError
from lyceum.tokens.chat import ChatFormat


def prompt(text: str) -> Conversation:
    return Conversation((Message("user", text),), meta={"question": text})


def ranking(question: str, answers: Sequence[str], ranks: Sequence[float], **fields: object) -> Ranking:
    responses = tuple(Message("assistant", answer) for answer in answers)
    return Ranking(prompt(question), responses, tuple(ranks), meta={"question": question}, **fields)  # type: ignore[arg-type]


def many(count: int) -> list[Ranking]:
    """Rankings of 2 to 5 answers, prompts and answers of several lengths."""
    rankings = []
    for n in range(count):
        answers = [f"{n} {k} " + "len " * ((n + k) % 6) for k in range(2 + n % 4)]
        rankings.append(ranking("what? " * (n % 4) + str(n), answers, range(1, 1 + len(answers))))
    return rankings


def test_rows_are_prompt_response_and_end(chat: ChatFormat) -> None:
    answers = ["the number of items", "items", "\nno"]
    (batch,) = ranking_batches([ranking("what does len return?", answers, [1, 2, 2])], chat, 999, seed=0)
    tokenizer = chat.tokenizer
    for row, length, answer in zip(batch.tokens_BT, batch.lengths_B.tolist(), answers, strict=True):
        expected = [*chat.prompt(prompt("what does len return?")), *tokenizer.encode(answer), tokenizer.turn_end_id]
        assert row[:length].tolist() == expected
        assert (row[length:] == tokenizer.pad_id).all()
    assert batch.ranks_B.tolist() == [1.0, 2.0, 2.0]
    assert batch.group_B.tolist() == [0, 0, 0]
    assert batch.probabilities_B is None
    assert (batch.num_groups, batch.meta) == (1, [{"question": "what does len return?"}])
    assert batch.num_tokens == int(batch.lengths_B.sum())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_ranking_stands_whole_in_exactly_one_batch(chat: ChatFormat, seed: int) -> None:
    rankings, tokenizer = many(60), chat.tokenizer
    batches = ranking_batches(rankings, chat, 600, seed)
    assert len(batches) > 5
    seen: Counter[str] = Counter()
    for batch in batches:
        assert batch.tokens_BT.numel() <= 600
        for group, meta in enumerate(batch.meta):
            source = next(ranking for ranking in rankings if ranking.meta == meta)
            rows = (batch.group_B == group).nonzero().flatten().tolist()
            assert rows == list(range(rows[0], rows[0] + len(source.responses)))
            assert batch.ranks_B[rows].tolist() == list(source.ranks)
            texts = [tokenizer.decode(batch.tokens_BT[row].tolist()) for row in rows]
            assert texts == [
                f"user\n{meta['question']}\nassistant\n{response.content}" for response in source.responses
            ]
            seen[meta["question"]] += 1
    assert seen == Counter(ranking.meta["question"] for ranking in rankings)


def test_seed_decides_the_order_and_encoding_once_is_enough(chat: ChatFormat) -> None:
    encoded = encode_rankings(many(40), chat)
    first, again, other = (
        [[meta["question"] for meta in batch.meta] for batch in ranking_batches(source, chat, 600, seed)]
        for source, seed in ((encoded, 1), (many(40), 1), (encoded, 2))
    )
    assert first == again != other


def test_rankings_without_order_or_beyond_the_context_are_left_out_and_counted(chat: ChatFormat) -> None:
    rankings = [
        ranking("a", ["x", "y"], [1, 1]),
        ranking("b", ["x", "y"], [1, 2]),
        ranking("c", ["x", "len " * 99], [1, 2]),
    ]
    encoded = encode_rankings(rankings, chat, context_length=40)
    assert [kept.meta["question"] for kept in encoded.rankings] == ["b"]
    assert (encoded.num_tied, encoded.num_too_long) == (1, 1)
    with pytest.raises(
        DataError, match=r"none of 2 rankings(.|\n)*1 are all ties, 1 have a response beyond(.|\n)*hint: "
    ):
        encode_rankings(rankings[::2], chat, context_length=40)


def test_equal_texts_and_ties_say_nothing_and_empty_responses_are_kept_and_counted(chat: ChatFormat) -> None:
    rankings = [
        ranking("a", ["x", "x"], [1, 2]),  # equal texts
        ranking("b", ["x", "x", "y"], [1, 1, 2]),  # two that tie, and one that differs from both
        ranking("c", ["x", ""], [1, 2]),  # an empty response
        ranking("d", ["x", "y"], [1, 1]),  # a tie
        ranking("e", ["x", "x"], [1, 1]),  # a tie of equal texts
    ]
    encoded = encode_rankings(rankings, chat)
    assert [kept.meta["question"] for kept in encoded.rankings] == ["b", "c"]
    assert encoded.counts() == {"kept": 2, "all_ties": 2, "too_long": 0, "equal_texts": 1, "empty_responses": 1}
    empty = encoded.rankings[1]
    assert empty.rows[1][empty.num_prompt :] == [chat.tokenizer.turn_end_id]
    encoded = encode_rankings(rankings, chat, ties=True)
    assert [kept.meta["question"] for kept in encoded.rankings] == ["b", "c", "d"]
    assert encoded.counts() == {"kept": 3, "all_ties": 0, "too_long": 0, "equal_texts": 2, "empty_responses": 1}


@pytest.mark.parametrize("margin", ["much", -1.0, math.nan, True])
def test_a_margin_that_is_none_is_an_error_that_names_its_ranking(chat: ChatFormat, margin: object) -> None:
    wrong = Ranking(
        prompt("a"), (Message("assistant", "x"), Message("assistant", "y")), (1, 2), meta={"margin": margin}
    )
    with pytest.raises(DataError, match=r"pairs\.jsonl: ranking 2 of rankings has the margin"):
        encode_rankings([ranking("a", ["x", "y"], [1, 2]), wrong], chat, path="pairs.jsonl")


# ------------------------------------------------------------------------------------------------ training and validation


def judged(question: str, annotator: str | None = None, **fields: object) -> Ranking:
    meta = {"question": question, **({} if annotator is None else {"annotator": annotator})}
    replies = (Message("assistant", "x"), Message("assistant", "y"))
    return Ranking(prompt(question), replies, (1, 2), meta=meta, **fields)  # type: ignore[arg-type]


def first_words(ranking: Ranking) -> str:
    return next(message.content for message in ranking.prompt.messages if message.role == "user")


@pytest.mark.parametrize("seed", range(5))
def test_a_prompt_is_on_one_side_of_the_split_however_its_conversation_goes_on(seed: int) -> None:
    rankings = []
    for n in range(300):
        opening = prompt(f"question {n // 3}")
        further = (Message("assistant", f"{n}"), Message("user", "and then?")) if n % 3 else ()
        rankings.append(replace(judged("q"), prompt=replace(opening, messages=opening.messages + further)))
    train, valid, left_out = split_rankings(rankings, 0.3, 0.0, seed)
    sides = [{ranking.prompt.messages[0].content for ranking in part} for part in (train, valid)]
    assert not sides[0] & sides[1] and len(train) + len(valid) == 300 and left_out == 0
    assert 0.15 < len(valid) / 300 < 0.45
    assert split_rankings(rankings[::-1], 0.3, 0.0, seed)[0][::-1] == train  # a function of prompts, not of their order


@pytest.mark.parametrize("seed", range(5))
def test_training_sees_nothing_of_held_out_annotators_nor_their_prompts(seed: int) -> None:
    shared = [judged(f"shared {n}", f"person {(n + more) % 10}") for n in range(100) for more in (0, 1)]
    alone = [judged(f"own {n}", f"person {n % 10}") for n in range(100)]
    unnamed = [judged(f"unnamed {n}") for n in range(50)]
    given = shared + alone + unnamed
    train, valid, left_out = split_rankings(given, 0.2, 0.3, seed)
    strangers = {ranking.meta["annotator"] for ranking in valid if ranking.meta.get("is_stranger")}
    assert len(strangers) == 3
    assert not strangers & {ranking.meta.get("annotator") for ranking in train}
    questions = [{ranking.meta["question"] for ranking in part} for part in (train, valid)]
    assert not questions[0] & questions[1]
    assert len(train) + len(valid) + left_out == len(given)
    theirs = [ranking for ranking in valid if ranking.meta.get("annotator") in strangers]
    assert all(ranking.meta["is_stranger"] for ranking in theirs)
    assert {r.meta["question"] for r in theirs} >= {
        r.meta["question"] for r in alone if r.meta["annotator"] in strangers
    }
    assert any(not ranking.meta.get("is_stranger") for ranking in valid)  # known people too, of prompts held out


REAL = (
    "hh-rlhf/test.jsonl.gz",
    "pref-demo/dpo_en_demo.json",
    "pref-demo/dpo_zh_500.jsonl",
    "pref-demo/dpo_zh_demo.json",
)


def test_real_pairs_are_read_named_and_split_by_prompt() -> None:
    folder = Path(os.environ.get("LYCEUM_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
    files = [folder / name for name in REAL]
    if not all(file.exists() for file in files):
        pytest.skip("no shared data sets here (set LYCEUM_DATA to their folder)")
    rankings = read_files(files)
    assert len(rankings) == 2312 + 300 + 500 + 300
    assert rankings[2312].meta["row"] == "ranking 1 of dpo_en_demo.json"
    train, valid, left_out = split_rankings(rankings, 0.2, 0.0, 0)
    openings = [{first_words(ranking) for ranking in part} for part in (train, valid)]
    assert not openings[0] & openings[1] and left_out == 0 and 0.15 < len(valid) / len(rankings) < 0.25


def test_probabilities_come_along_where_there_are_some(chat: ChatFormat) -> None:
    rankings = [ranking("a", ["x", "y"], [1, 2], probabilities=(0.75, 0.25)), ranking("b", ["x", "y"], [1, 2])]
    (batch,) = ranking_batches(rankings, chat, 999, seed=0)
    assert batch.probabilities_B is not None
    by_question = {
        meta["question"]: batch.probabilities_B[batch.group_B == group].tolist()
        for group, meta in enumerate(batch.meta)
    }
    assert by_question["a"] == [0.75, 0.25]
    assert all(map(math.isnan, by_question["b"]))


def test_prompt_whose_responses_need_more_than_one_batch_is_an_error_with_a_hint(chat: ChatFormat) -> None:
    with pytest.raises(ConfigError, match=r"tokens must be in one micro-batch(.|\n)*hint: set micro_tokens to"):
        ranking_batches([ranking("a", list("abcdefghi"), range(9))], chat, 50, seed=0)


def test_prompts_end_where_the_reply_begins(chat: ChatFormat, tmp_path: Path) -> None:
    questions = ["what does len return?", "items?", "what? " * 50]
    write_records(tmp_path / "prompts.jsonl", map(prompt, questions))
    prompts = read_prompts(tmp_path / "prompts.jsonl", chat, max_tokens=60)
    assert [chat.tokenizer.decode(ids) for ids in prompts.ids] == [f"user\n{q}\nassistant\n" for q in questions[:2]]
    assert prompts.meta == [{"question": question} for question in questions[:2]]
    assert prompts.num_too_long == 1


def test_no_prompt_that_fits_is_an_error_with_a_hint(chat: ChatFormat, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    write_records(path, [prompt("what does len return?")])
    with pytest.raises(DataError, match=r"no prompt of at most 3 tokens: the shortest of 1 has \d+(.|\n)*hint: "):
        read_prompts(path, chat, max_tokens=3)
    write_records(path, [])
    with pytest.raises(DataError, match=r"prompts\.jsonl: no prompt(.|\n)*the file is empty"):
        read_prompts(path, chat, max_tokens=3)
