"""Byte strings that a grammar allows, read one byte at a time: what a reply that must have a form may say next.

    grammar = Grammar()
    digits = grammar.repeat(grammar.byte(b"0123456789"), 1, None)
    grammar.begin(grammar.seq(grammar.text("v"), digits))
    state = grammar.step(grammar.start, ord("v"))  # 0: nothing goes on like this

A grammar is made of parts: bytes, sequences, choices, repeats, and rules, which may refer to themselves, so that values
nest. What is still to come after some bytes is a stack of parts. Several stacks are possible at once; the set of them
is a state. States, stacks and parts are numbered as they are met, and the row of a state (the next state for each of
the 256 bytes) is worked out when it is first asked for: a pushdown automaton read as a finite one, as far as needed.
Reading many strings at once is then a table look-up (`lyceum.engine.constrain`).

It takes no ambiguity amiss: it says whether a string is allowed, not how it is parsed. A part that can never be finished
(a value that must contain itself) is not gone into.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

MAX_STACKS = 1024  # ways to go on that a state keeps; leaving some out allows less, never more
NEVER = 1 << 60  # bytes: longer than anything; what cannot be finished

Part = int
_DONE = 0  # the empty stack


class Grammar:
    """Parts, made from the inside out, and the automaton over them. State 0 is dead: nothing can follow."""

    def __init__(self) -> None:
        self._parts: list[tuple[Any, ...]] = []
        self._part_numbers: dict[tuple[Any, ...], Part] = {}
        self._bodies: list[Part | None] = []  # of the rules
        self._shortest: list[int] = []  # bytes of the shortest string of each part; set in `begin`
        self._stacks: list[tuple[Part, int]] = [(-1, -1)]  # top part, the stack under it
        self._stack_numbers: dict[tuple[Part, int], int] = {}
        self._opened: dict[int, frozenset[int]] = {}
        self._states: list[frozenset[int]] = [frozenset()]
        self._state_numbers: dict[frozenset[int], int] = {frozenset(): 0}
        self.next = np.zeros((64, 256), dtype=np.int32)  # state, byte -> state; rows are right once they are known
        self.is_known = np.zeros(64, dtype=bool)
        self.is_known[0] = True
        self.empty = self.seq()

    # -- parts --------------------------------------------------------------------------------------------------------

    def byte(self, allowed: Iterable[int]) -> Part:
        """One of these bytes."""
        return self._part("byte", *sorted(set(allowed)))

    def text(self, text: str) -> Part:
        """Exactly this text, in UTF-8."""
        return self.seq(*(self.byte([byte]) for byte in text.encode()))

    def seq(self, *parts: Part) -> Part:
        """One after the other."""
        return parts[0] if len(parts) == 1 else self._part("seq", *parts)

    def alt(self, *parts: Part) -> Part:
        """One of them."""
        distinct = tuple(dict.fromkeys(parts))
        return distinct[0] if len(distinct) == 1 else self._part("alt", *distinct)

    def maybe(self, part: Part) -> Part:
        """This or nothing."""
        return self.alt(part, self.empty)

    def repeat(self, part: Part, least: int, most: int | None) -> Part:
        """This at least `least` times and at most `most` times, or without end."""
        return self.empty if most == 0 else self._part("repeat", part, least, most)

    def rule(self) -> Part:
        """A part to be defined later, by `define`: so a part can contain itself."""
        self._bodies.append(None)
        return self._part("rule", len(self._bodies) - 1)

    def define(self, rule: Part, body: Part) -> None:
        """Say what a rule stands for."""
        self._bodies[self._parts[rule][1]] = body

    def begin(self, root: Part) -> bool:
        """Make ready to read strings of this part, from the state `start`. False if there are no finite ones."""
        self._measure()
        self.start = self._state(self._open(self._push(root, _DONE)))
        return self._shortest[root] < NEVER

    def _part(self, *words: Any) -> Part:
        if words not in self._part_numbers:
            self._part_numbers[words] = len(self._parts)
            self._parts.append(words)
        return self._part_numbers[words]

    def _measure(self) -> None:
        # Least fixed point: rules are endless until shown otherwise. A part is made after what it contains.
        rules, found = [-1], [NEVER] * len(self._bodies)
        while rules != found:
            rules, self._shortest = found, []
            for kind, *inner in self._parts:
                if kind == "byte":
                    length = 1 if inner else NEVER
                elif kind == "rule":
                    length = rules[inner[0]]
                elif kind == "repeat":
                    length = self._shortest[inner[0]] * inner[1]
                else:
                    each = [self._shortest[part] for part in inner]
                    length = sum(each) if kind == "seq" else min(each)
                self._shortest.append(min(length, NEVER))
            found = [NEVER if body is None else self._shortest[body] for body in self._bodies]

    # -- states -------------------------------------------------------------------------------------------------------

    def step(self, state: int, byte: int) -> int:
        """The state after one more byte; 0 if that is not allowed."""
        if not self.is_known[state]:
            self.know(state)
        return int(self.next[state, byte])

    def is_complete(self, state: int) -> bool:
        """True if what has been read is a whole string."""
        return _DONE in self._states[state]

    @property
    def num_states(self) -> int:
        """States met so far; each takes about a kilobyte."""
        return len(self._states)

    def know(self, state: int) -> None:
        """Work out the row of a state."""
        after: dict[int, list[int]] = {}  # byte -> the stacks that are left after it
        for stack in self._states[state]:
            if stack != _DONE:
                top, rest = self._stacks[stack]
                for byte in self._parts[top][1:]:
                    after.setdefault(byte, []).append(rest)
        reached: dict[tuple[int, ...], int] = {}
        row = np.zeros(256, dtype=np.int32)
        for byte, rests in after.items():
            key = tuple(rests)
            if key not in reached:
                reached[key] = self._state(frozenset[int]().union(*map(self._open, dict.fromkeys(rests))))
            row[byte] = reached[key]
        self.next[state] = row
        self.is_known[state] = True

    def _state(self, stacks: frozenset[int]) -> int:
        if len(stacks) > MAX_STACKS:
            stacks = frozenset(sorted(stacks)[:MAX_STACKS])
        number = self._state_numbers.setdefault(stacks, len(self._states))
        if number == len(self._states):
            self._states.append(stacks)
            if number == len(self.next):
                self.next = np.concatenate([self.next, np.zeros_like(self.next)])
                self.is_known = np.concatenate([self.is_known, np.zeros_like(self.is_known)])
        return number

    def _push(self, part: Part, stack: int) -> int:
        entry = (part, stack)
        number = self._stack_numbers.setdefault(entry, len(self._stacks))
        if number == len(self._stacks):
            self._stacks.append(entry)
        return number

    def _open(self, stack: int) -> frozenset[int]:
        """The stacks that this one stands for: with a byte on top, or empty."""
        if stack not in self._opened:
            found, seen, to_do = set(), {stack}, [stack]
            while to_do:
                one = to_do.pop()
                if one == _DONE or self._parts[self._stacks[one][0]][0] == "byte":
                    found.add(one)
                    continue
                for other in self._unfold(*self._stacks[one]):
                    if other not in seen:
                        seen.add(other)
                        to_do.append(other)
            self._opened[stack] = frozenset(found)
        return self._opened[stack]

    def _unfold(self, top: Part, rest: int) -> Sequence[int]:
        kind, *inner = self._parts[top]
        if kind == "seq":
            for part in reversed(inner):
                rest = self._push(part, rest)
            return [rest]
        if kind == "alt":
            return [self._push(part, rest) for part in inner if self._shortest[part] < NEVER]
        if kind == "rule":
            body = self._bodies[inner[0]]
            return [self._push(body, rest)] if body is not None and self._shortest[body] < NEVER else []
        part, least, most = inner
        ways = [rest] if least == 0 else []
        if self._shortest[part] < NEVER:
            fewer = self.repeat(part, max(0, least - 1), None if most is None else most - 1)
            ways.append(self._push(part, self._push(fewer, rest)))
        return ways
