"""Rollouts: replies sampled from a policy, and the tensors that a policy update needs.

Why apart: every on-policy method samples and re-computes log-probabilities in the same way, and peers' hardest bugs lie
here (a sampler that is not the policy, padding counted as tokens, a score at the wrong index).

Shapes: B episodes, T positions. The conventions are those of `lyceum.train.policy`: index t means "token t of the row".
What it is not: it updates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lyceum import dist
from lyceum.batches.pack import bucket, bucket_alike, pad
from lyceum.batches.pairs import Prompts
from lyceum.device import side_by_side
from lyceum.engine import sides
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams, mix_seed
from lyceum.engine.sequence import Output
from lyceum.errors import DataError, TrainingError
from lyceum.log import log
from lyceum.model.branches import Branches, read
from lyceum.model.transformer import Decoder
from lyceum.stages.algorithms import Algorithm
from lyceum.stages.rewards import Ids, last_turn
from lyceum.tokens.chat import ChatFormat
from lyceum.tokens.tokenizer import Tokenizer
from lyceum.train import policy as algebra
from lyceum.train.advantages import ESTIMATORS


@dataclass
class Rollout:
    """Episodes as right-padded rows; everything is 0 outside `mask_BT`, the tokens that the policy chose.

    tokens_BT: prompt and response, right-padded. lengths_B: real tokens of each row. number_B: the episode's number in
    its iteration, over all ranks. group_B: its prompt's. ended_B: the response stopped by itself. score_B: after the
    missing-end rule. dense_BT: rewards of single tokens, in addition.
    sampled_BT: the sampler's log-probabilities; logp_old_BT: the training graph's; logp_ref_BT: the reference's.
    """

    tokens_BT: Tensor
    mask_BT: Tensor
    lengths_B: Tensor
    number_B: Tensor
    group_B: Tensor
    ended_B: Tensor
    score_B: Tensor
    dense_BT: Tensor
    sampled_BT: Tensor
    logp_old_BT: Tensor
    logp_ref_BT: Tensor
    entropy_BT: Tensor
    value_old_BT: Tensor
    advantage_BT: Tensor
    return_BT: Tensor

    @property
    def num_tokens(self) -> int:
        """Chosen tokens: the denominator of every mean over tokens."""
        return int(self.mask_BT.sum())

    def rows(self, indices: Sequence[int]) -> Rollout:
        """These episodes, with the padding that their longest row needs."""
        index = torch.as_tensor(list(indices), dtype=torch.long, device=self.tokens_BT.device)
        longest = int(self.lengths_B[index].max()) if len(index) else 0
        chosen = {f.name: getattr(self, f.name)[index] for f in fields(self)}
        return Rollout(**{name: v[:, :longest] if v.dim() == 2 else v for name, v in chosen.items()})

    def halves(self) -> list[Rollout]:
        """The first and the second half of the episodes; one episode stays whole."""
        count = len(self.lengths_B)
        return [self.rows(range(count // 2)), self.rows(range(count // 2, count))] if count > 1 else [self]


def make_rollout(
    prompts: Sequence[Ids],
    outputs: Sequence[Output],
    scores: Sequence[float],
    numbers: Sequence[int],
    pad_id: int,
    device: torch.device,
    *,
    group_size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Rollout:
    """Rows of prompt and reply with the sampler's log-probabilities; what the models say, in their `dtype`, comes later.

    Episodes `n * group_size` up to `(n + 1) * group_size` are replies to one prompt.
    """
    rows = [[*prompt, *output.ids] for prompt, output in zip(prompts, outputs, strict=True)]
    tokens_BT, lengths_B = pad(rows, pad_id) if rows else (torch.zeros(0, 1, dtype=torch.long), torch.zeros(0).long())
    starts_B = lengths_B - torch.tensor([len(output.ids) for output in outputs], dtype=torch.long)
    positions_T = torch.arange(tokens_BT.shape[1])
    mask_BT = (positions_T >= starts_B[:, None]) & (positions_T < lengths_B[:, None])
    number_B = torch.tensor(list(numbers), dtype=torch.long)
    sampled_BT = torch.zeros(tokens_BT.shape, dtype=dtype)
    sampled_BT[mask_BT] = torch.tensor([logprob for output in outputs for logprob in output.logprobs], dtype=dtype)
    names = ("logp_old_BT", "logp_ref_BT", "entropy_BT", "value_old_BT", "advantage_BT", "return_BT")
    rollout = Rollout(
        tokens_BT,
        mask_BT,
        lengths_B,
        number_B,
        number_B // group_size,
        torch.tensor([output.finish == "stop" for output in outputs], dtype=torch.bool),
        torch.tensor(list(scores), dtype=dtype),
        torch.zeros(tokens_BT.shape, dtype=dtype),
        sampled_BT,
        **{name: torch.zeros(tokens_BT.shape, dtype=dtype) for name in names},
    )
    return Rollout(**{f.name: getattr(rollout, f.name).to(device) for f in fields(rollout)})


def grouped(rollout: Rollout, group_size: int, micro_tokens: int, seed: int) -> list[list[int]]:
    """Rows in micro-batches of similar length; where a prompt has several replies these stand together, to read it once."""
    lengths = rollout.lengths_B.tolist()
    if group_size == 1:
        return bucket(lengths, micro_tokens, seed)
    return bucket_alike(lengths, rollout.group_B.tolist(), micro_tokens, seed)


def predicting_states(model: Decoder, part: Rollout) -> Tensor:
    """Hidden states (N, D) that predict the chosen tokens; what replies to one prompt have in common is computed once."""
    branches = Branches.of(part.tokens_BT, part.lengths_B, part.group_B)
    return read(model, part.tokens_BT, algebra.predicting(part.mask_BT), branches)


def logprobs_of(
    head_VD: Tensor, hidden_ND: Tensor, part: Rollout, temperature: float, *, with_entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the chosen tokens at the sampling temperature, and the entropy of each choice."""
    tokens_BT, mask_BT = part.tokens_BT, part.mask_BT
    return algebra.chosen_logprobs(
        hidden_ND, head_VD, tokens_BT, mask_BT, temperature=temperature, with_entropy=with_entropy
    )


