"""Pieces of a micro-batch side by side on a CPU, each on a thread of its own.

Why: in a model of a few million parameters one operator is too short to be worth cutting over cores, and whatever stands
between two operators runs on one. So every worker takes a part of the rows through the whole forward and backward pass
with its share of torch's threads (`lyceum.device.side_by_side`). `bench/demo_speed.py` measures what it brings.

The numbers depend on how many workers there are, as they do on the number of threads, and on nothing else: each adds up
its pieces in their order, and the workers' sums are added in theirs, whichever of them ends first.

What it is not: for a GPU, where one stream of large operators is what is wanted, nor for a sharded model, whose ranks are
the workers. A stage whose micro-batches cannot be halved stays on one thread of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lyceum import device
from lyceum.train.optim import Learner

Sums = dict[str, list[float]]  # name -> [total, count]

MIN_TOKENS = 1024  # of a worker's piece: below this, products of matrices no longer fill even one core


def num_workers(micro_tokens: int) -> int:
    """How many pieces a micro-batch of `micro_tokens` tokens is cut into on a CPU: a power of two."""
    count = 1
    while 2 * count <= min(torch.get_num_threads(), micro_tokens // MIN_TOKENS):
        count *= 2
    return count


def deal(micro_batches: Sequence[Any], halves: Callable[[Any], list[Any]], count: int) -> list[list[Any]]:
    """The micro-batches, cut, as one pile for each of `count` workers; all in one pile where `halves` cuts none of them.

    One that is not cut goes whole to whose turn it is.
    """
    parts: list[Any] = []
    for micro_batch in micro_batches:
        pieces = [micro_batch]
        for _ in range(count.bit_length() - 1):
            pieces = [half for piece in pieces for half in halves(piece)]
        parts += pieces
    if len(parts) < max(count, len(micro_batches) + 1):
        return [list(micro_batches)]
    return [parts[number::count] for number in range(count)]


def backward(
    piles: Sequence[Sequence[Any]],
    losses: Callable[[Any, Sums], dict[str, Tensor]],
    sums: Sums,
    learners: Sequence[Learner],
    into: dict[str, list[Tensor]],
) -> None:
    """Add the gradients of every piece's losses to `into`, and what the pieces sum up to `sums`.

    Args:
        losses: (piece, its worker's sums) -> name -> a differentiable number; called by several threads.
        into: name of a loss -> one flat gradient for each learner.
    """
    found: list[Sums] = [{} for _ in piles]
    parameters = [parameter for learner in learners for parameter in learner.parameters]

    def go(number: int) -> dict[str, list[Tensor]]:
        own = (
            into if number == 0 else {name: [torch.zeros_like(flat) for flat in flats] for name, flats in into.items()}
        )
        views = {
            name: [v for one, flat in zip(learners, own[name], strict=True) for v in one.views(flat)] for name in own
        }
        for piece in piles[number]:
            its = losses(piece, found[number])
            for left, (name, loss) in zip(reversed(range(len(its))), its.items(), strict=True):
                grads = torch.autograd.grad(loss, parameters, retain_graph=left > 0, allow_unused=True)
                used = [(view, grad) for view, grad in zip(views[name], grads, strict=True) if grad is not None]
                torch._foreach_add_([view for view, _ in used], [grad for _, grad in used])
        return own

    for others in device.side_by_side(go, len(piles))[1:]:
        for name, flats in others.items():
            torch._foreach_add_(into[name], flats)
    merge(sums, *found)


def add(sums: Sums, name: str, total: Tensor | float, count: float) -> None:
    """Add to one name's total and count."""
    pair = sums.setdefault(name, [0.0, 0.0])
    pair[0] += float(total.detach()) if isinstance(total, Tensor) else float(total)
    pair[1] += float(count)


def merge(sums: Sums, *others: Sums) -> None:
    """Add all of the others to `sums`, in their order."""
    for other in others:
        for name, (total, count) in other.items():
            add(sums, name, total, count)
