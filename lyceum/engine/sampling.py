"""What a request asks of the sampler, and the sampler: logits in, chosen tokens out, many rows at once.

Why it is our own: a token must depend on its request alone, never on who else is in the batch. The noise is therefore
no generator with a state but a hash: uniform = f(seed, position). It walks down the cumulative distribution in the
order of the token ids (inverse transform sampling), so one request gives the same reply alone, in a crowd, on any rank
and in any order of arrival, as far as logits agree (batch mates change their last bits).

A draw is: the model's logits; what the request adds to them (`lyceum.engine.adjust`: penalties, bias, a schema); over
the temperature; top-k, then top-p of what is left, then min-p; the noise. Every row has its own settings, and what no
row asks for costs nothing. `docs/engine.md` has the table of all parameters with their sources.

Shapes: B rows, V vocabulary, M most probable tokens in their order, K alternatives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lyceum.errors import UsageError

CANDIDATES = 256  # most probable tokens among which top-k and top-p are looked for first
FEW = 32  # rows up to which noise is hashed one by one

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the step of SplitMix64
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingParams:
    """How one reply is drawn, or the best of several.

    max_tokens: most tokens of the reply, forced ones included. min_tokens: so many stand before whatever stops it.
    temperature: divides the logits; 0 takes the most probable token. top_k: keep the k most probable tokens (0: all).
    top_p: of these keep the fewest whose probabilities reach p (1: all). min_p: of these keep those at least this share
    as probable as the most probable (0: all). presence_penalty, frequency_penalty: taken from the logit of a token that
    is in the reply, once and for each time. repetition_penalty: divides the logit of a token that is in the prompt or
    the reply if it is positive, multiplies it if negative. logit_bias: token -> what is added to its logit.

    stop_ids: tokens that end the reply and stay its last token. stop_strings: texts that end it, wherever token borders
    lie. forced: tokens the reply begins with, whatever the model thinks. json_schema: the reply, after the forced
    tokens, is JSON that fits it (`lyceum.engine.schema`; {"type": "object"}: any object); then a stop token ends it.

    seed: any integer; the noise is a function of it and of the position in the sequence, so two requests with one seed
    share their noise. n: replies wanted; best_of: replies drawn, of which the n best are wanted (0: n); see `each`.
    logprobs: return the log-probability of each token. top_logprobs: and so many most probable tokens beside it.
    prompt_logprobs: return the log-probabilities of the prompt's tokens.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    forced: tuple[int, ...] = ()
    json_schema: Mapping[str, Any] | bool | None = None
    seed: int = 0
    n: int = 1
    best_of: int = 0
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        def check(name: str, is_good: bool, expected: str) -> None:
            if not is_good:
                raise UsageError(
                    f"{name} = {getattr(self, name)!r} cannot be sampled with", hint=f"{name} must be {expected}"
                )

        check("max_tokens", self.max_tokens >= 0, "0 or more")
        check("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens")
        check("temperature", 0 <= self.temperature < float("inf"), "a number of at least 0 (0 is greedy)")
        check("top_k", self.top_k >= 0, "0 (no limit) or more")
        check("top_p", 0 <= self.top_p <= 1, "between 0 and 1 (1 is no limit)")
        check("min_p", 0 <= self.min_p <= 1, "between 0 (no limit) and 1")
        check("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2")
        check("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2")
        check("repetition_penalty", 0 < self.repetition_penalty <= 10, "above 0 and at most 10 (1 is none)")
        check("logit_bias", all(-100 <= x <= 100 for x in self.logit_bias.values()), "tokens with -100 to 100 each")
        strings = self.stop_strings
        check("stop_strings", not isinstance(strings, str) and "" not in strings, "a tuple of texts that are not empty")
        check("n", self.n >= 1, "1 or more")
        check("best_of", self.best_of == 0 or self.best_of >= self.n, "at least n, or 0 for n")
        check("top_logprobs", 0 <= self.top_logprobs <= 20, "between 0 and 20")
        if self.json_schema is not None:
            check("min_tokens", self.min_tokens == 0, "0 with json_schema, which may be complete before")

    @property
    def is_filtered(self) -> bool:
        """True if top-k, top-p or min-p may cut tokens off."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def is_adjusted(self) -> bool:
        """True if the reply is not drawn from the model's own logits."""
        return (
            self.has_penalties
            or bool(self.logit_bias)
            or (self.min_tokens > 0 and bool(self.stop_ids))
            or self.json_schema is not None
        )

    @property
    def has_penalties(self) -> bool:
        """True if what has been said changes what is likely next."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def is_biased(self) -> bool:
        """True if tokens are not drawn from the very distribution whose log-probabilities are returned."""
        return self.is_filtered or self.is_adjusted or self.temperature == 0.0

    def each(self) -> list[SamplingParams]:
        """The requests for one reply each that this one stands for; the first has this one's seed.

        Of the replies `best` chooses n.
        """
        drawn = self.best_of or self.n
        one = replace(self, n=1, best_of=0, logprobs=self.logprobs or drawn > self.n)
        return [replace(one, seed=mix_seed(self.seed, number) if number else self.seed) for number in range(drawn)]


PLAIN = SamplingParams()


def best(logprobs: Sequence[Sequence[float]], n: int) -> list[int]:
    """Which n of several replies have the highest mean log-probability of a token, best first; ties to the earlier.

    The server's `best_of` in OpenAI's API; ranking without an oracle in Chen et al. 2021, section 3.3.
    """
    mean = [sum(reply) / max(1, len(reply)) for reply in logprobs]
    return sorted(range(len(mean)), key=lambda reply: -mean[reply])[:n]


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
    if (
        len(seeds_B) <= FEW and seeds_B.device.type == "cpu"
    ):  # the same in Python's integers, beside 30 tensor operations
        pairs = zip(seeds_B.tolist(), positions_B.tolist(), strict=True)
        states = [_mix_int((seed + _GOLDEN) & _MASK) + (position + 1) * _GOLDEN for seed, position in pairs]
        return torch.tensor([(_mix_int(state & _MASK) >> 11) * 2.0**-53 for state in states], dtype=torch.float64)
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
    min_p_B: Tensor | None = None,
    adjusted_BV: Tensor | None = None,
    planned_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose one token a row and say how probable it was.

    temperature_B: 0 takes the most probable token. noise_B: uniform numbers, double; None if every row is greedy.
    has_greedy: False if none is. top_k_B (0: all), top_p_B (1: all), min_p_B (0: all): filters, None where no row has
    one. adjusted_BV: logits to draw from in place of the model's own. planned_B: tokens already decided, -1 where none
    is. Returns tokens_B and logprobs_B: log-softmax of the model's logits / temperature at the token, before anything
    was added or cut off (greedy: at temperature 1).
    """
    logits_BV = logits_BV.float()
    divisor_B1 = torch.where(temperature_B == 0, 1.0, temperature_B).unsqueeze(-1)
    scaled_BV = logits_BV / divisor_B1
    scaled_BV -= scaled_BV.amax(-1, keepdim=True)
    weights_BV = scaled_BV.exp()
    source_BV = logits_BV if adjusted_BV is None else adjusted_BV
    if noise_B is None:
        tokens_B, total_B = source_BV.argmax(-1), weights_BV.sum(-1)
    else:
        cumulative_BV = weights_BV.cumsum(-1, dtype=torch.float64)
        total_B = cumulative_BV[:, -1].float()
        is_filtered = not (top_k_B is None and top_p_B is None and min_p_B is None)
        if adjusted_BV is not None:
            weights_BV = adjusted_BV / divisor_B1
            weights_BV = (weights_BV - weights_BV.amax(-1, keepdim=True)).exp()
        if is_filtered:
            weights_BV = filtered(weights_BV, top_k_B, top_p_B, min_p_B)
        if is_filtered or adjusted_BV is not None:
            cumulative_BV = weights_BV.cumsum(-1, dtype=torch.float64)
        tokens_B = _inverse(cumulative_BV, noise_B)
        if has_greedy:
            tokens_B = torch.where(temperature_B == 0, source_BV.argmax(-1), tokens_B)
    if planned_B is not None:
        tokens_B = torch.where(planned_B >= 0, planned_B, tokens_B)
    chosen_B = scaled_BV.gather(-1, tokens_B.unsqueeze(-1)).squeeze(-1)
    return tokens_B, chosen_B - total_B.log()


