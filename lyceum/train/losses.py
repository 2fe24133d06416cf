"""Next-token cross-entropy, computed in chunks and only where a target has weight.

Why: at a vocabulary of a few thousand pieces the logits are the largest tensor of a step, and in fine-tuning most
tokens are prompt, whose logits nobody needs. So the model is asked only for the hidden states that predict a target,
logits are made a chunk at a time, and the gradient is computed in the forward pass, while a chunk's softmax is still in
the cache; no chunk is kept. Under autocast the products are in the lower precision; the softmax and all sums are not.

Run by: pretraining, fine-tuning and PPO's pretraining mix, through `next_token_loss`.

What it is not: log-probabilities with a gradient per token (those are in `lyceum.train.policy`); it is not
differentiable twice.

Shapes: B batch, T time, D width, V vocabulary, N positions with weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lyceum import dist
from lyceum.train.stage import Metrics

if TYPE_CHECKING:
    from lyceum.batches.pack import TokenBatch

# One chunk of logits on a CPU is about 2 MB in fp32: larger ones leave the cache, smaller ones starve the matrix product.
# A GPU has no such cache; there 256 MB are enough to fill it and little beside its memory.
_CHUNK_LOGITS = {"cpu": 1 << 19, "cuda": 1 << 26}
_MIN_CHUNK_ROWS = 128
MOST_KEPT = 4096  # positions whose softmax is kept where tokens have a gradient each


def chunk_rows(num_rows: int, vocab_size: int, device_type: str = "cpu") -> int:
    """Rows of logits that exist at once, of `num_rows`."""
    return min(max(num_rows, 1), max(_MIN_CHUNK_ROWS, _CHUNK_LOGITS[device_type] // vocab_size))


def _product_type(tensor: Tensor) -> torch.dtype:
    """The type of matrix products of `tensor`: lower than its own under autocast."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, where `out` may be of a higher precision."""
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else out.copy_(torch.mm(a, b))


def _add_gradients(
    dlogits_CV: Tensor, low_CD: Tensor, low_VD: Tensor, grad_CD: Tensor | None, grad_head_VD: Tensor | None
) -> None:
    """From the gradient of a chunk's logits: write that of its hidden states, add to that of the head."""
    low_CV = dlogits_CV.to(low_CD.dtype)
    if grad_CD is not None:
        _multiply(low_CV, low_VD, out=grad_CD)
    if grad_head_VD is not None:
        product = (low_CV.t(), low_CD)
        if low_CV.dtype == grad_head_VD.dtype:
            grad_head_VD.addmm_(*product)
        else:
            grad_head_VD.add_(torch.mm(*product))


class _CrossEntropySum(torch.autograd.Function):
    """(hidden_ND, head_VD, targets_N, weights_N) -> (sum of weight * -log p(target), number of argmax hits)."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        num_rows, vocab_size = len(hidden_ND), len(head_VD)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_head_VD = torch.zeros_like(head_VD) if needs_head else None
        total = torch.zeros((), dtype=hidden_ND.dtype, device=hidden_ND.device)
        hits = torch.zeros((), dtype=torch.long, device=hidden_ND.device)
        size, low = chunk_rows(num_rows, vocab_size, hidden_ND.device.type), _product_type(hidden_ND)
        low_ND, low_VD = hidden_ND.to(low), head_VD.to(low)
        buffer = hidden_ND.new_empty(size, vocab_size)
        for start in range(0, num_rows, size):
            rows = slice(start, min(start + size, num_rows))
            targets_C1, weights_C1 = targets_N[rows, None], weights_N[rows, None]
            logp_CV = _multiply(low_ND[rows], low_VD.t(), out=buffer[: len(targets_C1)])
            torch.log_softmax(logp_CV, 1, out=logp_CV)
            chosen_C1 = logp_CV.gather(1, targets_C1)
            total -= (chosen_C1 * weights_C1).sum()
            hits += (chosen_C1 == logp_CV.amax(1, keepdim=True)).sum()
            if not (needs_hidden or needs_head):
                continue
            # d loss / d logits = weight * (softmax - onehot)
            dlogits_CV = logp_CV.exp_().scatter_add_(1, targets_C1, torch.full_like(chosen_C1, -1.0)).mul_(weights_C1)
            _add_gradients(dlogits_CV, low_ND[rows], low_VD, _part(grad_hidden_ND, rows), grad_head_VD)
        ctx.save_for_backward(grad_hidden_ND, grad_head_VD)
        ctx.mark_non_differentiable(hits)
        return total, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # Out of place: a logging step goes through here once per term with the same saved tensors.
        grads = [None if grad is None else grad * grad_total for grad in ctx.saved_tensors]
        return grads[0], grads[1], None, None


def cross_entropy_sum(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted sum of cross-entropies in nats, without ever holding all logits.

    Args:
        hidden_ND: final hidden states of the positions that predict.
        head_VD: output embedding (the tied input embedding, or lm_head.weight).
        targets_N: the token each position should predict.
        weights_N: loss weight of each target; no gradient flows to it.

    Returns:
        (sum of weight * -log p(target), differentiable; number of targets that were the most likely token).
    """
    total, hits = _CrossEntropySum.apply(hidden_ND, head_VD, targets_N, weights_N)
    return total, hits


