"""PPO against a reward model, with the pretraining mix: the third step of InstructGPT.

The paper: L. Ouyang et al., "Training language models to follow instructions with human feedback" (2022), section 3.5
and appendix C.4; the algorithm is J. Schulman et al., "Proximal policy optimization" (2017), its use on language models
D. Ziegler et al. (2019) and N. Stiennon et al. (2020). Symbols and names:

    pi_RL, pi_SFT    policy, frozen["reference"]
    pi_old           logp_old_BT, recomputed by the training graph
    r_theta(x, y)    score_B, at the last real token of prompt + response
    V                critic, a network of its own, begun as the reward model
    beta, gamma      kl_beta (adaptive if kl_target is set), ptx_coef; config.gamma is the discount

One iteration: sample a reply to each of `prompts_per_iteration` prompts; score them; per-token rewards
-beta (log pi_old - log pi_SFT), plus the score on the last token; advantages by GAE, whitened over the whole iteration
and all ranks; then `epochs` passes in `minibatches` optimizer steps, every step with its share of pretraining text.

Deviations, each with its reason:
- The loss is a mean over the tokens of the *whole* minibatch (token-mean), however it is cut into micro-batches and
  ranks; the pretraining term is a mean over its own tokens. InstructGPT's 27.8 belongs to its own scaling; our
  `ptx_coef` is of order 1, and the log shows both terms' gradient norms so that their ratio can be chosen.
- A reply that does not end by itself gets `missing_end_score` *in place of* its score (Ziegler et al. 2019, Huang et
  al. 2024): the reward model never saw an unfinished reply. TRL subtracts from the score instead: `missing_end`.
- Policy and critic share nothing, so `vf_coef` scales only the critic's gradient before clipping.

Run by `lyceum ppo RECIPE`. What it is not: asynchronous, or able to mend a sampler that is not the policy; it refuses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lyceum import dist
from lyceum.batches.pack import TokenBatch, bucket
from lyceum.batches.pairs import Prompts, read_prompts
from lyceum.batches.shards import Shards
from lyceum.batches.stream import Stream, token_batch
from lyceum.config import setting
from lyceum.corpus.mixture import key_of, permuted
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams, mix_seed
from lyceum.errors import CheckpointError, ConfigError, DataError, RunError, TrainingError
from lyceum.model.checkpoint import load_checkpoint
from lyceum.model.heads import ScoreModel
from lyceum.model.transformer import Decoder
from lyceum.run import checkpoint_in
from lyceum.stages.pretrain import part_weights
from lyceum.stages.reward import RewardModel
from lyceum.stages.rollouts import (
    RewardSource,
    Rollout,
    Score,
    check_first_ratio,
    check_reference,
    check_sampler,
    estimate,
    figures,
    make_rollout,
    sample_replies,
    score_function,
    score_replies,
)
from lyceum.tokens.chat import TURN_END, TURN_START, ChatFormat
from lyceum.train import policy as algebra
from lyceum.train.loop import run_stage
from lyceum.train.losses import next_token_loss
from lyceum.train.stage import Metrics, Stage, Step, Term, TrainConfig, Trained

if TYPE_CHECKING:
    from lyceum.run import Work

VERSION = 1
NUM_SAMPLES = 4  # fixed prompts shown along the way and side by side in the report

# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class PPOConfig(TrainConfig):
    """Settings of PPO; the defaults follow InstructGPT where a small model allows it."""

    iterations: int = setting(20, "rounds of sampling and updating", low=1)
    prompts_per_iteration: int = setting(64, "episodes of one iteration, one reply a prompt, over all ranks", low=1)
    epochs: int = setting(2, "passes over the episodes of an iteration", low=1)
    minibatches: int = setting(4, "optimizer steps of one pass", low=1)
    max_response_tokens: int = setting(64, "longest reply, in tokens", low=1)
    temperature: float = setting(1.0, "sampling temperature, and that of every log-probability", low=0.01)
    kl_beta: float = setting(
        0.05, "KL coefficient in the reward (where the controller starts, if kl_target is set)", low=0.0
    )
    kl_target: float = setting(
        0.0, "KL in nats per response that an adaptive coefficient steers to; 0 = fixed", low=0.0
    )
    kl_horizon: float = setting(10_000.0, "episodes over which the adaptive coefficient reacts", low=1.0)
    missing_end: str = setting(
        "replace", "what missing_end_score does to a reply without an end", choices=("replace", "subtract", "keep")
    )
    missing_end_score: float = setting(-3.0, "replaces (or is subtracted from) the score of a reply that does not end")
    whiten_rewards: bool = setting(False, "divide token rewards by their standard deviation (the mean stays)")
    gamma: float = setting(1.0, "discount per token", low=0.0, high=1.0)
    lam: float = setting(0.95, "lambda of the advantage estimate", low=0.0, high=1.0)
    clip: float = setting(0.2, "how far a probability ratio may move before the objective is flat", low=0.0)
    value_clip: float = setting(0.2, "how far a value may move before its loss is clipped", low=0.0)
    vf_coef: float = setting(1.0, "weight of the value loss (it acts through clipping only)", low=0.0)
    critic_lr: float = setting(3e-4, "the critic's peak learning rate of AdamW", low=0.0)
    critic_matrix_lr: float = setting(0.0, "the critic's peak learning rate of Muon; 0 = AdamW", low=0.0)
    ptx_coef: float = setting(0.0, "weight of the loss on pretraining text; 0 = none is read", low=0.0)
    ptx_rows: float = setting(
        0.25, "rows of pretraining text for each episode of a minibatch (InstructGPT: 8)", low=0.0
    )
    ptx_docs_share: float = setting(0.5, "share of these rows that come from the part docs", low=0.0, high=1.0)
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


# ---------------------------------------------------------------- equations (see train/policy.py and rollouts.py too)


def shifted_values(score_BT: Tensor, mask_BT: Tensor, offset: float) -> Tensor:
    """V_t, the value of the state in which token t is chosen: the critic's output at t - 1, less `offset`."""
    value_BT = F.pad(score_BT[:, :-1], (1, 0)) - offset
    return value_BT.masked_fill(~mask_BT, 0.0)


