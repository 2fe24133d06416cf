"""One request and its state: the sequence, what comes back of it, and the sampler's settings of those that draw.

A `Sequence` is all that the engine knows of one request, as Python lists: a step appends to them, which costs less than a
column of a tensor does. Only what the sampler reads are tensors (`Draw`), and they are made anew when others draw.

Shapes: B rows that draw, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lyceum.engine.adjust import Adjustment, adjusted
from lyceum.engine.sampling import SamplingParams, alternatives, sample, signed64, uniform
from lyceum.errors import DataError

if TYPE_CHECKING:
    from lyceum.engine.guess import Guesser

Finish = Literal["stop", "length", "context", "abort"]
Top = list[tuple[int, float]]  # the most probable tokens with their log-probabilities, best first
Drawn = tuple[list[int], list[float], list[Top]]  # of each row: the token, its log-probability, those beside it
Processor = Callable[[Tensor, list[int]], Tensor]  # logits_V and the reply's ids so far -> logits_V


@dataclass(frozen=True)
class Scores:
    """What a model says of tokens that are given: of each the log-probability, and how many tokens are more probable.

    top: of each, the most probable tokens with their log-probabilities, as many as were asked for.
    """

    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    top: list[Top] = field(default_factory=list)

    def extend(self, more: Scores) -> None:
        """Add those of the tokens that follow."""
        self.logprobs.extend(more.logprobs)
        self.ranks.extend(more.ranks)
        self.top.extend(more.top)


@dataclass(frozen=True)
class Output:
    """A finished reply.

    ids: the reply, its stop token included if it hit one. logprobs: of each id at the request's temperature, before
    filters (greedy: at temperature 1); empty unless asked for. top_logprobs: beside each, the most probable tokens, best
    first. finish: "stop" (stop token or string), "length" (max_tokens), "context" (the model's context is full), "abort".
    num_forced: so many ids at the start were given, not drawn. is_biased: the ids were not drawn from the distribution
    that `logprobs` describes (a filter, greedy, or changed logits), so they must not feed a policy gradient. stop: the
    token or string that ended it. text_bytes: bytes of the text before the stop string; None when no stop string ended
    it. prompt: scores of the prompt's tokens but the first, at the same temperature; None unless asked for. num_reused:
    tokens of the prompt that were not read again.
    """

    id: int
    ids: list[int]
    finish: Finish
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[Top] = field(default_factory=list)
    num_forced: int = 0
    is_biased: bool = False
    stop: int | str | None = None
    text_bytes: int | None = None
    prompt: Scores | None = None
    num_reused: int = 0


class StopStrings:
    """Finds the first stop string in a reply that grows token by token, wherever the token borders lie.

    First is the one that is complete first, and of several complete at once the longest reach back; so the answer does
    not depend on how the text was cut into tokens. Matching is on bytes: a token may hold half a character.
    """

    def __init__(self, strings: Many[str], token_bytes: Many[bytes]):
        self._wanted = {text.encode(): text for text in strings}
        self._keep = max(map(len, self._wanted)) - 1
        self._token_bytes = token_bytes
        self._tail = b""
        self._num_bytes = 0

    def skip(self, token: int) -> None:
        """Pass over a forced token: what was given cannot end the reply, nor begin a stop string."""
        self._tail = b""
        self._num_bytes += len(self._token_bytes[token])

    def feed(self, token: int) -> tuple[str, int] | None:
        """Add a token. Returns the stop string that it completes and the number of reply bytes before that string."""
        window = self._tail + self._token_bytes[token]
        start = self._num_bytes - len(self._tail)
        self._num_bytes = start + len(window)
        self._tail = window[len(window) - self._keep :] if self._keep < len(window) else window
        found = [(at + len(wanted), at, wanted) for wanted in self._wanted if (at := window.find(wanted)) >= 0]
        if not found:
            return None
        _, at, wanted = min(found)
        return self._wanted[wanted], start + at


@dataclass(eq=False)
class Sequence:
    """A request: waiting, then running in one row.

    tokens: the prompt, then the reply. limit: most reply tokens, by max_tokens and by the context. adjustment: what the
    request adds to the logits. key: who asks. guesser: its guesses, where it may have some. row: its slot, -1 while it has
    none. num_cached: how many of its tokens the slot holds. leader: a running sequence whose slot will hold the first
    num_shared of them too, and which is waited for.
    """

    id: int
    tokens: list[int]
    params: SamplingParams
    limit: int
    stop_strings: StopStrings | None = None
    adjustment: Adjustment | None = None
    key: str = ""
    is_background: bool = False
    processor: Processor | None = None
    guesser: Guesser | None = None
    row: int = -1
    num_cached: int = 0
    num_reused: int = 0
    leader: Sequence | None = None
    num_shared: int = 0
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[Top] = field(default_factory=list)
    prompt_scores: Scores = field(default_factory=Scores)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)
        p = self.params
        # nothing but the most probable token is asked for
        is_plain = not (self.processor or p.is_adjusted or p.forced or p.logprobs or p.top_logprobs)
        self.is_argmax = p.temperature == 0 and is_plain
        self.is_predictable = not (self.processor or p.is_adjusted)  # what is drawn depends on logits alone
        self.stop_ids = frozenset(p.stop_ids)

    @property
    def reply(self) -> list[int]:
        """Ids it has been given so far."""
        return self.tokens[self.num_prompt :]

    @property
    def num_left(self) -> int:
        """Tokens that the model has not seen: 1 while it is decoding, more while its prompt is being read."""
        return len(self.tokens) - self.num_cached

    @property
    def num_promised(self) -> int:
        """Tokens that it may come to."""
        return self.num_prompt + self.limit

    def append(self, token: int, logprob: float, top: Top) -> Output | None:
        """Add a token; returns what has become of the request if that was its last."""
        if self.limit == 0:  # it only wanted its prompt scored
            return self.output()
        self.tokens.append(token)
        p, num_reply = self.params, len(self.tokens) - self.num_prompt
        if p.logprobs:
            self.logprobs.append(logprob)
        if p.top_logprobs:
            self.top_logprobs.append(top[: p.top_logprobs])
        is_forced = num_reply <= len(p.forced)
        if self.adjustment is not None:
            self.adjustment.feed(token, is_drawn=not is_forced)
        if self.stop_strings is not None:
            if is_forced or num_reply <= p.min_tokens:
                self.stop_strings.skip(token)
            elif (match := self.stop_strings.feed(token)) is not None:
                return self.output("stop", *match)
        if token in self.stop_ids and not is_forced:
            return self.output("stop", token)
        return self.output() if num_reply >= self.limit else None

    def output(
        self, finish: Finish | None = None, stop: int | str | None = None, text_bytes: int | None = None
    ) -> Output:
        """What it has, for this reason; by default, because it is at its limit."""
        ids = self.reply
        return Output(
            id=self.id,
            ids=ids,
            finish=finish or ("length" if self.limit == self.params.max_tokens else "context"),
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs,
            num_forced=min(len(self.params.forced), len(ids)),
            is_biased=self.params.is_biased or self.processor is not None,
            stop=stop,
            text_bytes=text_bytes,
            prompt=self.prompt_scores if self.params.prompt_logprobs else None,
            num_reused=self.num_reused,
        )


class Draw:
    """One draw for each of these sequences, again and again; their settings stand ready as tensors."""

    def __init__(self, sequences: Many[Sequence], device: torch.device, ahead: Many[int] | None = None):
        """ahead: so many tokens behind the next one each is drawn for (default: none)."""
        self.sequences = list(sequences)
        self._ahead = ahead or [0] * len(self.sequences)
        self._device = device
        params = [sequence.params for sequence in sequences]
        self._is_argmax = all(sequence.is_argmax for sequence in sequences)
        self._has_greedy = any(p.temperature == 0 for p in params)
        self._has_forced = any(p.forced for p in params)
        self._processed = [(i, it.processor) for i, it in enumerate(sequences) if it.processor is not None]
        self._temperature_B = torch.tensor([p.temperature for p in params], dtype=torch.float, device=device)
        self._adjustments = [sequence.adjustment for sequence in sequences]
        self._is_adjusted = any(adjustment is not None for adjustment in self._adjustments)
        self._num_top = max(p.top_logprobs for p in params)
        self._seed_B = self._top_k_B = self._top_p_B = self._min_p_B = None
        if any(p.temperature > 0 for p in params):
            self._seed_B = torch.tensor([signed64(p.seed) for p in params], device=device)
        if any(p.top_k > 0 or p.top_p < 1 for p in params):
            self._top_k_B = torch.tensor([p.top_k for p in params], device=device)
            self._top_p_B = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
        if any(p.min_p > 0 for p in params):
            self._min_p_B = torch.tensor([p.min_p for p in params], dtype=torch.float, device=device)

    def __call__(self, logits_BV: Tensor) -> Drawn:
        """The next token of each, its log-probability, and the most probable ones (0 and none where nobody asks)."""
        top: list[Top] = [[]] * len(self.sequences)
        if self._is_argmax:
            return logits_BV.argmax(-1).tolist(), [0.0] * len(self.sequences), top
        for i, processor in self._processed:
            logits_BV[i] = processor(logits_BV[i], self.sequences[i].reply)
        noise_B = planned_B = None
        if self._seed_B is not None:
            positions = [len(it.tokens) + ahead for it, ahead in zip(self.sequences, self._ahead, strict=True)]
            noise_B = uniform(self._seed_B, torch.tensor(positions, device=self._device))
        if self._has_forced:
            planned_B = torch.tensor([self._planned(sequence) for sequence in self.sequences], device=self._device)
        tokens_B, logprobs_B = sample(
            logits_BV,
            self._temperature_B,
            noise_B,
            has_greedy=self._has_greedy,
            top_k_B=self._top_k_B,
            top_p_B=self._top_p_B,
            min_p_B=self._min_p_B,
            adjusted_BV=adjusted(logits_BV, self._adjustments) if self._is_adjusted else None,
            planned_B=planned_B,
        )
        if self._num_top:
            ids_BK, top_BK = alternatives(logits_BV, self._temperature_B, tokens_B, logprobs_B, self._num_top)
            top = [list(zip(*row, strict=True)) for row in zip(ids_BK.tolist(), top_BK.tolist(), strict=True)]
        return tokens_B.tolist(), logprobs_B.tolist(), top

    @staticmethod
    def _planned(sequence: Sequence) -> int:
        num_reply = len(sequence.tokens) - sequence.num_prompt
        return sequence.params.forced[num_reply] if num_reply < len(sequence.params.forced) else -1


def check_ids(row: Many[int], forced: Many[int] = (), *, context_length: int, vocab_size: int) -> None:
    """Raises DataError where a prompt is empty or too long, or it or what is forced has ids outside the vocabulary."""
    if not row:
        raise DataError("the prompt is empty", hint="begin with at least one token, such as the end-of-text token")
    if len(row) > context_length:
        raise DataError(
            f"{len(row)} tokens do not fit the model's context of {context_length}",
            hint="shorten the text, or use a model with a longer context",
        )
    for ids in (row, forced):
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise DataError(
                f"token ids {min(ids)}..{max(ids)} are outside the model's vocabulary of {vocab_size}",
                hint="was the text encoded with another tokenizer?",
            )
