"""Muon against torch's own, the schedule by hand, and the learner's bookkeeping."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lyceum.train.optim import (
    NEWTON_SCHULZ,
    AdamW,
    Learner,
    Muon,
    OptimizerSettings,
    is_layer_matrix,
    orthogonalise,
    schedule,
)
from lyceum.train.state import STATE, SavedState, write_state


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Tiny(nn.Module):
    """An embedding, two layers of two equal and one odd matrix, a norm gain and a head."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8, dtype=dtype)
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(8, rows, bias=True, dtype=dtype) for name, rows in sizes.items()})
            for sizes in ({"q": 8, "k": 8, "up": 24}, {"q": 8, "k": 8, "up": 24})
        )
        self.norm = nn.Parameter(torch.ones(8, dtype=dtype))
        self.score = nn.Linear(8, 1, bias=False, dtype=dtype)


def fill_gradient(learner: Learner) -> None:
    learner.gradient.copy_(torch.randn(learner.gradient.shape))


# -------------------------------------------------------------------------------- Muon


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_muon_equals_torchs_muon_up_to_its_bfloat16(shape: tuple[int, int]) -> None:
    ours = [nn.Parameter(torch.randn(shape)) for _ in range(3)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    our_muon = Muon(ours, lr=0.05, weight_decay=0.1)
    their_muon = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.1, momentum=0.95, nesterov=True)
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(shape)
            other.grad = mine.grad.clone()
        our_muon.step()
        their_muon.step()
    for mine, other, first in zip(ours, theirs, start, strict=True):
        moved = (other.detach() - first).norm()
        assert (mine.detach() - other.detach()).norm() < 0.02 * moved  # bf16 has about 3 digits


def test_orthogonalise_keeps_singular_vectors_and_brings_values_near_one() -> None:
    rows = torch.randn(4, 12, 30, dtype=torch.float64)
    result = orthogonalise(rows)
    assert result.shape == rows.shape
    for before, after in zip(rows, result, strict=True):
        left, _, right = torch.linalg.svd(before, full_matrices=False)
        inner = left.T @ after @ right.T  # diagonal if the singular vectors are the same
        values = inner.diagonal()
        assert torch.allclose(inner, torch.diag(values), atol=1e-9)
        assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("shape", [(3, 24, 48), (3, 64, 8)])
@pytest.mark.parametrize("rank", [1, 8])
def test_long_matrices_take_the_same_steps_on_their_gram_matrix(shape: tuple[int, int, int], rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(3, size, rank, generator=generator, dtype=torch.float64) for size in shape[1:])
    matrices = left @ right.transpose(1, 2)
    expected = []
    for x in matrices:  # the iteration as the post writes it
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = NEWTON_SCHULZ[0] * x + (NEWTON_SCHULZ[1] * gram + NEWTON_SCHULZ[2] * gram @ gram) @ x
        expected.append(x)
    torch.testing.assert_close(orthogonalise(matrices), torch.stack(expected), rtol=0, atol=1e-9)
    torch.testing.assert_close(orthogonalise(matrices.float()).double(), torch.stack(expected), rtol=0, atol=2e-4)


def test_orthogonalise_of_zero_is_zero() -> None:
    assert torch.equal(orthogonalise(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))


def test_stacking_does_not_change_an_update() -> None:
    def train(alone: bool) -> list[Tensor]:
        torch.manual_seed(1)
        matrices = [nn.Parameter(torch.randn(6, 9, dtype=torch.float64)) for _ in range(4)]
        optimizers = [Muon([p], lr=0.1) for p in matrices] if alone else [Muon(matrices, lr=0.1)]
        for _ in range(3):
            for p in matrices:
                p.grad = torch.randn(6, 9, dtype=torch.float64)
            for optimizer in optimizers:
                optimizer.step()
        return [p.detach() for p in matrices]

    for one, other in zip(train(alone=True), train(alone=False), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


# -------------------------------------------------------------------------------- AdamW


def test_adamw_equals_torchs_fused_adamw_bit_for_bit() -> None:
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((5, 3), (7,))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    our_adamw = AdamW(ours, lr=0.1, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.2)
    their_adamw = torch.optim.AdamW(theirs, lr=0.1, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.2, fused=True)
    for rate in (0.1, 0.03, 0.2):
        our_adamw.lr = their_adamw.param_groups[0]["lr"] = rate
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        our_adamw.step()
        their_adamw.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)
            assert all(
                torch.equal(value, their_adamw.state[other][key]) for key, value in our_adamw.state[mine].items()
            )


