"""Best-of-n as data: several answers of a policy to each practice prompt, of which the one a reward source likes best is kept.

Why: it needs no policy gradient, so it is the baseline that PPO must beat; fine-tuned on, it is rejection sampling (Touvron
et al. 2023, Llama 2, section 3.2.3). Written as conversations, so an [sft] section after this one learns from them.

How far it goes is known: KL(best-of-n || policy) is at most log n - (n - 1) / n nats a response
(`lyceum.evals.metrics.best_of_n_kl`). Whether the *choice* helped, and not the mere training on one's own answers, only a
control can say: `keep = "random"` keeps as many answers of as many prompts, drawn by lot (KL 0).

Only answers that end by themselves can be kept: an answer that was cut off would teach to stop in the middle. A prompt none
of whose answers ends, one that cannot be scored, and one too long to be answered are left out and counted.

Writes `train.jsonl` and `valid.jsonl` (split by prompt). Run by `lyceum select RECIPE`. What it is not: better than its judge.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from lyceum.config import setting
from lyceum.corpus.records import Conversation, read_conversations, write_records
from lyceum.engine import sides
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams, mix_seed
from lyceum.engine.sequence import Output
from lyceum.errors import DataError
from lyceum.evals.metrics import best_of_n_kl
from lyceum.log import log, progress
from lyceum.model.checkpoint import load_checkpoint
from lyceum.run import Work, checkpoint_in
from lyceum.stages.reward import RewardModel
from lyceum.stages.rewards import RewardSource, Score, checked, score_function
from lyceum.tokens.chat import ChatFormat

VERSION = 1


@dataclass(frozen=True)
class SelectConfig:
    """How answers are drawn and chosen."""

    prompts: int = setting(800, "practice prompts to answer", low=1)
    responses: int = setting(4, "answers drawn for each prompt (n)", low=1)
    keep: str = setting("best", "the best answer by reward, or, as a control, a random one", choices=("best", "random"))
    top_share: float = setting(1.0, "share of the prompts kept: those with the highest scores", low=0.0, high=1.0)
    temperature: float = setting(1.0, "sampling temperature", low=0.01)
    max_response_tokens: int = setting(64, "longest answer, in tokens", low=1)
    valid_share: float = setting(0.1, "share of prompts kept for validation", low=0.0, high=0.9)
    max_batch: int = setting(128, "answers drawn at once", low=1)


@dataclass(frozen=True)
class Choice:
    """The answer that was kept for prompt number `prompt`, with its score, beside the mean of all that could be kept."""

    prompt: int
    output: Output
    score: float
    mean: float


def draw(
    engine: Engine, prompts: Sequence[list[int]], stop_ids: tuple[int, ...], config: SelectConfig, seed: int
) -> list[list[Output]]:
    """n answers to each prompt; the noise of one is a function of the seed, its prompt's number and its own."""
    n = config.responses
    params = [
        SamplingParams(
            config.max_response_tokens,
            temperature=config.temperature,
            stop_ids=stop_ids,
            seed=mix_seed(seed, number, answer),
        )
        for number in range(len(prompts))
        for answer in range(n)
    ]
    with progress(len(params), "select", unit="answer") as bar:
        done = 0

        def show(finished: int, _: int) -> None:
            nonlocal done
            bar.update(finished - done)
            done = finished

        outputs = sides.generate(engine, [p for p in prompts for _ in range(n)], params, on_progress=show)
    return [outputs[first : first + n] for first in range(0, len(outputs), n)]


def choose(
    outputs: Sequence[Sequence[Output]], scores: Sequence[Sequence[Score]], keep: str, chance: random.Random
) -> list[Choice | None]:
    """For each prompt the answer to keep among those that ended and have a score; None where there is none.

    Args:
        keep: ``best`` (the first of equals) or ``random``.
    """
    found: list[Choice | None] = []
    for number, (answers, values) in enumerate(zip(outputs, scores, strict=True)):
        fit = [(o, s) for o, s in zip(answers, values, strict=True) if o.finish == "stop" and s is not None]
        if not fit:
            found.append(None)
            continue
        output, score = max(fit, key=lambda pair: pair[1]) if keep == "best" else chance.choice(fit)
        found.append(Choice(number, output, score, sum(s for _, s in fit) / len(fit)))
    return found


def top(choices: Sequence[Choice], config: SelectConfig, chance: random.Random) -> list[Choice]:
    """The stated share of the prompts, in their order: those with the highest scores or, for the control, by lot."""
    count = max(1, round(config.top_share * len(choices)))
    ranked = sorted(choices, key=lambda c: -c.score) if config.keep == "best" else chance.sample(choices, len(choices))
    return sorted(ranked[:count], key=lambda c: c.prompt)


