"""The parts of a layer that hold no attention: norm, rotary positions, the feed-forward, linear layers of one input.

Why: each part is written twice. The plain line of PyTorch is the definition; it runs on a GPU, and the tests compare
against it. Beside it stands the form for whole micro-batches on a CPU, where PyTorch has no fused kernel for any of
these: a `torch.autograd.Function` whose backward is worked out by hand, so that memory is read and written as few times
as can be. `is_fast` chooses between the two, by device and size.

Shapes: B batch, T time, D width, H heads, E head width, F ffn width.
Run it: these are parts of `lyceum.model.transformer.Decoder`. The costs: `bench/demo_speed.py`.
What it is not: the hand-written backwards cannot be differentiated again. What only GPT-2 has (LayerNorm, GELU) has the
plain form alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lyceum.model.spec import ModelSpec, RopeScaling

MIN_NUMBERS = 1 << 14  # below this a step is bound by calls, not by memory, and the plain line makes fewer


def is_fast(x: Tensor, *linears: nn.Module) -> bool:
    """Whether the hand-written form serves: much of `x`, on a CPU, in fp32 or fp64, and no autocast.

    `linears` are the layers whose weights it would read: they must be bare, without adapters, quantised weights or
    weights of which this rank holds a part (FSDP2 gathers a layer's before the layer runs; tensor parallel does not).
    """
    if torch.compiler.is_compiling():  # the compiler fuses the plain line itself
        return False
    is_plain = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    is_bare = all(type(it) is nn.Linear and it.bias is None and type(it.weight) is nn.Parameter for it in linears)
    return is_plain and is_bare and x.numel() >= MIN_NUMBERS and not torch.is_autocast_enabled("cpu")


# -- norm --------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.  (Zhang and Sennrich 2019, equation 4)"""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if is_fast(x):
            return FastRMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class FastRMSNorm(torch.autograd.Function):
    """RMSNorm in three passes forward and six backward; it keeps the normalised x, not x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rstd = _rstd(x, eps)
        normed = x * rstd
        ctx.save_for_backward(normed, rstd, weight)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normed, rstd, weight = ctx.saved_tensors
        product = grad * normed
        grad_weight = product.flatten(0, -2).sum(0)
        mean = (product @ weight).div_(weight.numel()).unsqueeze(-1)
        grad_x = torch.mul(grad, weight, out=product)
        return grad_x.addcmul_(normed, mean, value=-1).mul_(rstd), grad_weight, None


def _rstd(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which is kept; vector_norm is the one fused reduction."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


# -- rotary positions --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def rotary_table(
    length: int,
    head_width: int,
    theta: float,
    dtype: torch.dtype,
    device: torch.device,
    scaling: RopeScaling | None = None,
) -> Tensor:
    """The turns as complex numbers (length, E/2): pair i of position t turns by the angle t * theta^(-2i/E).

    Source: Su et al. 2021 (RoFormer), equation 15; the pairs are (i, i + E/2), as in Hugging Face's models. A table
    is computed once for each device; it is no buffer, because a cast of the model to bf16 must not round it.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        frequencies = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
        if scaling is not None:
            frequencies = _scaled(frequencies, scaling)
        angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
        return torch.polar(torch.ones_like(angles), angles).to(dtype.to_complex()).to(device)


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    kept = torch.zeros_like(frequencies)  # the share of every frequency that stays as it is
    if scaling.low is not None and scaling.high is not None and scaling.original_context is not None:
        turns = scaling.original_context * frequencies / (2 * math.pi)
        kept = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def rotate(x_BTHE: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs (i, i + E/2) of every head by the angles of its position.

    `table` is (T, E/2) for rows that start at position 0, or (B, T, E/2).
    """
    if torch.compiler.is_compiling():  # which does not fuse complex numbers
        (a, b), (cos, sin) = x_BTHE.chunk(2, dim=-1), torch.view_as_real(table).unsqueeze(-3).unbind(-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x_BTHE)
    pairs = torch.complex(*x_BTHE.to(table.dtype.to_real()).chunk(2, dim=-1)) * table.unsqueeze(-2)
    return torch.cat((pairs.real, pairs.imag), dim=-1).type_as(x_BTHE)


def paired(weight: Tensor, head_width: int) -> Tensor:
    """Bring the members i and i + E/2 of every rotary pair side by side, along the first dimension.

    With its pairs so ordered a head is a row of E/2 complex numbers, which turn in one pass over memory. Queries and
    keys are ordered alike, so their products do not change.
    """
    return weight.unflatten(0, (-1, 2, head_width // 2)).transpose(1, 2).flatten(0, 2)


class FastNormRotate(torch.autograd.Function):
    """`rotate(RMSNorm(x), table)` for heads whose pairs stand side by side (see `paired`).

    `weight` is the norm's gain (E), its pairs side by side too; None leaves the norm out.
    """

    @staticmethod
    def forward(ctx: Any, x_BTHE: Tensor, weight: Tensor | None, table: Tensor, eps: float) -> Tensor:
        table = table.unsqueeze(-2).expand(*table.shape[:-1], x_BTHE.shape[-2], -1).contiguous()
        if weight is None:
            ctx.save_for_backward(table)
            return _turn(x_BTHE, table)
        rstd = _rstd(x_BTHE, eps)
        normed = x_BTHE.contiguous() * rstd
        gains = weight.expand(x_BTHE.shape[-2:]).contiguous()
        ctx.save_for_backward(table, normed, rstd, gains)
        out = normed * gains
        _pairs(out).mul_(table)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, *saved = ctx.saved_tensors
        grad = _turn(grad, table.conj().resolve_conj())
        if not saved:
            return grad, None, None, None
        normed, rstd, gains = saved
        product = grad * normed
        grad_weight = product.flatten(0, -3).sum(0).sum(0)
        mean = product.mul_(gains).mean(-1, keepdim=True)
        return grad.mul_(gains).addcmul_(normed, mean, value=-1).mul_(rstd), grad_weight, None, None


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))


def _turn(x: Tensor, table: Tensor) -> Tensor:
    return torch.view_as_real(_pairs(x) * table).flatten(-2)


# -- linear layers -----------------------------------------------------------------------------------------------------


def linear(name: str, spec: ModelSpec, num_in: int, num_out: int) -> nn.Linear:
    """The linear layer `name` of a decoder layer, with a bias where the spec says so."""
    return nn.Linear(num_in, num_out, bias=name in spec.biases)


class FastLinears(torch.autograd.Function):
    """`tuple(F.linear(x, weight) for weight in weights)`.

    PyTorch computes the gradient of a weight as grad^T x. Where grad is at least as wide as x, as it is here,
    (x^T grad)^T is 1.2 to 1.4 times as fast on a CPU: the smaller matrix is the one to transpose.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        flat_x, flat_grads = x.flatten(0, -2), [grad.flatten(0, -2) for grad in grads]
        grad_x = flat_grads[0] @ weights[0]
        for grad, weight in zip(flat_grads[1:], weights[1:], strict=True):
            grad_x.addmm_(grad, weight)
        needed = zip(flat_grads, ctx.needs_input_grad[1:], strict=True)
        return grad_x.view_as(x), *((flat_x.t() @ grad).t() if is_needed else None for grad, is_needed in needed)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)).  (Shazeer 2020, equation 6)"""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_proj = linear("gate_proj", spec, spec.width, spec.ffn_width)
        self.up_proj = linear("up_proj", spec, spec.width, spec.ffn_width)
        self.down_proj = linear("down_proj", spec, spec.ffn_width, spec.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if is_fast(x_BTD, self.gate_proj, self.up_proj):
            gate_BTF, up_BTF = FastLinears.apply(x_BTD, self.gate_proj.weight, self.up_proj.weight)
            return self.down_proj(FastSiluTimes.apply(gate_BTF, up_BTF))
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class FastSiluTimes(torch.autograd.Function):
    """silu(gate) * up; silu(gate) is kept for the backward, since its exponential is the dear part on a CPU."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        activated = F.silu(gate)
        ctx.save_for_backward(gate, up, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up, activated = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, grad * activated


class GELU(nn.Module):
    """down(gelu(up(x))), with the tanh form of the GELU.  (Radford et al. 2019; Hendrycks and Gimpel 2016, section 2)"""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.up_proj = linear("up_proj", spec, spec.width, spec.ffn_width)
        self.down_proj = linear("down_proj", spec, spec.ffn_width, spec.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x_BTD), approximate="tanh"))


# what the words of a ModelSpec stand for
NORMS: dict[str, Callable[..., nn.Module]] = {"rms": RMSNorm, "layer": nn.LayerNorm}
FFNS: dict[str, Callable[[ModelSpec], nn.Module]] = {"swiglu": SwiGLU, "gelu": GELU}
