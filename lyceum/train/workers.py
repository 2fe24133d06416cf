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
    piles: Sequence[Sequence[Any]], loss: Callable[[Any, Sums], Tensor], sums: Sums, learners: list[Learner]
) -> None:
    """Add the gradient of every piece's `loss` to its learners' `gradient`, and what the pieces sum up to `sums`.

    Args:
        loss: (piece, its worker's sums) -> a differentiable number; called by several threads.
    """
    found: list[Sums] = [{} for _ in piles]
    parameters = [parameter for learner in learners for parameter in learner.parameters]

    def go(number: int) -> list[Tensor]:
        flats = [learner.gradient if number == 0 else torch.zeros_like(learner.gradient) for learner in learners]
        views = [view for learner, flat in zip(learners, flats, strict=True) for view in learner.views(flat)]
        for piece in piles[number]:
            grads = torch.autograd.grad(loss(piece, found[number]), parameters, allow_unused=True)
            used = [(view, grad) for view, grad in zip(views, grads, strict=True) if grad is not None]
            torch._foreach_add_([view for view, _ in used], [grad for _, grad in used])
        return flats

    for flats in device.side_by_side(go, len(piles))[1:]:
        torch._foreach_add_([learner.gradient for learner in learners], flats)
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
