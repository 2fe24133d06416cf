from __future__ import annotations

import random
import re
import time
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from lyceum.corpus.dedup import (
    NUM_HASHES,
    Shingler,
    candidate_pairs,
    exact_duplicates,
    jaccard,
    near_duplicates,
    overlap,
    rows_per_band,
    signatures,
)
from lyceum.corpus.records import Document


@cache
def word_shingles(text: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return frozenset(tuple(words[n : n + 5]) for n in range(max(1, len(words) - 4)))


def true_jaccard(one: str, other: str) -> float:
    """By sets of tuples of words: the definition."""
    return len(word_shingles(one) & word_shingles(other)) / len(word_shingles(one) | word_shingles(other))


def edited(text: str, share: float, draw: random.Random) -> str:
    return " ".join(f"new{draw.randrange(10**6)}" if draw.random() < share else word for word in text.split())


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """60 originals of 80 to 300 words, each with a copy edited somewhere between not at all and heavily."""
    draw = random.Random(4)
    originals = [" ".join(f"w{draw.randrange(400)}" for _ in range(draw.randrange(80, 300))) for _ in range(60)]
    return originals + [edited(text, n / 400, draw) for n, text in enumerate(originals)]


def test_the_jaccard_index_of_hashed_shingles_is_that_of_the_sets(texts: list[str]) -> None:
    shingler = Shingler()
    hashed = [shingler(text) for text in texts]
    for one, other in [(n, n + 60) for n in range(60)] + [(0, 1), (5, 100)]:
        assert jaccard(hashed[one], hashed[other]) == pytest.approx(true_jaccard(texts[one], texts[other]), abs=1e-12)


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_near_duplicates_are_those_of_brute_force(texts: list[str], threshold: float) -> None:
    similar = {pair: true_jaccard(texts[pair[0]], texts[pair[1]]) for pair in combinations(range(len(texts)), 2)}
    expected = {later: earlier for (earlier, later), value in similar.items() if value >= threshold}
    found = near_duplicates(texts, threshold)
    assert 10 < len(expected) < 60
    assert {removed.index: removed.survivor for removed in found.removed} == expected
    for removed in found.removed:
        assert removed.similarity == pytest.approx(similar[removed.survivor, removed.index], abs=1e-12)
    assert sorted(found.kept + [removed.index for removed in found.removed]) == list(range(len(texts)))


def test_minhash_estimates_the_jaccard_index(texts: list[str]) -> None:
    shingler = Shingler()
    hashed = [shingler(text) for text in texts]
    signed = signatures(hashed)
    errors = [np.mean(signed[n] == signed[n + 60]) - jaccard(hashed[n], hashed[n + 60]) for n in range(60)]
    assert np.mean(errors) == pytest.approx(0, abs=4 * 0.5 / (60 * NUM_HASHES) ** 0.5)


def test_bands_find_a_pair_at_the_threshold() -> None:
    # 128 values; 32 bands of 4 find s = 0.8 with 1 - (1 - 0.8**4)**32 = 1 - 4.9e-8; 16 bands of 8 only with 0.947
    assert rows_per_band(0.8) == 4
    # 4 bands of 32 find s = 1 always, and 0.99 with 1 - (1 - 0.99**32)**4 = 0.994
    assert rows_per_band(1.0) == rows_per_band(0.99) == 32


def test_big_buckets_stay_linear() -> None:
    signed = np.ones((500, NUM_HASHES), np.uint64)
    pairs = candidate_pairs(signed, 0.8)
    assert len(pairs) == 499 + 498  # with the first, and with the neighbour; (0, 1) is both
    assert near_duplicates(["one two three four five six seven"] * 500, 0.8).kept == [0]


def test_chains_join_and_the_first_document_survives() -> None:
    words = [f"w{n}" for n in range(200)]
    a, b, c = (" ".join(words[start : start + 150]) for start in (0, 12, 24))
    # 146 shingles each; 12 words further means 134 shared of 158: 0.848; 24 further 122 of 170: 0.718
    found = near_duplicates(["something else entirely, many words long", c, a, b], 0.8)
    assert found.kept == [0, 1]
    assert [(r.index, r.survivor, round(r.similarity, 3)) for r in found.removed] == [(2, 1, 0.718), (3, 1, 0.848)]


def test_empty_and_short_texts_are_no_near_duplicates_of_each_other() -> None:
    assert near_duplicates(["", "!!", "", "one two", "three four"], 0.8).kept == [0, 1, 2, 3, 4]
    assert near_duplicates(["one two", "One, two!"], 0.8).kept == [0]


def test_exact_duplicates_ignore_case_and_white_space() -> None:
    found = exact_duplicates(["A b\n", "c", "a  B", "c.", "C"])
    assert found.kept == [0, 1, 3]
    assert [(r.index, r.survivor) for r in found.removed] == [(2, 0), (4, 1)]


def test_han_characters_count_as_words() -> None:
    one, other = "今天天气很好我们去公园散步吧", "今天天气很好我们去公园跑步吧"
    # 14 characters, 10 shingles of 5; the 12th character differs and stands in the last 3: 7 shared of 13
    shingler = Shingler()
    assert len(shingler(one)) == 10
    assert jaccard(shingler(one), shingler(other)) == pytest.approx(7 / 13)


def test_overlap_finds_an_evaluation_text_in_a_document_and_nothing_else() -> None:
    evaluation = ["What is the capital of France, and why?", "Two plus two?", "Name a river in Peru that is long"]
    documents = [
        Document("Quiz: what is the capital of france and why not Lyon?", id="a"),
        Document("two PLUS two is four. Name a river", id="b"),
        Document("nothing here", id="c"),
    ]
    found = overlap(documents, evaluation, 5)
    # the first question has 8 words, so 4 five-grams, all in document a; the second is shorter than 5: found whole
    assert [(o.document, o.evaluation, o.shared, o.share) for o in found] == [("a", 0, 4, 1.0), ("b", 1, 1, 1.0)]
    assert overlap(documents, ["", "?!"], 5) == []


def test_ten_thousand_shingles_a_document_are_fast() -> None:
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(5000)}" for _ in range(10_000)) for _ in range(20)]
    start = time.process_time()
    near_duplicates(texts, 0.8)
    assert time.process_time() - start < 5  # about 0.3 s on a quiet core


def test_editions_of_a_book_are_near_duplicates_and_another_book_is_not(shared: Path) -> None:
    folder = shared / "neardup-books"
    if not folder.is_dir():
        pytest.skip("no neardup-books here")
    books = {
        path.stem: path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("pandp*.txt"))
    }
    shingler = Shingler()
    hashed = {name: shingler(text) for name, text in books.items()}
    # measured by others on these files with word 5-shingles: 10/11 0.976, 10/12 0.936, 11/12 0.953
    assert jaccard(hashed["pandp10"], hashed["pandp11"]) == pytest.approx(0.976, abs=0.0006)
    assert jaccard(hashed["pandp10"], hashed["pandp12"]) == pytest.approx(0.936, abs=0.0006)
    assert jaccard(hashed["pandp11"], hashed["pandp12"]) == pytest.approx(0.953, abs=0.0006)
