"""What the stages that fine-tune one policy share: its weights or low-rank adapters, chosen at the start and saved merged.

What adapters are says `lyceum.model.lora`. What it is not: a stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lyceum.log import log
from lyceum.model.checkpoint import save_checkpoint
from lyceum.model.lora import LoraLinear, adapt, merged_tensors, save_adapters
from lyceum.model.transformer import Decoder
from lyceum.train.parallel import gathered
from lyceum.train.stage import TrainConfig, Trained

if TYPE_CHECKING:
    from lyceum.train.stage import Stage

ADAPTER = "adapter"  # folder of the adapters alone


def trained_policy(model: Decoder, config: TrainConfig, rank: int, alpha: float) -> Trained:
    """What of `model` is trained: its weights or, with a rank above 0, adapters that are put on it."""
    if not rank:
        return Trained(model, config.optimizer(), config.clip_norm)
    adapt(model, rank, alpha)
    num_trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    log.info(f"  adapters of rank {rank}: {num_trained:,} numbers are trained")
    # AdamW, as in Hu et al.: with Muon they were never tried here
    return Trained(model, config.optimizer(matrix_lr=0.0), config.clip_norm)


def save_policy(
    stage: Stage[Any], folder: Path, name: str, *, adapters: bool = True, info: Mapping[str, Any] | None = None
) -> None:
    """Writes what is saved as "checkpoint" as folder/name; where it has adapters, merged, and them alone beside it.

    Every rank of a sharded model must call it; rank 0 writes.

    Args:
        adapters: False leaves the adapters' own folder as it is.
        info: for lyceum.json; None takes the stage's.
    """
    kept = next(trained for trained in stage.trained.values() if trained.save_as == "checkpoint")
    model = cast(Decoder, kept.module)
    adapter = next((module for module in model.modules() if isinstance(module, LoraLinear)), None)
    if adapter is not None and adapters:
        save_adapters(folder / ADAPTER, model, stage.parent or "", gather=gathered)
    merge = None if adapter is None else partial(merged_tensors, scale=adapter.alpha / adapter.rank)
    told = stage.info() if info is None else info
    save_checkpoint(folder / name, model, stage.tokenizer, told, gather=gathered, change=merge)