def fill_in(
    rollout: Rollout,
    groups: Sequence[Sequence[int]],
    policy: Decoder,
    reference: Decoder,
    values: Callable[[Rollout, Tensor], Tensor],
    temperature: float,
    *,
    head_VD: Tensor,
    num_workers: int = 1,
    asks_policy: bool = True,
) -> None:
    """Writes what the training graph says of each row into the rollout; on a CPU threads share the rows.

    Args:
        groups: the rows of each pass.
        values: (rows, the policy's hidden states that predict) -> the critic's values.
        head_VD: the output embedding of what drew.
        asks_policy: False leaves out the policy's log-probabilities and entropies, and the values.
    """
    device = rollout.tokens_BT.device
    count = max(1, min(len(groups), num_workers)) if device.type == "cpu" else 1

    @torch.no_grad()  # which is each thread's own affair
    def go(number: int) -> None:
        for group in groups[number::count]:
            part = rollout.rows(group)
            index, width = torch.tensor(group, device=device), part.tokens_BT.shape[1]
            hidden_ND = predicting_states(reference, part)
            logp_BT, _ = logprobs_of(reference.output_weight, hidden_ND, part, temperature, with_entropy=False)
            rollout.logp_ref_BT[index, :width] = logp_BT
            if asks_policy:
                hidden_ND = predicting_states(policy, part)
                logp_BT, entropy_BT = logprobs_of(head_VD, hidden_ND, part, temperature)
                rollout.logp_old_BT[index, :width] = logp_BT
                rollout.entropy_BT[index, :width] = entropy_BT
                rollout.value_old_BT[index, :width] = values(part, hidden_ND)

    side_by_side(go, count)


def sample_replies(
    engine: Engine,
    prompts: Sequence[Ids],
    numbers: Sequence[int],
    *,
    seed: int,
    iteration: int,
    temperature: float,
    max_tokens: int,
    stop_ids: tuple[int, ...],
) -> list[Output]:
    """One reply to each prompt from the unfiltered distribution softmax(logits / temperature).

    The noise of a reply is a function of (seed, iteration, its number) and of the position, so it does not depend on
    the rank, on batch mates, or on whether the run was resumed.
    """
    params = [
        SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            stop_ids=stop_ids,
            seed=mix_seed(seed, iteration, number),
            logprobs=True,
        )
        for number in numbers
    ]
    return sides.generate(engine, prompts, params)


