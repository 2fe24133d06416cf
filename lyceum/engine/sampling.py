"""What a request asks of the sampler, and the sampler: logits in, chosen tokens out, many rows at once.

Why it is our own: a token must depend on its request alone, never on who else is in the batch. The noise is therefore
no generator with a state but a hash: uniform = f(seed, position). It walks down the cumulative distribution in the
order of the token ids (inverse transform sampling), so one request gives the same reply alone, in a crowd, on any rank
and in any order of arrival, as far as logits agree (batch mates change their last bits).

It is not a place for penalties, logit bias or grammars; they come as one more mask on the weights where an issue asks
for them.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lyceum.errors import UsageError

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the step of SplitMix64
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingParams:
    """How one reply is drawn.

    max_tokens: most tokens of the reply, forced ones included. temperature: divides the logits; 0 takes the most
    probable token. top_k: keep the k most probable tokens (0: all). top_p: of these keep the fewest whose probabilities
    reach p (1: all). stop_ids: tokens that end the reply and stay its last token. stop_strings: texts that end it,
    wherever token borders lie. seed: any integer; the noise is a function of it and of the position in the sequence, so
    two requests with one seed share their noise. forced: tokens the reply begins with, whatever the model thinks.
    logprobs: return the log-probability of each token.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0
    forced: tuple[int, ...] = ()
    logprobs: bool = False

    def __post_init__(self) -> None:
        def refuse(name: str, expected: str) -> None:
            raise UsageError(
                f"{name} = {getattr(self, name)!r} cannot be sampled with", hint=f"{name} must be {expected}"
            )

        if self.max_tokens < 0:
            refuse("max_tokens", "0 or more")
        if not 0.0 <= self.temperature < float("inf"):
            refuse("temperature", "a number of at least 0 (0 is greedy)")
        if self.top_k < 0:
            refuse("top_k", "0 (no limit) or more")
        if not 0.0 <= self.top_p <= 1.0:
            refuse("top_p", "between 0 and 1 (1 is no limit)")
        if isinstance(self.stop_strings, str) or "" in self.stop_strings:
            refuse("stop_strings", "a tuple of texts that are not empty")

    @property
    def is_filtered(self) -> bool:
        """True if top-k or top-p may cut tokens off."""
        return self.top_k > 0 or self.top_p < 1.0

    @property
    def is_biased(self) -> bool:
        """True if tokens are not drawn from the very distribution whose log-probabilities are returned."""
        return self.is_filtered or self.temperature == 0.0


PLAIN = SamplingParams()


def mix_seed(*parts: int) -> int:
    """One 64-bit seed out of several integers, such as run seed, iteration and prompt number; their order counts."""
    state = 0
    for part in parts:
        state = _mix_int(((state ^ (part & _MASK)) + _GOLDEN) & _MASK)
    return state


def uniform(seeds_B: Tensor, positions_B: Tensor) -> Tensor:
    """Noise in [0, 1), double precision, a pure function of each row's seed and position.

    The n-th number of SplitMix64 (Steele, Lea, Flood 2014) whose state starts at the hashed seed; counter based, so any
    position is had at once. seeds_B, positions_B: int64.
    """
    state = _mix(seeds_B + signed64(_GOLDEN)) + (positions_B + 1) * signed64(_GOLDEN)
    return _shift(_mix(state), 11).double() * 2.0**-53


def sample(
    logits_BV: Tensor,
    temperature_B: Tensor,
    noise_B: Tensor | None,
    *,
    has_greedy: bool = True,
    top_k_B: Tensor | None = None,
    top_p_B: Tensor | None = None,
    planned_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose one token a row and say how probable it was.

    temperature_B: 0 takes the most probable token. noise_B: uniform numbers, double; None if every row is greedy.
    has_greedy: False if none is. top_k_B (0: all), top_p_B (1: all): filters, None where no row has one. planned_B:
    tokens already decided, -1 where none is. Returns tokens_B and logprobs_B: log-softmax of logits / temperature at
    the token, before any filter (greedy: at temperature 1).
    """
    logits_BV = logits_BV.float()
    scaled_BV = logits_BV / torch.where(temperature_B == 0, 1.0, temperature_B).unsqueeze(-1)
    scaled_BV -= scaled_BV.amax(-1, keepdim=True)
    weights_BV = scaled_BV.exp()
    if noise_B is None:
        tokens_B, total_B = logits_BV.argmax(-1), weights_BV.sum(-1)
    else:
        cumulative_BV = weights_BV.cumsum(-1, dtype=torch.float64)
        total_B = cumulative_BV[:, -1].float()
        if top_k_B is not None or top_p_B is not None:
            cumulative_BV = filtered(weights_BV, top_k_B, top_p_B).cumsum(-1, dtype=torch.float64)
        tokens_B = _inverse(cumulative_BV, noise_B)
        if has_greedy:
            tokens_B = torch.where(temperature_B == 0, logits_BV.argmax(-1), tokens_B)
    if planned_B is not None:
        tokens_B = torch.where(planned_B >= 0, planned_B, tokens_B)
    chosen_B = scaled_BV.gather(-1, tokens_B.unsqueeze(-1)).squeeze(-1)
    return tokens_B, chosen_B - total_B.log()


def filtered(weights_BV: Tensor, top_k_B: Tensor | None, top_p_B: Tensor | None) -> Tensor:
    """Set the weights of tokens that top-k, then top-p (nucleus sampling: Holtzman et al. 2019) cut off to 0.

    Exactly k tokens stay, ties going to the lower id; p is a share of what top-k left; the most probable token stays.
    """
    ordered_BV, order_BV = weights_BV.sort(dim=-1, descending=True, stable=True)
    kept_BV = torch.ones_like(ordered_BV, dtype=torch.bool)
    if top_k_B is not None:
        rank_V = torch.arange(weights_BV.shape[-1], device=weights_BV.device)
        kept_BV &= (top_k_B.unsqueeze(-1) == 0) | (rank_V < top_k_B.unsqueeze(-1))
    if top_p_B is not None:
        ordered_BV = ordered_BV * kept_BV
        reached_BV = ordered_BV.cumsum(-1, dtype=torch.float64)
        before_BV = reached_BV - ordered_BV
        kept_BV &= (before_BV < top_p_B.double().unsqueeze(-1) * reached_BV[:, -1:]) | (top_p_B.unsqueeze(-1) >= 1)
    kept_BV[:, 0] = True
    return weights_BV * torch.zeros_like(kept_BV).scatter_(-1, order_BV, kept_BV)


def _inverse(cumulative_BV: Tensor, noise_B: Tensor) -> Tensor:
    # The first token whose cumulative weight passes noise * total. noise <= 1 - 2^-53 keeps the product below the total
    # in double precision, so the search cannot run off the end and never picks a token of weight 0.
    target_B1 = (noise_B * cumulative_BV[:, -1]).unsqueeze(-1)
    return torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(-1)


def _mix(x: Tensor) -> Tensor:
    # SplitMix64's finaliser on int64 tensors: multiplication wraps, and the right shift is made logical by a mask
    x = (x ^ _shift(x, 30)) * signed64(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * signed64(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def signed64(x: int) -> int:
    """The int64 with the low 64 bits of any integer."""
    x &= _MASK
    return x - (1 << 64) if x >= 1 << 63 else x
