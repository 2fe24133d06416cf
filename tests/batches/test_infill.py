"""What must hold of every rewritten row: its documents come back, their middles whole and their ends learned."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from lyceum.batches.infill import Infill
from lyceum.batches.shards import Shards, write_shards
from lyceum.batches.stream import Stream, token_batch
from lyceum.corpus.records import Document
from lyceum.tokens.infill import parse_infill
from lyceum.tokens.tokenizer import Tokenizer

TEXTS = [
    "what does len return? ",
    "it returns the number of items.\r\n",
    "我想学习 🦙 ",
    "<|fim_middle|>",
    "e\u0301",
    "x",
]


@pytest.fixture(scope="session")
def spelled() -> Tokenizer:
    """A vocabulary without merges: every byte is a token, so a text's length in tokens is known."""
    return Tokenizer.train([], 267)


def row_of(texts: Sequence[str], tokenizer: Tokenizer, num_ids: int) -> np.ndarray:
    """The beginning of the stream that the texts make: each is followed by an end token."""
    ids = [number for text in texts for number in [*tokenizer.encode(text), tokenizer.end_id]]
    assert len(ids) >= num_ids
    return np.array(ids[:num_ids], "<u2")


def documents(row: Sequence[int], tokenizer: Tokenizer) -> list[list[int]]:
    """The documents of a row without pads, each up to its end token."""
    found: list[list[int]] = [[]]
    for number in row:
        if number != tokenizer.pad_id:
            found[-1].append(number)
            if number == tokenizer.end_id:
                found.append([])
    return [document for document in found if document]


def rearranged(document: Sequence[int], tokenizer: Tokenizer) -> bool:
    return document[0] == tokenizer.fim_prefix_id


# -------------------------------------------------------------------------------- rows


def test_a_document_that_fits_is_rearranged_whole_and_keeps_its_place(tokenizer: Tokenizer) -> None:
    texts = [text * 3 for text in TEXTS]
    row = row_of([*texts, "filler " * 200], tokenizer, 400)
    infill = Infill(tokenizer, {"code": 1.0}, seed=1)
    for k in range(100):
        found = documents(infill.row(row, "code", k).tolist(), tokenizer)
        for text, document in zip(texts, found, strict=False):
            assert rearranged(document, tokenizer) and "".join(parse_infill(document, tokenizer)) == text


def test_the_middle_and_its_end_survive_in_rows_of_any_length(spelled: Tokenizer) -> None:
    draw, marks = random.Random(3), 4
    infill = Infill(spelled, {"code": 1.0}, seed=2)
    num_rearranged = num_plain = 0
    for k in range(3000):
        text = "".join(draw.choices("abcdefgh\n", k=200))
        row = row_of([text], spelled, draw.randint(2, 60))
        after = infill.row(row, "code", k).tolist()
        assert len(after) == len(row)
        if not rearranged(after, spelled):
            assert after == row.tolist()  # no room for its middle: as it was
            num_plain += 1
            continue
        num_rearranged += 1
        prefix, middle, suffix = parse_infill(after, spelled)
        assert after[-1] == spelled.end_id and len(prefix + middle + suffix) == len(row) - marks
        assert prefix + middle + suffix in text  # nothing is missing inside
    assert num_rearranged > 2000 and num_plain > 100


def test_trimming_by_hand(spelled: Tokenizer) -> None:
    pre, suf, mid, end = spelled.fim_prefix_id, spelled.fim_suffix_id, spelled.fim_middle_id, spelled.end_id
    a, b, c, d, e, f, g, h = spelled.encode("abcdefgh")
    infill = Infill(spelled, {"code": 1.0}, seed=0)

    def trimmed(room: int, start: int, stop: int, mode: float) -> list[int] | None:
        draws = iter([(start + 0.5) / 9, (stop + 0.5) / 9, mode])  # nine places to cut
        return infill._rearranged([a, b, c, d, e, f, g, h], room, draws.__next__)

    assert trimmed(12, 2, 5, 0.9) == [pre, a, b, suf, f, g, h, mid, c, d, e, end]
    assert trimmed(11, 2, 5, 0.9) == [pre, b, suf, f, g, h, mid, c, d, e, end]
    assert trimmed(9, 2, 5, 0.9) == [pre, suf, f, g, mid, c, d, e, end]
    assert trimmed(11, 2, 5, 0.1) == [pre, suf, f, g, h, mid, b, c, d, e, end]
    assert trimmed(7, 2, 5, 0.1) == [pre, suf, mid, c, d, e, end]
    assert trimmed(6, 2, 5, 0.1) is None


