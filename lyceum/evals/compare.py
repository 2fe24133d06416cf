"""The compare section: a model beside the one it started from, by judgements that it has not seen.

    implicit margin of a judged pair    m = log (pi_new / pi_old)(better | x) - log (pi_new / pi_old)(worse | x)

Beta times the log ratio is the reward under which the new model is the best answer to the old one's (Rafailov et al. 2023,
eq. 5), whatever method made it. So the share of held-out pairs with m > 0 says how often the new model went the way that
people point; 1/2 is what a model that learned nothing has, and the old one itself. With a reward model before it, both
models' own answers to the held-out prompts are scored too: how often the new one's is the better.

Intervals are bootstrap intervals over prompts. **The rule**: the new model is better if what it was judged by lies above one
half with its whole interval, and it has not lost the way to end an answer. What it was judged by is the share of pairs, or, with
a reward model whose own order of the held-out pairs lies above one half as well, the share of prompts on which its answer is the
better one.

Run by `lyceum compare RECIPE`, and by `lyceum improve`. What it is not: the examination (`lyceum.evals.tutor_table`). People
say which answers they like; whether they are true is another question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lyceum.batches.pairs import EncodedRanking, encode_rankings
from lyceum.config import setting
from lyceum.corpus.records import read_rankings
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import mix_seed
from lyceum.errors import CheckpointError, RunError
from lyceum.evals.agreement import accuracy, counted, differences
from lyceum.evals.answers import Judge, Written, write_answers
from lyceum.evals.metrics import decided, interval, mean_interval
from lyceum.model.checkpoint import Loaded, load_checkpoint
from lyceum.model.transformer import Decoder
from lyceum.run import Work, checkpoint_in, read_state
from lyceum.tokens.chat import ChatFormat

VERSION = 1
NUM_SHOWN = 8  # prompts that the page shows with both answers
Interval = tuple[float, float, float]


@dataclass(frozen=True)
class CompareConfig:
    """How two models are compared."""

    prompts: int = setting(200, "held-out prompts that both models answer", low=1)
    max_response_tokens: int = setting(128, "longest answer, in tokens", low=1)
    temperature: float = setting(1.0, "at which they answer", low=0.0)
    ended_drop: float = setting(
        0.05, "by how much its share of answers that end may be lower before the new model counts as worse", low=0.0
    )
    max_batch: int = setting(64, "answers written at once", low=1)


# ---------------------------------------------------------------- what people said


def logprobs(engine: Engine, rankings: Sequence[EncodedRanking]) -> list[list[float]]:
    """log pi(response | prompt) of every response of every ranking, in nats, its end token included."""
    rows = [row for ranking in rankings for row in ranking.rows]
    scores = iter(engine.score(rows))
    return [[sum(next(scores)[ranking.num_prompt - 1 :]) for _ in ranking.rows] for ranking in rankings]


def by_prompt(rankings: Sequence[EncodedRanking], values: Sequence[Sequence[float]]) -> list[list[float]]:
    """Of each prompt that differs the differences of `values` (one for each response) between better and worse."""
    groups: dict[tuple[int, ...], list[float]] = {}
    for ranking, own in zip(rankings, values, strict=True):
        prompt = tuple(ranking.rows[0][: ranking.num_prompt])
        groups.setdefault(prompt, []).extend(differences(own, ranking.ranks))
    return list(groups.values())


def orders(old: Engine, new: Engine, rankings: Sequence[EncodedRanking]) -> dict[str, Interval]:
    """How the two models order the pairs: `implicit` by the margin above; `old`, `new`: by what each finds likelier."""
    logp = {"old": logprobs(old, rankings), "new": logprobs(new, rankings)}
    ratios = [
        [now - then for now, then in zip(after, before, strict=True)]
        for before, after in zip(logp["old"], logp["new"], strict=True)
    ]
    each = {name: counted(by_prompt(rankings, values)) for name, values in logp.items()}
    return {
        "implicit": accuracy(by_prompt(rankings, ratios)),
        "old": interval(each["old"]),
        "new": interval(each["new"]),
        "new_minus_old": interval(each["new"], each["old"]),
    }


# ---------------------------------------------------------------- what they say themselves


def told(written: Sequence[Written]) -> dict[str, Any]:
    """Of one model's answers: which share came to an end, and how long they are."""
    ended, low, high = mean_interval([float(one.ended) for one in written])
    length = sum(len(one.ids) for one in written) / len(written)
    return {"ended": ended, "ended_interval": [low, high], "tokens": length}


def rewarded(
    judge: Judge, prompts: Sequence[list[int]], old: Sequence[Written], new: Sequence[Written]
) -> dict[str, Any]:
    """The reward model's scores of both models' answers, and on which share of prompts the new one's is the better."""
    scores = {
        name: judge.score([prompt + one.ids for prompt, one in zip(prompts, written, strict=True)])
        for name, written in (("old", old), ("new", new))
    }
    gains = [[now - then] for then, now in zip(scores["old"], scores["new"], strict=True)]
    means = {f"reward_{name}": sum(values) / len(values) for name, values in scores.items()}
    return {**means, **stated("preferred", accuracy(gains))}


