"""Rankings by a written rule: several answers of the fine-tuned model to each practice prompt, put in order.

Stage two of InstructGPT (Ouyang et al. 2022, 3.2) with a rule in the labelers' place: K answers a prompt, most drawn from the
fine-tuned model at temperature 1 and the rest from an earlier checkpoint of it, duplicates drawn again; ranked by
`lyceum.evals.tasks.tutor.grade`, origin `rule`. People disagree, so for a stated share of prompts the whole order is reversed
(`meta.clean_ranks` keeps the rule's own). A prompt whose answers all came out the same, or all score the same, carries no
preference: it is left out and counted.

In a later round (Ouyang et al. 2022, 3.1: steps two and three can be iterated) most answers are the newest policy's, the others
those of the model it started from. With `cumulative` the rankings of the section before come first, so that the reward model is
trained on all comparisons so far (Stiennon et al. 2020, 3.1: re-trained on the cumulative data): one that has seen the newest
policy's answers alone forgets what was wrong with the earlier ones. A prompt that was held out before stays held out.

Writes `train.jsonl` and `valid.jsonl` (split by prompt). Run by `lyceum rankings RECIPE`. Not a substitute for people: the
rule knows the reference answers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path

from lyceum.config import setting
from lyceum.corpus.records import Conversation, Message, Ranking, read_conversations, read_rankings, write_records
from lyceum.engine import sides
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams, mix_seed
from lyceum.errors import DataError, RunError
from lyceum.evals.tasks import tutor
from lyceum.log import log, progress
from lyceum.model.checkpoint import load_checkpoint
from lyceum.model.lineage import SHAPED, read_model
from lyceum.run import Work, checkpoint_in
from lyceum.tokens.chat import ChatFormat

VERSION = 1
PARTS = ("train", "valid")


@dataclass(frozen=True)
class RankingsConfig:
    """How answers are drawn and ranked."""

    prompts: int = setting(800, "practice prompts to answer", low=4)
    responses: int = setting(4, "distinct answers a prompt (K)", low=2)
    earlier: int = setting(2, "of these, answers by the earlier checkpoint", low=0)
    declines: float = setting(
        0.4,
        "share of prompts of which one answer is made to begin as a decline does, so that it meets claims",
        low=0,
        high=1,
    )
    redraws: int = setting(3, "times duplicates are drawn again", low=0)
    temperature: float = setting(1.0, "sampling temperature", low=0.0)
    max_response_tokens: int = setting(64, "longest answer, in tokens", low=1)
    reversed_share: float = setting(
        0.1, "share of prompts whose order is reversed, as labelers disagree", low=0, high=1
    )
    valid_share: float = setting(0.2, "share of prompts kept for validation", low=0, high=0.9)
    cumulative: bool = setting(False, "begin with the rankings of the rankings section before; rounds set it")
    max_batch: int = setting(128, "answers drawn at once", low=1)


@dataclass(frozen=True)
class Answer:
    text: str
    ended: bool


def draw(
    engine: Engine,
    chat: ChatFormat,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    config: RankingsConfig,
    forced: Sequence[tuple[int, ...]],
) -> list[Answer]:
    """One sampled answer to each prompt, after its forced opening if it has one; its noise is a function of its seed."""
    params = [
        SamplingParams(
            max_tokens=config.max_response_tokens,
            temperature=config.temperature,
            stop_ids=chat.stop_ids,
            seed=seed,
            forced=opening,
        )
        for seed, opening in zip(seeds, forced, strict=True)
    ]
    outputs = sides.generate(engine, prompts, params)
    return [Answer(chat.parse(output.ids).content, output.finish == "stop") for output in outputs]


def draw_distinct(
    engines: Sequence[Engine], chat: ChatFormat, prompts: Sequence[list[int]], config: RankingsConfig, seed: int
) -> list[list[Answer]]:
    """Up to K distinct answers to each prompt: K - `earlier` by the first engine, the others by the second.

    For a stated share of prompts the first answer is begun for the model with the first words of a decline. A fine-tuned
    model seldom declines what it knows, so its own answers hardly ever show a right answer beside a needless decline; a
    reward model that has not seen the two side by side takes every decline for good, and PPO then declines everything.

    Answers that repeat another one of the same prompt are drawn again with another seed, up to `redraws` times, by the
    earlier checkpoint from the second redraw on: a confident model would only repeat itself.
    """
    found: list[dict[str, Answer]] = [{} for _ in prompts]
    opening = tuple(chat.tokenizer.encode(" ".join(tutor.DECLINE.split()[:4])))
    is_declined = [random.Random(mix_seed(seed, i)).random() < config.declines for i in range(len(prompts))]
    with progress(len(prompts) * config.responses, "rankings", unit="answer") as bar:
        for attempt, (number, engine) in product(range(config.redraws + 1), enumerate(engines)):
            share = config.earlier if number else config.responses - config.earlier
            wanted = []
            for i, distinct in enumerate(found):
                missing = config.responses - len(distinct)
                first = share if attempt == 0 else missing if number == 0 or attempt >= 2 else 0
                wanted += [i] * min(first, missing)
            seeds = [mix_seed(seed, number, attempt, i, j) for j, i in enumerate(wanted)]
            forced: list[tuple[int, ...]] = [()] * len(wanted)
            if attempt == 0 and number == 0:
                for i in filter(is_declined.__getitem__, set(wanted)):
                    forced[wanted.index(i)] = opening
            answers = draw(engine, chat, [prompts[i] for i in wanted], seeds, config, forced)
            before = sum(map(len, found))
            for i, answer in zip(wanted, answers, strict=True):
                if len(found[i]) < config.responses:
                    found[i].setdefault(answer.text, answer)
            bar.update(sum(map(len, found)) - before, drawn=len(wanted))
    return [list(answers.values()) for answers in found]


def rank(scores: Sequence[float]) -> tuple[float, ...]:
    """Ranks, 1 for the best; equal scores tie and share the mean of their places (as in Spearman's ranks)."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    ranks = [0.0] * len(scores)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and abs(scores[order[stop]] - scores[order[start]]) < 1e-9:
            stop += 1
        for i in order[start:stop]:
            ranks[i] = (start + 1 + stop) / 2
        start = stop
    return tuple(ranks)


def rank_by_rule(prompt: Conversation, answers: Sequence[Answer], *, reverse: bool) -> Ranking | None:
    """The rule's ranking of the answers to one prompt; None where it prefers none."""
    question = tutor.Question.from_meta(prompt.meta)
    scores = [tutor.grade(question, answer.text, ended=answer.ended).score for answer in answers]
    clean = rank(scores)
    if len(set(clean)) < 2:
        return None
    ranks = tuple(len(clean) + 1 - place for place in clean) if reverse else clean
    responses = tuple(Message("assistant", answer.text) for answer in answers)
    meta = {"cell": question.cell, "clean_ranks": list(clean), "scores": scores, "reversed": reverse}
    return Ranking(prompt, responses, ranks, origin="rule", meta=meta)


def earlier_checkpoint(section: Path) -> Path:
    """The first snapshot of the section; without one, what a policy that learned from rewards or preferences started from."""
    snapshots = sorted(section.glob("snapshot-*"))
    if snapshots:
        return snapshots[0]
    own = read_model(checkpoint_in(section))
    if own.stage in SHAPED and own.parent is not None:
        return own.parent
    raise RunError(f"{section.name} has no earlier checkpoint", hint="set snapshots = [0.3] in its recipe section")


def rankings_before(folder: Path) -> dict[str, list[Ranking]]:
    """Part -> the rankings of another section, each with the section that drew it first in `meta.section`."""
    found: dict[str, list[Ranking]] = {}
    for part in PARTS:
        path = folder / f"{part}.jsonl"
        rows = read_rankings(path) if path.stat().st_size else ()
        found[part] = [replace(r, meta={"section": folder.name, **r.meta}) for r in rows]
    return found


def _asked(prompt: Conversation) -> str:
    return json.dumps([message.to_json() for message in prompt.messages], sort_keys=True)


def run(config: RankingsConfig, work: Work) -> dict:
    """Draw and rank answers of `work.inputs["policy"]` to the prompts of `work.inputs["lessons"]`; returns the counts."""
    policy = load_checkpoint(checkpoint_in(work.inputs["policy"]))
    models = [policy.model]
    if config.earlier:
        models.append(load_checkpoint(earlier_checkpoint(work.inputs["policy"])).model)
    chat = ChatFormat(policy.tokenizer)
    path = work.inputs["lessons"] / "prompts.jsonl"
    conversations = list(islice(read_conversations(path), config.prompts))
    if len(conversations) < config.prompts:
        log.warning(f"only {len(conversations)} practice prompts for rankings, {config.prompts} were asked for")
    prompts = [chat.prompt(conversation) for conversation in conversations]
    if max(map(len, prompts), default=0) + config.max_response_tokens > policy.spec.context_length:
        raise DataError("a practice prompt does not fit the context", file=path, hint="raise model.context_length")
    engines = [Engine(model, max_batch=config.max_batch, num_kept=0) for model in models]
    answers = draw_distinct(engines, chat, prompts, config, work.seed)
    chance = random.Random(f"{work.seed} rankings")
    before = rankings_before(work.inputs["earlier"]) if config.cumulative else {part: [] for part in PARTS}
    part_of = {_asked(ranking.prompt): part for part in PARTS for ranking in before[part]}
    rankings: dict[str, list[Ranking]] = {part: [] for part in PARTS}
    single = tied = turned = 0
    for prompt, found in zip(conversations, answers, strict=True):
        reverse = chance.random() < config.reversed_share
        drawn = "valid" if chance.random() < config.valid_share else "train"
        part = part_of.get(_asked(prompt), drawn)
        if len(found) < 2:
            single += 1
            continue
        ranking = rank_by_rule(prompt, found, reverse=reverse)
        if ranking is None:
            tied += 1
            continue
        turned += reverse
        rankings[part].append(ranking)
    if not rankings["train"]:
        raise DataError("no prompt has two answers that the rule tells apart", hint="raise rankings.temperature")
    for part, rows in rankings.items():
        write_records(work.folder.path / f"{part}.jsonl", [*before[part], *rows])
    kept = rankings["train"] + rankings["valid"]
    num_before = sum(map(len, before.values()))
    return {
        "line": f"{len(kept)} rankings of {sum(len(r.responses) for r in kept) / len(kept):.1f} answers; "
        f"left out {single} with one distinct answer and {tied} all tied; {turned} reversed"
        + (f"; after {num_before} of rounds before" if num_before else ""),
        **{part: len(rankings[part]) for part in PARTS},
        **{f"{part}_before": len(before[part]) for part in PARTS},
        "one_answer": single,
        "all_tied": tied,
        "reversed": turned,
    }
