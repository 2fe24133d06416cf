"""A model on the machine as the recipe's `[machine]` table says, put on from outside by PyTorch's own engine.

Under `shard` every decoder layer is gathered before it computes and let go after (Rajbhandari et al. 2020, ZeRO stage 3;
`torch.distributed.fsdp.fully_shard`). Under `tensor` the ranks of a row hold columns of q, k, v, gate and up and rows of o
and down, as Shoeybi et al. 2019 (Megatron-LM, section 3) cut them; embeddings, norms and the output layer stand whole in
every row, and are cut over the rows. But for bf16 the numbers trained stay the same up to rounding: the table is part of no
key. bf16 needs no scaling of the loss, since it has the exponents of fp32 (Kalamkar et al. 2019).

One layer is compiled, not the model: all layers share its code, so that the wait does not grow with the depth, and what
stands between them (logits in chunks, hooks of FSDP) stays as it is.

A sharded parameter is a DTensor. What updates weights sees only `local` pieces, plain tensors; `whole` and `own` lead to
the full tensor and back. PyTorch's engine is imported where it is used: it takes seconds, which one rank need not wait.

Run by: `lyceum.train.loop`, on modules that the stage built, before they move to the device. docs/scale.md has the launch
lines and the arithmetic. What it is not: sequence, context, pipeline or expert parallel; nor for stages that generate while
they train (PPO), whose log-probabilities must be those of their engine; these also stay in fp32.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lyceum import device, dist
from lyceum.errors import ConfigError, RunError
from lyceum.log import log
from lyceum.model.transformer import DecoderLayer
from lyceum.train.machine import MachineConfig, machine_config

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from lyceum.run import Work
    from lyceum.train.stage import Stage

CUT_OUT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
CUT_IN = ("self_attn.o_proj", "mlp.down_proj")
ROOM = 0.5  # of its machine's memory rank 0 may fill with the whole model
COMPILE_FLOPS = {"cpu": 1e14, "cuda": 1e18}  # from here on it pays: some 20 minutes of two cores, an hour of a GPU
PER_HEAD = ("q_norm.weight", "k_norm.weight")  # whole on every rank of a row, which sees only its own heads' gradient


# -------------------------------------------------------------------------------- put on


class Parallel:
    """How one section's ranks train together: `config`, laid out on `mesh` (None with one rank)."""

    def __init__(self, config: MachineConfig, mesh: Any) -> None:
        self.config, self.mesh, self.is_sharded = config, mesh, config.is_sharded
        self.shapes: dict[str, nn.Module] = {}  # the sharded modules as they were, without weights

    def put_on(self, stage: Stage[Any]) -> None:
        """Recomputes, cuts and shards the stage's trained modules, in place.

        Raises:
            ConfigError: the stage cannot be trained so, or the model's heads or widths cannot be cut so.
        """
        if self.is_sharded and not stage.can_shard:
            raise ConfigError(
                f"[machine] shards the model, and {stage.kind} can only be trained with a whole one on every rank",
                hint="run this section by itself with --set machine.shard=false --set machine.tensor=1",
            )
        compiles = self._compiles(stage)
        for name, trained in stage.trained.items():
            layers = [layer for layer in trained.module.modules() if isinstance(layer, DecoderLayer)]
            if self.is_sharded:
                self.shapes[name] = _without_weights(trained.module)
                self._shard(trained.module, layers)
            for layer in layers:
                if compiles:
                    layer.forward = _compiled(layer.forward)  # type: ignore[method-assign]
                if self.config.recompute:
                    layer.forward = _recomputed(layer.forward)  # type: ignore[method-assign]

    def _shard(self, module: nn.Module, layers: list[DecoderLayer]) -> None:
        if self.config.tensor > 1:
            for layer in layers:
                _cut(layer, self.config.tensor, self.mesh["tensor"])
        from torch.distributed.fsdp import fully_shard

        # what a pass returns may be a view, which nothing here writes into
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
        for part in (*layers, module):
            sharded = fully_shard(part, mesh=self.mesh["data"])
            sharded.set_gradient_divide_factor(1.0)  # the loop divides by the counts of all ranks: this is a sum
            sharded.set_force_sum_reduction_for_comms(True)

    def _compiles(self, stage: Stage[Any]) -> bool:
        """Only pretraining, whose rows have one length: each length is compiled anew. Decided by what does not vary."""
        flops = stage.flops_per_token * stage.num_steps * stage.config.batch_tokens
        if not flops or self.config.compile == "no":
            return False
        if self.config.compile == "auto" and flops < COMPILE_FLOPS[stage.device.type]:
            return False
        if stage.device.type == "cpu" and not device.has_compiler():
            said = f"torch.compile needs a C++ compiler, and there is none of {', '.join(device.COMPILERS)}"
            if self.config.compile == "yes":
                raise ConfigError(said, hint="install g++, or leave machine.compile at auto")
            log.info(f"  {said}: layers run operator by operator")
            return False
        return True

    def precision(self, stage: Stage[Any]) -> AbstractContextManager[Any]:
        """Inside, products are in bf16 where the table says so."""
        return torch.autocast(stage.device.type, torch.bfloat16) if self._is_low(stage) else nullcontext()

    def _is_low(self, stage: Stage[Any]) -> bool:
        if not stage.can_shard or self.config.precision == "fp32":
            return False
        return self.config.precision == "bf16" or (stage.device.type == "cuda" and torch.cuda.is_bf16_supported(False))

    def spares(self, micro_batches: list[Any]) -> list[Any]:
        """What this rank must pass through a sharded model besides its own micro-batches, at a weight of 0.

        A pass needs every rank; one that has fewer micro-batches goes through another's.
        """
        if not self.is_sharded:
            return []
        numbers = dist.gather([len(micro_batches)])
        missing = max(numbers) - len(micro_batches)
        return dist.gather(micro_batches[:1])[:1] * missing if min(numbers) < max(numbers) else []

    @contextmanager
    def whole(self, stage: Stage[Any]) -> Iterator[bool]:
        """Inside, rank 0's trained modules are in one piece, in its own memory, so that it can answer prompts alone.

        Every rank must come here; False where so much memory is not there.
        """
        sharded = {name: stage.trained[name].module for name in self.shapes}
        size, there = sum(p.nbytes for m in self.shapes.values() for p in m.parameters()), device.memory_bytes()
        fits = dist.is_main() and (size < ROOM * there or not there)
        fits = not self.is_sharded or dist.sum_everywhere(float(fits)) > 0
        if not fits:
            log.warning(f"no prompts are answered: {size / 1e9:,.1f} GB of weights are too much for rank 0's machine")
        for name, shape in self.shapes.items() if fits else ():
            weights = {key: gathered(tensor) for key, tensor in sharded[name].state_dict().items()}
            if dist.is_main():
                stage.trained[name].module = copy.deepcopy(shape).eval()
                stage.trained[name].module.load_state_dict(weights, assign=True)
        try:
            yield fits
        finally:
            for name, module in sharded.items():
                stage.trained[name].module = module


