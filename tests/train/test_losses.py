"""The chunked cross-entropy against F.cross_entropy, and the selection of weighted targets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.train import losses
from lyceum.train.losses import cross_entropy_sum, next_token_loss, token_logprobs


class Bigram(nn.Module):
    """A model with the Decoder's two doors: hidden states, and an output matrix."""

    def __init__(self, vocab_size: int = 11, width: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width, dtype=torch.float64)
        self.seen: list[tuple[int, ...]] = []

    @property
    def output_weight(self) -> Tensor:
        return self.embed.weight

    def forward(self, tokens_BT: Tensor, at_N: Tensor | None = None) -> Tensor:
        self.seen.append(tuple(tokens_BT.shape))
        hidden_BTD = self.embed(tokens_BT).cumsum(1)
        return hidden_BTD if at_N is None else hidden_BTD.flatten(0, 1)[at_N]


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 6, dtype=dtype, generator=generator, requires_grad=True)
    head = torch.randn(13, 6, dtype=dtype, generator=generator, requires_grad=True)
    targets = torch.randint(0, 13, (9,), generator=generator)
    return hidden, head, targets, torch.rand(9, dtype=dtype, generator=generator)


@pytest.mark.parametrize("chunk_rows", [1, 4, 9, 100])
def test_value_and_gradients_equal_torchs_cross_entropy_for_any_chunk(
    chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(losses._CHUNK_LOGITS, "cpu", 1)
    monkeypatch.setattr(losses, "_MIN_CHUNK_ROWS", chunk_rows)
    hidden, head, targets, weights = problem(torch.float64)
    total, hits = cross_entropy_sum(hidden, head, targets, weights)
    ours = torch.autograd.grad(3 * total, (hidden, head))
    logits = hidden @ head.T
    wanted = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
    theirs = torch.autograd.grad(3 * wanted, (hidden, head))
    assert torch.allclose(total, wanted, rtol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, theirs, strict=True))
    assert hits.item() == (logits.argmax(1) == targets).sum().item()


def test_under_autocast_products_are_in_bf16_and_the_sum_is_not() -> None:
    torch.manual_seed(0)
    hidden, head = (torch.randn(rows, 64).requires_grad_() for rows in (700, 900))
    targets, weights = torch.randint(0, 900, (700,)), torch.rand(700)
    wanted, _ = cross_entropy_sum(hidden, head, targets, weights)
    theirs = torch.autograd.grad(wanted, (hidden, head))
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = cross_entropy_sum(hidden, head, targets, weights)
    ours = torch.autograd.grad(total, (hidden, head))
    assert total.dtype == ours[0].dtype == ours[1].dtype == torch.float32
    assert 0 < abs(total.item() - wanted.item()) < 2e-4 * wanted.item()  # rounded, each product by up to 2^-8
    assert all((a - b).norm() < 0.02 * b.norm() for a, b in zip(ours, theirs, strict=True))


def test_gradcheck() -> None:
    hidden, head, targets, weights = problem(torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy_sum(h, w, targets, weights)[0], (hidden, head))


def test_backward_twice_through_one_forward_gives_the_same_gradient() -> None:
    hidden, head, targets, weights = problem(torch.float64)
    total, _ = cross_entropy_sum(hidden, head, targets, weights)
    first = torch.autograd.grad(total, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, hidden)[0])


def test_a_frozen_head_gets_no_gradient_and_huge_logits_stay_finite() -> None:
    hidden, head, targets, weights = problem(torch.float32)
    total, _ = cross_entropy_sum(hidden * 1e4, head.detach(), targets, weights)
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(hidden.grad).all() and head.grad is None


def test_next_token_loss_counts_only_weighted_targets_after_the_first_column() -> None:
    torch.manual_seed(0)
    model = Bigram()
    tokens = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]])
    weights = torch.tensor([[7.0, 0.0, 1.0, 0.5, 0.0], [7.0, 0.0, 1.0, 0.0, 0.0]])  # column 0 has no prefix
    total, count, metrics = next_token_loss(model, tokens, weights)
    logp = torch.log_softmax(model(tokens) @ model.embed.weight.T, -1)
    wanted = -(logp[0, 1, 4] + 0.5 * logp[0, 2, 1] + logp[1, 1, 6])
    assert total.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert count == 2.5 and metrics["token_accuracy"][1] == 3.0
    assert model.seen[0] == (2, 4)  # the last token predicts nothing and is not run


def test_next_token_loss_of_a_decoder_is_the_same_where_it_asks_for_all_hidden_states() -> None:
    spec = ModelSpec(31, 2, 32, 2, 1, 16, 64, 16)
    tokens = torch.randint(31, (3, 9), generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 0.5, 1.0, 0.0, 0.0]).expand(3, 9)
    found = []
    for picks in (True, False):
        model = Decoder(spec, torch.Generator().manual_seed(0)).double()
        whole = model.forward
        if not picks:
            model.forward = lambda tokens, at_N, whole=whole: whole(tokens).flatten(0, 1)[at_N]  # type: ignore[method-assign]
        total, _, _ = next_token_loss(model, tokens, weights)
        total.backward()
        found.append([total, *(weight.grad for weight in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_rows_without_weight_give_a_zero_that_can_be_differentiated() -> None:
    model = Bigram()
    total, count, _ = next_token_loss(model, torch.tensor([[1, 2, 3]]), torch.zeros(1, 3))
    total.backward()
    assert total.item() == 0.0 and count == 0.0 and not model.embed.weight.grad.any()


# -- log-probabilities with a gradient each ----------------------------------------------------------------------------


@pytest.mark.parametrize("most_kept", [0, 100])
@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_and_gradients_equal_torchs_distribution(
    chunk_rows: int, temperature: float, most_kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(losses._CHUNK_LOGITS, "cpu", 1)
    monkeypatch.setattr(losses, "_MIN_CHUNK_ROWS", chunk_rows)
    hidden, head, chosen, weights = problem(torch.float64)
    logp, entropy = token_logprobs(hidden, head, chosen, temperature, with_entropy=True, most_kept=most_kept)
    choice = torch.distributions.Categorical(logits=hidden @ head.T / temperature)
    torch.testing.assert_close(logp, choice.log_prob(chosen), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, choice.entropy().detach(), rtol=1e-12, atol=1e-12)
    theirs = torch.autograd.grad((choice.log_prob(chosen) * weights).sum(), (hidden, head))
    for retain in (True, False):  # a step that logs its terms goes back twice
        ours = torch.autograd.grad((logp * weights).sum(), (hidden, head), retain_graph=retain)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_token_logprobs_of_bf16_have_a_softmax_in_fp32_and_gradients_in_bf16() -> None:
    hidden, head, chosen, _ = problem(torch.float32)
    low, low_head = (x.detach().bfloat16().requires_grad_() for x in (hidden, head))
    logp, _ = token_logprobs(low, low_head, chosen)
    logp.sum().backward()
    assert logp.dtype == torch.float32 and low.grad is not None and low.grad.dtype == torch.bfloat16
    wanted = torch.log_softmax(hidden @ head.T, 1).gather(1, chosen[:, None])[:, 0]
    assert 0 < (logp - wanted).abs().max() < 0.05
