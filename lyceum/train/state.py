"""What a killed run needs to go on, as one safetensors file: read, and replaced whole or not at all.

The tensors are weights, optimizer, running average and torch's random numbers; the rest is JSON in the file's header. What
is in them is the loop's affair (`lyceum.train.loop`). What it is not: a checkpoint for others to open.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lyceum import dist
from lyceum.errors import CheckpointError
from lyceum.run import disk_errors

STATE = "state.safetensors"


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a saved state; CheckpointError when it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["lyceum"])
            return {name: file.get_tensor(name) for name in file.keys()}, header
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        hint = "remove this file to train from the start"
        raise CheckpointError(f"{path} cannot be read: {error}", hint=hint) from error


def write_state(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Replaces the state at `path` whole or not at all; ResourceError when the disk is full."""
    partial = path.with_name(path.name + ".partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # clone: fused optimizers and tied views may share storage, which the format does not allow
        held = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(held, partial, metadata={"lyceum": json.dumps(header)})
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)


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
