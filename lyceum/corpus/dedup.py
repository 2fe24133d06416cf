"""Duplicates: exact ones by a hash, near ones by MinHash, verified; and overlap with evaluation texts.

What: shingles of five words, 128 MinHash values, bands that make candidate pairs (A. Broder, "On the resemblance and
containment of documents", 1997; banding as in J. Leskovec et al., "Mining of Massive Datasets", section 3.4). Every
candidate is then *verified*: the reported similarity is the Jaccard index of the two shingle sets, not an estimate.
Verified pairs are joined with union-find; the document that comes first in the input survives, and every removed one is
reported with its survivor and their similarity.

Why: repeated documents make a small model recite, and a filter that cannot say what it removed for which reason cannot
be trusted. Han characters count as words of their own.

Bounds: shingles are compared by 64-bit hashes; all in memory, about 8 bytes a word. Chains join: if A is like B and B
like C, all three are one group even where A and C are not alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lyceum.corpus.records import Document, content_id

SHINGLE_WORDS = 5
NUM_HASHES = 128
FOUND_AT_THRESHOLD = 0.99  # the wanted chance that a pair exactly at the threshold becomes a candidate
MAX_PAIRWISE = 64  # in a band's bucket with more documents, each is compared with the first and its neighbour only
_WORD = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]|[^\W\u3400-\u4dbf\u4e00-\u9fff]+")
Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Removed:
    """A document (its place in the input) that was removed for a survivor, and how alike the two are."""

    index: int
    survivor: int
    similarity: float


@dataclass
class Found:
    """Places in the input of the documents to keep, in order, and what was removed and why."""

    kept: list[int] = field(default_factory=list)
    removed: list[Removed] = field(default_factory=list)


def normalised(text: str) -> str:
    """Text for exact comparison: lower case, runs of white space as one blank."""
    return " ".join(text.lower().split())


def exact_duplicates(texts: Iterable[str]) -> Found:
    """Finds texts that are equal once normalised; the first of each survives."""
    first: dict[str, int] = {}
    found = Found()
    for index, text in enumerate(texts):
        survivor = first.setdefault(content_id(normalised(text)), index)
        if survivor == index:
            found.kept.append(index)
        else:
            found.removed.append(Removed(index, survivor, 1.0))
    return found


class Shingler:
    """Texts to sorted arrays of distinct 64-bit shingle hashes; one object, one vocabulary, comparable arrays.

    Args:
        num_words: words in a shingle; a shorter text is one shingle.
        seed: of the words' random codes.
    """

    def __init__(self, num_words: int = SHINGLE_WORDS, seed: int = 0) -> None:
        self.num_words = num_words
        self._numbers: dict[str, int] = {}
        self._random = np.random.default_rng(seed)
        self._codes: Hashes = np.empty(0, np.uint64)

    def __call__(self, text: str) -> Hashes:
        numbers = self._numbers
        words = np.array([numbers.setdefault(w, len(numbers)) for w in _WORD.findall(text.lower())], np.int64)
        if len(numbers) > len(self._codes):
            new = self._random.integers(0, 2**64, max(1024, len(numbers)), np.uint64)
            self._codes = np.concatenate([self._codes, new])
        codes = self._codes[words]
        width = min(self.num_words, len(codes))
        if not width:
            return codes
        shingles = np.zeros(len(codes) - width + 1, np.uint64)
        for place in range(width):  # a polynomial in an odd constant, so the order of the words counts
            shingles = shingles * np.uint64(0x9E3779B97F4A7C15) + codes[place : place + len(shingles)]
        return np.unique(shingles ^ (shingles >> np.uint64(29)))


def jaccard(one: Hashes, other: Hashes) -> float:
    """|A and B| / |A or B| of two sorted arrays of distinct hashes; 0 if one is empty."""
    if not len(one) or not len(other):
        return 0.0
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)


def signatures(shingles: Sequence[Hashes], seed: int = 0) -> Hashes:
    """MinHash signatures, (documents, NUM_HASHES); an empty set gets a row of the largest number."""
    random = np.random.default_rng(seed)
    factors = random.integers(0, 2**63, NUM_HASHES, np.uint64) * np.uint64(2) + np.uint64(1)
    offsets = random.integers(0, 2**64, NUM_HASHES, np.uint64)
    result = np.full((len(shingles), NUM_HASHES), np.iinfo(np.uint64).max, np.uint64)
    for row, hashes in zip(result, shingles, strict=True):
        for start in range(0, len(hashes), 2048):  # chunks that stay in the cache
            chunk = hashes[start : start + 2048]
            values = np.multiply.outer(factors, chunk)
            values += offsets[:, None]
            np.minimum(row, values.min(axis=1), out=row)
    return result


def rows_per_band(threshold: float) -> int:
    """The longest band for which a pair at the threshold is still found with FOUND_AT_THRESHOLD.

    A band of r values agrees with probability s**r at similarity s, so one of the NUM_HASHES / r bands does with
    1 - (1 - s**r)**(NUM_HASHES / r). Longer bands mean fewer false candidates.
    """
    lengths = [length for length in (1, 2, 4, 8, 16, 32) if NUM_HASHES % length == 0]
    good = [r for r in lengths if 1 - (1 - threshold**r) ** (NUM_HASHES // r) >= FOUND_AT_THRESHOLD]
    return max(good, default=1)


def candidate_pairs(signed: Hashes, threshold: float) -> NDArray[np.int64]:
    """Pairs (earlier, later) of documents that agree in at least one band: (pairs, 2), distinct, sorted."""
    length = rows_per_band(threshold)
    is_empty = (signed == np.iinfo(np.uint64).max).all(axis=1)
    pairs: list[NDArray[np.int64]] = []
    for start in range(0, NUM_HASHES, length):
        band = np.ascontiguousarray(signed[:, start : start + length])
        keys = band.view(np.dtype((np.void, band.dtype.itemsize * length))).ravel()
        order = np.argsort(keys, kind="stable")
        order = order[~is_empty[order]]
        edges = np.flatnonzero(keys[order[1:]] != keys[order[:-1]]) + 1
        for bucket in np.split(order, edges):
            if len(bucket) > MAX_PAIRWISE:
                pairs.append(np.stack([np.full(len(bucket) - 1, bucket[0]), bucket[1:]], axis=1))
                pairs.append(np.stack([bucket[:-1], bucket[1:]], axis=1))
            elif len(bucket) > 1:
                pairs.append(bucket[np.stack(np.triu_indices(len(bucket), 1), axis=1)])
    return np.unique(np.concatenate(pairs), axis=0) if pairs else np.empty((0, 2), np.int64)


def near_duplicates(texts: Sequence[str], threshold: float, *, seed: int = 0) -> Found:
    """Finds texts whose shingle sets have a Jaccard index of at least `threshold`; the first of each group survives.

    Args:
        threshold: 0 < threshold <= 1.

    Returns: what to keep, and for each removed text its survivor with their (exact) Jaccard index, which may lie below
        the threshold where a chain of pairs joined them.
    """
    shingler = Shingler(seed=seed)
    shingles = [shingler(text) for text in texts]
    parent = list(range(len(texts)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for one, other in candidate_pairs(signatures(shingles, seed), threshold).tolist():
        one_root, other_root = root(one), root(other)
        if one_root != other_root and jaccard(shingles[one], shingles[other]) >= threshold:
            parent[max(one_root, other_root)] = min(one_root, other_root)
    found = Found()
    for index in range(len(texts)):
        survivor = root(index)
        if survivor == index:
            found.kept.append(index)
        else:
            found.removed.append(Removed(index, survivor, jaccard(shingles[index], shingles[survivor])))
    return found


@dataclass(frozen=True)
class Overlap:
    """A document that shares n-grams with an evaluation text: how many, and which share of that text's n-grams."""

    document: str
    evaluation: int
    shared: int
    share: float