def _without_weights(module: nn.Module) -> nn.Module:
    """A copy on the device "meta", made without a copy of the weights."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, dict(empty)).to("meta")


def _compiled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    fused = torch.compile(forward, dynamic=False)

    def either(x_BTD: Tensor, table: Tensor | None, layer: int, cache: Any, at_N: Tensor | None = None) -> Tensor:
        if cache is None and at_N is None and torch.is_grad_enabled():  # how many positions are picked out varies
            return fused(x_BTD, table, 0, None)  # a layer's number is for its cache, and would be compiled in
        return forward(x_BTD, table, layer, cache, at_N)

    return either


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def again(*args: Any) -> Tensor:
        return checkpoint(forward, *args, use_reentrant=False) if torch.is_grad_enabled() else forward(*args)

    return again


def _cut(layer: DecoderLayer, tensor: int, mesh: Any) -> None:
    """Tensor parallel; a head must stand whole on a rank."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    parts = {name: part for name, part in layer.named_modules() if name in (*CUT_OUT, *CUT_IN)}
    for name, part in parts.items():
        if type(part) is not nn.Linear:
            raise ConfigError(
                f"machine.tensor is {tensor}, and {name} is no plain matrix but a {type(part).__name__}",
                hint="adapters (lora_rank) are trained with machine.shard alone",
            )
        unit = layer.self_attn.head_width if name.startswith("self_attn") else 1
        side = part.out_features if name in CUT_OUT else part.in_features
        if side // unit % tensor:
            raise ConfigError(
                f"machine.tensor is {tensor}, and the {side // unit} {'heads' if unit > 1 else 'columns'} of {name} are "
                "no multiple of it",
                hint="lower tensor, or give [model] heads, kv_heads and ffn_width that it divides",
            )
    parallelize_module(layer, mesh, {n: ColwiseParallel() if n in CUT_OUT else RowwiseParallel() for n in parts})


