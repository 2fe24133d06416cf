"""TAMER+RL: PPO beside a trainer who presses keys while replies are shown.

The papers: W. B. Knox and P. Stone, "Combining manual feedback with subsequent MDP reward signals for reinforcement learning"
(2010) and "Reinforcement learning from simultaneous human and MDP reward" (2012). Of their eight ways to combine a learned human
reward H with a task's, two stand here, each with a weight that fades from iteration to iteration:

    reward shaping      R'(s, a) = R(s, a) + B H(s, a): H is a dense reward beside the score (dense_coef, dense_decay)
    action biasing      actions are drawn as if Q(s, a) + B H(s, a): from softmax(logits + B H)   (bias, bias_decay)

The second is what they recommend: it changes where the policy looks and not what is right, so a trainer who errs costs
time, not the optimum. H is `lyceum.engine.tamer.Human` over the policy's own hidden vectors; it learns from every iteration's
presses, a reply's tokens being shown at a steady pace, and is then asked about the same replies.

H being linear in the vector that makes the logits, the bias is an addition to the output matrix: the sampler needs no hook, and
the log-probabilities that PPO learns from are those of what really drew. What acts is what learns, so its checks hold: the
first ratio is 1, the sampler's log-probabilities are the training graph's, and the KL is that of what was shown. What is saved is
the policy without the bias; let `bias_decay` take it to nothing before the end.

Deviations, each with its reason:
- Knox and Stone bias a greedy choice over Q; a language model samples from logits, which stand in Q's place.
- They fade B by the credit each feature has had; here it fades by iteration, alike for all.

Run by `lyceum tamer RECIPE`, with a function that presses keys, or says what a simulated trainer would like; from Python by
`TamerPPO(config, reward, trainer)`. What it is not: a page with keys to press.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lyceum import dist
from lyceum.batches.pack import bucket, pad
from lyceum.batches.pairs import Prompts
from lyceum.config import setting
from lyceum.corpus.watched import read_watched
from lyceum.engine.engine import Engine
from lyceum.engine.stream import TextStream, offsets
from lyceum.engine.tamer import Delay, Human, Press, Shown, credited, times_of
from lyceum.errors import ConfigError, DataError, UsageError
from lyceum.model.transformer import Decoder
from lyceum.stages.ppo import PPO, PPOConfig
from lyceum.stages.rewards import Ids, RewardSource, Score, find_function, last_turn
from lyceum.stages.rollouts import Rollout
from lyceum.tokens.chat import ChatFormat
from lyceum.train.loop import run_stage

if TYPE_CHECKING:
    from lyceum.run import Work

VERSION = 1

# (prompts, responses, meta), the tokens of a response shown one after the other from second 0 -> presses on each response
Trainer = Callable[[Sequence[Ids], Sequence[Ids], Sequence[dict[str, Any]]], Sequence[Sequence[Press]]]

# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class TamerConfig(PPOConfig):
    """Settings of PPO beside a trainer; `dense_coef` and `dense_decay` weigh the learned human reward."""

    tokens_per_s: float = setting(4.0, "tokens shown in a second", low=0.01)
    delay_low_s: float = setting(0.2, "shortest time from seeing to pressing", low=0.0)
    delay_high_s: float = setting(0.8, "longest", low=0.0)
    bias: float = setting(1.0, "weight of the human reward where tokens are drawn; 0 = none", low=0.0)
    bias_decay: float = setting(0.9, "what that weight is multiplied by after each iteration", low=0.0, high=1.0)
    human_rate: float = setting(0.5, "step of the human reward's regression", low=0.0, high=1.0)
    human_passes: int = setting(20, "steps of it an iteration", low=1)
    trainer: str = setting("", "function that presses keys while replies are shown, as file.py:function")
    presses: str = setting("", "file of watched replies, whose presses teach before the first iteration")
    likes: str = setting(
        "", "in its place: function that gives 1, -1 or 0 for each piece of a reply; a simulated trainer presses"
    )
    attention: float = setting(1.0, "share of tokens that the simulated trainer gets round to", low=0.0, high=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        Delay(self.delay_low_s, self.delay_high_s)
        if self.dense:
            raise ConfigError(
                f"the dense reward of a [tamer] section is what its trainer taught, and dense = {self.dense!r} names another",
                hint="leave dense out, or add it to the score: rewards = { ... }",
            )
        if self.trainer and self.likes:
            raise ConfigError(
                f"trainer = {self.trainer!r} presses keys, and likes = {self.likes!r} has another do it",
                hint="leave one of the two out",
            )


# ---------------------------------------------------------------- trainers


def shown_at(num_tokens: int, tokens_per_s: float) -> list[Shown]:
    """The seconds in which each token of a reply is the newest one shown."""
    return [(i / tokens_per_s, (i + 1) / tokens_per_s) for i in range(num_tokens)]


def nobody(prompts: Sequence[Ids], responses: Sequence[Ids], meta: Sequence[dict[str, Any]]) -> list[list[Press]]:
    """A trainer who presses nothing."""
    return [[] for _ in responses]


@dataclass
class SimulatedTrainer:
    """A trainer in place of a person: presses what it thinks of a token, some time after it was shown.

    Args:
        likes: (prompt, response) -> for each token 1, -1 or 0; it presses on those that are not 0.
        tokens_per_s: how fast tokens are shown.
        delay: how long it takes; the trainer draws from it.
        seed: of the delays, and of what it misses.
        attention: share of tokens that it gets round to.
    """

    likes: Callable[[Ids, Ids], Sequence[float]]
    tokens_per_s: float = 4.0
    delay: Delay = field(default_factory=Delay)
    seed: int = 0
    attention: float = 1.0

    def __call__(
        self, prompts: Sequence[Ids], responses: Sequence[Ids], meta: Sequence[dict[str, Any]]
    ) -> list[list[Press]]:
        """Presses on each response, which are a function of the seed and of what was shown."""
        return [self._presses(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]

    def _presses(self, prompt: Ids, response: Ids) -> list[Press]:
        chance = np.random.default_rng([self.seed, *prompt, *response])
        found = []
        spans = shown_at(len(response), self.tokens_per_s)
        for value, (begin, end) in zip(self.likes(prompt, response), spans, strict=True):
            seen, after, heed = (
                chance.uniform(begin, end),
                chance.uniform(self.delay.low_s, self.delay.high_s),
                chance.random(),
            )
            if value and heed < self.attention:
                found.append(Press(float(seen + after), float(value)))
        return found


@dataclass
class TextTrainer:
    """A function of texts as a trainer.

    function: (prompts, shown, meta) -> presses on each reply, each a pair (second, value). `shown` has for each reply a list of
        (from second, until second, text), a piece for each token: whole characters, and nothing for the end.
    """

    name: str
    function: Callable[..., Sequence[Sequence[tuple[float, float]]]]
    chat: ChatFormat
    tokens_per_s: float

    def __call__(
        self, prompts: Sequence[Ids], responses: Sequence[Ids], meta: Sequence[dict[str, Any]]
    ) -> list[list[Press]]:
        """The presses. Raises UsageError where they are none."""
        asked = [asked_text(prompt, self.chat) for prompt in prompts]
        spans = [shown_at(len(response), self.tokens_per_s) for response in responses]
        texts = [pieces(response, self.chat) for response in responses]
        shown = [[(*span, text) for span, text in zip(*row, strict=True)] for row in zip(spans, texts, strict=True)]
        found = [[tuple(map(float, press)) for press in row] for row in self.function(asked, shown, list(meta))]
        is_right = all(len(press) == 2 and all(map(math.isfinite, press)) for row in found for press in row)
        if len(found) != len(responses) or not is_right:
            raise UsageError(
                f"the trainer {self.name} did not give presses for each of {len(responses)} replies",
                hint="return a list for each reply, of pairs (second, value); an empty one where nothing was pressed",
            )
        return [[Press(*press) for press in row] for row in found]


def asked_text(prompt: Ids, chat: ChatFormat) -> str:
    """What was said last to the model."""
    return last_turn(chat.tokenizer.decode(list(prompt), keep_special=True))


def pieces(response: Ids, chat: ChatFormat) -> list[str]:
    """What each token of a reply adds to the text that is shown."""
    stream = TextStream(chat.tokenizer.token_bytes)
    texts = [stream.feed([token]) for token in response]
    return [*texts[:-1], texts[-1] + stream.close()] if texts else []


def named_trainer(config: TamerConfig, function: Callable[..., Any], chat: ChatFormat, seed: int) -> Trainer:
    """The trainer that a recipe names, from the function it found: one of flesh and blood, or a simulated one."""
    if config.trainer:
        return TextTrainer(config.trainer, function, chat, config.tokens_per_s)

    def likes(prompt: Ids, response: Ids) -> list[float]:
        said = [float(value) for value in function(asked_text(prompt, chat), pieces(response, chat))]
        if len(said) != len(response) or not all(map(math.isfinite, said)):
            raise UsageError(
                f"{config.likes} did not give a number for each of {len(response)} pieces of a reply",
                hint="return as many numbers as there are pieces: 1, -1, or 0 where nothing is pressed",
            )
        return said

    delay = Delay(config.delay_low_s, config.delay_high_s)
    return SimulatedTrainer(likes, config.tokens_per_s, delay, seed, config.attention)


@dataclass(frozen=True)
class LoggedLesson:
    """A reply that somebody watched: its tokens, and of each the label and the credit."""

    prompt: Ids
    response: Ids
    labels: Sequence[float]
    weights: Sequence[float]


def logged(path: Path, chat: ChatFormat, delay: Delay, room: int) -> list[LoggedLesson]:
    """Lessons from a file of watched replies (`lyceum.corpus.watched`), as live teaching leaves them.

    room: most tokens of a prompt and its reply; of longer ones the oldest tokens of the prompt and the end of the reply go.
    Raises DataError where the file holds none.
    """
    found = []
    for watched in read_watched(path):
        prompt, response = chat.prompt(watched.prompt), chat.tokenizer.encode(watched.text)[: room - 1]
        if not response:
            continue
        times = times_of(watched.shown, offsets(chat.tokenizer.token_bytes, response))
        labels, weights = credited(times, [Press(*press) for press in watched.presses], delay)
        found.append(LoggedLesson(prompt[-(room - len(response)) :], response, labels, weights))
    if not found:
        raise DataError(
            "no watched reply", file=path, hint="lyceum feedback export RUN --to presses.jsonl --format presses"
        )
    return found


# ---------------------------------------------------------------- equations


def biased(model: Decoder, addition_VD: Tensor) -> Decoder:
    """The same decoder, weights shared, whose logits have `addition_VD` times the hidden vector added to them."""
    other = copy.copy(model)
    other._modules = dict(model._modules)
    weight_VD = model.output_weight.detach() + addition_VD
    other.lm_head = nn.Linear(weight_VD.shape[1], weight_VD.shape[0], bias=False, device="meta")
    other.lm_head.weight = nn.Parameter(weight_VD, requires_grad=False)
    return other


# ---------------------------------------------------------------- the stage


class TamerPPO(PPO):
    """PPO with a trainer beside its reward.

    Args:
        config: its settings.
        reward: as PPO's.
        trainer: who watches the replies of every iteration, and presses keys.
    """

    kind = "tamer"
    config: TamerConfig

    def __init__(
        self,
        config: TamerConfig,
        reward: RewardSource | Callable[..., list[Score]] | None = None,
        trainer: Trainer = nobody,
    ) -> None:
        super().__init__(config, reward, self.watched)
        self.trainer, self.delay = trainer, Delay(config.delay_low_s, config.delay_high_s)
        # of this iteration, until it is learned from
        self.seen: tuple[Tensor, Tensor, Tensor, Tensor, int] | None = None

    def start(self, work: Work) -> None:
        """As PPO's; the trainer is the one that the settings name, unless one was given.

        Raises:
            ConfigError: nobody watches, or the function is not there.
        """
        config, named = self.config, self.config.trainer or self.config.likes
        if self.trainer is nobody and not named and not config.presses:
            raise ConfigError(
                "a [tamer] section needs somebody who watches",
                hint="trainer = 'file.py:function' presses keys; likes = 'file.py:function' has a simulated trainer do it; "
                "presses = 'file.jsonl' is a log of them",
            )
        function = find_function(named, work.recipe.path.parent) if named else None
        super().start(work)
        if function is not None and self.trainer is nobody:
            self.trainer = named_trainer(config, function, ChatFormat(self.tokenizer), work.seed)
        if config.presses:
            chat, room = ChatFormat(self.tokenizer), self.policy.spec.context_length
            self.learn_before(logged(Path(config.presses), chat, self.delay, room))

    def begin(self, policy: Decoder, prompts: Prompts, **given: Any) -> None:
        """As PPO's; the trainer is not known yet."""
        super().begin(policy, prompts, **given)
        weight_VD = policy.output_weight.detach()
        self.human = Human(weight_VD.shape[0], weight_VD.shape[1], weight_VD.dtype)
        # what the output matrix has more while this iteration's replies count
        self.addition_VD = torch.zeros_like(weight_VD)

    @property
    def bias(self) -> float:
        """The weight of the human reward where this iteration's tokens are drawn."""
        return self.config.bias * self.config.bias_decay**self.iteration

    # -- the trainer

    @torch.no_grad()
    def watched(
        self, prompts: Sequence[Ids], responses: Sequence[Ids], meta: Sequence[dict[str, Any]]
    ) -> list[list[float]]:
        """Shows the replies to the trainer, and tells what was known before of how each token would be liked.

        What the presses teach takes effect with the next iteration (`learn`), on all ranks at once.
        """
        presses = self.trainer(prompts, responses, meta)
        phi_ND, action_N, sizes = self._states(prompts, responses)
        labels: list[float] = []
        weights: list[float] = []
        for response, pressed in zip(responses, presses, strict=True):
            label, weight = credited(shown_at(len(response), self.config.tokens_per_s), pressed, self.delay)
            labels += label
            weights += weight
        num_presses = sum(map(len, presses))
        self.seen = phi_ND, action_N, phi_ND.new_tensor(labels), phi_ND.new_tensor(weights), num_presses
        return [row.tolist() for row in self.human.of(phi_ND, action_N).split(sizes)]

    @torch.no_grad()
    def learn(self) -> dict[str, float]:
        """The regression on this iteration's presses, over all ranks; its figures."""
        none = self.human.weight_AD.new_zeros(0)
        nothing = none.view(0, self.human.weight_AD.shape[1]), none.long(), none, none, 0
        *steps, num_presses = self.seen or nothing  # a rank without a scored reply has seen none
        phi_ND, action_N, label_N, weight_N = steps
        for _ in range(self.config.human_passes):
            pull_AD, mass_A = self.human.gradient(phi_ND, action_N, label_N, weight_N)
            dist.sum_tensors(pull_AD, mass_A)
            self.human.step(pull_AD, mass_A, self.config.human_rate)
        error = float((weight_N * (label_N - self.human.of(phi_ND, action_N)).square()).sum())
        sums = dist.sum_numbers({"presses": float(num_presses), "error": error, "weight": float(weight_N.sum())})
        self.seen = None
        return {"tamer/presses": sums["presses"], "tamer/error": sums["error"] / max(sums["weight"], 1e-12)}

    @torch.no_grad()
    def learn_before(self, lessons: Sequence[LoggedLesson]) -> None:
        """What was pressed before, on any replies, taught to the human reward by the policy as it begins; every rank the same."""
        phi_ND, action_N, _ = self._states([one.prompt for one in lessons], [one.response for one in lessons])
        label_N = phi_ND.new_tensor([x for one in lessons for x in one.labels])
        weight_N = phi_ND.new_tensor([x for one in lessons for x in one.weights])
        for _ in range(self.config.human_passes):
            self.human.step(*self.human.gradient(phi_ND, action_N, label_N, weight_N), self.config.human_rate)

    def note(self, rollout: Rollout, kl_BT: Tensor, counted: dict[str, float]) -> None:
        """Adds what the trainer did, and learns from it."""
        super().note(rollout, kl_BT, counted)
        self.figures |= {**self.learn(), "tamer/bias": self.bias}

    def _states(self, prompts: Sequence[Ids], responses: Sequence[Ids]) -> tuple[Tensor, Tensor, list[int]]:
        """The policy's hidden vector before every token of the replies, those tokens, and how many each reply has."""
        rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        sizes = [len(response) for response in responses]
        phi: dict[int, Tensor] = {}
        for group in bucket([len(row) for row in rows], self.config.micro_tokens, 0):
            tokens_BT, _ = pad([rows[i] for i in group], self.pad_id)
            hidden_BTD = self.policy(tokens_BT.to(self.device)).cpu()
            for place, i in enumerate(group):
                first = len(prompts[i]) - 1
                phi[i] = hidden_BTD[place, first : first + sizes[i]]
        width = self.policy.spec.width
        phi_ND = torch.cat([phi[i] for i in range(len(rows))]) if rows else self.human.weight_AD.new_zeros(0, width)
        return phi_ND, torch.tensor([token for response in responses for token in response], dtype=torch.long), sizes

    # -- what is drawn, and what is learned from

    def engine(self) -> Engine:
        """The sampler over the biased policy."""
        self.addition_VD = self.bias * self.human.weight_AD.to(self.addition_VD.device)
        acting = biased(self.policy, self.addition_VD)
        if not hasattr(self, "_engine"):
            self._engine = Engine(acting, max_batch=self.config.engine_batch, num_kept=0)
        else:
            self._engine.update_weights(acting)
        return self._engine

    @property
    def is_reference(self) -> bool:
        """Not where presses from before have biased the first replies already."""
        return super().is_reference and not bool(self.addition_VD.any())

    def head(self) -> Tensor:
        """The policy's with its bias, as it drew."""
        return super().head() + self.addition_VD

    # -- a restart

    def state_dict(self) -> dict[str, Any]:
        """With what the trainer has taught."""
        return {**super().state_dict(), "human": self.human.weight_AD}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        super().load_state_dict(state)
        self.human.weight_AD = state["human"].to(self.human.weight_AD)


def run(config: TamerConfig, work: Work) -> dict[str, Any]:
    """Trains `work.inputs["policy"]` beside the trainer that the settings name; returns the report."""
    return run_stage(TamerPPO(config), work)
