"""Which requests run, and which of their tokens go into the next pass.

Continuous batching: requests join and leave at every step. Rows 0..num_decoding-1 hold sequences that bring one token
each, the rows behind them sequences whose prompt is still being read, by chunks within a budget of tokens, in the same
pass as everyone else's next token. What is running is never thrown out: a request is let in only when memory for all
that it may become is left (`fits`).

Who is next: a person's requests before those of the background (titles, evaluations), which moreover never take the last
eighth of the rows; between keys (users) the one that has been served the fewest tokens, by the virtual token counter of
Sheng et al. 2024 ("Fairness in Serving Large Language Models", algorithm 2): a key that comes back from idleness is lifted
to the least counter of those who wait, so that it cannot save up; of one key, first come, first served. The chosen one is
not overtaken while it waits for memory, so nobody starves.

It knows no tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as Many

from lyceum.engine.sequence import Sequence

MAX_COUNTERS = 10_000  # keys whose tokens are remembered while they are idle


class Scheduler:
    """The waiting and the running. max_batch: most sequences that run at once."""

    def __init__(self, max_batch: int):
        self.max_batch = max_batch
        self.running: list[Sequence] = []  # running[i].row == i
        self.num_decoding = 0
        self._queues: dict[tuple[bool, str], deque[Sequence]] = {}  # (is_background, key) -> first come first
        self._served: dict[str, int] = {}  # key -> tokens, those promised to running requests included

    @property
    def num_waiting(self) -> int:
        """Requests that have no row yet."""
        return sum(map(len, self._queues.values()))

    def waiting(self) -> Iterator[Sequence]:
        """Requests that have no row yet."""
        for queue in self._queues.values():
            yield from queue

    def add(self, sequence: Sequence) -> None:
        """Let a request wait in line."""
        key = sequence.key
        others = [other for _, other in self._queues]
        if key not in others:
            least = min((self._served[other] for other in others), default=0)
            self._served[key] = max(self._served.get(key, 0), least)
        self._queues.setdefault((sequence.is_background, key), deque()).append(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Take a request that waits out of its line."""
        queue = self._queues[sequence.is_background, sequence.key]
        queue.remove(sequence)
        self._forget(sequence.is_background, sequence.key)

    def admit(self, fits: Callable[[Sequence], bool]) -> list[Sequence]:
        """Give rows to as many as there are rows and room for; returns them, in the order in which they came in."""
        newcomers = []
        while len(self.running) < self.max_batch and (sequence := self._next()) is not None and fits(sequence):
            self._queues[sequence.is_background, sequence.key].popleft()
            self._forget(sequence.is_background, sequence.key)
            self._served[sequence.key] += sequence.num_promised
            sequence.row = len(self.running)
            self.running.append(sequence)
            newcomers.append(sequence)
        return newcomers

    def chunks(self, max_tokens: int) -> list[tuple[Sequence, int]]:
        """How many tokens of which prompts to read now; people's before the background's, first come, first served.

        One that is to copy what another is still reading waits for it.
        """
        reading = [sequence for sequence in self.running[self.num_decoding :] if sequence.leader is None]
        chosen = []
        for sequence in sorted(reading, key=lambda sequence: (sequence.is_background, sequence.id)):
            if max_tokens <= 0:
                break
            num_tokens = min(sequence.num_left, max_tokens)
            chosen.append((sequence, num_tokens))
            max_tokens -= num_tokens
        return chosen

    def leave(self, gone: Collection[Sequence]) -> None:
        """Take sequences that have finished out; their rows are free once `arrange` has closed the gaps."""
        for sequence in gone:
            self._served[sequence.key] -= sequence.num_promised - len(sequence.tokens)
            sequence.row = -1
        left = [sequence for sequence in self.running if sequence.row >= 0]
        if len(self._served) > MAX_COUNTERS:
            busy = {sequence.key for sequence in (*left, *self.waiting())}
            self._served = {key: num for key, num in self._served.items() if key in busy}
        self.running = left

    def arrange(self, decoding: Collection[Sequence]) -> tuple[list[int], list[int]]:
        """Bring the running into rows 0..n-1, those that decode first. Returns the moves: into which rows, out of which.

        All moves are at once. Who stands well already stays.
        """
        chosen = set(map(id, decoding))
        groups = [[s for s in self.running if (id(s) in chosen) == first] for first in (True, False)]
        bounds = (0, len(groups[0]), len(self.running))
        order: list[Sequence | None] = [None] * len(self.running)
        homeless: list[list[Sequence]] = [[], []]
        for number, group in enumerate(groups):
            for sequence in group:
                if bounds[number] <= sequence.row < bounds[number + 1]:
                    order[sequence.row] = sequence
                else:
                    homeless[number].append(sequence)
        into, out_of = [], []
        for number, group in enumerate(homeless):
            holes = [row for row in range(bounds[number], bounds[number + 1]) if order[row] is None]
            for row, sequence in zip(holes, group, strict=True):
                into.append(row)
                out_of.append(sequence.row)
                order[row] = sequence
        self.running = [sequence for sequence in order if sequence is not None]
        for row, sequence in zip(into, (self.running[row] for row in into), strict=True):
            sequence.row = row
        self.num_decoding = bounds[1]
        return into, out_of

    def check(self) -> None:
        """Asserts that rows are dense, that nobody is in two places, and that no counter is left over."""
        assert [sequence.row for sequence in self.running] == list(range(len(self.running))), "rows are not dense"
        assert len(self.running) <= self.max_batch, "more run than there are rows"
        everyone = [*self.running, *self.waiting()]
        assert len({sequence.id for sequence in everyone}) == len(everyone), "a request is in two places"
        assert all(self._queues.values()), "an empty line is kept"
        assert all(sequence.key in self._served for sequence in everyone), "a key is not counted"

    def _next(self) -> Sequence | None:
        for is_background in (False, True):
            firsts = [queue[0] for (background, _), queue in self._queues.items() if background is is_background]
            if firsts and not (is_background and self._is_full_of_background()):
                return min(firsts, key=lambda sequence: (self._served[sequence.key], sequence.id))
        return None

    def _is_full_of_background(self) -> bool:
        num_background = sum(sequence.is_background for sequence in self.running)
        return num_background >= max(1, self.max_batch - self.max_batch // 8)

    def _forget(self, is_background: bool, key: str) -> None:
        if not self._queues[is_background, key]:
            del self._queues[is_background, key]


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
