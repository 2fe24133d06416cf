"""How training is laid out on the machine: the recipe's `[machine]` table, read without torch.

    [machine]
    shard = true             # weights, gradients and optimizer state cut over the ranks (FSDP2)
    tensor = 8               # and each layer's matrices over 8 neighbouring ranks (tensor parallel)
    recompute = true         # activation checkpointing
    precision = "bf16"       # of products; weights, sums and the optimizer stay in fp32 (mixed precision)
    compile = "yes"          # a layer's operators fused by torch.compile

It is part of no section's key. What it means is done by `lyceum.train.parallel`.
"""

from __future__ import annotations

from dataclasses import dataclass

from lyceum import dist
from lyceum.config import Recipe, build, setting
from lyceum.errors import ConfigError


@dataclass(frozen=True)
class MachineConfig:
    """The `[machine]` table of a recipe."""

    shard: bool = setting(False, "cut weights, gradients and optimizer state over the ranks (FSDP2)")
    tensor: int = setting(1, "neighbouring ranks that share each layer's matrices; above 1 also shards", low=1)
    recompute: bool = setting(False, "keep only the input of each layer, and compute the layer again going back")
    precision: str = setting(
        "auto", "of products: bf16, fp32, or auto: bf16 on a GPU that has it", choices=("auto", "bf16", "fp32")
    )
    compile: str = setting(
        "auto", "torch.compile of pretraining's layers: auto where it is long enough", choices=("auto", "yes", "no")
    )
    timeout_s: float = setting(1800.0, "seconds that a rank waits for the others within a step", low=1.0)

    @property
    def is_sharded(self) -> bool:
        """Whether there is more than one rank to cut the model over, and the recipe asks for it."""
        return dist.world_size() > 1 and (self.shard or self.tensor > 1)


def machine_config(recipe: Recipe) -> MachineConfig:
    """The recipe's `[machine]` table.

    Raises:
        ConfigError: a wrong setting, or ranks that are no multiple of `tensor`.
    """
    where = f"[machine] in {recipe.path}"
    config = build(MachineConfig, recipe.machine, where)
    if dist.world_size() % config.tensor:
        raise ConfigError(
            f"{where}: tensor is {config.tensor}, and the {dist.world_size()} ranks are no multiple of it",
            hint="start with torchrun --nproc-per-node a multiple of tensor, or lower tensor",
        )
    return config
