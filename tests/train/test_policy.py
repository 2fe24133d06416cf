"""Known answers for the token algebra: by hand, by enumeration, or by a second formula, never the same code again."""

from __future__ import annotations

import math

import pytest
import torch

from lyceum.train import policy
from lyceum.train.advantages import gae
from lyceum.train.objectives import Clip, clipped_policy_loss, clipped_value_loss


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- 3: padding


def build_rows(pad_left: int, pad_right: int) -> dict[str, torch.Tensor]:
    """One and the same pair of episodes behind any padding; whatever stands on the pads is wild."""
    generator = torch.Generator().manual_seed(7)
    rows = {k: torch.randn(2, 6, generator=generator).double() for k in ("logp", "old", "ref", "value", "value_old")}
    rows["mask"] = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]).double()
    return {
        k: torch.nn.functional.pad(v, (pad_left, pad_right), value=0.0 if k == "mask" else 1e4) for k, v in rows.items()
    }


def all_numbers(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    mask = rows["mask"]
    kl = policy.kl_estimate(rows["logp"], rows["ref"])
    reward = policy.token_rewards(kl, mask, tensor(1.0, -2.0), 0.1)
    advantage, returns = gae(reward, rows["value_old"], mask, 1.0, 0.95)
    white = policy.masked_whiten(advantage, mask)
    loss, stats = clipped_policy_loss(rows["logp"], rows["old"], white, mask, Clip(0.2))
    value_loss, value_clip = clipped_value_loss(rows["value"], rows["value_old"], returns, mask, 0.2)
    per_token = {"kl": kl, "reward": reward, "advantage": advantage, "return": returns, "white": white, "loss": loss}
    per_token |= {"value_loss": value_loss, "value_clip": value_clip} | stats
    numbers = {k: policy.masked_mean(v.abs(), mask) for k, v in per_token.items()}
    residual = policy.moment_sums(returns - rows["value"], mask)
    numbers["explained"] = torch.tensor(policy.explained_variance(residual, policy.moment_sums(returns, mask)))
    return numbers


@pytest.mark.parametrize("padding", [(0, 5), (5, 0), (3, 2)])
def test_every_number_is_the_same_whatever_the_padding(padding: tuple[int, int]) -> None:
    plain, padded = all_numbers(build_rows(0, 0)), all_numbers(build_rows(*padding))
    for name, value in plain.items():
        torch.testing.assert_close(padded[name], value, atol=1e-9, rtol=1e-9, msg=name)
        assert value != 0, f"{name} would not notice"


# ---------------------------------------------------------------- 5: KL by enumeration


def five_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    logits = tensor(0.3, -0.2, 0.5, 0.0, -0.6).requires_grad_()
    return logits, torch.log_softmax(tensor(0.1, 0.2, -0.3, 0.4, -0.2), 0)


def test_k1_and_k3_are_exact_in_expectation_k2_is_close_and_all_are_positive() -> None:
    logits, log_ref = five_tokens()
    logp = torch.log_softmax(logits.detach(), 0)
    true = (logp.exp() * (logp - log_ref)).sum()
    assert true > 0.05
    expected = {kind: (logp.exp() * policy.kl_estimate(logp, log_ref, kind)).sum() for kind in ("k1", "k2", "k3")}
    torch.testing.assert_close(expected["k1"], true)
    torch.testing.assert_close(expected["k3"], true)
    assert abs(expected["k2"] / true - 1) < 0.15
    assert (policy.kl_estimate(logp, log_ref, "k3") >= 0).all() and (policy.kl_estimate(logp, log_ref, "k1") < 0).any()


def test_kl_loss_gradients_k2_is_the_kl_k1_is_nothing_k3_is_the_reverse_kl() -> None:
    logits, log_ref = five_tokens()
    logp = torch.log_softmax(logits, 0)
    p = logp.detach().exp()  # on-policy: tokens are drawn from pi, no gradient through the draw

    def gradient(total: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(total, logits, retain_graph=True)[0]

    forward = gradient((logp.exp() * (logp - log_ref)).sum())
    reverse = gradient((log_ref.exp() * (log_ref - logp)).sum())
    torch.testing.assert_close(gradient((p * policy.kl_estimate(logp, log_ref, "k2")).sum()), forward)
    torch.testing.assert_close(gradient((p * policy.kl_estimate(logp, log_ref, "k1")).sum()), torch.zeros(5).double())
    torch.testing.assert_close(gradient((p * policy.kl_estimate(logp, log_ref, "k3")).sum()), reverse)


# ---------------------------------------------------------------- 6: rankings


def test_bradley_terry_gradient_by_hand() -> None:
    # d/ds_better of -log sigmoid(s_better - s_worse) = -sigmoid(-(s_better - s_worse)); at a gap of log 3 that is -1/4
    score = tensor(math.log(3.0), 0.0).requires_grad_()
    policy.ranking_loss(score, policy.ranking_pairs(tensor(1, 2), torch.tensor([0, 0]))).backward()
    torch.testing.assert_close(score.grad, tensor(-0.25, 0.25))


def test_k_wise_loss_is_the_mean_of_its_pairs_and_weighs_prompts_equally() -> None:
    score = tensor(0.3, -1.0, 2.0, 0.5, 1.0)
    rank, group = tensor(2, 3, 1, 1, 2), torch.tensor([0, 0, 0, 1, 1])
    pairs = policy.ranking_pairs(rank, group)

    def pair(better: int, worse: int) -> float:
        return math.log(1 + math.exp(score[worse].item() - score[better].item()))

    by_hand = (pair(2, 0) + pair(2, 1) + pair(0, 1)) / 3 + pair(3, 4)
    assert len(pairs) == 4 and pairs.num_groups == 2
    assert policy.ranking_loss(score, pairs).item() == pytest.approx(by_hand)


def test_k_wise_loss_does_not_depend_on_the_order_of_responses() -> None:
    torch.manual_seed(0)
    score, rank, group = torch.randn(9).double(), torch.randperm(9).double(), torch.arange(9) // 3
    order = torch.randperm(9)
    straight = policy.ranking_loss(score, policy.ranking_pairs(rank, group))
    shuffled = policy.ranking_loss(score[order], policy.ranking_pairs(rank[order], group[order]))
    torch.testing.assert_close(straight, shuffled)


def test_ties_make_no_pair_and_a_prompt_of_ties_no_loss() -> None:
    pairs = policy.ranking_pairs(tensor(1, 2, 2, 5, 5), torch.tensor([0, 0, 0, 1, 1]))
    assert sorted(zip(pairs.better_P.tolist(), pairs.worse_P.tolist(), strict=True)) == [(0, 1), (0, 2)]
    assert pairs.num_groups == 1
    nothing = policy.ranking_pairs(tensor(1, 1), torch.tensor([0, 0]))
    assert len(nothing) == 0 and policy.ranking_loss(tensor(1.0, 2.0), nothing).item() == 0


def test_ties_make_half_a_pair_where_asked() -> None:
    rank, group = tensor(1, 2, 2, 5, 5), torch.tensor([0, 0, 0, 1, 1])
    pairs = policy.ranking_pairs(rank, group, ties=True)
    assert sorted(zip(pairs.better_P.tolist(), pairs.worse_P.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2), (3, 4)]
    assert pairs.num_groups == 2 and pairs.weight_P.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])
    # of a tie's two scores a half label is least where they are equal, whichever of them is called better
    gap = tensor(0.6, -0.6).requires_grad_()
    policy.pair_loss(gap, probability_P=tensor(0.5, 0.5)).sum().backward()
    pull = 0.5 - 1 / (1 + math.exp(0.6))
    assert gap.grad is not None and gap.grad.tolist() == pytest.approx([pull, -pull])