def test_characters_that_the_row_cuts_are_left_out_and_the_row_stays_as_long(spelled: Tokenizer) -> None:
    llama = spelled.encode("🦙")
    row = np.array([*llama[2:], *spelled.encode("def f(): pass"), *llama[:3]], "<u2")
    infill = Infill(spelled, {"code": 1.0}, seed=4)
    texts = set()
    for k in range(200):
        after = infill.row(row, "code", k).tolist()
        assert len(after) == len(row)
        assert rearranged(after, spelled)
        assert after[-2:] == [spelled.end_id, spelled.pad_id]  # 5 bytes are left out and 4 marks come in
        texts.add("".join(parse_infill(after, spelled)))
    assert texts == {"def f(): pass"}
    only_a_piece = np.array(llama[1:], "<u2")
    assert infill.row(only_a_piece, "code", 0).tolist() == llama[1:]


def test_no_mark_comes_from_text(tokenizer: Tokenizer) -> None:
    row = row_of(["".join(Tokenizer.SPECIALS) * 9], tokenizer, 300)
    marks = {tokenizer.fim_prefix_id, tokenizer.fim_suffix_id, tokenizer.fim_middle_id}
    for k in range(50):
        after = Infill(tokenizer, {"code": 1.0}, seed=5).row(row, "code", k)
        found = [number for number in after.tolist() if number in tokenizer.special_ids.values()]
        assert not found or (set(found[:3]) == marks and found[3:] == [tokenizer.end_id])


def test_rates_and_arrangements_are_as_often_as_they_should(spelled: Tokenizer) -> None:
    row = row_of(["ab" * 100, "y" * 400], spelled, 400)
    infill, num_rows, rate = Infill(spelled, {"code": 0.3}, seed=6), 4000, 0.3
    first = [documents(infill.row(row, "code", k).tolist(), spelled)[0] for k in range(num_rows)]
    chosen = [document for document in first if rearranged(document, spelled)]
    assert abs(len(chosen) / num_rows - rate) < 4 * (rate * (1 - rate) / num_rows) ** 0.5
    late = sum(document[1] == spelled.fim_suffix_id for document in chosen) / len(chosen)
    empty = 1 - (200 / 201) ** 2  # a PSM document with an empty prefix looks the same
    assert abs(late - (0.5 + 0.5 * empty)) < 4 * (0.25 / len(chosen)) ** 0.5


# -------------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def shards(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("run") / "shards"
    draw = random.Random(7)
    texts = ["".join(draw.choices(TEXTS, k=draw.randint(1, 6))) for _ in range(300)]
    rows = [Document(text, meta={"part": "docs" if n % 4 else "code"}) for n, text in enumerate(texts)]
    write_shards(rows, tokenizer, folder, row_tokens=64)
    return Shards(folder, tokenizer.fingerprint)


def stream_of(shards: Shards) -> Stream:  # made anew, as each process makes it
    return Stream(shards.parts, {"docs": 1.0, "code": 1.0}, seed=5)


def test_without_a_rate_the_batches_are_the_plain_ones(shards: Shards, tokenizer: Tokenizer) -> None:
    plain = token_batch(shards, stream_of(shards), 0, 40)
    for rates in ({}, {"code": 0.0, "docs": 0.0}):
        infilled = token_batch(shards, stream_of(shards), 0, 40, Infill(tokenizer, rates, seed=5))
        for name in ("tokens_BT", "weights_BT", "lengths_B"):
            assert torch.equal(getattr(infilled, name), getattr(plain, name))
            assert getattr(infilled, name).dtype == getattr(plain, name).dtype