class _ChosenLogprobs(torch.autograd.Function):
    """(hidden_ND, head_VD, chosen_N, temperature, with_entropy, most_kept) -> (log p(chosen)_N, entropy_N)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        chosen_N: Tensor,
        temperature: float,
        with_entropy: bool,
        most_kept: int,
    ) -> tuple[Tensor, Tensor]:
        num_rows, low = len(hidden_ND), _product_type(hidden_ND)
        keeps = any(ctx.needs_input_grad[:2]) and num_rows <= most_kept
        ctx.low, ctx.temperature = low, temperature
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        size = chunk_rows(num_rows, len(head_VD), hidden_ND.device.type)
        p_NV = hidden_ND.new_empty(num_rows if keeps else 0, len(head_VD), dtype=wide)
        logp_buffer, p_buffer = (hidden_ND.new_empty(size, len(head_VD), dtype=wide) for _ in range(2))
        logp_N, entropy_N = (hidden_ND.new_zeros(num_rows, dtype=wide) for _ in range(2))
        low_ND, low_VD = hidden_ND.to(low), head_VD.to(low)
        for start in range(0, num_rows, size):
            rows = slice(start, min(start + size, num_rows))
            logp_CV = logp_buffer[: rows.stop - start]
            _log_softmax(low_ND[rows], low_VD, temperature, out=logp_CV)
            logp_N[rows] = logp_CV.gather(1, chosen_N[rows, None]).squeeze(1)
            if keeps or with_entropy:
                p_CV = torch.exp(logp_CV, out=p_NV[rows] if keeps else p_buffer[: len(logp_CV)])
                if with_entropy:
                    entropy_N[rows] = logp_CV.mul_(p_CV).sum(1).neg_().clamp_(min=0.0)
        ctx.save_for_backward(hidden_ND, head_VD, chosen_N, p_NV if keeps else None)
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, head_VD, chosen_N, p_NV = ctx.saved_tensors
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_head_VD = torch.zeros_like(head_VD) if needs_head else None
        num_rows, low = len(hidden_ND), ctx.low
        size = chunk_rows(num_rows, len(head_VD), hidden_ND.device.type)
        buffer = grad_N.new_empty(size, len(head_VD))
        low_ND, low_VD = hidden_ND.to(low), head_VD.to(low)
        for start in range(0, num_rows, size):
            rows = slice(start, min(start + size, num_rows))
            d_CV = buffer[: rows.stop - start]
            p_CV = p_NV[rows] if p_NV is not None else _log_softmax(low_ND[rows], low_VD, ctx.temperature, d_CV).exp_()
            # d log p(chosen) / d logits = (onehot - softmax) / temperature; out of place, as a step that logs its terms
            # goes through here once for each with the same saved tensors
            grad_C1 = grad_N[rows, None] / ctx.temperature
            torch.mul(p_CV, -grad_C1, out=d_CV).scatter_add_(1, chosen_N[rows, None], grad_C1)
            _add_gradients(d_CV, low_ND[rows], low_VD, _part(grad_hidden_ND, rows), grad_head_VD)
        return grad_hidden_ND, grad_head_VD, None, None, None, None


def _log_softmax(hidden_CD: Tensor, head_VD: Tensor, temperature: float, out: Tensor) -> Tensor:
    """log softmax(hidden head^T / temperature) of a chunk, in `out`."""
    _multiply(hidden_CD, head_VD.t(), out=out)
    if temperature != 1.0:
        out.div_(temperature)
    return torch.log_softmax(out, 1, out=out)


def _part(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def token_logprobs(
    hidden_ND: Tensor,
    head_VD: Tensor,
    chosen_N: Tensor,
    temperature: float = 1.0,
    *,
    with_entropy: bool = False,
    most_kept: int = MOST_KEPT,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each chosen token under softmax(logits / temperature), with a gradient for each.

    The softmax is in at least float32, and all sums are. It is kept for the way back where it has at most `most_kept`
    rows, otherwise computed again there, a chunk at a time.

    Args:
        hidden_ND: final hidden states of the positions that predict.
        head_VD: output embedding.
        chosen_N: ids.
        temperature: the sampling temperature, > 0; it must be the sampler's, or ratios are biased.
        with_entropy: also return the entropy in nats at each position (without gradient, never negative).

    Returns:
        logp_N and entropy_N (0 unless asked for).
    """
    assert temperature > 0, "a log-probability needs a temperature above 0"
    return _ChosenLogprobs.apply(hidden_ND, head_VD, chosen_N, temperature, with_entropy, most_kept)


