"""Ranks: several processes that train one model, as ``torchrun`` starts them.

One rank is the usual case and needs no process group, no torch and no network: every function here is then free. With
``torchrun --nproc-per-node 2 -m lyceum run RECIPE`` the environment says who we are, and `start` opens the group.

This is not a launcher, and it shards nothing: sums, a barrier, and who speaks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")

PATIENCE = timedelta(hours=12)  # the other ranks wait here while rank 0 reads a corpus, which can take hours


def rank() -> int:
    """This process' number, 0 for the first (and for the only one)."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """True on rank 0: the one that logs, and writes what all ranks share."""
    return rank() == 0


def start() -> None:
    """Join the process group that torchrun's environment describes; with one rank, or already joined, nothing."""
    if world_size() == 1:
        return
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=PATIENCE)


def stop() -> None:
    """Leave the process group, if there is one."""
    if world_size() == 1:
        return
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        from torch import distributed

        distributed.barrier()


def share(items: Sequence[Item]) -> list[Item]:
    """This rank's part of `items`: every world_size-th, beginning with its own number."""
    return list(items[rank() :: world_size()])


def gather(items: Sequence[Item]) -> list[Item]:
    """The items of all ranks, one rank's after the other's, on every rank."""
    if world_size() == 1:
        return list(items)
    from torch import distributed

    gathered: list[Any] = [None] * world_size()
    distributed.all_gather_object(gathered, list(items))
    return [item for one in gathered for item in one]


def sum_tensors(*tensors: torch.Tensor) -> None:
    """Add up each tensor over all ranks, in place; those of one type travel together, as one message."""
    if world_size() == 1 or not tensors:
        return
    import torch
    from torch import distributed

    by_type: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    for group in by_type.values():
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
        distributed.all_reduce(flat)
        with torch.no_grad():
            for tensor, summed in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(summed.view_as(tensor))


def sum_numbers(numbers: dict[str, float]) -> dict[str, float]:
    """Add up each number over all ranks, in float64; every rank must bring the same names."""
    if world_size() == 1 or not numbers:
        return dict(numbers)
    import torch

    names = sorted(numbers)
    values = torch.tensor([float(numbers[name]) for name in names], dtype=torch.float64)
    sum_tensors(values)
    summed = dict(zip(names, values.tolist(), strict=True))
    return {name: summed[name] for name in numbers}