# -------------------------------------------------------------------------------- pieces and wholes


def is_piece(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this rank holds a piece of `tensor`: a DTensor, known by its mesh, since its class is slow to import."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This rank's piece, sharing its memory; of a plain tensor, itself."""
    if not is_piece(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local().requires_grad_(tensor.requires_grad)


def like(piece: Tensor, tensor: Tensor) -> Tensor:
    """A piece of this rank as a tensor laid out as `tensor` is, sharing its memory."""
    if not is_piece(tensor):
        return piece
    mesh, placements = tensor.device_mesh, tensor.placements
    return cast(Any, type(tensor.data)).from_local(piece, mesh, placements, shape=tensor.shape, stride=tensor.stride())


def whole(piece: Tensor, tensor: Tensor) -> Tensor:
    """All ranks' pieces of what is laid out as `tensor` is, put together on every rank; every rank must call it."""
    laid_out = like(piece, tensor)
    if not is_piece(laid_out):
        return piece
    from torch.distributed.tensor import Placement, Replicate

    placements: list[Placement] = list(laid_out.placements)
    for dim in range(len(placements)):  # what was cut last is joined first; in one call torch warns of two steps
        placements[dim] = Replicate()
        laid_out = laid_out.redistribute(placements=placements)
    return laid_out.to_local()


def place(tensor: Tensor) -> list[tuple[int, int]]:
    """Where this rank's piece stands in the whole of `tensor`: its start and its length along each side."""
    spans = [(0, size) for size in tensor.shape]
    if is_piece(tensor):
        # the row cut first, then over the rows: fully_shard came after the tensor cut
        for dim in reversed(range(tensor.device_mesh.ndim)):
            placement = tensor.placements[dim]
            if not placement.is_replicate():
                side: int = placement.dim  # type: ignore[attr-defined]
                start, length = spans[side]
                most = -(-length // tensor.device_mesh.size(dim))  # the last ranks have what the others leave
                begun = min(most * tensor.device_mesh.get_local_rank(dim), length)
                spans[side] = (start + begun, min(most, length - begun))
    return spans


def own(full: Tensor, tensor: Tensor) -> Tensor:
    """This rank's piece of `full`, which is the same on every rank."""
    if is_piece(tensor):
        for side, (start, length) in enumerate(place(tensor)):
            full = full.narrow(side, start, length)
    return full


def for_main(piece: Tensor, tensor: Tensor) -> Tensor:
    """`whole` in rank 0's own memory; every other rank gets nothing, and must call it all the same."""
    full = whole(piece, tensor)
    return full if full is piece else full.cpu() if dist.is_main() else full.new_empty(0)


def gathered(tensor: Tensor) -> Tensor:
    """`tensor` in one piece in rank 0's own memory; every other rank gets nothing, and must call it all the same."""
    return for_main(local(tensor), tensor).detach()


def is_first_copy(tensor: Tensor) -> bool:
    """Whether this rank is the first of those that hold the same piece of `tensor`."""
    row = dist.world_size() // dist.data_size()
    return (copies(tensor, row) == 1 or dist.rank() % row == 0) if is_piece(tensor) else dist.is_main()


def copies(tensor: Tensor, row: int) -> int:
    """How many ranks of a grid with rows of `row` hold the same piece of `tensor`."""
    is_cut = is_piece(tensor) and tensor.device_mesh.ndim == 2 and not tensor.placements[-1].is_replicate()
    return 1 if is_cut else row


# -------------------------------------------------------------------------------- a rank that is gone


@contextmanager
def ranks_together(work: Work, device: torch.device) -> Iterator[Parallel]:
    """Inside, ranks stand as the recipe says; another's end or silence is a RunError that says how to go on."""
    config = machine_config(work.recipe)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # which PyTorch's engine takes for this rank's
        with dist.teams(config.tensor, config.timeout_s, device.type) as mesh:
            yield Parallel(config, mesh)
    except RuntimeError as error:
        said = (str(error).strip().splitlines() or [""])[0][:200]
        is_group = isinstance(error, torch.distributed.DistError) or "gloo" in said.lower()
        if dist.world_size() == 1 or not is_group:
            raise
        raise RunError(
            f"rank {dist.rank()} of {dist.world_size()} lost another, which ended or was silent too long ({said})",
            hint=f"see what the others said last; the same command goes on from what is saved in {work.folder.trainer}",
        ) from error