def next_token_loss(
    model: Any, tokens_BT: Tensor, weights_BT: Tensor, noise_BTD: Tensor | None = None
) -> tuple[Tensor, float, Metrics]:
    """Cross-entropy of every weighted token given its prefix.

    Args:
        model: a Decoder: `model(tokens_BT) -> hidden_BTD`, with `at_N` hidden_ND, and `model.output_weight`, (V, D).
        tokens_BT: right-padded rows of ids.
        weights_BT: weights_BT[b, t] is the loss weight of token t as target; column 0 is ignored (it has no prefix).
        noise_BTD: added to the tokens' embeddings, where there is any.

    Returns:
        (weighted sum in nats, differentiable; sum of the weights; metrics: token_accuracy as (hits, targets)).
    """
    device = model.output_weight.device
    tokens_BT, weights_BT = tokens_BT.to(device), weights_BT.to(device)
    noise = {} if noise_BTD is None else {"noise_BTD": noise_BTD[:, :-1].to(device)}
    targets_N, weights_N = tokens_BT[:, 1:].flatten(), weights_BT[:, 1:].flatten()
    kept_N = weights_N.nonzero().squeeze(1)
    if len(kept_N) < len(weights_N):
        hidden_ND = model(tokens_BT[:, :-1], at_N=kept_N, **noise)
        targets_N, weights_N = targets_N[kept_N], weights_N[kept_N]
    else:
        hidden_ND = model(tokens_BT[:, :-1], **noise).flatten(0, 1)
    head_VD: Tensor = model.output_weight  # after the pass, which gathers it where the model is sharded
    weights_N = weights_N.to(hidden_ND.dtype)
    total, hits = cross_entropy_sum(hidden_ND, head_VD, targets_N, weights_N)
    return total, float(weights_N.sum()), {"token_accuracy": (hits.to(total.dtype), float(len(kept_N)))}


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[TokenBatch]) -> dict[str, float]:
    """Loss and accuracy over all batches and ranks; each rank takes its share of the batches.

    Returns:
        loss: nats per unit of weight; accuracy: share of the targets that were the most likely token; targets: sum of
        the weights. Empty if no batch has a target.
    """
    sums = {"total": 0.0, "weight": 0.0, "hits": 0.0, "targets": 0.0}
    own = dist.share(batches)
    for batch in own:
        total, weight, metrics = next_token_loss(model, batch.tokens_BT, batch.weights_BT)
        hits, targets = metrics["token_accuracy"]
        for name, value in zip(sums, (total, weight, hits, targets), strict=True):
            sums[name] += float(value)
    if len(own) * dist.data_size() < len(batches):  # another rank reads one more, and a sharded model's pass needs all
        next_token_loss(model, batches[0].tokens_BT, batches[0].weights_BT)
    sums = dist.sum_numbers(sums)
    if not sums["targets"]:
        return {}
    return {
        "loss": sums["total"] / sums["weight"],
        "accuracy": sums["hits"] / sums["targets"],
        "targets": sums["weight"],
    }
