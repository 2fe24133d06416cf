"""One matrix of a packed decoder, and how it multiplies few rows and many.

Why: torch hands every product to one routine, which is made for large ones. With 2 to 32 rows, as when several sequences
decode, it spends most of its time putting the matrix into another order, each time anew: 8 rows take three times as long
as one. So the matrix is kept in that order too (MKL's packed format, where torch has it): then they cost little more.
Weights kept in 16 bits (`half`) are read in half the time, which is what a single row waits for; products are added up
in fp32. Rounding a weight to fp16 changes it by at most 2^-11 of itself; beyond 65,504 it cannot be held and is refused.

    product = Product(weight_OI, bias_O)
    product.into(out_NO, x_NI)     # out = x weight^T + bias
    product.onto(out_NO, x_NI)     # out += x weight^T + bias

Measured by `bench/engine.py`; what else was tried stands in `dev/LOG.md`.
Shapes: N rows, I and O width of input and output.
What it is not: differentiable; and many rows (a prompt) always go through the fp32 matrix itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lyceum.errors import UsageError

FEW = 32  # rows that a packed matrix serves
MIN_NUMBERS = 1 << 16  # of a smaller matrix the call costs more than the product
MIN_HALVED = 1 << 18  # the call of the fp16 routine costs more: about 30 us
LARGEST_HALF = 65504.0


class Product:
    """A matrix (O, I) with its bias.

    weight: is used as it is, not copied. half: few rows see the weights rounded to fp16. Raises UsageError where this
    torch has no such routine, or a weight is too large for it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, half: bool = False) -> None:
        if half and not can_halve(weight):
            raise UsageError(
                f"weights in 16 bits need a CPU, fp32 weights and torch with FBGEMM; here are {weight.dtype} on {weight.device}",
                hint="leave half=True out",
            )
        self.half = half
        self.update(weight, bias)

    def update(self, weight: Tensor, bias: Tensor | None) -> None:
        """Multiply with this matrix from now on; what was kept in another order is made anew when it is needed."""
        self.weight, self.bias, self._transposed = weight, bias, weight.t()
        self._few: Any = None
        self._first = 1 if self.half else 2
        self._last = FEW
        if weight.numel() < (MIN_HALVED if self.half else MIN_NUMBERS) or not (self.half or _can_pack(weight)):
            self._last = 0
        if self._last and self.half and not bool(weight.abs().max() <= LARGEST_HALF):
            raise UsageError(f"a weight beyond {LARGEST_HALF:.0f} does not fit 16 bits", hint="leave half=True out")

    def into(self, out: Tensor, x: Tensor) -> None:
        """out = x weight^T + bias"""
        if self._first <= len(x) <= self._last:
            out.copy_(self._multiplied(x))
            if self.bias is not None:
                out += self.bias
        elif self.bias is None:
            torch.mm(x, self._transposed, out=out)
        else:
            torch.addmm(self.bias, x, self._transposed, out=out)

    def onto(self, out: Tensor, x: Tensor) -> None:
        """out += x weight^T + bias"""
        if self._first <= len(x) <= self._last:
            out += self._multiplied(x)
        else:
            out.addmm_(x, self._transposed)
        if self.bias is not None:
            out += self.bias

    @property
    def few(self) -> Any:
        """The matrix as it is kept for few rows; None where it is not."""
        if self._few is None and self._last:
            self._few = _halved(self.weight) if self.half else _reordered(self.weight)
        return self._few

    def _multiplied(self, x: Tensor) -> Tensor:
        if self.half:
            return torch.ops.quantized.linear_dynamic_fp16.default(x, self.few)
        return torch.ops.mkl._mkl_linear.default(x, self.few, self.weight, None, len(x))


def can_halve(weight: Tensor) -> bool:
    """Whether this torch multiplies with such a matrix in 16 bits."""
    return _is_plain(weight) and "fbgemm" in torch.backends.quantized.supported_engines


def _can_pack(weight: Tensor) -> bool:
    return _is_plain(weight) and torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")


def _is_plain(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def _reordered(weight: Tensor) -> Tensor:
    return torch.ops.mkl._mkl_reorder_linear_weight(weight.detach().contiguous(), FEW)


def _halved(weight: Tensor) -> Any:
    before = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = "fbgemm"
        return torch.ops.quantized.linear_prepack_fp16(weight.detach().contiguous(), None)
    finally:
        torch.backends.quantized.engine = before