def greedy_answers(
    model: Decoder, prompts: Sequence[Ids], tokenizer: Tokenizer, max_tokens: int, stop_ids: tuple[int, ...]
) -> list[dict[str, Any]]:
    """A model's greedy replies, as text, beside what was last said to it."""
    params = SamplingParams(max_tokens, temperature=0.0, stop_ids=stop_ids)
    outputs = Engine(model, max_batch=max(1, len(prompts))).generate(prompts, params)
    chat = ChatFormat(tokenizer)
    return [
        {
            "prompt": last_turn(tokenizer.decode(list(prompt), keep_special=True)),
            "reply": chat.parse(output.ids).content,
            "ended": output.finish == "stop",
        }
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def fitting(prompts: Prompts, room: int) -> Prompts:
    """The prompts that leave room for a reply; a prompt is never cut, and what is left out is counted and said.

    Raises:
        DataError: there is none.
    """
    fits = [number for number, ids in enumerate(prompts.ids) if 0 < len(ids) <= room]
    left_out = len(prompts.ids) - len(fits)
    if not fits:
        raise DataError(
            f"no prompts to practise on: of {left_out} none has at most {room} tokens",
            hint="check the prompts, and max_response_tokens against the context",
        )
    if left_out:
        log.warning(f"{left_out} of {len(prompts.ids)} prompts leave no room for a reply and are left out")
    kept = [prompts.ids[number] for number in fits], [prompts.meta[number] for number in fits]
    return replace(prompts, ids=kept[0], meta=kept[1], num_too_long=prompts.num_too_long + left_out)


# ---------------------------------------------------------------- checks at the start of a run


def largest_gap(one_BT: Tensor, other_BT: Tensor, mask_BT: Tensor) -> float:
    """The largest absolute difference on the mask; 0 where it is empty."""
    gap_BT = (one_BT - other_BT).detach().abs().masked_fill(~mask_BT, 0.0)
    return float(gap_BT.max()) if gap_BT.numel() else 0.0


def check_unbiased(outputs: Sequence[Output]) -> None:
    """Raises TrainingError if replies were not drawn from the distribution whose log-probabilities came with them."""
    num_biased = sum(output.is_biased or output.num_forced > 0 for output in outputs)
    if num_biased:
        raise TrainingError(
            f"{num_biased} of {len(outputs)} replies were drawn with top-k, top-p, greedily or with given tokens: a policy "
            "gradient is an average over the policy's own samples, and these are another's",
            hint="sample at a temperature above 0 without filters; the temperature itself is corrected for",
        )


def check_sampler(rollout: Rollout, tolerance: float) -> None:
    """Raises TrainingError if the sampler's log-probabilities are not the training graph's, by more than `tolerance`."""
    gap = largest_gap(rollout.sampled_BT, rollout.logp_old_BT, rollout.mask_BT)
    if not gap <= tolerance:
        raise TrainingError(
            f"the sampler and the training graph disagree by {gap:.2g} nats on a token (allowed: {tolerance:.0e}): "
            "every ratio and every KL of this run would be wrong",
            hint="the engine must run the same weights, temperature and precision as training, without top-k or top-p "
            "and without dropout; in low precision raise max_logprob_gap knowingly",
        )


def check_reference(rollout: Rollout, tolerance: float) -> None:
    """Raises TrainingError if the policy, before its first update, is not the reference."""
    gap = largest_gap(rollout.logp_old_BT, rollout.logp_ref_BT, rollout.mask_BT)
    if not gap <= tolerance:
        raise TrainingError(
            f"before the first update the KL to the reference is not 0 (a token differs by {gap:.2g} nats)",
            hint="policy and reference must be the same checkpoint, in the same precision, without dropout",
        )


def check_first_ratio(logp_BT: Tensor, rollout: Rollout, tolerance: float) -> None:
    """Raises TrainingError if the ratio is not 1 in the first pass: the forward pass is random, or padded wrongly."""
    gap = largest_gap(logp_BT, rollout.logp_old_BT, rollout.mask_BT)
    if not gap <= tolerance:
        raise TrainingError(
            f"the first ratio is not 1: a log-probability moved by {gap:.2g} nats without an update",
            hint="switch dropout off and keep the same precision in rollouts and updates",
        )


# ---------------------------------------------------------------- advantages and figures


def global_moments(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """`moment_sums` over all ranks."""
    sums = algebra.moment_sums(value_BT, mask_BT)
    dist.sum_tensors(sums)
    return sums


def estimate(
    rollout: Rollout, algorithm: Algorithm, beta: float, gamma: float, lam: float, *, whiten_rewards: bool = False
) -> Tensor:
    """Fills in returns and advantages as the algorithm says; gives back kl_BT (k1).

    Whitening, where there is any, is over the whole iteration and all ranks. Source: Ouyang et al. 2022, eq. 2;
    checklist items 15, 16, 19, 22, 23.
    """
    mask_BT = rollout.mask_BT
    kl_BT = algebra.kl_estimate(rollout.logp_old_BT, rollout.logp_ref_BT, "k1")
    penalty = beta if algorithm.kl == "reward" else 0.0
    reward_BT = algebra.token_rewards(kl_BT, mask_BT, rollout.score_B, penalty) + rollout.dense_BT
    if whiten_rewards:
        reward_BT = algebra.masked_whiten(reward_BT, mask_BT, global_moments(reward_BT, mask_BT), shift_mean=False)
    advantage_BT, rollout.return_BT = ESTIMATORS[algorithm.advantage](
        reward_BT, rollout.value_old_BT, mask_BT, rollout.group_B, gamma, lam
    )
    if algorithm.whitens:
        advantage_BT = algebra.masked_whiten(advantage_BT, mask_BT, global_moments(advantage_BT, mask_BT))
    rollout.advantage_BT = advantage_BT
    return kl_BT


def figures(
    rollout: Rollout, kl_BT: Tensor, beta: float, counted: Mapping[str, float] | None = None
) -> dict[str, float]:
    """What an iteration's episodes look like, over all ranks, masked, under the field's names (checklist 2.7).

    KL and entropy are sums over a response's tokens, in nats, averaged over episodes. `counted` is what else this rank
    has counted; it is summed over ranks. Warns when the KL is negative by more than chance allows.
    """
    mask_BT, score_B = rollout.mask_BT, rollout.score_B.double()
    kl_B = kl_BT.double().masked_fill(~mask_BT, 0.0).sum(1)
    gap_BT = (rollout.sampled_BT - rollout.logp_old_BT).abs()
    counted = dict(counted or {})
    total = dist.sum_numbers(
        {
            "episodes": float(len(score_B)),
            "tokens": float(rollout.num_tokens),
            "kl": float(kl_B.sum()),
            "kl_square": float(kl_B.square().sum()),
            "entropy": float(algebra.masked_sum(rollout.entropy_BT, mask_BT)),
            "score": float(score_B.sum()),
            "score_square": float(score_B.square().sum()),
            "ended": float(rollout.ended_B.sum()),
            "gap": float(algebra.masked_sum(gap_BT, mask_BT)),
            **counted,
        }
    )
    n, tokens = max(total["episodes"], 1.0), max(total["tokens"], 1.0)
    kl, score = total["kl"] / n, total["score"] / n
    kl_error = (max(total["kl_square"] / n - kl * kl, 0.0) / n) ** 0.5
    if kl < -3 * kl_error - 1e-3:
        log.warning(
            f"the KL to the reference is negative ({kl:.3f} nats per response, standard error {kl_error:.3f}): over "
            "many samples it cannot be, unless replies are not drawn from the policy that is being trained"
        )
    return {
        "objective/kl": kl,
        "objective/kl_per_token": total["kl"] / tokens,
        "objective/kl_coef": beta,
        "objective/entropy": total["entropy"] / n,
        "objective/scores": score,
        "objective/scores_std": max(total["score_square"] / n - score * score, 0.0) ** 0.5,
        "objective/non_score_reward": -beta * kl,
        "objective/rlhf_reward": score - beta * kl,
        "tokens/response_length": total["tokens"] / n,
        "tokens/end_rate": total["ended"] / n,
        "rollout/logprob_gap": total["gap"] / tokens,
        **{name: total[name] for name in counted},
    }


def explained_variance(rollout: Rollout) -> float:
    """How much of the returns' variance the critic knew before the update, over all ranks."""
    residual = global_moments(rollout.return_BT - rollout.value_old_BT, rollout.mask_BT)
    return algebra.explained_variance(residual, global_moments(rollout.return_BT, rollout.mask_BT))