def test_a_margin_can_be_each_pairs_own() -> None:
    gap, own = tensor(0.7, 0.7), tensor(0.0, 1.0)
    one_by_one = [policy.pair_loss(gap[i : i + 1], required_margin=float(own[i])).item() for i in range(2)]
    assert policy.pair_loss(gap, required_margin=own).tolist() == one_by_one


def test_soft_label_is_the_expected_loss_and_margin_shifts_the_gap() -> None:
    gap = tensor(0.7)
    win, lose = math.log(1 + math.exp(-0.7)), math.log(1 + math.exp(0.7))
    assert policy.pair_loss(gap, probability_P=tensor(0.8)).item() == pytest.approx(0.8 * win + 0.2 * lose)
    assert policy.pair_loss(gap, required_margin=0.7).item() == pytest.approx(math.log(2))
    coin = gap.clone().requires_grad_()
    policy.pair_loss(coin * 0, probability_P=tensor(0.5)).sum().backward()
    assert coin.grad is not None and coin.grad.item() == 0


# ---------------------------------------------------------------- 9 and 10: whitening, controller


def test_whitening_gives_mean_zero_and_biased_variance_one_on_the_mask() -> None:
    torch.manual_seed(0)
    value, mask = 3 + 5 * torch.randn(6, 7).double(), (torch.rand(6, 7) < 0.6).double()
    white = policy.masked_whiten(value, mask)
    kept = white[mask.bool()]
    assert abs(kept.mean()) < 1e-12 and abs(kept.var(unbiased=False) - 1) < 1e-8
    assert white[mask == 0].abs().sum() == 0


def test_whitening_without_shift_keeps_the_sign_and_the_ratio_of_the_mean() -> None:
    value, mask = tensor(1, 2, 3, 1e9)[None], tensor(1, 1, 1, 0)[None]
    white = policy.masked_whiten(value, mask, shift_mean=False)[0, :3]
    torch.testing.assert_close(white, tensor(1, 2, 3) / math.sqrt(2 / 3), atol=1e-6, rtol=1e-6)