def alternatives(
    logits_BV: Tensor, temperature_B: Tensor, tokens_B: Tensor, logprobs_B: Tensor, num: int
) -> tuple[Tensor, Tensor]:
    """The most probable tokens of each row, best first, beside the one that `sample` chose: ids_BK, logprobs_BK.

    Log-probabilities are on the chosen one's scale: where it is among them, it has the very same float.
    """
    divisor_B1 = torch.where(temperature_B == 0, 1.0, temperature_B).unsqueeze(-1)
    best_BK, ids_BK = logits_BV.float().topk(min(num, logits_BV.shape[-1]))
    chosen_B1 = logits_BV.float().gather(-1, tokens_B.unsqueeze(-1))
    return ids_BK, (best_BK - chosen_B1) / divisor_B1 + logprobs_B.unsqueeze(-1)


def filtered(
    weights_BV: Tensor, top_k_B: Tensor | None, top_p_B: Tensor | None, min_p_B: Tensor | None = None
) -> Tensor:
    """Set the weights of tokens that top-k, then top-p, then min-p cut off to 0.

    Top-k (Fan, Lewis, Dauphin 2018): exactly k tokens stay, ties going to the lower id. Top-p (nucleus sampling:
    Holtzman et al. 2019): p is a share of what top-k left; the most probable token stays. Min-p (Nguyen et al. 2024):
    what is at least min_p times as probable as the most probable token stays.

    Each keeps the first few in the order of falling weight, so all that is looked for is the least weight kept. It is
    looked for among the most probable `CANDIDATES`, and where the nucleus reaches beyond among all that it could hold.
    """
    if top_k_B is not None or top_p_B is not None:
        weights_BV = _first_few(weights_BV, top_k_B, top_p_B)
    if min_p_B is not None:
        least_B1 = min_p_B.unsqueeze(-1) * weights_BV.amax(-1, keepdim=True)
        weights_BV = weights_BV * (weights_BV >= least_B1)
    return weights_BV


