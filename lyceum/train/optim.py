"""Optimizers and schedules: Muon for the matrices inside layers, AdamW for everything else.

Muon (Keller Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024): the momentum of a matrix is
replaced by the nearest orthogonal matrix, approximately, by five steps of a quintic Newton-Schulz iteration. Ours runs
in the parameters' own precision on a CPU, where bf16 products are slower, and in bf16 on a GPU, as in the post; matrices
of equal shape are stacked and orthogonalised by one batched product per step and thread.

The update is scaled by sqrt(max(1, rows / cols)), as in the original post; so matrix_lr means what it means there
(0.02 to 0.05 for small models). The other scale in use, 0.2 * sqrt(max(rows, cols)) (arXiv 2502.16982), is not offered.

Weight decay is decoupled (arXiv 1711.05101) and acts on the matrices inside layers only.

Both are plain classes over torch's kernels: making any `torch.optim.Optimizer` imports torch's compiler, which nothing
here uses and which takes nearly as long as torch itself.

Sharded (`lyceum.train.parallel`), a rank's optimizers see its own pieces only. AdamW works number by number and does not
mind; for Muon each matrix's momentum is put together on every rank, one at a time, which orthogonalises all of it and
keeps its own piece: the same update, with the products of Newton-Schulz done once a rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lyceum import device, dist
from lyceum.train.parallel import PER_HEAD, copies, like, local, own, whole

# The quintic's coefficients (a, b, c): chosen in the post for the steepest slope at zero, so singular values end
# in about [0.7, 1.2] rather than at exactly 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class OptimizerSettings:
    """How one trained module is updated.

    lr: peak learning rate of AdamW. matrix_lr: peak of Muon for the matrices inside layers; 0 = these use AdamW at lr.
    weight_decay: of the matrices inside layers. betas, eps: AdamW's. momentum: Muon's.
    """

    lr: float
    matrix_lr: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95


def schedule(progress: float, *, warmup: float, decay: float, shape: str, final: float) -> float:
    """Learning rate as a share of its peak: a linear rise, a plateau, then a fall to `final`.

    Args:
        progress: position in the run, in [0, 1].
        warmup: share of the run that rises; decay: share of the run, at its end, that falls (decay = 1 with "cosine"
            is the usual cosine without a plateau).
        shape: "linear" or "cosine"; final: the share of the peak at progress 1.
    """
    rise = progress / warmup if progress < warmup else 1.0
    fallen = min(1.0, max(0.0, (progress - (1.0 - decay)) / decay)) if decay > 0 else 0.0
    if shape == "cosine":
        fallen = (1.0 - math.cos(math.pi * fallen)) / 2.0
    return rise * (1.0 - (1.0 - final) * fallen)


@torch.no_grad()
def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Moves every singular value of each matrix near 1, keeping its singular vectors, by Newton-Schulz steps.

    Args:
        matrices: (N, rows, cols) in any floating type; all-zero matrices stay zero.

    Returns:
        A new tensor of the same shape. Source: Jordan 2024, X <- a X + (b A + c A A) X with A = X X^T.
    """
    is_tall = matrices.size(1) > matrices.size(2)
    x = matrices.transpose(1, 2) if is_tall else matrices  # the short side first: the smaller A
    if x.is_cuda and x.dtype == torch.float32:
        x = x.bfloat16()
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7).view(-1, 1, 1)
    # Where the matrix is much longer than wide the steps are cheaper on A alone; bf16 is too coarse for that.
    in_gram = x.size(2) >= 2 * x.size(1) and x.dtype != torch.bfloat16
    x = torch.bmm(_gram_steps(x, steps), x) if in_gram else _steps(x, steps)
    return (x.transpose(1, 2) if is_tall else x).to(matrices.dtype)


def _steps(x: Tensor, steps: int) -> Tensor:
    """Newton-Schulz steps of wide matrices (N, short, long), as written."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = torch.bmm(x, x.transpose(1, 2))
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _gram_steps(x: Tensor, steps: int) -> Tensor:
    """(N, short, short), the product of the steps' polynomials P = a I + b A + c A A: they and A commute, so A <- P A P."""
    a, b, c = NEWTON_SCHULZ
    gram, product = torch.bmm(x, x.transpose(1, 2)), None
    for step in range(steps):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        product = polynomial if product is None else torch.bmm(polynomial, product)
        if step < steps - 1:
            gram = torch.bmm(torch.bmm(polynomial, gram), polynomial)
    assert product is not None, "at least one step"
    return product