# ---------------------------------------------------------------- the verdict


def verdict(found: dict[str, Any], ended_drop: float) -> tuple[bool, str]:
    """Whether the new model is better, by the rule above, and why, in words."""
    if found["new"]["ended"] < found["old"]["ended"] - ended_drop:
        share = f"{found['new']['ended']:.0%} of its answers end, {found['old']['ended']:.0%} of the old model's did"
        return False, f"worse: {share}"
    measures = [("implicit", "of held-out pairs it went the way people point")]
    if found.get("judge_interval", [0.0])[0] > 0.5:
        measures.append(("preferred", "of held-out prompts the reward model puts its answer first"))
    said = [f"on {_share(found, name)} {meaning}" for name, meaning in measures]
    above = [text for text, (name, _) in zip(said, measures, strict=True) if found[f"{name}_interval"][0] > 0.5]
    if above:
        return True, "better: " + "; ".join(above)
    return False, "not shown to be better: " + "; ".join(said)


def _share(found: dict[str, Any], name: str) -> str:
    low, high = found[f"{name}_interval"]
    return f"{found[name]:.1%} ({low:.1%} to {high:.1%})"


def stated(name: str, share: Interval) -> dict[str, Any]:
    """A share and its interval under a name."""
    return {name: share[0], f"{name}_interval": list(share[1:])}


# ---------------------------------------------------------------- the section


def base_of(policy: Path) -> Path:
    """The checkpoint that a section's policy started from, as its state says.

    Raises:
        RunError: it does not say.
    """
    state = read_state(policy)
    if state is None or "policy" not in state.inputs:
        raise RunError(f"{policy} does not say what it started from", hint="compare a section of a run that trains")
    return checkpoint_in(policy.parent / state.inputs["policy"])  # an absolute path stands for itself


def _load(folder: Path) -> tuple[Loaded, Decoder]:
    loaded = load_checkpoint(folder)
    if not isinstance(loaded.model, Decoder) or loaded.tokenizer is None:
        raise CheckpointError(f"{folder} holds no language model with a tokenizer", hint="compare policies")
    return loaded, loaded.model


def run(config: CompareConfig, work: Work) -> dict[str, Any]:
    """Compares `work.inputs["policy"]` with what it started from on the held-out rankings; returns the report.

    Raises:
        CheckpointError: the two do not read the same tokens.
        DataError: no held-out ranking can be judged by.
    """
    policy = work.inputs["policy"]
    (before, old_model), (after, new_model) = _load(base_of(policy)), _load(checkpoint_in(policy))
    if before.tokenizer.fingerprint != after.tokenizer.fingerprint:
        raise CheckpointError(
            f"{policy} has another tokenizer than what it started from", hint="compare like with like"
        )
    chat, context = ChatFormat(after.tokenizer), min(old_model.spec.context_length, new_model.spec.context_length)
    path = work.inputs["rankings"] / "valid.jsonl"
    held_out = encode_rankings(read_rankings(path), chat, context, path=path)
    old, new = (Engine(model, max_batch=config.max_batch, num_kept=0) for model in (old_model, new_model))
    found = orders(old, new, held_out.rankings)
    asked = {tuple(ranking.rows[0][: ranking.num_prompt]): None for ranking in held_out.rankings}
    prompts = [list(prompt) for prompt in asked if len(prompt) < context][: config.prompts]
    seeds = [mix_seed(work.seed, number) for number in range(len(prompts))]  # both models draw with the same noise
    written = [
        write_answers(engine, chat, prompts, config.max_response_tokens, temperature=config.temperature, seeds=seeds)
        for engine in (old, new)
    ]
    result: dict[str, Any] = {"pairs": sum(len(decided(ranking.ranks)) for ranking in held_out.rankings)}
    result |= {"prompts": len(asked), "answered": len(prompts), "left_out": held_out.counts()}
    result |= stated("implicit", found["implicit"])
    for name in ("old", "new", "new_minus_old"):
        result |= stated(f"likelier_{name}", found[name])
    result |= {name: told(answers) for name, answers in zip(("old", "new"), written, strict=True)}
    if "reward" in work.inputs:
        judge = Judge(work.inputs["reward"] / "checkpoint", config.max_batch)
        scores = [judge.score(ranking.rows) for ranking in held_out.rankings]
        result |= stated("judge", accuracy(by_prompt(held_out.rankings, scores)))
        result |= rewarded(judge, prompts, *written)
    is_better, why = verdict(result, config.ended_drop)
    result |= {"is_better": is_better, "why": why, "line": why}
    result["examples"] = [
        {"prompt": chat.tokenizer.decode(prompt), "old": then.text, "new": now.text}
        for prompt, then, now in list(zip(prompts, *written, strict=True))[:NUM_SHOWN]
    ]
    return result
