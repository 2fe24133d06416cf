"""What a request adds to the model's logits before it draws: penalties, bias, tokens that must not come yet, a schema.

Each request keeps its own account of the few tokens that are concerned (`Adjustment`); `adjusted` puts those of a whole
batch into one gather and one scatter, and touches no row that asked for nothing. With m the model's logit of a token:

    m > 0: m / r, else m * r    if the token is in the prompt or the reply; r: repetition_penalty
    - c * frequency_penalty     c: how often it is in the reply
    - presence_penalty          if c > 0
    + logit_bias

and all that over the temperature. Presence and frequency penalties and the bias are OpenAI's ("Frequency and presence
penalties", API documentation): only what the reply holds counts. The repetition penalty is Keskar et al. 2019 (CTRL),
section 4.1; they divide, which makes a negative logit likelier, so it is multiplied instead, as everybody does by now.

Shapes: B rows, V vocabulary, U tokens that a request has to do with, N those of all requests together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lyceum.engine.constrain import Constraint
from lyceum.engine.sampling import SamplingParams
from lyceum.errors import UsageError

_COUNT, _WAS_SEEN, _BIAS = range(3)


class Adjustment:
    """One request's account. Feed it every token of the reply, in order.

    constraint: what json_schema asks for; forced tokens do not count for it.
    Raises UsageError if logit_bias names a token outside the vocabulary.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], vocab_size: int, constraint: Constraint | None = None
    ):
        self.params = params
        self.constraint = constraint
        self._num_fed = 0
        self._place: dict[int, int] = {}
        self._tokens = np.zeros(16, dtype=np.int64)
        self._account = np.zeros((3, 16), dtype=np.float32)
        for token, bias in params.logit_bias.items():
            if not 0 <= token < vocab_size:
                raise UsageError(
                    f"logit_bias names the token {token}, the vocabulary has {vocab_size}",
                    hint="was it looked up in another tokenizer?",
                )
            self._set(_BIAS, token, bias)
        if params.repetition_penalty != 1:
            for token in set(prompt):
                self._set(_WAS_SEEN, token, 1)
        self._stops = [stop for stop in params.stop_ids if 0 <= stop < vocab_size] if params.min_tokens else []
        for token in self._stops:
            self._set(_BIAS, token, -np.inf)

    def feed(self, token: int, is_drawn: bool = True) -> None:
        """Count a token of the reply; is_drawn: False if it was forced."""
        self._num_fed += 1
        if self.params.has_penalties:
            at = self._at(token)
            self._account[_COUNT, at] += 1
            self._account[_WAS_SEEN, at] = 1
        if self._stops and self._num_fed == self.params.min_tokens:
            for stop in self._stops:
                self._set(_BIAS, stop, self.params.logit_bias.get(stop, 0.0))
        if self.constraint is not None and is_drawn:
            self.constraint.feed(token)

    def account(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens concerned (U,); how often each is in the reply, whether it was seen at all, its bias (3, U)."""
        size = len(self._place)
        return self._tokens[:size], self._account[:, :size]

    def _set(self, line: int, token: int, value: float) -> None:
        at = self._at(token)  # first: it may make room
        self._account[line, at] = value

    def _at(self, token: int) -> int:
        at = self._place.setdefault(token, len(self._place))
        if at == len(self._place) - 1:
            if at == len(self._tokens):
                self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
                self._account = np.concatenate([self._account, np.zeros_like(self._account)], axis=1)
            self._tokens[at] = token
        return at


def adjusted(logits_BV: Tensor, adjustments: Sequence[Adjustment | None]) -> Tensor:
    """A copy of the logits, in fp32, with what each row's request adds to them; None adds nothing."""
    adjusted_BV = logits_BV.to(torch.float32, copy=True)
    each = [(row, adjustment) for row, adjustment in enumerate(adjustments) if adjustment is not None]
    _add_accounts(adjusted_BV, each)
    for row, adjustment in each:
        if adjustment.constraint is not None:
            forbidden_V = adjustment.constraint.forbidden().to(adjusted_BV.device)
            known = len(forbidden_V)  # a model may have more rows of logits than there are tokens
            adjusted_BV[row, :known].masked_fill_(forbidden_V, float("-inf"))
            adjusted_BV[row, known:] = float("-inf")
    return adjusted_BV


def _add_accounts(logits_BV: Tensor, each: Sequence[tuple[int, Adjustment]]) -> None:
    accounts = [adjustment.account() for _, adjustment in each]
    sizes = [len(tokens) for tokens, _ in accounts]
    if not sum(sizes):
        return
    params = [adjustment.params for _, adjustment in each]
    penalties = [(p.frequency_penalty, p.presence_penalty, p.repetition_penalty) for p in params]
    device = logits_BV.device
    rows_N = torch.from_numpy(np.repeat([row for row, _ in each], sizes)).to(device)
    tokens_N = torch.from_numpy(np.concatenate([tokens for tokens, _ in accounts])).to(device)
    account = torch.from_numpy(np.concatenate([account for _, account in accounts], axis=1)).to(device)
    penalty = torch.from_numpy(np.repeat(np.array(penalties, dtype=np.float32), sizes, axis=0).T.copy()).to(device)
    count_N, was_seen_N, bias_N = account
    frequency_N, presence_N, repetition_N = penalty
    old_N = logits_BV[rows_N, tokens_N]
    new_N = torch.where(was_seen_N > 0, torch.where(old_N > 0, old_N / repetition_N, old_N * repetition_N), old_N)
    new_N = new_N - frequency_N * count_N - presence_N * (count_N > 0) + bias_N
    logits_BV[rows_N, tokens_N] = new_N