class Muon:
    """Momentum, orthogonalised; for 2-D parameters only.

    Args:
        params: matrices (rows, cols); those of one shape are updated in one batch.
        lr: learning rate; weight_decay: decoupled; momentum: Nesterov's.
        layouts: of a sharded module, piece -> the parameter that it is this rank's piece of.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        layouts: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        self.parameters, self.lr, self.weight_decay, self.momentum = list(params), lr, weight_decay, momentum
        self.layouts = layouts or {}
        for parameter in self.parameters:
            assert parameter.ndim == 2, f"Muon takes matrices, got a shape of {tuple(parameter.shape)}"
        self.state = {p: {"momentum_buffer": torch.zeros_like(p, requires_grad=False)} for p in self.parameters}

    def step(self) -> None:
        """One update from the parameters' .grad; on a CPU each thread takes matrices of its own."""
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in self.parameters:
            if parameter.grad is not None:
                by_shape.setdefault(self.layouts.get(parameter, parameter).shape, []).append(parameter)
        is_shared = self.parameters[0].device.type == "cpu" and not self.layouts
        count = min(torch.get_num_threads(), len(self.parameters)) if is_shared else 1

        @torch.no_grad()
        def go(number: int) -> None:
            for shape, parameters in by_shape.items():
                mine = parameters[number::count]
                for batch in [[p] for p in mine] if self.layouts else [mine]:  # sharded, one matrix at a time is whole
                    if batch:
                        self._update(shape, batch)

        device.side_by_side(go, count)

    def _update(self, shape: torch.Size, parameters: list[Tensor]) -> None:
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(buffers, grads, 1.0 - self.momentum)
        nesterov = torch._foreach_lerp(grads, buffers, self.momentum)
        layouts = [self.layouts.get(parameter, parameter) for parameter in parameters]
        full = orthogonalise(torch.stack([whole(*pair) for pair in zip(nesterov, layouts, strict=True)]))
        updates = [own(*pair) for pair in zip(full, layouts, strict=True)]
        if self.weight_decay:
            torch._foreach_mul_(tuple(parameters), 1.0 - self.lr * self.weight_decay)
        rate = self.lr * math.sqrt(max(1.0, shape[0] / shape[1]))
        torch._foreach_add_(tuple(parameters), updates, alpha=-rate)


class AdamW:
    """AdamW (arXiv 1711.05101) by torch's fused kernel: what `torch.optim.AdamW(fused=True)` computes.

    Args:
        params: of any shape, all of one floating type on one device.
        lr: learning rate; betas, eps: of the two moments; weight_decay: decoupled.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.parameters, self.lr, self.betas, self.eps, self.weight_decay = list(params), lr, betas, eps, weight_decay
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        for p in self.parameters:
            moments = {name: torch.zeros_like(p, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            self.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device), **moments}

    @torch.no_grad()
    def step(self) -> None:
        """One update from the parameters' .grad."""
        parameters = [p for p in self.parameters if p.grad is not None]
        if not parameters:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        names = ("exp_avg", "exp_avg_sq", "step")
        averages, squares, steps = ([self.state[p][name] for p in parameters] for name in names)
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            tuple(parameters), grads, averages, squares, [], steps, amsgrad=False, lr=self.lr, beta1=self.betas[0],
            beta2=self.betas[1], weight_decay=self.weight_decay, eps=self.eps, maximize=False,
        )  # fmt: skip


