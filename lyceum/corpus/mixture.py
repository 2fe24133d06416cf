"""The mixture as arithmetic: sample number k -> (source, epoch, index), a pure function of the seed.

What: which row of which source a training run sees as its k-th. Why: the loader's state is then one integer, every
number of ranks and workers gives the same stream, and epochs for each source are known before the run starts.

How: samples come in blocks. In each block every source has its exact share, rounded by largest remainder; the order
inside a block is a keyed permutation. The n-th sample of a source is row n mod size of epoch n div size, and within an
epoch the rows come in the order of another keyed permutation, so each row comes once. Permutations are Feistel
networks with cycle walking (M. Luby, C. Rackoff, "How to construct pseudorandom permutations", 1988; J. Black,
P. Rogaway, "Ciphers with arbitrary finite domains", 2002): constant memory, any size.

    mixture = Mixture({"docs": 3000, "code": 9000}, {"docs": 1, "code": 1}, seed=1)
    mixture.at(0)            # Place(source="code", epoch=0, index=4711)
    mixture.epochs(12_000)   # {"docs": 2.0, "code": 0.667}

Not here: rows, tensors (`lyceum.batches.stream`). The permutations are for shuffling, not for secrecy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lyceum.errors import DataError

BLOCK = 128  # samples a block at first; doubled until every source with a weight has a place in it
MAX_BLOCK = 1 << 20
_ROUNDS = 4
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Place:
    """Row `index` of `source`, in that source's pass number `epoch` (from 0)."""

    source: str
    epoch: int
    index: int


def _mixed(value: int) -> int:
    """A 64-bit number with its bits stirred (the finalizer of splitmix64, G. Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def key_of(*parts: int | str) -> int:
    """A 64-bit key from numbers and names, in order; the same on every machine."""
    key = 0
    for part in parts:
        numbers = part.encode() if isinstance(part, str) else (part & _MASK, part >> 64 & _MASK)
        for number in (len(numbers), *numbers):
            key = _mixed(key ^ number)
    return key


def permuted(size: int, key: int, index: int) -> int:
    """Where `index` goes under a keyed permutation of range(size).

    Args:
        size: at least 1.
        key: any integer; another key is another permutation.
        index: 0 <= index < size.
    """
    assert 0 <= index < size
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:  # a permutation of 4**half >= size numbers; walk along its cycle until we are back inside
        left, right = index >> half, index & low
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_mixed(key ^ _mixed(right << 8 | turn)) & low)
        index = left << half | right
        if index < size:
            return index


def largest_remainder(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Shares of `total` in whole numbers that add up exactly; ties go to the name that comes first."""
    whole = sum(weights.values())
    exact = {name: weight / whole * total for name, weight in weights.items()}
    counts = {name: int(share) for name, share in exact.items()}
    missing = total - sum(counts.values())
    for name in sorted(exact, key=lambda name: counts[name] - exact[name])[:missing]:
        counts[name] += 1
    return counts


class Mixture:
    """An endless stream over weighted sources, addressed by sample number.

    Args:
        sizes: source -> number of rows.
        weights: source -> weight, any positive scale; a source without a weight, or with weight 0, never comes.
        seed: another seed, another order.

    Raises: DataError if no source has a weight, or one with a weight has no rows.
    """

    def __init__(self, sizes: Mapping[str, int], weights: Mapping[str, float], seed: int) -> None:
        weights = {name: float(weight) for name, weight in sorted(weights.items()) if weight > 0}
        if not weights:
            raise DataError("the mixture has no source with a weight above 0", hint="give at least one source a weight")
        empty = [name for name in weights if sizes.get(name, 0) < 1]
        if empty:
            hint = f"sources with rows: {', '.join(name for name in sizes if sizes[name]) or 'none'}"
            raise DataError(f"the mixture wants rows from {', '.join(map(repr, empty))}, which has none", hint=hint)
        self.sizes = {name: sizes[name] for name in weights}
        self.seed = seed
        self.block = BLOCK
        while self.block < MAX_BLOCK and not all(largest_remainder(weights, self.block).values()):
            self.block *= 2
        self.counts = largest_remainder(weights, self.block)  # source -> samples in each block

    def at(self, k: int) -> Place:
        """Where sample number `k` (from 0) comes from."""
        block, offset = divmod(k, self.block)
        slot = permuted(self.block, key_of(self.seed, "block", block), offset)
        for source, count in self.counts.items():
            if slot < count:
                epoch, row = divmod(block * count + slot, self.sizes[source])
                return Place(source, epoch, permuted(self.sizes[source], key_of(self.seed, source, epoch), row))
            slot -= count
        raise AssertionError("the shares of a block add up to the block")

    def samples(self, n: int) -> dict[str, int]:
        """How many of the first `n` samples come from each source."""
        blocks, rest = divmod(n, self.block)
        counts = {source: blocks * count for source, count in self.counts.items()}
        for k in range(n - rest, n):
            counts[self.at(k).source] += 1
        return counts

    def epochs(self, n: int) -> dict[str, float]:
        """How many times the first `n` samples go through each source."""
        return {source: count / self.sizes[source] for source, count in self.samples(n).items()}
