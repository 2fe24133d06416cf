"""Learning from one's own samples: the one stage that PPO, GRPO, Dr.GRPO, RLOO and REINFORCE++ are settings of.

One iteration: sample `group_size` replies to each of `prompts_per_iteration` prompts; score them; per-token rewards; an
advantage for each token; then `epochs` passes in `minibatches` optimizer steps, every step with its share of pretraining
text. What differs between the methods is data (`lyceum.stages.algorithms`); a critic is added by the one method that has
one (`lyceum.stages.ppo`).

At the start of every run, resumed ones too, it refuses to train when the numbers could not be right: replies drawn from
another distribution than the one that is scored, a sampler whose log-probabilities are not the training graph's, a first
ratio that is not 1, a KL to the reference that is not 0 before the first update.

No episode disappears unsaid: one without a token, or whose reward cannot be told, is left out of the update and counted
(`rollout/empty`, `rollout/unscorable`), and so are prompts that leave no room for a reply.

Shapes: B episodes, T positions, N chosen tokens of all episodes, D width. What it is not: asynchronous, or able to mend a
sampler that is not the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lyceum import dist
from lyceum.batches.pack import TokenBatch
from lyceum.batches.pairs import Prompts, read_prompts
from lyceum.batches.shards import Shards
from lyceum.batches.stream import Stream, token_batch
from lyceum.corpus.mixture import key_of, permuted
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import mix_seed
from lyceum.errors import CheckpointError, RunError, TrainingError
from lyceum.log import log
from lyceum.model.checkpoint import load_checkpoint
from lyceum.model.lineage import learned
from lyceum.model.reference import reference_of, train_top_layers
from lyceum.model.transformer import Decoder
from lyceum.run import checkpoint_in
from lyceum.stages.adapters import save_policy, trained_policy
from lyceum.stages.algorithms import OnPolicyConfig, resolve
from lyceum.stages.pretrain import part_weights, read_weights
from lyceum.stages.reward import RewardModel
from lyceum.stages.rewards import (
    MODEL,
    Blend,
    Dense,
    RewardSource,
    Score,
    checked,
    dense_rewards,
    find_function,
    load_judge,
    reward_source,
    score_function,
)
from lyceum.stages.rollouts import (
    Rollout,
    check_first_ratio,
    check_reference,
    check_sampler,
    check_unbiased,
    estimate,
    figures,
    fill_in,
    fitting,
    greedy_answers,
    grouped,
    logprobs_of,
    make_rollout,
    predicting_states,
    sample_replies,
)
from lyceum.tokens.chat import ChatFormat
from lyceum.train import policy as algebra
from lyceum.train import workers
from lyceum.train.advantages import num_flat_groups
from lyceum.train.losses import next_token_loss
from lyceum.train.objectives import AGGREGATORS, OBJECTIVES, Clip
from lyceum.train.stage import Metrics, Stage, Step, Term

if TYPE_CHECKING:
    from lyceum.run import Work

NUM_SAMPLES = 4  # fixed prompts shown along the way and side by side in the report
COUNTED = ("rollout/unscorable", "rollout/empty")  # what is left out of an iteration; the report has their sums

Batch = Rollout | TokenBatch


class OnPolicy(Stage[Batch]):
    """A policy that learns from the rewards of its own replies.

    Args:
        config: its settings.
        reward: where rewards come from; None takes what the settings name.
        dense: rewards of single tokens, in addition; None takes what the settings name, by default none.
    """

    headline = "objective/scores"
    config: OnPolicyConfig

    def __init__(
        self,
        config: OnPolicyConfig,
        reward: RewardSource | Callable[..., list[Score]] | None = None,
        dense: Dense | None = None,
    ) -> None:
        super().__init__(config)
        self.algorithm = resolve(config, *config.preset)
        self.objective = OBJECTIVES[self.algorithm.objective]
        self.mean = AGGREGATORS[self.algorithm.mean]
        self.clip = Clip(config.clip, config.clip_high or None, config.dual_clip)
        self.reward, self.dense = reward, dense
        self.iteration = 0
        self.prompt_cursor = 0
        self.kl = algebra.AdaptiveKL(config.kl_beta, config.kl_target, config.kl_horizon)
        self.beta = config.kl_beta  # of the present iteration
        self.lam = 1.0
        self.policy_weight = 1.0  # 0 while a critic learns alone
        self.figures: dict[str, float] = {}  # of the present iteration's rollout
        self.first_figures: dict[str, float] = {}
        self.left_out = dict.fromkeys(COUNTED, 0.0)  # over the whole run
        self.final_samples: list[dict[str, Any]] = []  # of what was saved
        self.is_proven = False  # sampler and training graph were compared in this process

    # -- where it starts

    def start(self, work: Work) -> None:
        """Loads the policy, the reward source, the prompts and, for the pretraining mix, the token shards."""
        config = self.config
        folder = checkpoint_in(work.inputs["policy"])
        loaded = load_checkpoint(folder)
        self.tokenizer, self.parent = loaded.tokenizer, work.name_of(folder)
        if not isinstance(loaded.model, Decoder):
            raise CheckpointError(f"{work.inputs['policy']} holds no language model", hint="name an sft section")
        chat = ChatFormat(self.tokenizer)
        judge, judges = None, ["a function"]  # whose scores count
        if self.reward is None:
            rewards = dict(config.rewards) or {MODEL: 1.0}
            if MODEL in rewards:
                judge = load_judge(work, self.tokenizer, self.kind, config.micro_tokens)
                self.frozen |= judge.modules()
            self.reward = judge
            judges = [work.inputs["reward"].name if name == MODEL else Path(name).name for name in rewards]
            if rewards != {MODEL: 1.0}:
                self.reward = reward_source(
                    rewards, chat, model=judge, pattern=config.reward_pattern, folder=work.recipe.path.parent
                )
        if self.dense is None and config.dense:
            self.dense = find_function(config.dense, work.recipe.path.parent)
        room = loaded.spec.context_length - config.max_response_tokens
        asked = Path(config.prompts) if config.prompts else work.inputs["lessons"] / "prompts.jsonl"
        prompts = read_prompts(asked, chat, room)
        text = None
        if config.ptx_coef > 0:
            if "pretrain" not in work.inputs:
                raise RunError(
                    f"ptx_coef = {config.ptx_coef} needs pretraining text, and no pretrain section comes before",
                    hint="set ptx_coef = 0, or put a [pretrain] section before it",
                )
            shards = Shards(work.inputs["pretrain"] / "shards", self.tokenizer.fingerprint)
            weights = read_weights(work.inputs["pretrain"]) or part_weights(shards.parts, config.ptx_docs_share)
            text = partial(token_batch, shards, Stream(shards.parts, weights, mix_seed(work.seed, 1)))
        self.begin(
            loaded.model, prompts, judge=judge, text=text, stop_ids=chat.stop_ids,
            pad_id=self.tokenizer.pad_id, seed=work.seed,
        )  # fmt: skip
        episodes = config.iterations * config.episodes
        self.learned_from = [
            learned("prompts", len(self.prompts.ids), asked.name if config.prompts else asked.parent.name),
            learned("scores", episodes, " + ".join(judges)),
        ]

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
        """Sets the stage from things in memory.

        Args:
            policy: where it starts; what it is now becomes the reference.
            prompts: their ids and what their records say; visited in a seeded permutation, epoch after epoch.
            judge: the reward model, if one is among the rewards.
            text: (start, count) -> rows of pretraining text, for the pretraining mix.

        Raises:
            DataError: no prompt leaves room for a reply.
        """
        config = self.config
        self.prompts = fitting(prompts, policy.spec.context_length - config.max_response_tokens)
        self.seed, self.stop_ids, self.pad_id = seed, stop_ids, pad_id
        self.policy, self.text = policy, text
        if config.train_layers:
            train_top_layers(policy, config.train_layers)
        self.trained = {"policy": trained_policy(policy, config, config.lora_rank, config.lora_alpha)}
        self.frozen["reference"] = self.reference = reference_of(policy)
        self.num_steps = config.iterations * config.epochs * config.minibatches
        episodes_a_step = config.episodes / config.minibatches
        self.text_rows = max(1, round(config.ptx_rows * episodes_a_step)) if text is not None else 0
        self.text_row_tokens = text(0, 1).tokens_BT.shape[1] if text is not None else 0

    # -- what its steps are made of

    def steps(self, first: int) -> Iterator[Step[Batch]]:
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
                    micro_batches: list[Batch] = [*self.episodes(rollout, chosen, index), *self.text_batches(index)]
                    tokens = int(length_P[chosen].sum()) + self.text_rows * self.text_row_tokens
                    is_last = (epoch, number) == (config.epochs - 1, config.minibatches - 1)
                    if is_last:  # what is saved after this step is the state between two iterations
                        self.iteration += 1
                        self.prompt_cursor += config.prompts_per_iteration
                    yield Step(micro_batches, tokens=tokens, can_resume=is_last)

    def episodes(self, rollout: Rollout, chosen: Tensor, index: int) -> list[Rollout]:
        """This rank's part of the chosen episodes, in micro-batches of similar length."""
        mine = torch.isin(rollout.number_B.cpu(), chosen).nonzero().flatten()
        part = rollout.rows(mine.tolist())
        groups = grouped(part, self.config.group_size, self.config.micro_tokens, mix_seed(self.seed, index, 3))
        return [part.rows(group) for group in groups]

    def text_batches(self, index: int) -> list[TokenBatch]:
        """This rank's rows of pretraining text for step `index`: a function of the step alone."""
        if self.text is None:
            return []
        first, size = index * self.text_rows, max(1, self.config.micro_tokens // self.text_row_tokens)
        starts = dist.share(range(first, first + self.text_rows, size))
        return [self.text(start, min(size, first + self.text_rows - start)) for start in starts]

    # -- the rollout

    def collect(self) -> tuple[Rollout, Tensor]:
        """Samples, scores and prepares one iteration; also each episode's length over all ranks (0: not learned from).

        The replies to one prompt are one rank's.
        """
        config, size = self.config, self.config.group_size
        assert self.reward is not None
        numbers = [p * size + i for p in dist.share(range(config.prompts_per_iteration)) for i in range(size)]
        which = [self.prompt_number(self.prompt_cursor + number // size) for number in numbers]
        outputs = sample_replies(
            self.engine(), [self.prompts.ids[i] for i in which], numbers, seed=self.seed, iteration=self.iteration,
            temperature=config.temperature, max_tokens=config.max_response_tokens, stop_ids=self.stop_ids,
        )  # fmt: skip
        check_unbiased(outputs)
        drawn = [row for row in zip(numbers, which, outputs, strict=True) if row[2].ids]
        scores = checked(
            score_function(self.reward)(
                [self.prompts.ids[i] for _, i, _ in drawn], [output.ids for *_, output in drawn],
                [self.prompts.meta[i] for _, i, _ in drawn],
            ),
            len(drawn),
        )  # fmt: skip
        kept = [(*row, score) for row, score in zip(drawn, scores, strict=True) if score is not None]
        rollout = make_rollout(
            [self.prompts.ids[i] for _, i, _, _ in kept], [output for _, _, output, _ in kept],
            [score for *_, score in kept], [number for number, *_ in kept], self.pad_id, self.device,
            group_size=size, dtype=next(self.policy.parameters()).dtype,
        )  # fmt: skip
        if self.dense is not None:
            rows = [(self.prompts.ids[i], output.ids, self.prompts.meta[i]) for _, i, output, _ in kept]
            each = [number for row in dense_rewards(self.dense, rows) for number in row]
            weight = config.dense_coef * config.dense_decay**self.iteration
            rollout.dense_BT[rollout.mask_BT] = weight * rollout.score_B.new_tensor(each)
        if config.score_clip:
            rollout.score_B = rollout.score_B.clamp(-config.score_clip, config.score_clip)
        rollout.score_B = algebra.apply_missing_end(
            rollout.score_B, rollout.ended_B, config.missing_end_score, config.missing_end
        )
        self.fill_in(rollout)
        if not self.is_proven:
            check_sampler(rollout, config.max_logprob_gap)
            if self.is_reference:
                check_reference(rollout, config.max_logprob_gap)
        if self.is_single:
            rollout.logp_old_BT = rollout.sampled_BT.clone()
        self.beta = self.kl.beta
        kl_BT = estimate(
            rollout, self.algorithm, self.beta, config.gamma, self.lam, whiten_rewards=config.whiten_rewards
        )
        counted = {"rollout/unscorable": len(drawn) - len(kept), "rollout/empty": len(outputs) - len(drawn)}
        self.note(rollout, kl_BT, {name: float(count) for name, count in counted.items()})
        self.kl.update(self.figures["objective/kl"], config.episodes)
        length_P, teaches_P = torch.zeros(config.episodes), torch.zeros(config.episodes)
        length_P[rollout.number_B.cpu()] = rollout.lengths_B.cpu().float()
        teaches_P[rollout.number_B.cpu()] = (rollout.advantage_BT != 0).any(1).cpu().float()
        dist.sum_tensors(length_P, teaches_P)
        if config.flat_groups == "drop" and int(teaches_P.sum()) >= config.minibatches:
            length_P *= teaches_P  # where too few would be left, all stay: their gradient is 0
        return rollout, length_P

    def note(self, rollout: Rollout, kl_BT: Tensor, counted: dict[str, float]) -> None:
        """Keeps the figures of this rollout, and says, the first time, that episodes were left out."""
        if self.config.group_size > 1:
            counted["rollout/flat_groups"] = float(num_flat_groups(rollout.score_B, rollout.group_B)[0])
        self.figures = figures(rollout, kl_BT, self.beta, counted)
        if isinstance(self.reward, Blend):
            self.figures |= self.reward.means()
        if self.dense is not None:
            sums = dist.sum_numbers({"dense": float(rollout.dense_BT.sum()), "n": float(len(rollout.score_B))})
            self.figures["objective/dense_reward"] = sums["dense"] / max(sums["n"], 1.0)
        self.first_figures = self.first_figures or self.figures
        was_said = any(self.left_out.values())
        for name in COUNTED:
            self.left_out[name] += self.figures[name]
        if any(self.left_out.values()) and not was_said:
            unscorable, empty = (int(self.figures[name]) for name in COUNTED)
            log.warning(
                f"of {self.config.episodes} replies {unscorable} cannot be scored and {empty} are empty: they are left out, "
                "here and from now on, and counted in metrics.jsonl as rollout/unscorable and rollout/empty"
            )

    def prompt_number(self, k: int) -> int:
        """Which prompt is the k-th of the whole run: every prompt once an epoch, in a seeded order."""
        epoch, place = divmod(k, len(self.prompts.ids))
        return permuted(len(self.prompts.ids), key_of(self.seed, "prompts", epoch), place)

    def engine(self) -> Engine:
        """The sampler over the policy as it is now."""
        if not hasattr(self, "_engine"):
            self._engine = Engine(self.policy, max_batch=self.config.engine_batch, num_kept=0)
        else:
            self._engine.update_weights(self.policy)
        return self._engine

    def fill_in(self, rollout: Rollout) -> None:
        """What the training graph says of the rollout: log-probabilities of policy and reference, and values.

        Where the policy is asked again in the iteration's only update (`is_single`), the sampler's word for it is taken
        here, once that was found to be true.
        """
        fill_in(
            rollout, grouped(rollout, self.config.group_size, self.config.micro_tokens, 0), self.policy, self.reference,
            self.values, self.config.temperature, head_VD=self.head(), asks_policy=not (self.is_single and self.is_proven),
            num_workers=workers.num_workers(self.config.micro_tokens),
        )  # fmt: skip

    @property
    def is_reference(self) -> bool:
        """Whether what draws is still the reference, so that they can be compared."""
        return self.iteration == 0

    def head(self) -> Tensor:
        """The output embedding (V, D) of what draws."""
        return self.policy.output_weight

    def values(self, part: Rollout, hidden_ND: Tensor) -> Tensor:
        """Values of the states in which tokens were chosen, for a method with a critic; 0 without."""
        return torch.zeros_like(part.value_old_BT)

    # -- its losses

    @property
    def is_single(self) -> bool:
        """Whether no advantage depends on the log-probabilities, and an iteration is one update, of the policy that sampled."""
        depends = self.algorithm.advantage == "gae" or self.algorithm.kl == "reward"
        return self.config.epochs * self.config.minibatches == 1 and not depends

    @property
    def has_kl_term(self) -> bool:
        """Whether the KL is a term of the loss."""
        return self.algorithm.kl != "reward" and self.beta > 0

    def counts(self, micro_batch: Batch) -> dict[str, float]:
        """The policy's units (tokens or replies, as the mean says); weighted targets of the pretraining text."""
        if not isinstance(micro_batch, Rollout):
            return {"ptx": float(micro_batch.num_targets)}
        count = self.mean.count(micro_batch.mask_BT)
        return {"policy": count, **({"kl": count} if self.has_kl_term else {})}

    def loss(self, micro_batch: Batch) -> tuple[dict[str, Term], Metrics]:
        """The policy's losses of some episodes, or the pretraining loss of some text."""
        if isinstance(micro_batch, Rollout):
            return self.policy_terms(micro_batch, predicting_states(self.policy, micro_batch))
        total, count, _ = next_token_loss(self.policy, micro_batch.tokens_BT, micro_batch.weights_BT)
        weight = self.config.ptx_coef * self.policy_weight
        return {"ptx": Term(total, weight)}, {"ptx/loss": (total.detach(), count)}

    def policy_terms(self, part: Rollout, hidden_ND: Tensor) -> tuple[dict[str, Term], Metrics]:
        """The surrogate and, where it is a term, the KL to the reference."""
        config, mask_BT = self.config, part.mask_BT
        logp_BT, entropy_BT = logprobs_of(self.head(), hidden_ND, part, config.temperature)
        if not self.is_proven:
            check_first_ratio(logp_BT, part, config.max_logprob_gap)
            self.is_proven = True
        old_BT = logp_BT.detach() if self.is_single else part.logp_old_BT
        policy_BT, stats = self.objective(logp_BT, old_BT, part.advantage_BT, mask_BT, self.clip)
        total = self.mean.total(policy_BT, mask_BT, config.max_response_tokens)
        terms = {"policy": Term(total, self.policy_weight)}
        if self.has_kl_term:
            kl_BT = algebra.kl_estimate(logp_BT, part.logp_ref_BT, self.algorithm.kl).masked_fill(~mask_BT, 0.0)
            total = self.mean.total(kl_BT, mask_BT, config.max_response_tokens)
            terms["kl"] = Term(total, self.beta * self.policy_weight)
        count = float(part.num_tokens)
        centred_BT = (stats["ratio"] - 1.0).masked_fill(~mask_BT, 0.0)
        sums = {
            "policy/approxkl": stats["approxkl"],
            "policy/clipfrac": stats["clipfrac"],
            "policy/entropy": entropy_BT,
            "val/ratio": stats["ratio"],
            "val/ratio_var": centred_BT.square(),  # after_step takes the squared mean off
        }
        if self.is_single:
            sums["rollout/logprob_gap"] = (part.sampled_BT - logp_BT.detach()).abs().masked_fill(~mask_BT, 0.0)
        return terms, {name: (value.sum(), count) for name, value in sums.items()}

    def halves(self, micro_batch: Batch) -> list[Batch]:
        """Its rows in two."""
        return [*micro_batch.halves()]

    def after_step(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Adds the figures of the iteration's rollout to every line; of some the update knows more than the rollout did."""
        if self.is_single:
            self.figures["rollout/logprob_gap"] = metrics["rollout/logprob_gap"]
            self.figures["objective/entropy"] = metrics["policy/entropy"] * self.figures["tokens/response_length"]
        spread = metrics["val/ratio_var"] - (metrics["val/ratio"] - 1.0) ** 2
        return {**self.figures, "val/ratio_var": max(spread, 0.0)}

    # -- what it tells

    def answers(self, model: Decoder) -> list[dict[str, Any]]:
        """Greedy replies of a model to the first prompts, as text; none without a tokenizer."""
        if self.tokenizer is None:
            return []
        prompts = self.prompts.ids[:NUM_SAMPLES]
        return greedy_answers(model, prompts, self.tokenizer, self.config.max_response_tokens, self.stop_ids)

    def samples(self) -> list[dict[str, Any]]:
        """Greedy replies to a few fixed prompts."""
        return self.answers(self.policy)

    def save(self, folder: Path, snapshot: str = "") -> None:
        """Writes the checkpoint, of adapters the merged weights; notes what it answers beside the reference."""
        save_policy(self, folder, snapshot or "checkpoint", adapters=not snapshot)
        if not snapshot:
            pairs = zip(self.samples(), self.answers(self.reference), strict=True)
            self.final_samples = [{**row, "before": first["reply"]} for row, first in pairs]

    def report(self, final: Mapping[str, float]) -> dict[str, Any]:
        """Reward before and after, KL, how replies end, and replies of reference and policy side by side."""
        before, after = self.first_figures, self.figures
        shown = {name.split("/", 1)[1]: [before[name], after[name]] for name in before if name in after}
        return {
            "line": f"reward {before['objective/scores']:.2f} -> {after['objective/scores']:.2f} at KL "
            f"{after['objective/kl']:.2f} nats per response; {after['tokens/end_rate']:.0%} of replies end",
            "episodes": self.config.iterations * self.config.episodes,
            "prompts": {"kept": len(self.prompts.ids), "too_long": self.prompts.num_too_long},
            "left_out": {name.split("/")[1]: count for name, count in self.left_out.items()},
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
            "left_out": dict(self.left_out),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.iteration, self.prompt_cursor = int(state["iteration"]), int(state["prompt_cursor"])
        self.kl.beta = float(state["kl_coef"])
        self.first_figures, self.figures = dict(state["first_figures"]), dict(state["figures"])
        self.left_out = dict(state["left_out"])