def overlap(documents: Iterable[Document], evaluation_texts: Sequence[str], n: int) -> list[Overlap]:
    """Finds evaluation texts of which `n` words in a row, or the whole of a shorter text, stand in a document.

    A dry run: it reports and removes nothing. Case, punctuation and white space do not count.

    Returns: one entry for each (document id, place in `evaluation_texts`) that share something, in input order.
    """
    sizes = [min(n, len(_WORD.findall(text.lower()))) for text in evaluation_texts]
    shinglers = {size: Shingler(size) for size in sorted(set(sizes)) if size}
    grams = [shinglers[size](text) if size else None for size, text in zip(sizes, evaluation_texts, strict=True)]
    wanted = {
        size: np.unique(np.concatenate([g for g, s in zip(grams, sizes, strict=True) if g is not None and s == size]))
        for size in shinglers
    }
    found: list[Overlap] = []
    for document in documents:
        here = {size: np.intersect1d(shingler(document.text), wanted[size]) for size, shingler in shinglers.items()}
        for number, (size, gram) in enumerate(zip(sizes, grams, strict=True)):
            if gram is not None and len(here[size]):
                shared = len(np.intersect1d(here[size], gram, assume_unique=True))
                if shared:
                    found.append(Overlap(document.id, number, shared, shared / len(gram)))
    return found