def _first_few(weights_BV: Tensor, top_k_B: Tensor | None, top_p_B: Tensor | None) -> Tensor:
    num_candidates = CANDIDATES if top_k_B is None else max(CANDIDATES, int(top_k_B.max()))
    if 4 * num_candidates < weights_BV.shape[1]:
        ordered_BM = weights_BV.topk(num_candidates).values
    else:
        ordered_BM = weights_BV.sort(-1, descending=True).values
    least_B, ties_B, is_short_B = _least(ordered_BM, weights_BV, top_k_B, top_p_B)
    if is_short_B.any():
        rows = is_short_B.nonzero().flatten()
        wide_BV, top_p_B = weights_BV[rows], top_p_B[rows]  # type: ignore[index]
        # tokens of weight (1 - p) / V of the whole or less are together no more than 1 - p: the nucleus needs none
        small_B = (1 - top_p_B) * wide_BV.sum(-1, dtype=torch.float64) / wide_BV.shape[1]
        num_candidates = int((wide_BV > small_B.unsqueeze(-1)).sum(-1).max()) + 1
        ordered_BM = wide_BV.topk(min(num_candidates, wide_BV.shape[1])).values
        least_B[rows], ties_B[rows], _ = _least(ordered_BM, wide_BV, None, top_p_B)
    is_kept_BV = weights_BV > least_B.unsqueeze(-1)
    is_tie_BV = weights_BV == least_B.unsqueeze(-1)
    if (is_tie_BV.sum(-1) > ties_B).any():
        is_tie_BV &= is_tie_BV.cumsum(-1) <= ties_B.unsqueeze(-1)
    return weights_BV * (is_kept_BV | is_tie_BV)


def _least(
    ordered_BM: Tensor, weights_BV: Tensor, top_k_B: Tensor | None, top_p_B: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The least weight that stays (-1: all), how many of that very weight do, and whether M were too few to say."""
    num_rows, size = weights_BV.shape
    num = ordered_BM.shape[1]
    kept_B = torch.full((num_rows,), size, device=weights_BV.device)
    if top_k_B is not None:
        kept_B = torch.where(top_k_B == 0, size, top_k_B.clamp(max=size))
    is_short_B = torch.zeros_like(kept_B, dtype=torch.bool)
    if top_p_B is not None:
        is_in_BM = torch.arange(num, device=kept_B.device) < kept_B.unsqueeze(-1)
        reached_BM = (ordered_BM * is_in_BM).cumsum(-1, dtype=torch.float64)
        whole_B = reached_BM[:, -1]
        if num < size:
            whole_B = torch.where(kept_B > num, weights_BV.sum(-1, dtype=torch.float64), whole_B)
        # a token stays if those before it do not reach p; the first has none before it
        num_reaching_B = 1 + (reached_BM[:, :-1] < (top_p_B.double() * whole_B).unsqueeze(-1)).sum(-1)
        is_short_B = (kept_B > num) & (top_p_B < 1) & (num_reaching_B == num)
        kept_B = torch.where(top_p_B < 1, num_reaching_B.minimum(kept_B), kept_B)
    least_B = ordered_BM.gather(1, (kept_B.clamp(max=num) - 1).unsqueeze(-1)).squeeze(-1)
    least_B = torch.where(kept_B == size, -1.0, least_B)
    return least_B, kept_B - (ordered_BM > least_B.unsqueeze(-1)).sum(-1), is_short_B


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
