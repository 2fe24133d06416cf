"""Low-rank adapters: train a few new numbers beside the frozen weights, then add them in.

The paper: E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1. Symbols and names:

    W0 x + (alpha / r) B A x     LoraLinear: weight, lora_B, lora_A, scale; r is the rank
    A random, B = 0              the adapted model begins as the model it was

Deviations, each with its reason:
- A is drawn uniformly, by He's rule with a = sqrt(5), not from a normal distribution: that is what the authors' code and
  PEFT do, so that a learning rate means the same here.
- All linear layers inside layers are adapted, not only queries and values: it learns more at the same number of weights
  (Dettmers et al. 2023, section 4).

Why: fine-tuning then needs gradients and optimizer state for about a hundredth of the weights. The base weights keep
their names and stay frozen; only lora_A and lora_B ask for a gradient, so an optimizer sees nothing else.

    adapt(model, rank=8, alpha=16.0); ...train...; save_adapters("adapter", model); merge(model)

Run it: `lora_rank` in [sft]. A saved folder is PEFT's: `PeftModel.from_pretrained(base, folder)` opens one that was made
for a Llama, Qwen2 or Qwen3. GPT-2's has our names too, which only we read, since transformers keeps its q, k and v in one.
What it is not: adapters of embeddings, dropout, DoRA, quantised bases.

Shapes: r rank, N inputs, M outputs of a linear layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import skip_init

from lyceum import dist
from lyceum.errors import CheckpointError, ConfigError
from lyceum.model.hub import COPY_AGAIN, read_json, read_weights
from lyceum.model.transformer import Decoder
from lyceum.run import fresh_folder, write_json

PREFIX = "base_model.model."  # what PEFT puts before the names of the base model
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REFUSED: dict[
    str, tuple[Any, ...]
] = {  # what an adapter_config.json may ask for beyond the equation above -> what means that it does not
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "lora_bias": (False, None),
    "init_lora_weights": (True, False, None, "gaussian"),  # others (pissa, olora) change the base
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "fan_in_fan_out": (False, None),
}


class LoraLinear(nn.Linear):
    """A frozen linear layer with an adapter: W x + b + scale * B A x.

    Takes over the weight and the bias of `linear`. Being no bare nn.Linear, it is left alone by the hand-written forms
    that read a weight directly (`lyceum.model.layers.is_fast`).
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        like = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.lora_A = skip_init(nn.Linear, self.in_features, rank, bias=False, **like)
        self.lora_B = skip_init(nn.Linear, rank, self.out_features, bias=False, **like)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias) + self.lora_B(self.lora_A(input)) * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A bare linear layer that does the same; nothing is shared with this one but the bias."""
        return self._bare(nn.Parameter(_sum(self.weight, self.lora_A.weight, self.lora_B.weight, self.scale)))

    def without_adapter(self) -> nn.Linear:
        """The linear layer as it was before it was adapted: its very weight and bias."""
        return self._bare(self.weight)

    def _bare(self, weight: Tensor) -> nn.Linear:
        bare = skip_init(nn.Linear, self.in_features, self.out_features, bias=False, device="meta")
        assert isinstance(weight, nn.Parameter)
        bare.weight, bare.bias = weight, self.bias
        return bare


def adapt(
    model: nn.Module,
    rank: int,
    alpha: float,
    targets: Collection[str] = (),
    generator: torch.Generator | None = None,
) -> None:
    """Freeze `model` and give its linear layers adapters, in place; every parameter that asks for a gradient is one.

    Args:
        targets: names of layers, or the last parts of their names ("q_proj"); none given means all inside layers.
        generator: draws A (default: torch's global one).

    Raises:
        ConfigError: a rank below 1, a target that is not there, or adapters that are there already.
    """
    if rank < 1 or not alpha > 0:
        raise ConfigError(f"adapters of rank {rank} and alpha {alpha}", hint="rank is 1 or more, alpha above zero.")
    if _adapted(model):
        raise ConfigError("the model has adapters already", hint="merge them first: lyceum.model.lora.merge")
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    chosen = {name for name in linears if "layers" in name.split(".")} if not targets else set()
    for target in targets:
        fitting = {name for name in linears if name == target or name.endswith(f".{target}")}
        if not fitting:
            known = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise ConfigError(f"there is no linear layer {target} to adapt", hint=f"known: {', '.join(known)}.")
        chosen |= fitting
    model.requires_grad_(False)
    for name in sorted(chosen):
        model.set_submodule(name, LoraLinear(linears[name], rank, alpha, generator))


def merge(model: nn.Module) -> None:
    """Add the adapters of `model` to its weights, in place: bare linear layers again, everything trainable."""
    for name, module in _adapted(model).items():
        model.set_submodule(name, module.merged())
    model.requires_grad_(True)


@torch.no_grad()
def merged_tensors(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """What `merge` makes of an adapted model's tensors, or of those of some layers, by their names; the rest is shared."""
    found = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            found[f"{layer}.weight"] = _sum(tensors[f"{layer}.weight"], a, tensors[f"{layer}.lora_B.weight"], scale)
    return found


def _sum(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return weight + scale * (b @ a)


def save_adapters(
    folder: Path | str, model: Decoder, base: str = "", *, gather: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Write the adapters alone, in PEFT's format, replacing `folder` in one step; rank 0 does.

    `base` is the name or folder of the model they were trained beside. `gather` puts one tensor of a sharded model
    together on rank 0: then every rank must call this. Raises ResourceError when the disk is full.
    """
    adapted = _adapted(model)
    assert adapted, "a model without adapters has none to save"
    first = next(iter(adapted.values()))
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".lora_" not in name}
    parts = {name.rsplit(".", 1)[-1] for name in adapted}
    is_whole = adapted.keys() == {name for name in linears if name.rsplit(".", 1)[-1] in parts}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(parts if is_whole else adapted),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = {PREFIX + name: gather(t) if gather else t for name, t in _adapter_tensors(model).items()}
    if not dist.is_main():
        return
    with fresh_folder(folder) as fresh:
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(held, fresh / WEIGHTS, metadata={"format": "pt"})
        write_json(fresh / CONFIG, config)


def load_adapters(folder: Path | str, model: Decoder) -> None:
    """Adapt `model` with what `save_adapters`, or PEFT, wrote.

    Raises:
        CheckpointError: a file is missing or broken, the adapters do not fit the model or are of another kind.
    """
    folder = Path(folder)
    config, found = read_json(folder / CONFIG), read_weights(folder / WEIGHTS)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder / CONFIG} is of the type {config.get('peft_type')}", hint="known: LORA.")
    for key, fine in REFUSED.items():
        if config.get(key) not in fine:
            raise CheckpointError(
                f"{folder / CONFIG} asks for {key} = {json.dumps(config[key])}",
                hint="plain low-rank adapters alone are known here; let PEFT merge these and open what it saves.",
            )
    found = {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}
    targets = {name.removesuffix(".lora_A.weight") for name in found if name.endswith(".lora_A.weight")}
    try:
        adapt(model, config["r"], config["lora_alpha"], targets or ["no layer"])
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} does not fit this model: {error}", hint=COPY_AGAIN) from None
    wanted = _adapter_tensors(model)
    for name in sorted(wanted.keys() ^ found.keys()):
        has = "lacks" if name in wanted else "has an unknown"
        raise CheckpointError(f"{folder / WEIGHTS} {has} {PREFIX}{name}", hint=COPY_AGAIN)
    with torch.no_grad():
        for name, tensor in wanted.items():
            if tensor.shape != found[name].shape:
                shapes = f"{list(found[name].shape)}, the model wants {list(tensor.shape)}"
                raise CheckpointError(f"{folder / WEIGHTS}: {name} is {shapes}", hint="is this its base model?")
            tensor.copy_(found[name])


def _adapted(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def _adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