class Learner:
    """One module while it is trained: its flat gradient, its optimizers and the running average of its weights.

    Args:
        module: its parameters that require a gradient are trained; all of one floating type. Of a sharded module this
            rank's pieces are: `parameters`, the gradient and the optimizers' state are pieces.
        settings: peak learning rates and the rest.
        average_decay: decay of the running average of the weights; 0 = none is kept.
    """

    def __init__(self, module: nn.Module, settings: OptimizerSettings, average_decay: float = 0.0) -> None:
        self.module, self.settings, self.average_decay = module, settings, average_decay
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.parameters = [local(p) for p in self.named.values()]
        self.held = self._weights()
        self.average = [p.detach().clone() for p in self.parameters] if average_decay else []
        first, self.row = self.parameters[0], dist.world_size() // dist.data_size()
        self.is_sharded = first is not next(iter(self.named.values()))
        self.gradient = torch.zeros(sum(p.numel() for p in self.parameters), dtype=first.dtype, device=first.device)
        self._optimizers = self._build()

    def _build(self) -> list[tuple[Muon | AdamW, float]]:
        """The optimizers, each with its peak learning rate."""
        settings = self.settings
        pieces = list(zip(self.named.items(), self.parameters, strict=True))
        matrices = [piece for (name, p), piece in pieces if is_layer_matrix(name, p)]
        others = [piece for (name, p), piece in pieces if not is_layer_matrix(name, p)]
        optimizers: list[tuple[Muon | AdamW, float]] = []
        if settings.matrix_lr > 0 and matrices:
            layouts = {piece: p for (_, p), piece in pieces} if self.is_sharded else None
            muon = Muon(matrices, settings.matrix_lr, settings.weight_decay, settings.momentum, layouts)
            optimizers.append((muon, settings.matrix_lr))
            matrices = []
        for parameters, decay in ((others, 0.0), (matrices, settings.weight_decay)):
            if parameters:
                adamw = AdamW(parameters, settings.lr, settings.betas, settings.eps, decay)
                optimizers.append((adamw, settings.lr))
        return optimizers

    def accumulate_in(self, flat: Tensor) -> None:
        """Makes every parameter's .grad a view of `flat`, so that backward passes add to what stands there."""
        for parameter, piece, view in zip(self.named.values(), self.parameters, self.views(flat), strict=True):
            piece.grad = view
            parameter.grad = like(view, parameter)

    def views(self, flat: Tensor) -> list[Tensor]:
        """`flat` as one view for each parameter, shaped like it."""
        views = flat.split([piece.numel() for piece in self.parameters])
        return [view.view_as(piece) for view, piece in zip(views, self.parameters, strict=True)]

    def sum_over_ranks(self, flat: Tensor) -> None:
        """Makes a gradient that backward passes have filled the sum over all ranks."""
        if not self.is_sharded:
            dist.sum_tensors(flat)
        elif self.row > 1:  # FSDP has summed over the copies; a row's ranks have each seen their own heads
            views = zip(self.named, self.views(flat), strict=True)
            dist.sum_row([view for name, view in views if name.endswith(PER_HEAD)])

    def norm(self, flat: Tensor) -> float:
        """The norm of a summed gradient, over all pieces of it."""
        if not self.is_sharded:
            return float(flat.norm())
        pieces = zip(self.named.values(), self.views(flat), strict=True)
        squares = sum(float(view.double().square().sum()) / copies(p, self.row) for p, view in pieces)
        return math.sqrt(dist.sum_everywhere(squares))

    def update(self, factor: float) -> None:
        """One update from `self.gradient` at `factor` times the peak learning rates; then the running average."""
        self.accumulate_in(self.gradient)
        for optimizer, peak in self._optimizers:
            optimizer.lr = peak * factor
            optimizer.step()
        if self.average:
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.parameters, 1.0 - self.average_decay)

    def swap(self) -> None:
        """Exchanges the weights and their running average, if there is one."""
        if self.is_sharded:
            cast(Any, self.module).reshard()  # what a pass has gathered is of the weights before
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average, strict=False):
                kept = parameter.detach().clone()
                parameter.copy_(average)
                average.copy_(kept)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything needed to go on, in its own memory: parameters (tied ones once) and persistent buffers, optimizer
        state, average. Of a sharded module pieces, laid out as its parameters are."""
        held = {f"weights/{name}": tensor for name, tensor in self.held.items()}
        for (name, p), average in zip(self.named.items(), self.average, strict=False):
            held[f"average/{name}"] = like(average, p)
        for (name, p), piece in zip(self.named.items(), self.parameters, strict=True):
            for optimizer, _ in self._optimizers:
                for key, value in optimizer.state.get(piece, {}).items():
                    held[f"optimizer/{name}/{key}"] = like(value, p) if value.shape == piece.shape else value
        return held

    def _weights(self) -> dict[str, Tensor]:
        persistent = self.module.state_dict().keys()
        buffers = {name: buffer for name, buffer in self.module.named_buffers() if name in persistent}
        return {**{name: parameter.detach() for name, parameter in self.module.named_parameters()}, **buffers}


def is_layer_matrix(name: str, parameter: Tensor) -> bool:
    """True for the 2-D weights inside layers: not embeddings, output heads, score heads or norms."""
    return parameter.ndim == 2 and "layers" in name.split(".")
