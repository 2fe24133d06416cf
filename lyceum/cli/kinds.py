"""What sections there are: each kind's settings, entry function, and which earlier sections it starts from.

The only table that knows which stage feeds which; `lyceum.cli.river` reads it. Modules are named, not imported: a typo in a
recipe, or `lyceum --help`, should not wait for torch. What it is not: their order, which is the recipe's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lyceum.model.lineage import SHAPED


@dataclass(frozen=True)
class Input:
    """A role in a section's work, and the kinds of earlier sections that can play it; the nearest one does.

    needed: whether there must be one; or, of the section's settings, whether they ask for one.
    only_if: a setting without which the role is not played; empty: it always is.
    every: those before the nearest come too, each in the role "role:name".
    asked: the role is played only where the recipe says ``from``.
    """

    role: str
    kinds: tuple[str, ...]
    needed: bool | Callable[[Any], bool] = True
    only_if: str = ""
    every: bool = False
    asked: bool = False


@dataclass(frozen=True)
class Kind:
    """What a section's kind is: where its entry function ``run`` and its settings stand, and what it starts from.

    makes_model: the recipe's [model] table is part of its key.
    every_rank: under torchrun all ranks run it together; otherwise rank 0 alone, and the others wait.
    """

    help: str
    module: str
    config: str
    inputs: tuple[Input, ...] = ()
    makes_model: bool = False
    every_rank: bool = False


def _from(role: str, *kinds: str, needed: bool | Callable[[Any], bool] = True) -> Input:
    return Input(role, kinds or (role,), needed)


POLICIES = ("sft", *SHAPED)  # kinds whose policy answers
RANKED = ("rankings", "judgements")  # who puts answers in order: a written rule, or people

ON_POLICY = (  # what a policy that learns from its own samples starts from, besides itself
    _from("reward", needed=lambda config: not config.rewards or "model" in config.rewards),
    _from("lessons", "lessons", "judgements", needed=lambda config: not config.prompts),
    _from("pretrain", needed=lambda config: config.ptx_coef > 0),
)


KINDS: dict[str, Kind] = {
    "corpus": Kind("read and clean the texts", "lyceum.corpus.pipeline", "CorpusConfig"),
    "lessons": Kind(
        "write the conversations to learn from", "lyceum.synth.lessons", "LessonsConfig", (_from("corpus"),)
    ),
    "tokenizer": Kind(
        "learn the pieces that text is cut into",
        "lyceum.tokens.tokenizer",
        "TokenizerConfig",
        (_from("corpus"), _from("lessons", needed=False)),
    ),
    "pretrain": Kind(
        "stage 1: learn to continue text",
        "lyceum.stages.pretrain",
        "PretrainConfig",
        (_from("corpus"), _from("tokenizer"), Input("policy", ("pretrain",), needed=False, asked=True)),
        makes_model=True,
        every_rank=True,
    ),
    "sft": Kind(
        "stage 2: learn to answer, from written conversations",
        "lyceum.stages.sft",
        "SFTConfig",
        (
            _from("policy", "pretrain", "sft"),
            _from("lessons", "lessons", "select", needed=lambda config: not config.data),
            _from("reward", needed=False),
        ),
        every_rank=True,
    ),
    "rankings": Kind(
        "draw answers and rank them",
        "lyceum.synth.rankings",
        "RankingsConfig",
        (
            _from("policy", *POLICIES),
            _from("lessons"),
            Input("earlier", ("rankings",), only_if="cumulative"),
        ),
    ),
    "judgements": Kind(
        "read what people said about answers, as rankings to learn from and to judge by",
        "lyceum.cli.judgements",
        "JudgementsConfig",
    ),
    "reward": Kind(
        "stage 3: learn to tell the better answer",
        "lyceum.stages.reward",
        "RewardConfig",
        (_from("policy", "sft"), _from("rankings", *RANKED, needed=lambda config: not config.data)),
        every_rank=True,
    ),
    "preference": Kind(
        "learn which answer is better, without a reward model (DPO and its kin)",
        "lyceum.stages.preference",
        "PreferenceConfig",
        (_from("policy", "sft"), _from("rankings", *RANKED, needed=False)),
        every_rank=True,
    ),
    "select": Kind(
        "draw answers and keep the best as conversations (best-of-n)",
        "lyceum.synth.select",
        "SelectConfig",
        (_from("policy", *POLICIES), _from("reward"), _from("lessons")),
    ),
    "ppo": Kind(
        "stage 4: learn from the reward of its own answers",
        "lyceum.stages.ppo",
        "PPOConfig",
        (_from("policy", "sft"), *ON_POLICY),
        every_rank=True,
    ),
    "tamer": Kind(
        "stage 4 with a trainer who presses keys beside the reward (TAMER+RL)",
        "lyceum.stages.tamer",
        "TamerConfig",
        (_from("policy", "sft"), *ON_POLICY),
        every_rank=True,
    ),
    "grpo": Kind(
        "learn from comparing its own answers, without a critic",
        "lyceum.stages.grpo",
        "GRPOConfig",
        (_from("policy", "sft", "ppo", "tamer", "grpo"), *ON_POLICY),
        every_rank=True,
    ),
    "compare": Kind(
        "compare a model with the one it started from, on judgements that it has not seen",
        "lyceum.evals.compare",
        "CompareConfig",
        (
            _from("policy", *POLICIES),
            _from("rankings", *RANKED),
            _from("reward", needed=False),
        ),
    ),
    "eval": Kind(
        "ask the held-out questions",
        "lyceum.evals.tutor_table",
        "EvalConfig",
        (
            _from("corpus"),
            _from("lessons"),
            Input("base", ("pretrain",), needed=False, every=True),
            Input("sft", ("sft",), every=True),
            _from("reward", needed=False),
            Input("shaped", SHAPED, needed=False, every=True),
        ),
    ),
}
POLICY = "policy"  # the role that ``from = "name"`` chooses
# kinds whose checkpoint talks, the most schooled first
CAN_CHAT = ("ppo", "tamer", "grpo", "preference", "sft", "pretrain")