def select(
    engine: Engine,
    chat: ChatFormat,
    conversations: Sequence[Conversation],
    reward: RewardSource | Callable[..., list[Score]],
    config: SelectConfig,
    seed: int,
) -> tuple[list[Conversation], dict[str, float]]:
    """Answered prompts to learn from, and the counts and scores for the report.

    Args:
        reward: any reward source, as PPO takes it: a reward model, or a function (prompts, responses, meta).

    Raises:
        DataError: no prompt has an answer that can be kept.
    """
    encoded = [(conversation, chat.prompt(conversation)) for conversation in conversations]
    room = engine.context_length - config.max_response_tokens
    asked = [(conversation, prompt) for conversation, prompt in encoded if len(prompt) <= room]
    outputs = draw(engine, [prompt for _, prompt in asked], chat.stop_ids, config, seed)
    n = config.responses
    flat = [output for answers in outputs for output in answers]
    prompts = [prompt for _, prompt in asked for _ in range(n)]
    meta = [conversation.meta for conversation, _ in asked for _ in range(n)]
    scored = checked(score_function(reward)(prompts, [output.ids for output in flat], meta), len(flat))
    by_prompt = [scored[first : first + n] for first in range(0, len(scored), n)]
    chance = random.Random(f"{seed} select")
    chosen = choose(outputs, by_prompt, config.keep, chance)
    fit = [choice for choice in chosen if choice is not None]
    unfinished = sum(all(output.finish != "stop" for output in answers) for answers in outputs)
    counts = {
        "prompts": len(encoded),
        "too_long": len(encoded) - len(asked),
        "none_ends": unfinished,
        "unscorable": len(asked) - len(fit) - unfinished,
    }
    left_out = {name: count for name, count in counts.items() if count and name != "prompts"}
    if left_out:
        log.warning(f"of {len(encoded)} prompts left out: " + ", ".join(f"{n} {k}" for k, n in left_out.items()))
    if not fit:
        raise DataError(
            f"none of {len(encoded)} prompts has an answer to keep: {left_out}",
            hint="raise max_response_tokens, or start from a policy that ends its answers",
        )
    kept = top(fit, config, chance)
    rows = []
    for choice in kept:
        conversation = asked[choice.prompt][0]
        answered = (*conversation.messages, chat.parse(choice.output.ids))
        about = {**conversation.meta, "origin": "model", "score": choice.score}
        rows.append(replace(conversation, messages=answered, meta=about))
    return rows, {
        **counts,
        "kept": len(kept),
        "n": n,
        "ended": sum(output.finish == "stop" for output in flat) / max(len(flat), 1),
        "score_drawn": sum(choice.mean for choice in fit) / len(fit),
        "score_kept": sum(choice.score for choice in kept) / len(kept),
        "kl_bound": best_of_n_kl(n) if config.keep == "best" else 0.0,
    }


def run(config: SelectConfig, work: Work) -> dict:
    """Answers the prompts of `work.inputs["lessons"]` and keeps what `work.inputs["reward"]` scores best.

    Raises:
        CheckpointError: policy and reward model have other tokenizers. DataError: nothing can be kept.
    """
    policy = load_checkpoint(checkpoint_in(work.inputs["policy"]))
    reward = RewardModel.load(work.inputs["reward"] / "checkpoint", reads=policy.tokenizer)
    path = work.inputs["lessons"] / "prompts.jsonl"
    conversations = list(islice(read_conversations(path), config.prompts))
    if len(conversations) < config.prompts:
        log.warning(f"only {len(conversations)} practice prompts, {config.prompts} were asked for")
    engine = Engine(policy.model, max_batch=config.max_batch, num_kept=0)
    rows, found = select(engine, ChatFormat(policy.tokenizer), conversations, reward, config, work.seed)
    chance = random.Random(f"{work.seed} split")
    parts: dict[str, list[Conversation]] = {"train": [], "valid": []}
    for row in rows:
        parts["valid" if chance.random() < config.valid_share else "train"].append(row)
    if not parts["train"]:
        raise DataError(
            "every prompt was kept for validation", file=path, hint="lower valid_share, or ask more prompts"
        )
    for part, records in parts.items():
        write_records(work.folder.path / f"{part}.jsonl", records)
    return {
        "line": f"{config.keep} of {config.responses}: {found['kept']} conversations of {found['prompts']} prompts, "
        f"score {found['score_drawn']:.2f} -> {found['score_kept']:.2f}, at most {found['kl_bound']:.2f} nats from the policy",
        **found,
        **{part: len(records) for part, records in parts.items()},
    }
