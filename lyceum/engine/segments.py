"""A reply told segment by segment: several candidates for each, and the one taken that a trainer would like best.

    telling = Telling(prompt_ids, params, Ends.of(tokenizer.token_bytes), engine.context_length, num_candidates=4)
    while not telling.is_over:
        outputs = engine.generate(*zip(*telling.wanted(), strict=True))
        telling.take(outputs, mean_states(engine, telling.rows(outputs)), taste)
    telling.reply, telling.spans, telling.phi

TAMER acts greedily on what it has learned of its trainer, argmax_a H(s, a) (Knox and Stone 2009). Here the state is a
conversation and an action its next segment: up to the end of a clause, or a dozen tokens. The actions that are looked at are
drawn from the model, so whatever is taken is something it would say: best-of-n, a block at a time (Mudgal et al. 2023,
"Controlled decoding", block-wise). A segment's features are the model's hidden vectors at its tokens, averaged; the model
itself never changes.

The first candidate of each segment is what the model would have said by itself with the request's seed, and it is the only
one where nothing was taught: then the segments add up to the engine's plain reply.

Deviations, each with its reason: presence and frequency penalties see one segment at a time (each is a request of its own);
stop strings are looked for when a segment has come.

Shapes: N candidates, T positions, D width. What it is not: a loop (the server and the tests each have theirs, over one
engine), or what is learned (`lyceum.engine.tamer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams, mix_seed
from lyceum.engine.sequence import Finish, Output, StopStrings
from lyceum.engine.tamer import Taste
from lyceum.errors import UsageError

MOST_TOKENS = 12  # of a segment: at reading speed a second or two, the scale of a person's delay
MARKS = (".", "!", "?", ";", ":", ",", "\n", "。", "！", "？", "；", "：", "，", "、", "…")  # a segment ends behind one

Span = tuple[int, int]  # tokens of the reply: from, until


@dataclass(frozen=True)
class Ends:
    """Where a reply is cut: behind these tokens, and after `most` tokens at the latest."""

    ids: frozenset[int] = frozenset()
    most: int = MOST_TOKENS

    def __post_init__(self) -> None:
        if self.most < 1:
            raise UsageError(f"segments of {self.most} tokens", hint="a segment has at least one token")

    @classmethod
    def of(cls, token_bytes: Sequence[bytes], most: int = MOST_TOKENS) -> Ends:
        """The ends of a vocabulary: tokens whose text ends with one of MARKS."""
        marks = tuple(mark.encode() for mark in MARKS)
        found = (number for number, piece in enumerate(token_bytes) if piece.rstrip(b" ").endswith(marks))
        return cls(frozenset(found), most)

    def spans(self, reply: Sequence[int]) -> list[Span]:
        """The segments of a whole reply; the last may have no end yet."""
        found, begin = [], 0
        for at, token in enumerate(reply, 1):
            if token in self.ids or at - begin == self.most:
                found.append((begin, at))
                begin = at
        return found + ([(begin, len(reply))] if begin < len(reply) else [])


@dataclass
class Telling:
    """One reply under way.

    prompt: ids. params: of the whole reply, one of it. ends: where it is cut. context_length: most tokens of both. token_bytes:
    needed for stop strings only. num_candidates: drawn for each segment once something was taught. reply, spans, phi: what was
    taken so far, its segments, and each segment's features (D,). finish: why it is over; None while it is not.
    """

    prompt: Sequence[int]
    params: SamplingParams
    ends: Ends
    context_length: int
    num_candidates: int = 4
    token_bytes: Sequence[bytes] = ()
    reply: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    phi: list[Tensor] = field(default_factory=list)
    finish: Finish | None = None

    def __post_init__(self) -> None:
        p = self.params
        if self.num_candidates < 1 or p.n > 1 or p.best_of > 1 or p.min_tokens or p.forced or p.json_schema is not None:
            raise UsageError(
                f"{self.num_candidates} candidates for {p.n} replies, or what cannot be told in segments",
                hint="one reply without min_tokens, forced tokens and json_schema; at least one candidate for each segment",
            )
        strings = p.stop_strings
        self._watch = StopStrings(strings, self.token_bytes) if strings else None
        self._room = min(p.max_tokens, self.context_length - len(self.prompt))
        if self._room <= 0:
            self.finish = self._full

    @property
    def _full(self) -> Finish:
        return "length" if self._room == self.params.max_tokens else "context"

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be taken."""
        return self.finish is not None

    def wanted(self, is_taught: bool = True) -> list[tuple[list[int], SamplingParams]]:
        """Requests for the next segment's candidates: prompts and parameters. Nothing taught, or nothing drawn: only one."""
        num = self.num_candidates if is_taught and self.params.temperature > 0 else 1
        one = replace(
            self.params,
            max_tokens=min(self.ends.most, self._room - len(self.reply)),
            stop_ids=(*self.params.stop_ids, *self.ends.ids),
            stop_strings=(),
        )
        row = [*self.prompt, *self.reply]
        return [(row, replace(one, seed=mix_seed(one.seed, place) if place else one.seed)) for place in range(num)]

    def rows(self, outputs: Sequence[Output]) -> list[tuple[list[int], int]]:
        """What the features of these candidates are read from: all tokens up to their ends, and how many are their own."""
        return [([*self.prompt, *self.reply, *output.ids], len(output.ids)) for output in outputs]

    def take(self, outputs: Sequence[Output], phi_ND: Tensor, taste: Taste | None = None) -> list[int]:
        """Choose one of the candidates by what the trainer would say of it, the first of equals; returns its ids."""
        place = int(taste.values(phi_ND).argmax()) if taste is not None and len(outputs) > 1 else 0
        output = outputs[place]
        begin = len(self.reply)
        self.reply += output.ids
        self.spans.append((begin, len(self.reply)))
        self.phi.append(phi_ND[place])
        self.finish = self._finish(output)
        return output.ids

    def _finish(self, output: Output) -> Finish | None:
        if self._watch is not None and any(self._watch.feed(token) is not None for token in output.ids):
            return "stop"
        if output.finish == "stop" and output.ids[-1] in self.params.stop_ids:
            return "stop"
        return self._full if len(self.reply) >= self._room else None


def mean_states(engine: Engine, rows: Sequence[tuple[list[int], int]]) -> Tensor:
    """Features (N, D) in single precision: the mean hidden vector at the last few tokens of each row, as many as it says."""
    states = engine.encode([row for row, _ in rows], at="all")
    return torch.stack([state_TD[-num:].float().mean(0).cpu() for state_TD, (_, num) in zip(states, rows, strict=True)])


def segment_states(engine: Engine, prompt: Sequence[int], reply: Sequence[int], spans: Sequence[Span]) -> Tensor:
    """The same features of all segments of a reply that is whole (N, D): one pass, since no token sees what follows it."""
    (state_TD,) = engine.encode([[*prompt, *reply]], at="all")
    own_TD = state_TD[len(prompt) :].float().cpu()
    return torch.stack([own_TD[begin:end].mean(0) for begin, end in spans])
