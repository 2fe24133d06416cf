"""A matrix in every order it is kept in, against the plain product."""

from __future__ import annotations

import pytest
import torch

from lyceum.errors import UsageError
from lyceum.model import product as product_module
from lyceum.model.product import FEW, Product, can_halve

ROWS = (1, 2, 3, 7, 8, FEW - 1, FEW, FEW + 1, 100)


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_module, "MIN_NUMBERS", 0)
    monkeypatch.setattr(product_module, "MIN_HALVED", 0)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


needs_fbgemm = pytest.mark.skipif(not can_halve(torch.ones(1, 1)), reason="torch was built without FBGEMM")


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize(("num_out", "num_in"), [(48, 32), (97, 33), (1, 5), (576, 192)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("half", [False, pytest.param(True, marks=needs_fbgemm)])
def test_every_number_of_rows_gives_the_plain_product(num_out: int, num_in: int, has_bias: bool, half: bool) -> None:
    weight, bias = drawn(num_out, num_in), drawn(num_out) if has_bias else None
    one = Product(weight, bias, half=half)
    for num in ROWS:
        x, before = drawn(num, num_in), drawn(num, num_out)
        seen = weight.half().float() if half and num <= FEW else weight
        wanted = torch.nn.functional.linear(x.double(), seen.double(), None if bias is None else bias.double()).float()
        out, sum_ = torch.full((num, num_out), torch.nan), before.clone()
        one.into(out, x)
        one.onto(sum_, x)
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5 * num_in**0.5)
        torch.testing.assert_close(sum_, before + wanted, rtol=1e-5, atol=1e-5 * num_in**0.5)


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("half", [False, pytest.param(True, marks=needs_fbgemm)])
def test_an_update_reaches_what_is_kept_in_another_order(half: bool) -> None:
    weight, x, out = drawn(40, 32), drawn(4, 32), torch.empty(4, 40)
    one = Product(weight, None, half=half)
    one.into(out, x)
    with torch.no_grad():
        weight.mul_(-2)
    stale = out.clone()
    one.update(weight, None)
    one.into(out, x)
    torch.testing.assert_close(out, -2 * stale)


def test_large_matrices_of_few_rows_are_reordered_and_small_ones_are_not() -> None:
    small, large = Product(drawn(32, 32), None), Product(drawn(512, 256), None)
    for one in (small, large):
        for num in (1, FEW + 1):
            one.into(torch.empty(num, len(one.weight)), drawn(num, one.weight.shape[1]))
        assert one._few is None
        one.into(torch.empty(2, len(one.weight)), drawn(2, one.weight.shape[1]))
    assert small._few is None and (large._few is not None) == torch.backends.mkl.is_available()


@needs_fbgemm
@pytest.mark.usefixtures("every_size")
def test_what_does_not_fit_16_bits_is_refused() -> None:
    with pytest.raises(UsageError, match="65504"):
        Product(torch.tensor([[1.0, 7e4]]), None, half=True)
    with pytest.raises(UsageError, match="65504"):
        Product(torch.tensor([[1.0, torch.nan]]), None, half=True)
    with pytest.raises(UsageError, match="float64"):
        Product(torch.ones(2, 2, dtype=torch.float64), None, half=True)
