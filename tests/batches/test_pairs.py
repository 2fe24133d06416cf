"""Oracles: rows written out by hand, and what must hold for any set of rankings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from lyceum.batches.pairs import encode_rankings, ranking_batches, read_prompts
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
        ranking_batches([ranking("a", ["x"] * 9, range(9))], chat, 50, seed=0)


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
