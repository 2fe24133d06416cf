"""Presets: what each one's expected gradient is, by enumeration; and what cannot work together is refused at once."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from lyceum.config import build
from lyceum.errors import ConfigError
from lyceum.stages.algorithms import KL_PLACES, PRESETS, OnPolicyConfig, resolve
from lyceum.stages.grpo import GRPO, WITHOUT_CRITIC, GRPOConfig
from lyceum.stages.ppo import PPO, PPOConfig
from lyceum.train import policy as algebra
from lyceum.train.advantages import ESTIMATORS
from lyceum.train.objectives import AGGREGATORS, OBJECTIVES, Clip

REWARD = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64)  # of replies of one token, out of four
LOG_REF = torch.log_softmax(torch.tensor([0.2, 0.1, -0.4, 0.3], dtype=torch.float64), 0)


def expected_gradient(name: str, group_size: int = 2, beta: float = 0.0, **changed: str) -> torch.Tensor:
    """The mean, over all groups that a policy of four replies could draw, of a preset's gradient before any update."""
    preset = replace(PRESETS[name], **changed)
    logits = torch.tensor([0.3, -0.2, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    logp_V = torch.log_softmax(logits, 0)
    mask_BT, group_B, total = torch.ones(group_size, 1), torch.zeros(group_size).long(), torch.zeros(())
    for replies in itertools.product(range(4), repeat=group_size):
        logp_BT = logp_V[list(replies)].unsqueeze(1)
        kl_BT = algebra.kl_estimate(logp_BT.detach(), LOG_REF[list(replies)].unsqueeze(1))
        in_reward = beta if preset.kl == "reward" else 0.0
        reward_BT = algebra.token_rewards(kl_BT, mask_BT, REWARD[list(replies)], in_reward)
        advantage_BT, _ = ESTIMATORS[preset.advantage](reward_BT, reward_BT * 0, mask_BT, group_B, 1.0, 1.0)
        loss_BT, _ = OBJECTIVES[preset.objective](logp_BT, logp_BT.detach(), advantage_BT, mask_BT, Clip())
        if preset.kl != "reward":
            loss_BT = loss_BT + beta * algebra.kl_estimate(logp_BT, LOG_REF[list(replies)].unsqueeze(1), preset.kl)
        rule = AGGREGATORS[preset.mean]
        probability = logp_BT.detach().sum().exp()
        total = total + probability * rule.total(loss_BT, mask_BT, 1) / rule.count(mask_BT)
    return -torch.autograd.grad(total, logits)[0]


def true_gradient(beta: float = 0.0) -> torch.Tensor:
    """Of E[r] - beta KL(pi || pi_ref), in closed form."""
    logits = torch.tensor([0.3, -0.2, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    logp = torch.log_softmax(logits, 0)
    return torch.autograd.grad((logp.exp() * (REWARD - beta * (logp - LOG_REF))).sum(), logits)[0]


@pytest.mark.parametrize("group_size", [2, 3])
def test_rloo_is_the_policy_gradient_dr_grpo_a_known_part_of_it_and_grpo_another(group_size: int) -> None:
    true = true_gradient()
    torch.testing.assert_close(expected_gradient("rloo", group_size), true)
    torch.testing.assert_close(expected_gradient("reinforce++", group_size), true)  # before whitening
    torch.testing.assert_close(expected_gradient("dr_grpo", group_size), true * (1 - 1 / group_size))
    grpo = expected_gradient("grpo", group_size)
    assert torch.cosine_similarity(grpo, true, 0) > 0.8  # it points the same way, in units of the groups' deviations
    assert not torch.allclose(grpo / grpo.norm(), true / true.norm(), atol=0.02)


def test_kl_in_the_reward_and_k2_in_the_loss_have_the_gradient_of_the_penalised_reward_and_k3_has_not() -> None:
    true = true_gradient(0.7)
    torch.testing.assert_close(expected_gradient("rloo", 2, 0.7), true)
    torch.testing.assert_close(expected_gradient("rloo", 2, 0.7, kl="k2"), true)
    assert (expected_gradient("rloo", 2, 0.7, kl="k3") - true).abs().max() > 1e-3  # the control


def test_over_two_tokens_only_kl_in_the_reward_has_the_whole_gradient() -> None:
    # the first of two choices decides among which two the second is made
    logits = torch.tensor([[0.3, -0.2], [0.5, 0.0], [-0.4, 0.9]], dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.tensor([[0.0, 0.1], [-0.6, 0.4], [0.2, 0.3]], dtype=torch.float64), 1)
    reward, beta, mask_BT = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64), 0.7, torch.ones(4, 2)
    first, second = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])

    def of_reply(table: torch.Tensor) -> torch.Tensor:
        return torch.stack([table[0, first], table[1 + first, second]], 1)

    logp_BT, ref_BT = of_reply(torch.log_softmax(logits, 1)), of_reply(ref)
    p_B = logp_BT.sum(1).exp()
    (true,) = torch.autograd.grad((p_B * (reward - beta * (logp_BT - ref_BT).sum(1))).sum(), logits, retain_graph=True)

    def expected(kl: str) -> torch.Tensor:
        kl_BT = algebra.kl_estimate(logp_BT.detach(), ref_BT)
        reward_BT = algebra.token_rewards(kl_BT, mask_BT, reward, beta if kl == "reward" else 0.0)
        advantage_BT, _ = ESTIMATORS["returns"](reward_BT, reward_BT * 0, mask_BT, first, 1.0, 1.0)
        loss_BT, _ = OBJECTIVES["reinforce"](logp_BT, logp_BT.detach(), advantage_BT, mask_BT, Clip())
        if kl != "reward":
            loss_BT = loss_BT + beta * algebra.kl_estimate(logp_BT, ref_BT, kl)
        return -torch.autograd.grad((p_B.detach() * loss_BT.sum(1)).sum(), logits, retain_graph=True)[0]

    torch.testing.assert_close(expected("reward"), true)
    torch.testing.assert_close(expected("k2")[1:], true[1:])  # nothing comes after the second choice
    assert (expected("k2")[0] - true[0]).abs().max() > 0.01 and (expected("k3") - true).abs().max() > 0.01


def test_every_word_of_every_preset_is_in_its_table() -> None:
    for preset in PRESETS.values():
        assert preset.advantage in ESTIMATORS and preset.objective in OBJECTIVES
        assert preset.mean in AGGREGATORS and preset.kl in KL_PLACES
    assert set(WITHOUT_CRITIC) == set(PRESETS) - {"ppo"}


def test_settings_replace_single_words_of_a_preset() -> None:
    config = GRPOConfig(algorithm="rloo", advantage="group_mean", objective="clipped", mean="token_mean", kl="k2")
    stage = GRPO(config)
    assert stage.algorithm == replace(PRESETS["reinforce++_baseline"], whitens=False)
    assert PPO(PPOConfig()).algorithm == PRESETS["ppo"]


@pytest.mark.parametrize(
    ("kind", "settings", "message", "hint"),
    [
        (GRPOConfig, {"group_size": 1}, "group_size is 1", "group_size to 2 or more"),
        (GRPOConfig, {"algorithm": "rloo", "minibatches": 2}, "right for the policy that sampled alone", "clipped"),
        (PPOConfig, {"objective": "reinforce"}, "an iteration has 2 x 4 updates", "epochs = 1"),
        (PPOConfig, {"top_p": 0.9}, "drawn from another distribution", "temperature is allowed"),
        (GRPOConfig, {"top_k": 40}, "every ratio, and every KL, would be biased", "leave them out"),
        (PPOConfig, {"prompts_per_iteration": 3}, "3 episodes an iteration cannot fill 4 minibatches", "raise"),
        (PPOConfig, {"kl_beta": 0.0, "kl_target": 6.0}, "0 would stay 0", "kl_beta above 0"),
        (PPOConfig, {"lora_rank": 2, "train_layers": 1}, "both say what is trained", "choose one"),
        (PPOConfig, {"critic": "shared", "critic_warmup": 1}, "cannot learn alone", "critic_warmup = 0"),
        (GRPOConfig, {"rewards": {"exact_answr": 1.0}}, "'exact_answr' is no reward", "exact_answer"),
        (GRPOConfig, {"reward_pattern": "("}, "no regular expression", "re"),
    ],
)
def test_what_cannot_work_together_is_refused_when_the_recipe_is_read(
    kind: type, settings: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(kind, settings, "[here]")
    assert hint in caught.value.hint


def test_unknown_names_fail_with_the_list_of_known_ones() -> None:
    with pytest.raises(ConfigError, match="no preset 'gpro'") as caught:
        resolve(OnPolicyConfig(), "gpro")
    assert "dr_grpo" in caught.value.hint
    with pytest.raises(ConfigError, match="no advantage 'best'") as caught:
        resolve(OnPolicyConfig(), "grpo", "best")
    assert "leave_one_out" in caught.value.hint
