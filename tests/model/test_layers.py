"""Each hand-written form against the plain one, and its backward against numbers (gradcheck, float64)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lyceum.model import layers
from lyceum.model.layers import FastLinears, FastNormRotate, FastRMSNorm, FastSiluTimes, RMSNorm, SwiGLU, paired
from lyceum.model.spec import ModelSpec

EPS = 1e-3  # large, so that a forgotten eps shows


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(*shape, dtype=torch.float64).normal_(generator=generator).requires_grad_()


def table(length: int, head_width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return layers.rotary_table(length, head_width, 100.0, dtype, torch.device("cpu"))


def same_values_and_gradients(fast, plain, inputs, tolerance=1e-9):
    fast_out, plain_out = fast(*inputs), plain(*inputs)
    torch.testing.assert_close(fast_out, plain_out, rtol=tolerance, atol=tolerance)
    grad = numbers(*plain_out.shape, seed=99).detach()
    gradients = (torch.autograd.grad(out, inputs, grad) for out in (fast_out, plain_out))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_rms_norm_of_a_row_by_hand():
    norm = RMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 2.0])
    # mean of squares of (1, 7) is 25
    torch.testing.assert_close(norm(torch.tensor([[1.0, 7.0]])), torch.tensor([[0.2, 2.8]]))


def test_fast_rms_norm_is_torchs():
    inputs = (numbers(3, 5, 8), numbers(8, seed=1))
    same_values_and_gradients(
        lambda x, w: FastRMSNorm.apply(x, w, EPS), lambda x, w: F.rms_norm(x, (8,), w, EPS), inputs
    )
    assert torch.autograd.gradcheck(lambda x, w: FastRMSNorm.apply(x, w, EPS), inputs)


def test_fast_rms_norm_of_zeros_is_zero_with_a_finite_gradient():
    x, weight = torch.zeros(2, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    out = FastRMSNorm.apply(x, weight, 1e-6)
    out.sum().backward()
    assert (out == 0).all() and x.grad.isfinite().all()


def test_fast_silu_times_is_torchs():
    inputs = (numbers(3, 5), numbers(3, 5, seed=1))
    same_values_and_gradients(FastSiluTimes.apply, lambda gate, up: F.silu(gate) * up, inputs)
    assert torch.autograd.gradcheck(FastSiluTimes.apply, inputs)


@pytest.mark.parametrize("rows", [1, 7])
def test_fast_linears_are_torchs(rows):
    inputs = (numbers(2, rows, 4), numbers(6, 4, seed=1), numbers(3, 4, seed=2))

    def joined(make):
        return lambda x, *weights: torch.cat(make(x, *weights), dim=-1)

    def plain(x, *weights):
        return tuple(F.linear(x, weight) for weight in weights)

    same_values_and_gradients(joined(FastLinears.apply), joined(plain), inputs)
    assert torch.autograd.gradcheck(joined(FastLinears.apply), inputs)


def test_rotation_by_hand():
    # one head of two numbers: one pair, which turns by one radian a position
    x = torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]])  # positions 0 and 1
    out = layers.rotate(x, table(2, 2, torch.float32))
    torch.testing.assert_close(out[0, :, 0], torch.tensor([[1.0, 0.0], [0.5403023, 0.8414710]]))


def test_product_of_rotated_query_and_key_depends_on_their_distance_only():
    q, k = numbers(1, 1, 1, 8), numbers(1, 1, 1, 8, seed=1)
    turns = table(40, 8)

    def product(q_position, k_position):
        turned = (layers.rotate(x, turns[None, position, None]) for x, position in ((q, q_position), (k, k_position)))
        return torch.mul(*turned).sum()

    torch.testing.assert_close(product(7, 3), product(39, 35))
    assert not torch.isclose(product(7, 3), product(7, 4))


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("has_rows_of_positions", [True, False])
def test_fast_norm_rotate_is_the_plain_one_with_its_pairs_side_by_side(has_norm, has_rows_of_positions):
    turns = table(9, 6)[torch.tensor([[0, 1, 5], [8, 2, 2]])] if has_rows_of_positions else table(3, 6)
    inputs = (numbers(2, 3, 4, 6), *([numbers(6, seed=1)] if has_norm else []))

    def side_by_side(x):  # paired() orders the first dimension; here the last one is wanted
        return paired(x.movedim(-1, 0), 6).movedim(0, -1)

    def fast(x, weight=None):
        ordered = None if weight is None else paired(weight, 6)
        return FastNormRotate.apply(side_by_side(x), ordered, turns, EPS)

    def plain(x, weight=None):
        normed = x if weight is None else F.rms_norm(x, (6,), weight, EPS)
        return side_by_side(layers.rotate(normed, turns))

    same_values_and_gradients(fast, plain, inputs)
    assert torch.autograd.gradcheck(fast, inputs)


def test_fast_backwards_give_the_same_twice_over_a_kept_graph():
    x, weight = numbers(2, 3, 2, 6), numbers(6, seed=1)
    hidden = FastNormRotate.apply(x, paired(weight, 6), table(3, 6), EPS)
    out = FastSiluTimes.apply(*FastLinears.apply(FastRMSNorm.apply(hidden, weight, EPS), numbers(4, 6), numbers(4, 6)))
    first, second = (torch.autograd.grad(out.sum(), (x, weight), retain_graph=True) for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


@pytest.mark.usefixtures("both_forms")
def test_swiglu_of_wrapped_layers_is_that_of_bare_ones():
    class Wrapped(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(x)

    ffn = SwiGLU(ModelSpec(4, 1, 8, 2, 2, 4, ffn_width=16, context_length=4))
    x = torch.randn(2, 3, 8)
    bare = ffn(x)
    ffn.gate_proj = Wrapped(ffn.gate_proj)
    torch.testing.assert_close(ffn(x), bare)


def test_rotary_table_first_made_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        made = layers.rotary_table(3, 6, 123.0, torch.float64, torch.device("cpu"))
    x = numbers(1, 3, 1, 6)
    FastNormRotate.apply(x, None, made, 0.0).sum().backward()
    assert x.grad is not None


def test_hand_written_forms_are_for_much_plain_data_and_bare_layers_only():
    class Adapted(nn.Linear):
        pass

    much, bare = torch.zeros(2, layers.MIN_NUMBERS // 2), nn.Linear(4, 4, bias=False)
    assert layers.is_fast(much, bare) and layers.is_fast(much.double())
    assert not layers.is_fast(much[:1])
    assert not layers.is_fast(much.bfloat16())
    assert not layers.is_fast(much.to("meta"))
    assert not layers.is_fast(much, bare, Adapted(4, 4, bias=False))
    assert not layers.is_fast(much, nn.Linear(4, 4, bias=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert not layers.is_fast(much)