def last_turn(text: str) -> str:
    """What was said last in a prompt that ends with the header of the reply."""
    turns = text.split(TURN_START)
    return turns[-2].partition("\n")[2].split(TURN_END)[0] if len(turns) > 2 else text


# ---------------------------------------------------------------- the stage


class PPO(Stage["Rollout | TokenBatch"]):
    """Proximal policy optimization of a language model.

    Args:
        config: its settings.
        reward: where rewards come from; None takes the reward model of `work.inputs["reward"]`.
    """

    kind = "ppo"
    headline = "objective/scores"
    config: PPOConfig

    def __init__(self, config: PPOConfig, reward: RewardSource | Callable[..., list[Score]] | None = None) -> None:
        super().__init__(config)
        self.reward = reward
        self.iteration = 0
        self.prompt_cursor = 0
        self.kl = algebra.AdaptiveKL(config.kl_beta, config.kl_target, config.kl_horizon)
        self.figures: dict[str, float] = {}  # of the present iteration's rollout
        self.first_figures: dict[str, float] = {}
        self.final_samples: list[dict[str, Any]] = []  # of what was saved
        self.is_proven = False  # sampler and training graph were compared in this process

    # -- where it starts

    def start(self, work: Work) -> None:
        """Loads the policy, the reward model, the prompts and, for the pretraining mix, the token shards."""
        config = self.config
        folder = checkpoint_in(work.inputs["policy"])
        loaded = load_checkpoint(folder)
        self.tokenizer, self.parent = loaded.tokenizer, f"{folder.parent.name}/{folder.name}"
        if not isinstance(loaded.model, Decoder):
            raise CheckpointError(f"{work.inputs['policy']} holds no language model", hint="name an sft section")
        critic, offset = None, 0.0
        if self.reward is None:
            source = RewardModel.load(work.inputs["reward"] / "checkpoint", micro_tokens=config.micro_tokens)
            if source.tokenizer.fingerprint != self.tokenizer.fingerprint:
                raise CheckpointError(
                    f"{work.inputs['reward']} was trained with another tokenizer than {work.inputs['policy']}",
                    hint="train the reward model from this policy's own tokenizer, or give PPO a reward of your own",
                )
            self.reward, critic, offset = source, copy.deepcopy(source.model), source.centre
            self.frozen["reward"] = source.model
        chat = ChatFormat(self.tokenizer)
        room = loaded.spec.context_length - config.max_response_tokens
        prompts = read_prompts(work.inputs["lessons"] / "prompts.jsonl", chat, room)
        text = None
        if config.ptx_coef > 0:
            if "pretrain" not in work.inputs:
                raise RunError(
                    f"ptx_coef = {config.ptx_coef} needs pretraining text, and no pretrain section comes before",
                    hint="set ptx_coef = 0, or put a [pretrain] section before it",
                )
            shards = Shards(work.inputs["pretrain"] / "shards", self.tokenizer.fingerprint)
            weights = part_weights(shards.parts, config.ptx_docs_share)
            text = partial(token_batch, shards, Stream(shards.parts, weights, mix_seed(work.seed, 1)))
        self.begin(
            loaded.model, prompts, critic=critic, value_offset=offset, text=text, stop_ids=chat.stop_ids,
            pad_id=self.tokenizer.pad_id, seed=work.seed,
        )  # fmt: skip

    def begin(
        self,
        policy: Decoder,
        prompts: Prompts,
        *,
        seed: int,
        critic: ScoreModel | None = None,
        value_offset: float = 0.0,
        text: Callable[[int, int], TokenBatch] | None = None,
        stop_ids: tuple[int, ...] = (),
        pad_id: int = 0,
    ) -> None:
        """Sets the stage from things in memory.

        Args:
            policy: where it starts; a copy of it becomes the reference.
            prompts: their ids and what their records say; visited in a seeded permutation, epoch after epoch.
            critic: None makes one on a copy of the policy, with a head of zeros.
            value_offset: subtracted from the critic's output.
            text: (start, count) -> rows of pretraining text, for the pretraining mix.
        """
        config = self.config
        if not prompts.ids:
            raise DataError(
                "no prompts to practise on", hint="check the prompts and max_response_tokens against the context"
            )
        if config.prompts_per_iteration < config.minibatches:
            raise ConfigError(
                f"{config.prompts_per_iteration} prompts an iteration cannot fill {config.minibatches} minibatches",
                hint="raise prompts_per_iteration or lower minibatches",
            )
        if critic is None:
            critic = ScoreModel.from_decoder(copy.deepcopy(policy))
            nn.init.zeros_(critic.score.weight)
        self.prompts, self.seed, self.stop_ids, self.pad_id = prompts, seed, stop_ids, pad_id
        self.policy, self.critic, self.value_offset, self.text = policy, critic, value_offset, text
        self.reference = copy.deepcopy(policy).requires_grad_(False)
        self.frozen["reference"] = self.reference
        critic_settings = config.optimizer(lr=config.critic_lr, matrix_lr=config.critic_matrix_lr)
        self.trained = {
            "policy": Trained(policy, config.optimizer(), config.clip_norm),
            "critic": Trained(critic, critic_settings, config.clip_norm, save_as=None),
        }
        self.num_steps = config.iterations * config.epochs * config.minibatches
        episodes_a_step = config.prompts_per_iteration / config.minibatches
        self.text_rows = max(1, round(config.ptx_rows * episodes_a_step)) if text is not None else 0

    # -- what its steps are made of

    def steps(self, first: int) -> Iterator[Step[Rollout | TokenBatch]]:
        """Samples an iteration's rollout when its first step is asked for, then yields its minibatches."""
        config = self.config
        per_iteration = config.epochs * config.minibatches
        assert first == self.iteration * per_iteration, "a run resumes at the end of an iteration only"
        while self.iteration < config.iterations:
            rollout, length_P = self.collect()
            alive = length_P.nonzero().flatten()
            if len(alive) < config.minibatches:
                raise TrainingError(
                    f"{len(alive)} of {len(length_P)} replies could be scored, for {config.minibatches} minibatches",
                    hint="look at what the reward source answers None to",
                )
            generator = torch.Generator()
            for epoch in range(config.epochs):
                generator.manual_seed(mix_seed(self.seed, self.iteration, epoch, 2))
                shuffled = alive[torch.randperm(len(alive), generator=generator)]
                for number, chosen in enumerate(shuffled.tensor_split(config.minibatches)):
                    index = self.iteration * per_iteration + epoch * config.minibatches + number
                    micro_batches: list[Rollout | TokenBatch] = [
                        *self.episodes(rollout, chosen, index),
                        *self.text_batches(index),
                    ]
                    tokens = int(length_P[chosen].sum()) + self.text_rows * self.text_row_tokens
                    is_last = (epoch, number) == (config.epochs - 1, config.minibatches - 1)
                    if is_last:  # what is saved after this step is the state between two iterations
                        self.iteration += 1
                        self.prompt_cursor += config.prompts_per_iteration
                    yield Step(micro_batches, tokens=tokens, can_resume=is_last)

    def episodes(self, rollout: Rollout, chosen: Tensor, index: int) -> list[Rollout]:
        """This rank's part of the chosen episodes, in micro-batches of similar length."""
        mine = torch.isin(rollout.number_B.cpu(), chosen).nonzero().flatten()
        groups = bucket(rollout.lengths_B.cpu()[mine].tolist(), self.config.micro_tokens, mix_seed(self.seed, index, 3))
        return [rollout.rows(mine[group].tolist()) for group in groups]

    @property
    def text_row_tokens(self) -> int:
        """Tokens of one row of pretraining text; 0 without one."""
        return self.text(0, 1).tokens_BT.shape[1] if self.text is not None else 0

    def text_batches(self, index: int) -> list[TokenBatch]:
        """This rank's rows of pretraining text for step `index`: a function of the step alone."""
        if self.text is None:
            return []
        first, size = index * self.text_rows, max(1, self.config.micro_tokens // self.text_row_tokens)
        starts = dist.share(range(first, first + self.text_rows, size))
        return [self.text(start, min(size, first + self.text_rows - start)) for start in starts]

    # -- the rollout

    def collect(self) -> tuple[Rollout, Tensor]:
        """Samples, scores and prepares one iteration; also each episode's length over all ranks (0: it was dropped)."""
        config = self.config
        assert self.reward is not None
        numbers = dist.share(range(config.prompts_per_iteration))
        which = [self.prompt_number(self.prompt_cursor + number) for number in numbers]
        prompts = [self.prompts.ids[i] for i in which]
        outputs = sample_replies(
            self.engine(), prompts, numbers, seed=self.seed, iteration=self.iteration,
            temperature=config.temperature, max_tokens=config.max_response_tokens, stop_ids=self.stop_ids,
        )  # fmt: skip
        meta = [self.prompts.meta[i] for i in which]
        scores = score_replies(score_function(self.reward), prompts, outputs, meta)
        kept = [(i, score) for i, score in enumerate(scores) if score is not None]
        rollout = make_rollout(
            [prompts[i] for i, _ in kept], [outputs[i] for i, _ in kept], [score for _, score in kept],
            [numbers[i] for i, _ in kept], self.pad_id, self.device,
        )  # fmt: skip
        rollout.score_B = algebra.apply_missing_end(
            rollout.score_B, rollout.ended_B, config.missing_end_score, config.missing_end
        )
        self.fill_in(rollout)
        if not self.is_proven:
            check_sampler(rollout, config.max_logprob_gap)
            if self.iteration == 0:
                check_reference(rollout, config.max_logprob_gap)
        beta = self.kl.beta
        kl_BT = estimate(rollout, beta, config.gamma, config.lam, whiten_rewards=config.whiten_rewards)
        self.figures = figures(rollout, kl_BT, beta, num_dropped=len(outputs) - len(kept))
        self.first_figures = self.first_figures or self.figures
        self.kl.update(self.figures["objective/kl"], config.prompts_per_iteration)
        length_P = torch.zeros(config.prompts_per_iteration)
        length_P[rollout.number_B.cpu()] = rollout.lengths_B.cpu().float()
        dist.sum_tensors(length_P)
        return rollout, length_P

    def prompt_number(self, k: int) -> int:
        """Which prompt episode k of the whole run begins with: every prompt once an epoch, in a seeded order."""
        epoch, place = divmod(k, len(self.prompts.ids))
        return permuted(len(self.prompts.ids), key_of(self.seed, "prompts", epoch), place)

    def engine(self) -> Engine:
        """The sampler over the policy as it is now."""
        if not hasattr(self, "_engine"):
            self._engine = Engine(self.policy, max_batch=self.config.engine_batch, num_kept=0)
        else:
            self._engine.update_weights(self.policy)
        return self._engine

    @torch.no_grad()
    def fill_in(self, rollout: Rollout) -> None:
        """Log-probabilities of policy and reference, and values, each by the training graph on the same padded rows."""
        for group in bucket(rollout.lengths_B.tolist(), self.config.micro_tokens, 0):
            part = rollout.rows(group)
            index, width = torch.tensor(group, device=self.device), part.tokens_BT.shape[1]
            logp_BT, entropy_BT = self.logprobs(self.policy, part, with_entropy=True)
            reference_BT, _ = self.logprobs(self.reference, part)
            value_BT = shifted_values(self.critic(part.tokens_BT), part.mask_BT, self.value_offset)
            rollout.logp_old_BT[index, :width] = logp_BT
            rollout.entropy_BT[index, :width] = entropy_BT
            rollout.logp_ref_BT[index, :width] = reference_BT
            rollout.value_old_BT[index, :width] = value_BT

    def logprobs(self, model: Decoder, part: Rollout, *, with_entropy: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the chosen tokens at the sampling temperature."""
        return algebra.chosen_logprobs(
            model(part.tokens_BT), model.logits, part.tokens_BT, part.mask_BT,
            temperature=self.config.temperature, with_entropy=with_entropy,
        )  # fmt: skip

    # -- its losses

    def counts(self, micro_batch: Rollout | TokenBatch) -> dict[str, float]:
        """Tokens: chosen ones for policy and value, weighted targets for the pretraining text."""
        if isinstance(micro_batch, Rollout):
            return {"policy": float(micro_batch.num_tokens), "value": float(micro_batch.num_tokens)}
        return {"ptx": float(micro_batch.num_targets)}

    def loss(self, micro_batch: Rollout | TokenBatch) -> tuple[dict[str, Term], Metrics]:
        """Clipped policy and value losses of some episodes, or the pretraining loss of some text."""
        if not isinstance(micro_batch, Rollout):
            total, count, _ = next_token_loss(self.policy, micro_batch.tokens_BT, micro_batch.weights_BT)
            return {"ptx": Term(total, self.config.ptx_coef)}, {"ptx/loss": (total.detach(), count)}
        config, part, mask_BT = self.config, micro_batch, micro_batch.mask_BT
        logp_BT, entropy_BT = self.logprobs(self.policy, part, with_entropy=True)
        if not self.is_proven:
            check_first_ratio(logp_BT, part, config.max_logprob_gap)
            self.is_proven = True
        policy_BT, stats = algebra.clipped_policy_loss(
            logp_BT, part.logp_old_BT, part.advantage_BT, mask_BT, config.clip
        )
        value_BT = shifted_values(self.critic(part.tokens_BT), mask_BT, self.value_offset)
        error_BT, clipped_BT = algebra.clipped_value_loss(
            value_BT, part.value_old_BT, part.return_BT, mask_BT, config.value_clip
        )
        count = float(part.num_tokens)
        centred_BT = (stats["ratio"] - 1.0).masked_fill(~mask_BT, 0.0)
        sums = {
            "policy/approxkl": stats["approxkl"],
            "policy/clipfrac": stats["clipfrac"],
            "policy/entropy": entropy_BT,
            "val/ratio": stats["ratio"],
            "val/ratio_var": centred_BT.square(),  # after_step takes the squared mean off
            "val/clipfrac": clipped_BT,
        }
        terms = {"policy": Term(policy_BT.sum()), "value": Term(error_BT.sum(), config.vf_coef)}
        return terms, {name: (value.sum(), count) for name, value in sums.items()}

    def halves(self, micro_batch: Rollout | TokenBatch) -> list[Rollout | TokenBatch]:
        """Its rows in two."""
        return [*micro_batch.halves()]

    def after_step(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Adds the figures of the iteration's rollout to every line."""
        spread = metrics["val/ratio_var"] - (metrics["val/ratio"] - 1.0) ** 2
        return {**self.figures, "val/ratio_var": max(spread, 0.0)}

    # -- what it tells

    def answers(self, model: Decoder) -> list[dict[str, Any]]:
        """Greedy replies of a model to the first prompts, as text; none without a tokenizer."""
        if self.tokenizer is None:
            return []
        prompts = self.prompts.ids[:NUM_SAMPLES]
        params = SamplingParams(self.config.max_response_tokens, temperature=0.0, stop_ids=self.stop_ids)
        outputs = Engine(model, max_batch=NUM_SAMPLES).generate(prompts, params)
        chat = ChatFormat(self.tokenizer)
        return [
            {
                "prompt": last_turn(self.tokenizer.decode(prompt, keep_special=True)),
                "reply": chat.parse(output.ids).content,
                "ended": output.finish == "stop",
            }
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    def samples(self) -> list[dict[str, Any]]:
        """Greedy replies to the first few prompts."""
        return self.answers(self.policy)

    def save(self, folder: Path, snapshot: str = "") -> None:
        """Writes the checkpoint, and notes what it answers, beside the reference, for the report."""
        super().save(folder, snapshot)
        if not snapshot:
            pairs = zip(self.samples(), self.answers(self.reference), strict=True)
            self.final_samples = [{**row, "before": first["reply"]} for row, first in pairs]

    def report(self, final: Mapping[str, float]) -> dict[str, Any]:
        """Reward before and after, KL, how replies end, and replies of reference and policy side by side."""
        before, after = self.first_figures, self.figures
        shown = {name.split("/")[1]: [before[name], after[name]] for name in before if name in after}
        return {
            "line": f"reward {before['objective/scores']:.2f} -> {after['objective/scores']:.2f} at KL "
            f"{after['objective/kl']:.2f} nats per response; {after['tokens/end_rate']:.0%} of replies end",
            "episodes": self.config.iterations * self.config.prompts_per_iteration,
            "prompts": {"kept": len(self.prompts.ids), "too_long": self.prompts.num_too_long},
            "first_and_last_iteration": shown,
            "samples": self.final_samples,
        }

    def state_dict(self) -> dict[str, Any]:
        """Where it stands between two iterations."""
        return {
            "iteration": self.iteration,
            "prompt_cursor": self.prompt_cursor,
            "kl_coef": self.kl.beta,
            "first_figures": self.first_figures,
            "figures": self.figures,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.iteration, self.prompt_cursor = int(state["iteration"]), int(state["prompt_cursor"])
        self.kl.beta = float(state["kl_coef"])
        self.first_figures, self.figures = dict(state["first_figures"]), dict(state["figures"])


def run(config: PPOConfig, work: Work) -> dict[str, Any]:
    """Trains `work.inputs["policy"]` against the reward model of `work.inputs["reward"]`; returns the report."""
    return run_stage(PPO(config), work)
