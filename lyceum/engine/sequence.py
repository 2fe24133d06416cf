"""One request and its state: the sequence, what comes back of it, and the running sequences' state as tensors.

A `Sequence` is what the engine knows of one request in Python. Whatever a decode step touches lies in `Batch`, one row
per running sequence, so that a step costs the same few tensor operations for one sequence and for two hundred.

Shapes: B rows, T time (tokens of the reply), S stop tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lyceum.engine.adjust import Adjustment
from lyceum.engine.sampling import SamplingParams, signed64

Finish = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Output:
    """A finished reply.

    ids: the reply, its stop token included if it hit one. logprobs: of each id at the request's temperature, before
    filters (greedy: at temperature 1); empty unless asked for. finish: "stop" (stop token or string), "length"
    (max_tokens or the context is full), "abort". num_forced: so many ids at the start were given, not drawn. is_biased:
    the ids were not drawn from the distribution that `logprobs` describes (top-k, top-p or greedy), so they must not
    feed a policy gradient. stop: the token or string that ended it. text_bytes: bytes of the text before the stop
    string; None when no stop string ended it. top_logprobs: for each id, the most probable tokens with their
    log-probabilities, best first. prompt_logprobs: of each token of the prompt but the first.
    """

    id: int
    ids: list[int]
    finish: Finish
    logprobs: list[float] = field(default_factory=list)
    num_forced: int = 0
    is_biased: bool = False
    stop: int | str | None = None
    text_bytes: int | None = None
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)


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


@dataclass
class Sequence:
    """A request: waiting, then running in one row. limit: most reply tokens, by max_tokens and by the context."""

    id: int
    prompt: list[int]
    params: SamplingParams
    limit: int
    stop_strings: StopStrings | None = None
    adjustment: Adjustment | None = None
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)


class Batch:
    """The running sequences' state, row i for the i-th of them; rows in use are always 0..n-1.

    last_B: the newest token, not yet in the cache. position_B: where the next token will stand in the sequence.
    reply_BT: the reply so far; beyond it, forced tokens yet to come, -1 elsewhere. logprob_BT: beside it.
    """

    def __init__(self, num_rows: int, device: torch.device):
        def whole() -> Tensor:
            return torch.zeros(num_rows, dtype=torch.long, device=device)

        self.last_B, self.position_B, self.num_reply_B, self.limit_B, self.seed_B = (
            whole(),
            whole(),
            whole(),
            whole(),
            whole(),
        )
        self.top_k_B = whole()
        self.top_p_B = torch.ones(num_rows, dtype=torch.float64, device=device)
        self.min_p_B = torch.zeros(num_rows, device=device)
        self.temperature_B = torch.ones(num_rows, device=device)
        self.stop_BS = torch.full((num_rows, 4), -1, device=device)
        self.reply_BT = torch.full((num_rows, 64), -1, device=device)
        self.logprob_BT = torch.zeros(num_rows, 64, device=device)
        self.rows_B = torch.arange(num_rows, device=device)

    def write(self, first: int, sequences: Many[Sequence]) -> None:
        """Put sequences that are about to start into rows first, first + 1, ..."""
        params = [sequence.params for sequence in sequences]
        rows = slice(first, first + len(sequences))
        device = self.rows_B.device
        self._widen(max(sequence.limit for sequence in sequences), max(len(p.stop_ids) for p in params))

        self.last_B[rows] = torch.tensor([sequence.prompt[-1] for sequence in sequences], device=device)
        self.position_B[rows] = torch.tensor([len(sequence.prompt) for sequence in sequences], device=device)
        self.limit_B[rows] = torch.tensor([sequence.limit for sequence in sequences], device=device)
        self.num_reply_B[rows] = 0
        self.seed_B[rows] = torch.tensor([signed64(p.seed) for p in params], device=device)
        self.top_k_B[rows] = torch.tensor([p.top_k for p in params], device=device)
        self.top_p_B[rows] = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
        self.min_p_B[rows] = torch.tensor([p.min_p for p in params], dtype=torch.float, device=device)
        self.temperature_B[rows] = torch.tensor([p.temperature for p in params], dtype=torch.float, device=device)
        self.stop_BS[rows] = -1
        self.reply_BT[rows] = -1
        for row, p in enumerate(params, first):
            if p.stop_ids:
                self.stop_BS[row, : len(p.stop_ids)] = torch.tensor(p.stop_ids, device=device)
            if p.forced:
                forced = p.forced[: self.reply_BT.shape[1]]
                self.reply_BT[row, : len(forced)] = torch.tensor(forced, device=device)

    def planned(self, n: int) -> Tensor:
        """The forced token that comes next in rows 0..n-1, -1 where none does."""
        return self.reply_BT[self.rows_B[:n], self.num_reply_B[:n]]

    def append(self, tokens_B: Tensor, logprobs_B: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token to rows 0..n-1. Returns which hit a stop token (forced ones do not count), which are full."""
        n = len(tokens_B)
        rows_B, num_reply_B = self.rows_B[:n], self.num_reply_B[:n]
        is_free_B = self.reply_BT[rows_B, num_reply_B] < 0
        self.reply_BT[rows_B, num_reply_B] = tokens_B
        self.logprob_BT[rows_B, num_reply_B] = logprobs_B
        self.last_B[:n] = tokens_B
        num_reply_B += 1
        self.position_B[:n] += 1
        is_stop_B = (tokens_B.unsqueeze(1) == self.stop_BS[:n]).any(1) & is_free_B
        return is_stop_B, num_reply_B >= self.limit_B[:n]

    def move(self, into: list[int], out_of: list[int]) -> None:
        """Copy whole rows: a running sequence moves into the row of one that has left."""
        for name, column in vars(self).items():
            if name != "rows_B":
                column[into] = column[out_of]

    def reply(self, row: int, start: int = 0) -> list[int]:
        """Ids of the reply in a row, from `start` on."""
        return self.reply_BT[row, start : int(self.num_reply_B[row])].tolist()

    def logprobs(self, row: int) -> list[float]:
        """Log-probability of every id of the reply in a row."""
        return self.logprob_BT[row, : int(self.num_reply_B[row])].tolist()

    def _widen(self, num_tokens: int, num_stops: int) -> None:
        if num_stops > self.stop_BS.shape[1]:
            self.stop_BS = _wider(self.stop_BS, num_stops, -1)
        if num_tokens > self.reply_BT.shape[1]:
            width = max(num_tokens, 2 * self.reply_BT.shape[1])
            self.reply_BT, self.logprob_BT = _wider(self.reply_BT, width, -1), _wider(self.logprob_BT, width, 0)


def _wider(old_BT: Tensor, width: int, fill: float) -> Tensor:
    new_BT = old_BT.new_full((old_BT.shape[0], width), fill)
    new_BT[:, : old_BT.shape[1]] = old_BT
    return new_BT
