"""Whole rows at once: log-probability and rank of every token, hidden vectors. Nothing is generated, nothing cached.

The one primitive under perplexity, multiple choice, `echo`, KL and reranking; hidden vectors are for heads that the caller
puts on: embeddings, reward scores, moderation, the logit lens.

Rows of similar length go through the model together, right padded, and logits are made for a block of positions at a time.

Shapes: B rows, T time, D width, V vocabulary, N positions picked out of (B, T), P places in a top list.
What it is not: it checks no ids; `lyceum.engine.engine.Engine` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from typing import Any, Literal

import torch
from torch import Tensor

from lyceum.engine.scheduler import groups
from lyceum.engine.sequence import Scores
from lyceum.errors import UsageError

GROUP_TOKENS = 2048  # padded tokens of one pass: small activations stay in the CPU's cache
LOGIT_CELLS = 1 << 22  # positions x vocabulary of one block of logits: 16 MB

PLACES = ("last", "mean", "all")
Place = Literal["last", "mean", "all"]


def score_rows(
    model: Any, rows: Many[Many[int]], temperature: float, num_top: int, device: torch.device
) -> list[Scores]:
    """Scores of every token but the first of each row, given those before it, of logits / temperature."""
    if not temperature > 0:
        raise UsageError(f"temperature = {temperature} cannot be scored with", hint="temperature must be above 0")
    found = [Scores() for _ in rows]
    for indices, tokens_BT, lengths in _grouped(rows, device):
        hidden_BTD = model(tokens_BT[:, :-1]) if tokens_BT.shape[1] > 1 else None
        for i, row, length in zip(indices, range(len(indices)), lengths, strict=True):
            if hidden_BTD is not None:
                part = score_tokens(
                    model, hidden_BTD[row, : length - 1], tokens_BT[row, 1:length], temperature, num_top
                )
                found[i].extend(part)
    return found


def score_tokens(model: Any, hidden_ND: Tensor, targets_N: Tensor, temperature: float, num_top: int) -> Scores:
    """Scores of tokens, each given the hidden state that it follows."""
    found = Scores()
    block = max(1, LOGIT_CELLS // model.spec.vocab_size)
    for hidden_BD, targets_B in zip(hidden_ND.split(block), targets_N.split(block), strict=True):
        logits_BV = model.logits(hidden_BD).float() / temperature
        chosen_B1 = logits_BV.gather(1, targets_B.unsqueeze(1))
        total_B1 = logits_BV.logsumexp(1, keepdim=True)
        top: list[list[tuple[int, float]]] = []
        if num_top:
            best = logits_BV.topk(min(num_top, logits_BV.shape[1]), dim=1)
            places = zip(best.indices.tolist(), (best.values - total_B1).tolist(), strict=True)
            top = [list(zip(tokens, logprobs, strict=True)) for tokens, logprobs in places]
        ranks = (logits_BV > chosen_B1).sum(1).tolist()
        found.extend(Scores((chosen_B1 - total_B1).flatten().tolist(), ranks, top))
    return found


def encode_rows(model: Any, rows: Many[Many[int]], at: Place, device: torch.device) -> Tensor | list[Tensor]:
    """Hidden vectors after the final norm: (rows, D) at the last token or averaged, or for "all" a (T, D) each."""
    if at not in PLACES:
        raise UsageError(f"at = {at!r} is no place to take hidden vectors", hint="at must be 'last', 'mean' or 'all'")
    vectors: list[Tensor] = [torch.empty(0)] * len(rows)
    for indices, tokens_BT, lengths in _grouped(rows, device):
        for i, hidden_TD, length in zip(indices, model(tokens_BT), lengths, strict=True):
            real_TD = hidden_TD[:length]
            vectors[i] = real_TD.clone() if at == "all" else real_TD[-1] if at == "last" else real_TD.mean(0)
    return vectors if at == "all" else torch.stack(vectors) if vectors else torch.empty(0, 0)


def _grouped(rows: Many[Many[int]], device: torch.device) -> Iterator[tuple[list[int], Tensor, list[int]]]:
    """Rows of similar length together, right padded: their indices, tokens_BT, lengths."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for group in groups([len(rows[i]) for i in order], GROUP_TOKENS):
        indices = order[group]
        lengths = [len(rows[i]) for i in indices]
        padded = [[*rows[i], *([0] * (max(lengths) - len(rows[i])))] for i in indices]
        yield indices, torch.tensor(padded, dtype=torch.long, device=device), lengths
