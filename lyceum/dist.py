"""Ranks: several processes that train one model, as ``torchrun`` starts them.

One rank is the usual case and needs no process group, no torch and no network: every function here is then free. With
``torchrun --nproc-per-node 2 -m lyceum run RECIPE`` the environment says who we are, and `start` opens the group.

While a section trains, `teams` may lay the ranks out as a grid: the ranks of a row (`tensor` neighbours) hold one copy of
the model between them and read the same data; `share`, `gather` and the sums go down a column, over the copies.

This is not a launcher, and it shards nothing: sums, a barrier, and who speaks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")

PATIENCE = timedelta(hours=12)  # the other ranks wait here while rank 0 reads a corpus, which can take hours

_tensor = 1  # ranks that hold one copy of the model between them
_column: Any = None  # the process group of this rank's column of the grid; None = all ranks
_row: Any = None  # that of its row


def rank() -> int:
    """This process' number, 0 for the first (and for the only one)."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def data_rank() -> int:
    """Which of the copies of the model this process holds, or holds a part of."""
    return rank() // _tensor


def data_size() -> int:
    """How many copies of the model read data of their own."""
    return world_size() // _tensor


def is_main() -> bool:
    """True on rank 0: the one that logs, and writes what all ranks share."""
    return rank() == 0


def start() -> None:
    """Join the process group that torchrun's environment describes; with one rank, or already joined, nothing."""
    if world_size() == 1:
        return
    from torch import distributed

    if not distributed.is_initialized():
        import torch

        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=PATIENCE)


@contextmanager
def teams(tensor: int, patience_s: float, device_type: str) -> Iterator[Any]:
    """Inside, ranks are laid out in rows of `tensor`, and none waits longer than `patience_s` for another's numbers.

    Yields:
        The grid as a DeviceMesh with the dimensions "data" and "tensor"; None with one rank.
    """
    global _tensor, _column, _row
    if world_size() == 1:
        yield None
        return
    import torch
    from torch import distributed
    from torch.distributed.device_mesh import DeviceMesh

    start()
    grid = torch.arange(world_size()).view(-1, tensor)
    patience = timedelta(seconds=patience_s)
    columns, _ = distributed.new_subgroups_by_enumeration(grid.T.tolist(), timeout=patience)
    rows, _ = distributed.new_subgroups_by_enumeration(grid.tolist(), timeout=patience)
    names = ("data", "tensor")
    _tensor, _column, _row = tensor, columns, rows
    try:
        yield DeviceMesh.from_group([columns, rows], device_type, mesh=grid, mesh_dim_names=names)
    finally:
        _tensor, _column, _row = 1, None, None


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
    """This rank's part of `items`: every data_size-th, beginning with its own number."""
    return list(items[data_rank() :: data_size()])


def gather(items: Sequence[Item]) -> list[Item]:
    """The items of all ranks, one rank's after the other's, on every rank."""
    if world_size() == 1:
        return list(items)
    from torch import distributed

    gathered: list[Any] = [None] * data_size()
    distributed.all_gather_object(gathered, list(items), group=_column)
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
        distributed.all_reduce(flat, group=_column)
        with torch.no_grad():
            for tensor, summed in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(summed.view_as(tensor))


def sum_row(tensors: Sequence[torch.Tensor]) -> None:
    """Add up each tensor over the ranks that hold one copy of the model between them, in place."""
    from torch import distributed

    for tensor in tensors:
        distributed.all_reduce(tensor, group=_row)


def sum_everywhere(number: float) -> float:
    """Add up a number over the whole grid, in float64."""
    if world_size() == 1:
        return number
    import torch
    from torch import distributed

    total = torch.tensor([number], dtype=torch.float64)
    for group in (_column, _row):
        distributed.all_reduce(total, group=group)
    return total.item()


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


def sum_pairs(pairs: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    """Add up totals and counts over all ranks, which may know different names; sorted by name."""
    names = sorted(set(gather(sorted(pairs))))
    both = sum_numbers({f"{i}{name}": pairs.get(name, (0.0, 0.0))[i] for name in names for i in (0, 1)})
    return {name: (both[f"0{name}"], both[f"1{name}"]) for name in names}
