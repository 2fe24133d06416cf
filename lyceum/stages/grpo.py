"""GRPO, Dr.GRPO, RLOO and REINFORCE++: learning from one's own samples without a critic.

The papers: Z. Shao et al., "DeepSeekMath" (2024), section 4.1 (GRPO); Z. Liu et al., "Understanding R1-Zero-like
training" (2025, Dr.GRPO); A. Ahmadian et al., "Back to basics" (2024, RLOO); J. Hu, "REINFORCE++" (2025). A critic tells
how good a reply was expected to be; here the other replies to the same prompt tell it. Symbols and names:

    q; o_1 ... o_G        a prompt; the `group_size` replies to it, which carry one number in group_B
    r_i, A_i,t            score_B, advantage_BT (`lyceum.train.advantages`)
    pi_theta_old, pi_ref  logp_old_BT, logp_ref_BT
    epsilon, beta         clip, kl_beta

Everything but the presets (`lyceum.stages.algorithms`) and the defaults is the one stage `lyceum.stages.onpolicy`.

Deviations, each with its reason:
- One update an iteration (`epochs` x `minibatches` = 1) by default, so that it is exactly on-policy and the clip never
  acts; the papers take several from larger iterations.
- A reply without an end keeps its score: what checks an answer does not mind, and length is bounded all the same.
- RLOO's KL penalty counts in each reply's own reward *and* in its baseline, as in the authors' code.
- REINFORCE++ weighs tokens alike (token_mean) and whitens over all ranks.

Run by `lyceum grpo RECIPE`, with rewards by rule (`lyceum.stages.rewards`) or by a reward model. What it is not: a home of
DAPO's resampling until groups differ (flat groups are counted, and dropped if asked), or of length penalties.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lyceum.config import setting
from lyceum.stages.algorithms import PRESETS, OnPolicyConfig, resolve
from lyceum.stages.onpolicy import OnPolicy
from lyceum.train.advantages import ESTIMATORS
from lyceum.train.loop import run_stage

if TYPE_CHECKING:
    from lyceum.run import Work

VERSION = 1

WITHOUT_CRITIC = tuple(name for name, preset in PRESETS.items() if preset.advantage != "gae")


@dataclass(frozen=True)
class GRPOConfig(OnPolicyConfig):
    """Settings of the methods without a critic; the defaults are GRPO's."""

    algorithm: str = setting("grpo", "the preset", choices=WITHOUT_CRITIC)
    advantage: str = setting(
        "",
        "how a reward becomes an advantage; empty = as the preset says",
        choices=("", *(name for name in ESTIMATORS if name != "gae")),
    )
    prompts_per_iteration: int = setting(8, "prompts of one iteration, over all ranks", low=1)
    group_size: int = setting(8, "replies to each of them", low=1)
    epochs: int = setting(1, "passes over the episodes of an iteration", low=1)
    minibatches: int = setting(1, "optimizer steps of one pass", low=1)
    iterations: int = setting(80, "rounds of sampling and updating", low=1)
    norms_every: int = setting(10, "steps between lines with each term's own gradient norm: a pass back a term", low=1)
    missing_end: str = setting(
        "keep", "what missing_end_score does to a reply without an end", choices=("replace", "subtract", "keep")
    )
    kl_beta: float = setting(0.04, "KL coefficient (where the controller starts, if kl_target is set)", low=0.0)

    def __post_init__(self) -> None:
        resolve(self, *self.preset)

    @property
    def preset(self) -> tuple[str, ...]:
        """The preset, and the estimator if the settings name another."""
        return self.algorithm, self.advantage


class GRPO(OnPolicy):
    """A policy that learns from how its replies to one prompt compare."""

    kind = "grpo"
    config: GRPOConfig


def run(config: GRPOConfig, work: Work) -> dict[str, Any]:
    """Trains `work.inputs["policy"]` on the rewards that its settings name; returns the report."""
    return run_stage(GRPO(config), work)