def test_only_the_parts_with_a_rate_change(shards: Shards, tokenizer: Tokenizer) -> None:
    plain = token_batch(shards, stream_of(shards), 0, 40)
    infilled = token_batch(shards, stream_of(shards), 0, 40, Infill(tokenizer, {"code": 1.0}, seed=5))
    for k, rows in enumerate(zip(plain.tokens_BT, infilled.tokens_BT, strict=True)):
        assert torch.equal(*rows) == (stream_of(shards).at(k)[0] == "docs")


def test_any_ranks_order_and_restart_give_the_same_rows_and_another_seed_others(
    shards: Shards, tokenizer: Tokenizer
) -> None:
    whole = token_batch(shards, stream_of(shards), 0, 32, Infill(tokenizer, {"code": 0.5}, seed=5))
    for size in (16, 8, 1):
        pieces = {}
        for start in reversed(range(0, 32, size)):
            infill = Infill(tokenizer, {"code": 0.5}, seed=5)
            pieces[start] = token_batch(shards, stream_of(shards), start, size, infill)
        for name in ("tokens_BT", "weights_BT", "lengths_B"):
            parts = [getattr(pieces[start], name) for start in sorted(pieces)]
            assert torch.equal(torch.cat(parts), getattr(whole, name))
    other = token_batch(shards, stream_of(shards), 0, 32, Infill(tokenizer, {"code": 0.5}, seed=6))
    assert not torch.equal(other.tokens_BT, whole.tokens_BT)
    infill, row = Infill(tokenizer, {"code": 1.0}, seed=5), shards.row("code", 0)
    assert infill.row(row, "code", 1).tolist() != infill.row(row, "code", 2).tolist()  # the next epoch cuts elsewhere


def test_all_but_pads_are_learned_and_every_rearranged_document_ends_in_a_learned_end(
    shards: Shards, tokenizer: Tokenizer
) -> None:
    batch = token_batch(shards, stream_of(shards), 0, 200, Infill(tokenizer, {"code": 0.5, "docs": 1.0}, seed=8))
    is_pad_BT = batch.tokens_BT == tokenizer.pad_id
    assert torch.equal(batch.weights_BT[:, 1:], 1.0 - is_pad_BT[:, 1:].float())
    assert not batch.weights_BT[:, 0].any() and batch.tokens_BT.shape == (200, 65)
    assert batch.lengths_B.tolist() == (~is_pad_BT).sum(1).tolist()
    num_rearranged = 0
    for row in batch.tokens_BT.tolist():
        for document in documents(row, tokenizer):
            marks = [number for number in document if 4 <= number < 7]
            assert len(marks) in (0, 3)
            if marks:
                assert rearranged(document, tokenizer) and document[-1] == tokenizer.end_id
                num_rearranged += 1
    assert num_rearranged > 200


def test_pads_of_a_row_that_became_shorter_are_not_learned(spelled: Tokenizer, tmp_path: Path) -> None:
    write_shards([Document("🦙" * 400, meta={"part": "code"})], spelled, tmp_path / "shards", row_tokens=33)
    shards = Shards(tmp_path / "shards", spelled.fingerprint)
    stream, infill = Stream(shards.parts, {"code": 1.0}, seed=1), Infill(spelled, {"code": 1.0}, seed=1)
    batch = token_batch(shards, stream, 0, 48, infill)
    ends = [row.index(spelled.end_id) for row in batch.tokens_BT.tolist()]  # the only document's
    for length, end, weights in zip(batch.lengths_B.tolist(), ends, batch.weights_BT.tolist(), strict=True):
        assert length == end + 1 and weights == [0.0] + [1.0] * end + [0.0] * (33 - end)
    assert {33 - end for end in ends} == {0, 2}  # 2 or 6 bytes of cut characters are left out, and 4 marks come in