def test_whitening_of_parts_with_common_sums_is_whitening_of_the_whole() -> None:
    torch.manual_seed(0)
    value, mask = torch.randn(6, 4).double(), torch.ones(6, 4)
    sums = policy.moment_sums(value[:2], mask[:2]) + policy.moment_sums(value[2:], mask[2:])
    parts = torch.cat([policy.masked_whiten(v, torch.ones_like(v), sums) for v in (value[:2], value[2:])])
    torch.testing.assert_close(parts, policy.masked_whiten(value, mask))


def test_adaptive_kl_on_a_fixed_sequence_and_its_bounds() -> None:
    # target 6, horizon 10,000, 512 episodes, from 0.15: errors are 12/6-1 -> +.2, 6.6/6-1 = +.1, 0 -> -.2, 6 -> 0
    control = policy.AdaptiveKL(0.15, target=6.0, horizon=10_000)
    expected = 0.15
    for kl, error in ((12.0, 0.2), (6.6, 0.1), (0.0, -0.2), (6.0, 0.0)):
        expected *= 1 + error * 0.0512
        assert control.update(kl, 512) == pytest.approx(expected)
    assert policy.AdaptiveKL(0.02).update(100.0, 512) == 0.02


# ---------------------------------------------------------------- 11: where the score stands


def test_score_stands_on_the_last_real_token_with_and_without_an_end_and_with_the_end_first() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 1, 1], [0, 1, 0, 0, 0]])
    assert policy.last_index(mask).tolist() == [3, 4, 1]
    reward = policy.token_rewards(torch.ones(3, 5).double(), mask, tensor(5, 6, 7), 0.1)
    expected = torch.stack([tensor(0, -0.1, -0.1, 4.9, 0), tensor(0, -0.1, -0.1, -0.1, 5.9), tensor(0, 6.9, 0, 0, 0)])
    torch.testing.assert_close(reward, expected)


def test_missing_end_is_replaced_or_subtracted_only_where_the_end_is_missing() -> None:
    score, ended = tensor(2.0, 2.0), torch.tensor([True, False])
    assert policy.apply_missing_end(score, ended, -1.0, "replace").tolist() == [2.0, -1.0]
    assert policy.apply_missing_end(score, ended, 1.0, "subtract").tolist() == [2.0, 1.0]
    assert policy.apply_missing_end(score, ended, 1.0, "keep").tolist() == [2.0, 2.0]


# ---------------------------------------------------------------- log-probabilities, entropy, the rest


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chosen_logprobs_stand_where_the_mask_does_with_their_gradients(temperature: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(11, (3, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]])
    picked = hidden.flatten(0, 1)[policy.predicting(mask)]
    logp, entropy = policy.chosen_logprobs(picked, head, tokens, mask, temperature=temperature, with_entropy=True)
    choice = torch.distributions.Categorical(logits=(hidden[:, :-1] @ head.T) / temperature)
    expected = torch.nn.functional.pad(choice.log_prob(tokens[:, 1:]), (1, 0)) * mask
    torch.testing.assert_close(logp, expected)
    torch.testing.assert_close(entropy, torch.nn.functional.pad(choice.entropy(), (1, 0)).detach() * mask)
    weight = torch.randn(3, 6).double()
    ours = torch.autograd.grad((logp * weight).sum(), (hidden, head))
    theirs = torch.autograd.grad((expected * weight).sum(), (hidden, head))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)


def test_the_state_before_a_chosen_token_predicts_it() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 0, 1]])
    assert policy.predicting(mask).tolist() == [1, 2, 8]
    with pytest.raises(AssertionError, match="no prefix"):
        policy.predicting(torch.tensor([[1, 0]]))


def test_masked_statistics_survive_infinities_and_empty_masks() -> None:
    value, mask = tensor(1, 3, math.inf)[None], tensor(1, 1, 0)[None]
    assert policy.masked_mean(value, mask) == 2
    assert policy.moment_sums(value, mask).tolist() == [2, 4, 10]
    assert policy.masked_mean(value, mask * 0) == 0
    assert policy.mean_and_variance(policy.moment_sums(value, mask * 0)) == (0, 0)


def test_explained_variance_is_one_for_the_truth_and_zero_for_a_constant() -> None:
    returns, mask = tensor(1, 2, 4)[None], torch.ones(1, 3)
    whole = policy.moment_sums(returns, mask)
    assert policy.explained_variance(policy.moment_sums(returns * 0, mask), whole) == 1.0
    assert policy.explained_variance(policy.moment_sums(returns - 7, mask), whole) == pytest.approx(0.0)
    assert policy.explained_variance(policy.moment_sums(2 * returns, mask), whole) == pytest.approx(-3.0)
