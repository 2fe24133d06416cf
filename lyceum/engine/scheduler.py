"""Which sequences run next, and which rows go through the model together.

Continuous batching: rows 0..n-1 are running, a finished sequence leaves at once, its row is taken by the last one, and
waiting sequences join behind. First come, first served; what is running is never thrown out.

It knows no tensors and no priorities; a token budget per step, priorities and fairness per key would be decided here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Many

from lyceum.engine.sequence import Sequence


class Scheduler:
    """The waiting and the running. max_batch: most sequences that run at once."""

    def __init__(self, max_batch: int):
        self.max_batch = max_batch
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def next(self) -> list[Sequence]:
        """The sequences that should start now, shortest prompts first, equal ones side by side; `start` makes it so.

        While more are waiting than fit, they are let in by groups of an eighth of the batch: prompts are cheaper to
        read together.
        """
        num_free = self.max_batch - len(self.running)
        if num_free < min(len(self.waiting), max(1, self.max_batch // 8)):
            return []
        chosen = [self.waiting[i] for i in range(min(num_free, len(self.waiting)))]
        return sorted(chosen, key=lambda sequence: (len(sequence.prompt), sequence.prompt))

    def start(self, sequences: Many[Sequence]) -> None:
        """Sequences from `next` now hold the rows behind those running, in this order."""
        self.running.extend(sequences)
        for _ in sequences:
            self.waiting.popleft()

    def leave(self, rows: Many[int]) -> tuple[list[int], list[int]]:
        """Take the sequences in these rows out. Returns the moves that keep rows dense: into which, out of which."""
        leaving = set(rows)
        num_left = len(self.running) - len(leaving)
        into = sorted(row for row in leaving if row < num_left)
        out_of = [row for row in range(num_left, len(self.running)) if row not in leaving]
        for hole, row in zip(into, out_of, strict=True):
            self.running[hole] = self.running[row]
        del self.running[num_left:]
        return into, out_of


def groups(lengths: Many[int], max_tokens: int) -> Iterator[slice]:
    """Cut rows that follow each other into groups of at most max_tokens, padding counted (one row may have more)."""
    start, longest = 0, 0
    for end, length in enumerate(lengths):
        if end > start and max(longest, length) * (end - start + 1) > max_tokens:
            yield slice(start, end)
            start, longest = end, 0
        longest = max(longest, length)
    if len(lengths) > start:
        yield slice(start, len(lengths))