def test_learning_does_not_import_torchs_compiler() -> None:
    code = """if True:
        import sys, torch
        from lyceum.train.optim import Learner, OptimizerSettings
        module = torch.nn.ModuleDict({"layers": torch.nn.Linear(4, 4)})
        Learner(module, OptimizerSettings(lr=0.1, matrix_lr=0.1)).update(1.0)
        assert "torch._dynamo" not in sys.modules
        torch.optim.AdamW(module.parameters())
        assert "torch._dynamo" in sys.modules  # the control: torch's own optimizers do
    """
    subprocess.run([sys.executable, "-c", code], check=True)


# -------------------------------------------------------------------------------- the learner


def test_matrices_inside_layers_go_to_muon_and_everything_else_to_adamw() -> None:
    names = {name: is_layer_matrix(name, p) for name, p in Tiny().named_parameters()}
    assert {name for name, is_matrix in names.items() if is_matrix} == {
        f"layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("q", "k", "up")
    }


@pytest.mark.parametrize("matrix_lr", [0.0, 0.02])
def test_learner_equals_torch_optimizers_given_the_same_gradients(matrix_lr: float) -> None:
    settings = OptimizerSettings(lr=0.01, matrix_lr=matrix_lr, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-5)
    module, other = Tiny(), Tiny()
    other.load_state_dict(module.state_dict())
    learner = Learner(module, settings)
    named = dict(other.named_parameters())
    matrices = [p for name, p in named.items() if is_layer_matrix(name, p)]
    rest = [p for name, p in named.items() if not is_layer_matrix(name, p)]
    adam = {"betas": (0.8, 0.9), "eps": 1e-5}
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=0.005, weight_decay=0.0, **adam)]
    if matrix_lr:
        optimizers.append(torch.optim.Muon(matrices, lr=0.01, weight_decay=0.2, momentum=0.95))
    else:
        optimizers.append(torch.optim.AdamW(matrices, lr=0.005, weight_decay=0.2, **adam))
    for _ in range(3):
        fill_gradient(learner)
        learner.update(0.5)
        for (_, mine), theirs in zip(module.named_parameters(), other.parameters(), strict=True):
            theirs.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for (name, mine), theirs in zip(module.named_parameters(), other.parameters(), strict=True):
        tolerance = 2e-3 if matrix_lr and is_layer_matrix(name, mine) else 1e-6
        assert torch.allclose(mine, theirs, atol=tolerance), name


def test_backward_accumulates_in_the_flat_gradient() -> None:
    learner = Learner(Tiny(), OptimizerSettings(lr=0.1))
    learner.accumulate_in(learner.gradient)
    for factor in (1.0, 2.0):
        (factor * sum(p.sum() for p in learner.parameters)).backward()
    assert torch.equal(learner.gradient, torch.full_like(learner.gradient, 3.0))


@pytest.mark.parametrize("matrix_lr", [0.0, 0.02])
def test_a_learner_restored_from_its_tensors_goes_on_bit_for_bit(matrix_lr: float, tmp_path: Path) -> None:
    settings = OptimizerSettings(lr=0.01, matrix_lr=matrix_lr, weight_decay=0.1)
    straight = Learner(Tiny(), settings, average_decay=0.9)
    for _ in range(3):
        fill_gradient(straight)
        straight.update(1.0)
    restored = Learner(Tiny(), settings, average_decay=0.9)
    write_state(tmp_path / STATE, straight.state_tensors(), {"step": 3})
    SavedState(tmp_path / STATE).copy_into(restored.state_tensors())
    for _ in range(3):
        fill_gradient(straight)
        restored.gradient.copy_(straight.gradient)
        straight.update(0.7)
        restored.update(0.7)
    here, there = straight.state_tensors(), restored.state_tensors()
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_running_average_follows_the_weights_by_hand_and_swaps() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 1.0)
    learner = Learner(module, OptimizerSettings(lr=0.5, eps=0.0), average_decay=0.9)
    learner.gradient.fill_(1.0)
    learner.update(1.0)  # AdamW's first step is lr * sign: 1.0 -> 0.5
    assert module.weight.item() == pytest.approx(0.5)
    learner.swap()
    assert module.weight.item() == pytest.approx(0.9 * 1.0 + 0.1 * 0.5)
    learner.swap()
    assert module.weight.item() == pytest.approx(0.5)


# -------------------------------------------------------------------------------- the schedule


def test_schedule_by_hand() -> None:
    def at(progress: float, shape: str = "linear") -> float:
        return schedule(progress, warmup=0.1, decay=0.4, shape=shape, final=0.2)

    assert at(0.05) == pytest.approx(0.5)
    assert at(0.1) == at(0.35) == at(0.6) == pytest.approx(1.0)
    assert at(0.8) == pytest.approx(0.6)  # half way from 1.0 to 0.2
    assert at(1.0) == pytest.approx(0.2)
    assert at(0.7, "cosine") == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert schedule(0.9, warmup=0.0, decay=0.0, shape="linear", final=0.0) == 1.0
