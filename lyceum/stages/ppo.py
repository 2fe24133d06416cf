"""PPO against a reward model, with the pretraining mix: the third step of InstructGPT.

The paper: L. Ouyang et al., "Training language models to follow instructions with human feedback" (2022), section 3.5
and appendix C.4; the algorithm is J. Schulman et al., "Proximal policy optimization" (2017), its use on language models
D. Ziegler et al. (2019) and N. Stiennon et al. (2020). Symbols and names:

    pi_RL, pi_SFT    policy, frozen["reference"]
    pi_old           logp_old_BT, recomputed by the training graph
    r_theta(x, y)    score_B, at the last real token of prompt + response
    V                critic, a network of its own, begun as the reward model
    beta, gamma      kl_beta (adaptive if kl_target is set), ptx_coef; config.gamma is the discount

One iteration (`lyceum.stages.onpolicy`): sample a reply to each of `prompts_per_iteration` prompts; score them; per-token
rewards -beta (log pi_old - log pi_SFT), plus the score on the last token; advantages by GAE, whitened over the whole
iteration and all ranks; then `epochs` passes in `minibatches` optimizer steps, every step with its share of pretraining
text. What stands here is what PPO has and its relatives lack: the critic.

Deviations, each with its reason:
- The loss is a mean over the tokens of the *whole* minibatch (token-mean), however it is cut into micro-batches and
  ranks; the pretraining term is a mean over its own tokens. InstructGPT's 27.8 belongs to its own scaling; our
  `ptx_coef` is of order 1, and the log shows both terms' gradient norms so that their ratio can be chosen.
- A reply that does not end by itself gets `missing_end_score` *in place of* its score (Ziegler et al. 2019, Huang et
  al. 2024): the reward model never saw an unfinished reply. TRL subtracts from the score instead: `missing_end`.
- Policy and critic share nothing, so `vf_coef` scales only the critic's gradient before clipping. With
  `critic = "shared"` (Ziegler et al. 2019) the critic is a head on the policy's trunk, and `vf_coef` weighs the two.

Run by `lyceum ppo RECIPE`. What it is not: asynchronous, or able to mend a sampler that is not the policy; it refuses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lyceum.batches.pack import TokenBatch
from lyceum.batches.pairs import Prompts
from lyceum.config import setting
from lyceum.errors import ConfigError
from lyceum.model.heads import ScoreModel
from lyceum.model.transformer import Decoder
from lyceum.stages.algorithms import OnPolicyConfig, resolve
from lyceum.stages.onpolicy import Batch, OnPolicy
from lyceum.stages.reward import RewardModel
from lyceum.stages.rewards import Dense, RewardSource, Score
from lyceum.stages.rollouts import Rollout, explained_variance
from lyceum.train.loop import run_stage
from lyceum.train.objectives import clipped_value_loss
from lyceum.train.policy import predicting
from lyceum.train.stage import Metrics, Term, Trained

if TYPE_CHECKING:
    from lyceum.run import Work

VERSION = 1

# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class PPOConfig(OnPolicyConfig):
    """Settings of PPO; the defaults follow InstructGPT where a small model allows it."""

    lam: float = setting(0.95, "lambda of the advantage estimate", low=0.0, high=1.0)
    critic: str = setting(
        "own", "own = a network, begun as the reward model; shared = a head on the policy", choices=("own", "shared")
    )
    critic_warmup: int = setting(0, "iterations at the start in which the critic learns alone", low=0)
    value_clip: float = setting(0.2, "how far a value may move before its loss is clipped", low=0.0)
    vf_coef: float = setting(1.0, "weight of the value loss", low=0.0)
    critic_lr: float = setting(3e-4, "the critic's peak learning rate of AdamW", low=0.0)
    critic_matrix_lr: float = setting(0.0, "the critic's peak learning rate of Muon; 0 = AdamW", low=0.0)

    def __post_init__(self) -> None:
        resolve(self, *self.preset)
        if self.critic == "shared" and self.critic_warmup:
            raise ConfigError(
                "a critic on the policy's own trunk cannot learn alone: its loss moves the policy",
                hint="set critic_warmup = 0, or critic = 'own'",
            )

    @property
    def preset(self) -> tuple[str, ...]:
        """PPO itself."""
        return ("ppo",)


# ---------------------------------------------------------------- equations (see train/advantages.py, objectives.py)


def shifted_values(score_N: Tensor, mask_BT: Tensor, offset: float) -> Tensor:
    """V_t, the value of the state in which token t is chosen: the critic's output at t - 1, less `offset`; else 0.

    score_N: that output at the positions `lyceum.train.policy.predicting(mask_BT)`.
    """
    return score_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, score_N - offset)


# ---------------------------------------------------------------- the stage


class PPO(OnPolicy):
    """Proximal policy optimization of a language model: the on-policy stage with a critic.

    Args:
        config: its settings.
        reward: where rewards come from; None takes what the settings name, by default the reward model of
            `work.inputs["reward"]`.
        dense: rewards of single tokens, in addition, such as a trainer's while the reply was shown.
    """

    kind = "ppo"
    config: PPOConfig

    def __init__(
        self,
        config: PPOConfig,
        reward: RewardSource | Callable[..., list[Score]] | None = None,
        dense: Dense | None = None,
    ) -> None:
        super().__init__(config, reward, dense)
        self.lam = config.lam

    def begin(
        self,
        policy: Decoder,
        prompts: Prompts,
        *,
        seed: int,
        judge: RewardModel | None = None,
        text: Callable[[int, int], TokenBatch] | None = None,
        stop_ids: tuple[int, ...] = (),
        pad_id: int = 0,
    ) -> None:
        """Sets the stage from things in memory; without a judge the critic begins as the policy, with a head of zeros."""
        config, self.value_offset = self.config, 0.0
        self.critic: ScoreModel | nn.Linear
        weight = next(policy.parameters())
        if config.critic == "shared":
            self.critic = nn.Linear(policy.spec.width, 1, bias=False, device=weight.device, dtype=weight.dtype)
            nn.init.zeros_(self.critic.weight)
        elif judge is not None:
            self.critic, self.value_offset = copy.deepcopy(judge.model), judge.centre
        else:
            self.critic = ScoreModel.from_decoder(copy.deepcopy(policy)).to(weight.dtype)
            nn.init.zeros_(self.critic.score.weight)
        super().begin(policy, prompts, seed=seed, judge=judge, text=text, stop_ids=stop_ids, pad_id=pad_id)
        critic_settings = config.optimizer(lr=config.critic_lr, matrix_lr=config.critic_matrix_lr)
        self.trained["critic"] = Trained(self.critic, critic_settings, config.clip_norm, save_as=None)

    def values(self, part: Rollout, hidden_ND: Tensor) -> Tensor:
        """The critic's value of each state in which a token was chosen."""
        if isinstance(self.critic, ScoreModel):
            score_N = self.critic(part.tokens_BT, at_N=predicting(part.mask_BT))
        else:
            score_N = self.critic(hidden_ND).squeeze(-1)
        return shifted_values(score_N, part.mask_BT, self.value_offset)

    def note(self, rollout: Rollout, kl_BT: Tensor, counted: dict[str, float]) -> None:
        """Adds how well the critic knew the returns."""
        self.policy_weight = float(self.iteration >= self.config.critic_warmup)
        explained = explained_variance(rollout)
        super().note(rollout, kl_BT, counted)
        self.figures["val/var_explained"] = explained

    def counts(self, micro_batch: Batch) -> dict[str, float]:
        """The critic's unit is the token."""
        value = {"value": float(micro_batch.num_tokens)} if isinstance(micro_batch, Rollout) else {}
        return {**super().counts(micro_batch), **value}

    def policy_terms(self, part: Rollout, hidden_ND: Tensor) -> tuple[dict[str, Term], Metrics]:
        """The policy's terms and the clipped value loss."""
        terms, metrics = super().policy_terms(part, hidden_ND)
        error_BT, clipped_BT = clipped_value_loss(
            self.values(part, hidden_ND), part.value_old_BT, part.return_BT, part.mask_BT, self.config.value_clip
        )
        terms["value"] = Term(error_BT.sum(), self.config.vf_coef)
        return terms, {**metrics, "val/clipfrac": (clipped_BT.sum(), float(part.num_tokens))}


def run(config: PPOConfig, work: Work) -> dict[str, Any]:
    """Trains `work.inputs["policy"]` against the reward model of `work.inputs["reward"]`; returns the report."""
    return run_stage(PPO(config), work)
