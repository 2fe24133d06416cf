"""What a killed run needs to go on: each rank writes what it alone holds, and all of it replaces the older state or nothing does.

    state.safetensors           rank 0's tensors; in the header the JSON that all ranks share, and the other files' names
    state-200-3.safetensors     those of rank 3 after step 200, where the model is sharded

Weights, optimizer and running average of a sharded model are cut; a file's header says where in the whole each piece of
its tensors begins. So any number of ranks, cut in any way, read a state: each takes what overlaps with its own pieces,
and none ever holds more than these. state.safetensors is renamed into place last, when all others are on the disk: until
then the older one stands, with the files it names.

What is in a state is the loop's affair (`lyceum.train.loop`). What it is not: a checkpoint for others to open; nor
PyTorch's distributed checkpoint, whose index is a pickle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lyceum import dist
from lyceum.errors import CheckpointError
from lyceum.run import PARTIAL, disk_errors
from lyceum.train.parallel import is_first_copy, is_piece, local, place

STATE = "state.safetensors"


def write_state(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Replaces the state at `path` whole or not at all; every rank must call it, and rank 0's header counts.

    Args:
        tensors: this rank's, a piece of each that is sharded; of what all ranks hold alike one writes.
        header: plain values; its `step` stands in the names of the files.

    Raises:
        ResourceError: the disk is full.
    """
    is_sharded = any(map(is_piece, tensors.values()))
    parts = [f"{path.stem}-{header['step']}-{rank}{path.suffix}" for rank in range(dist.world_size())][1:]
    file = path if dist.is_main() else path.with_name(parts[dist.rank() - 1])
    partial = file.with_name(file.name + PARTIAL)
    with disk_errors(file):
        path.parent.mkdir(parents=True, exist_ok=True)
        if dist.is_main() or is_sharded:
            mine = {name: tensor for name, tensor in tensors.items() if is_first_copy(tensor)}
            pieces = {name: _said(tensor) for name, tensor in mine.items() if is_piece(tensor)}
            said: dict[str, Any] = {"pieces": pieces}
            if dist.is_main():
                said |= {**header, "parts": parts if is_sharded else []}
            safetensors.torch.save_file(_on_the_cpu(mine), partial, metadata={"lyceum": json.dumps(said)})
            with open(partial, "rb") as written:
                os.fsync(written.fileno())
            if not dist.is_main():
                os.replace(partial, file)
        dist.barrier()
        if dist.is_main():
            os.replace(partial, file)
            for old in path.parent.glob(f"{path.stem}-*"):
                if old.name not in said["parts"]:
                    old.unlink(missing_ok=True)


def _on_the_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's pieces, copied only where the format asks for it: it allows no two tensors in one storage."""
    held: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        piece = local(tensor).detach().to("cpu").contiguous()
        storage = piece.untyped_storage().data_ptr()
        held[name] = piece.clone() if storage in storages else piece
        storages.add(storage)
    return held


def _said(tensor: Tensor) -> dict[str, list[int]]:
    return {"start": [start for start, _ in place(tensor)], "shape": list(tensor.shape)}


class SavedState:
    """A state on the disk: its header, and its tensors, of which a reader takes what it needs.

    Raises:
        CheckpointError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pieces: dict[str, list[tuple[Any, list[int], list[int]]]] = {}  # name -> (file, start, whole's shape)
        self.header = self._open(path)
        for part in self.header.get("parts", ()):
            self._open(path.with_name(part))

    def _open(self, path: Path) -> dict[str, Any]:
        with self._readable(path):
            file = safe_open(path, framework="pt")
            header = json.loads(file.metadata()["lyceum"])
            for name in file.keys():
                cut = header.get("pieces", {}).get(name)
                shape = cut["shape"] if cut else file.get_slice(name).get_shape()
                self._pieces.setdefault(name, []).append((file, cut["start"] if cut else [0] * len(shape), shape))
        return header

    @contextmanager
    def _readable(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            hint = f"remove {self.path} to train from the start"
            raise CheckpointError(f"{path} cannot be read: {error}", hint=hint) from error

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, without it; of those that were not cut."""
        with self._readable(self.path):
            names = [name for name in self._pieces if name.startswith(prefix)]
            return {name.removeprefix(prefix): self._pieces[name][0][0].get_tensor(name) for name in names}

    @torch.no_grad()
    def copy_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fills this rank's tensors, of sharded ones its pieces, from whatever pieces were saved.

        Raises:
            CheckpointError: a tensor, or a part of one, is not there, or is of another shape.
        """
        with self._readable(self.path):
            for name, tensor in tensors.items():
                missing = local(tensor).numel()
                for file, start, shape in self._pieces.get(name, ()):
                    if list(tensor.shape) != shape:
                        raise ValueError(f"{name} is {shape}, the model's {list(tensor.shape)}")
                    missing -= _copy_overlap(file, name, start, tensor)
                if missing:
                    raise ValueError(f"it lacks {missing} numbers of {name}")


def _copy_overlap(file: Any, name: str, start: list[int], tensor: Tensor) -> int:
    """Copies what a file's piece that begins at `start` and this rank's piece of `tensor` share; how many numbers."""
    saved, spans = file.get_slice(name), place(tensor)
    pairs = list(zip(start, saved.get_shape(), spans, strict=True))
    low = [max(a, b) for a, _, (b, _) in pairs]
    high = [min(a + n, b + m) for a, n, (b, m) in pairs]
    if any(first >= last for first, last in zip(low, high, strict=True)):
        return 0
    from_file = tuple(slice(first - a, last - a) for first, last, a in zip(low, high, start, strict=True))
    part = saved[from_file] if from_file else file.get_tensor(name)
    into = tuple(slice(first - b, last - b) for first, last, (b, _) in zip(low, high, spans, strict=True))
    local(tensor)[into].copy_(part)
    return part.numel()


def environment() -> dict[str, Any]:
    """What the last bits of a sum depend on."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__, "ranks": dist.world_size()}


def random_states() -> Tensor:
    """The state of torch's generator beside every copy of the model, one a row, on every rank."""
    own = torch.get_rng_state()
    rows = torch.zeros(dist.data_size(), len(own), dtype=torch.int32)
    rows[dist.data_rank()] = own.to(torch.int32)
    dist.sum_tensors(rows)
    return rows.to(torch.uint8)
