"""The reference's log-probabilities of given responses: computed once, before the first step, and kept.

A method that learns from written or ranked responses needs the reference only for those, so no second model stands in
memory while it trains and no second pass is made. They are kept in `reference.safetensors` of the section's folder,
under a key that is the hash of the reference's weights and of every row: with other weights or other data they are
computed anew, and said to be. A run that is gone on with reads the very same numbers.

What it is not: for on-policy methods, whose responses are new in every iteration.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lyceum import dist
from lyceum.batches.pack import bucket_alike, pad
from lyceum.batches.preferences import Judged
from lyceum.errors import CheckpointError
from lyceum.log import log
from lyceum.model.transformer import Decoder
from lyceum.train.preference import response_logprobs
from lyceum.train.state import SavedState, write_state

FILE = "reference.safetensors"


def with_reference(
    model: Decoder, judged: Sequence[Judged], *, micro_tokens: int, folder: Path | None = None
) -> list[Judged]:
    """The same with the log-probability of every response, and of every stranger, under `model` as it is now.

    Args:
        model: the reference; it is only run.
        micro_tokens: tokens of one pass, pads included.
        folder: where they are kept; None computes them without keeping.
    """
    rows = [row for one in judged for row in one.rows()]
    starts = [len(one.prompt) for one in judged for _ in one.rows()]
    owners = [number for number, one in enumerate(judged) for _ in one.rows()]
    key = key_of(model, rows, starts)
    logp_N = _kept(folder, key, len(rows)) if folder else None
    if logp_N is None:
        logp_N = _computed(model, rows, starts, owners, micro_tokens)
        if folder:
            write_state(folder / FILE, {"logp": logp_N}, {"key": key, "step": 0})
    values, found, first = logp_N.tolist(), [], 0
    for one in judged:
        count = len(one.rows())
        found.append(replace(one, reference=tuple(values[first : first + count])))
        first += count
    return found


def key_of(model: Decoder, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> str:
    """A hash of all weights and all rows."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    for row, start in zip(rows, starts, strict=True):
        found.update(np.asarray([start, len(row), *row], dtype=np.int64).data)
    return found.hexdigest()


def _kept(folder: Path, key: str, num_rows: int) -> Tensor | None:
    """What is kept under this key, on every rank; None if one of them cannot read it."""
    found: Tensor | None = None
    try:
        saved = SavedState(folder / FILE)
        (logp_N,) = saved.below("logp").values()
        if saved.header["key"] == key and logp_N.shape == (num_rows,):
            found = logp_N
    except (CheckpointError, KeyError, ValueError):
        pass
    if dist.sum_numbers({"found": float(found is not None)})["found"] == dist.data_size():
        log.info(f"  the reference's log-probabilities of {num_rows:,} responses: as kept")
        return found
    return None


@torch.no_grad()
def _computed(
    model: Decoder, rows: Sequence[list[int]], starts: Sequence[int], owners: Sequence[int], micro_tokens: int
) -> Tensor:
    log.info(f"  the reference's log-probabilities of {len(rows):,} responses: computed once")
    lengths = [len(row) for row in rows]
    logp_N = torch.zeros(len(rows), dtype=torch.float64)
    model.eval()
    for group in dist.share(bucket_alike(lengths, owners, max([micro_tokens, *lengths]), 0)):
        tokens_BT, lengths_B = pad([rows[i] for i in group], 0)
        starts_B, owners_B = torch.tensor([starts[i] for i in group]), torch.tensor([owners[i] for i in group])
        logp_N[group] = response_logprobs(model, tokens_BT, starts_B, lengths_B, owners_B).double().cpu()
    dist.sum_tensors(logp_N)
    return logp_N
