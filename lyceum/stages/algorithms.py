"""What on-policy methods differ in, as data: the presets, and the settings that all of them share.

A preset is five words, each a name in a table: how a reward becomes an advantage, whether advantages are whitened,
which surrogate is made small, how tokens weigh against each other, and where the KL to the reference counts. The
stage (`lyceum.stages.onpolicy`) looks each word up once, when it is made; what cannot work together is refused when the
recipe is read.

    preset                 advantage      whitened  objective  mean           KL       paper
    ppo                    gae            yes       clipped    token_mean     reward   Schulman et al. 2017; Ouyang 2022
    grpo                   group_score    no        clipped    sequence_mean  k3       Shao et al. 2024 (DeepSeekMath)
    dr_grpo                group_mean     no        clipped    constant       k3       Liu et al. 2025
    rloo                   leave_one_out  no        reinforce  sequence_sum   reward   Ahmadian et al. 2024
    reinforce++            returns        yes       clipped    token_mean     reward   Hu 2025
    reinforce++_baseline   group_mean     yes       clipped    token_mean     k2       Hu 2025

The words are explained in `lyceum.train.advantages` and `lyceum.train.objectives`. KL "reward": k1 of each token is
taken off its reward, times beta. "k2", "k3": a term of the loss, weighted as the surrogate is. On the policy's own samples
the gradient of k2 is that of KL(pi || pi_ref) of the choice at hand; of k3 it is that of KL(pi_ref || pi), which the GRPO
paper uses all the same. Either leaves out that an early token leads to states where later ones cost more: only a
penalty in the reward knows that. k1 as a loss has no gradient in expectation, and is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lyceum.config import setting
from lyceum.errors import ConfigError
from lyceum.evals.verify import check_pattern
from lyceum.stages.rewards import check_name
from lyceum.train.advantages import ESTIMATORS, OVER_GROUPS
from lyceum.train.objectives import AGGREGATORS, OBJECTIVES
from lyceum.train.stage import TrainConfig


@dataclass(frozen=True)
class Algorithm:
    """One method: a word from each table (see the module's page)."""

    advantage: str
    whitens: bool
    objective: str
    mean: str
    kl: str


PRESETS = {
    "ppo": Algorithm("gae", True, "clipped", "token_mean", "reward"),
    "grpo": Algorithm("group_score", False, "clipped", "sequence_mean", "k3"),
    "dr_grpo": Algorithm("group_mean", False, "clipped", "constant", "k3"),
    "rloo": Algorithm("leave_one_out", False, "reinforce", "sequence_sum", "reward"),
    "reinforce++": Algorithm("returns", True, "clipped", "token_mean", "reward"),
    "reinforce++_baseline": Algorithm("group_mean", True, "clipped", "token_mean", "k2"),
}
KL_PLACES = ("reward", "k2", "k3")


@dataclass(frozen=True)
class OnPolicyConfig(TrainConfig):
    """Settings of every method that learns from its own samples; the defaults are PPO's."""

    prompts: str = setting("", "a file of prompts, in place of those of the lessons before it")
    iterations: int = setting(20, "rounds of sampling and updating", low=1)
    prompts_per_iteration: int = setting(64, "prompts of one iteration, over all ranks", low=1)
    group_size: int = setting(1, "replies to each of them", low=1)
    epochs: int = setting(2, "passes over the episodes of an iteration", low=1)
    minibatches: int = setting(4, "optimizer steps of one pass", low=1)
    max_response_tokens: int = setting(64, "longest reply, in tokens", low=1)
    temperature: float = setting(1.0, "sampling temperature, and that of every log-probability", low=0.01)
    top_k: int = setting(0, "must stay 0: a reply from the likeliest tokens alone is not the policy's", low=0)
    top_p: float = setting(1.0, "must stay 1, for the same reason", low=0.0, high=1.0)
    rewards: dict[str, float] = setting({}, "where scores come from, name = weight; none = the reward model")
    reward_pattern: str = setting("", "regular expression that verified replies must match; its first group answers")
    dense: str = setting("", "function of ids that rewards single tokens, in addition; empty = none")
    dense_coef: float = setting(1.0, "weight of its rewards")
    dense_decay: float = setting(1.0, "what that weight is multiplied by after each iteration", low=0.0, high=1.0)
    missing_end: str = setting(
        "replace", "what missing_end_score does to a reply without an end", choices=("replace", "subtract", "keep")
    )
    missing_end_score: float = setting(-3.0, "replaces (or is subtracted from) the score of a reply that does not end")
    score_clip: float = setting(0.0, "scores are kept between minus this and this; 0 = as they are", low=0.0)
    flat_groups: str = setting("keep", "groups whose advantages are all 0 in the update", choices=("keep", "drop"))
    kl_beta: float = setting(0.05, "KL coefficient (where the controller starts, if kl_target is set)", low=0.0)
    kl_target: float = setting(
        0.0, "KL in nats per response that an adaptive coefficient steers to; 0 = fixed", low=0.0
    )
    kl_horizon: float = setting(10_000.0, "episodes over which the adaptive coefficient reacts", low=1.0)
    kl: str = setting("", "where the KL counts; empty = as the preset says", choices=("", *KL_PLACES))
    objective: str = setting("", "the surrogate; empty = as the preset says", choices=("", *OBJECTIVES))
    mean: str = setting("", "how tokens weigh; empty = as the preset says", choices=("", *AGGREGATORS))
    whiten_rewards: bool = setting(False, "divide token rewards by their standard deviation (the mean stays)")
    gamma: float = setting(1.0, "discount per token", low=0.0, high=1.0)
    clip: float = setting(0.2, "how far a probability ratio may move before the objective is flat", low=0.0)
    clip_high: float = setting(0.0, "how far upwards, if not as far as downwards (DAPO: 0.28); 0 = clip", low=0.0)
    dual_clip: float = setting(0.0, "bound of the loss where the advantage is negative (3 is usual); 0 = none", low=0.0)
    ptx_coef: float = setting(0.0, "weight of the loss on pretraining text; 0 = none is read", low=0.0)
    ptx_rows: float = setting(
        0.25, "rows of pretraining text for each episode of a minibatch (InstructGPT: 8)", low=0.0
    )
    ptx_docs_share: float = setting(
        0.5, "share of these rows from the part docs, unless pretraining had weights", low=0.0, high=1.0
    )
    lora_rank: int = setting(0, "rank of low-rank adapters, trained in place of the weights; 0 = the weights", low=0)
    lora_alpha: float = setting(16.0, "what the adapters write is scaled by lora_alpha / lora_rank", low=0.0)
    train_layers: int = setting(0, "last layers that are trained, the rest shared with the reference; 0 = all", low=0)
    engine_batch: int = setting(64, "replies sampled at once", low=1)
    max_logprob_gap: float = setting(
        1e-4, "largest difference of sampler and training graph at the start, in nats", low=0.0
    )

    lr: float = setting(1e-4, "the policy's peak learning rate of AdamW", low=0.0)
    matrix_lr: float = setting(0.0, "the policy's peak learning rate of Muon; 0 = AdamW at lr", low=0.0)
    eps: float = setting(1e-5, "AdamW's epsilon", low=0.0)
    warmup: float = setting(0.05, "share of the run over which the learning rate rises", low=0.0, high=1.0)
    decay: float = setting(0.0, "share of the run, at its end, over which it falls (0 = constant)", low=0.0, high=1.0)
    log_every: int = setting(1, "steps between lines of metrics.jsonl", low=1)
    save_every: int = setting(
        40, "steps between saves, put off to the end of an iteration (0 = only at the end)", low=0
    )
    batch_tokens: int = setting(1, "not used: a step is one of the `minibatches`", low=1)

    @property
    def preset(self) -> tuple[str, ...]:
        """What `resolve` takes besides these settings: the preset's name, and perhaps another advantage."""
        raise NotImplementedError

    @property
    def episodes(self) -> int:
        """Replies of one iteration, over all ranks."""
        return self.prompts_per_iteration * self.group_size


def resolve(config: OnPolicyConfig, preset: str, advantage: str = "") -> Algorithm:
    """The preset with what the settings say otherwise.

    Raises:
        ConfigError: no such preset or estimator, or settings that cannot work together.
    """
    if preset not in PRESETS:
        raise ConfigError(f"there is no preset {preset!r}", hint=f"known are {', '.join(PRESETS)}")
    base = PRESETS[preset]
    algorithm = replace(
        base,
        advantage=advantage or base.advantage,
        objective=config.objective or base.objective,
        mean=config.mean or base.mean,
        kl=config.kl or base.kl,
    )
    check(config, algorithm)
    return algorithm


def check(config: OnPolicyConfig, algorithm: Algorithm) -> None:
    """Refuses what cannot work together, before any section of the recipe runs.

    Raises:
        ConfigError: says what, and what to do.
    """

    def refuse(message: str, hint: str) -> None:
        raise ConfigError(message, hint=hint)

    if algorithm.advantage not in ESTIMATORS:
        refuse(f"there is no advantage {algorithm.advantage!r}", f"known are {', '.join(ESTIMATORS)}")
    if algorithm.advantage in OVER_GROUPS and config.group_size < 2:
        refuse(
            f"{algorithm.advantage} compares a reply with others to the same prompt, and group_size is 1",
            "set group_size to 2 or more (8 is usual)",
        )
    if algorithm.objective == "reinforce" and config.epochs * config.minibatches > 1:
        refuse(
            f"objective reinforce is right for the policy that sampled alone, and an iteration has {config.epochs} x "
            f"{config.minibatches} updates",
            "set epochs = 1 and minibatches = 1, or objective = 'clipped', which corrects for the change",
        )
    if config.top_k or config.top_p < 1:
        refuse(
            f"top_k = {config.top_k}, top_p = {config.top_p:g}: replies would be drawn from another distribution than the "
            "one whose log-probabilities are learned from, so every ratio, and every KL, would be biased",
            "leave them out here (filters are for answering people); temperature is allowed, since it is corrected for",
        )
    if config.episodes < config.minibatches:
        refuse(
            f"{config.episodes} episodes an iteration cannot fill {config.minibatches} minibatches",
            "raise prompts_per_iteration or lower minibatches",
        )
    if config.kl_target > 0 and config.kl_beta == 0:
        refuse(
            f"kl_target = {config.kl_target:g} with kl_beta = 0: the controller multiplies, and 0 would stay 0",
            "start it at a kl_beta above 0, such as 0.05",
        )
    if config.lora_rank and config.train_layers:
        refuse("lora_rank and train_layers both say what is trained", "choose one of the two")
    check_pattern(config.reward_pattern)
    for name in config.rewards:
        check_name(name)
