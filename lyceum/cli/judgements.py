"""The judgements section: what people said about answers, as rankings to learn from and, of other prompts, to judge by.

    [judgements]
    store = "runs/demo"        # a run's folder, a store's file, or its address

It reads the store as `lyceum feedback export` does (`lyceum.serve.feedback`): with consent only, of each person the last word,
split by how the conversation began. Beside the rankings of corrections, comparisons and orders it makes one of thumbs:
answers to the same prompt that the same person gave different thumbs.

Writes `train.jsonl` and `valid.jsonl` (rankings), and `prompts.jsonl`: what was asked in training, for methods that draw
answers of their own. Run by `lyceum judgements RECIPE`, and by `lyceum improve`.

It stands in this room because it reads a store, which is the service's; no stage imports it. What it is not: told of what the
store comes to hold later. A finished section is not run again; the next improvement has a section of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lyceum.cli.feedback import reader
from lyceum.config import setting
from lyceum.corpus.records import Conversation, Message, Ranking, Rating, write_records
from lyceum.corpus.rows import json_line
from lyceum.errors import DataError, UsageError
from lyceum.run import Work

VERSION = 2  # 2: what came of the labelling page is read, too
PARTS = ("train", "valid")
LEAST_HELD_OUT = 5  # prompts: an interval over fewer says nothing


@dataclass(frozen=True)
class JudgementsConfig:
    """Whose judgements are read, and how many it takes."""

    store: str = setting("", "a run's folder, a store's file, or its address")
    held_out: float = setting(0.3, "share of the prompts kept to judge by", low=0.0, high=0.9)
    least: int = setting(40, "prompts with a ranking that it takes; fewer are an error", low=2)
    voices: str = setting(
        "consensus", "of several who ranked the same answers on the labelling page", choices=("consensus", "each")
    )


def of_thumbs(ratings: Iterable[Rating]) -> list[Ranking]:
    """Rankings of answers to one prompt, told apart by the thumbs that one person gave them."""
    groups: dict[str, list[Rating]] = {}
    for rating in ratings:
        if rating.meta.get("kind") == "label_score":
            continue  # who gave scores on the labelling page ranked the same answers too
        groups.setdefault(json_line([rating.meta.get("annotator"), rating.prompt.to_json()]), []).append(rating)
    found = []
    for group in groups.values():
        values: dict[Message, float] = {rating.response: rating.value for rating in group}  # the last word on each text
        if len(set(values.values())) > 1:
            ranks = tuple(1.0 if value == max(values.values()) else 2.0 for value in values.values())
            found.append(Ranking(group[0].prompt, tuple(values), ranks, meta={**group[0].meta, "kind": "thumbs"}))
    return found


def prompts_of(records: Iterable[Ranking | Rating]) -> list[Conversation]:
    """The prompts that differ, in the order in which they were first asked."""
    distinct: dict[str, Conversation] = {}
    for record in records:
        distinct.setdefault(asked(record), record.prompt)
    return list(distinct.values())


def asked(record: Ranking | Rating) -> str:
    """A record's prompt as one line."""
    return json_line(record.prompt.to_json())


@dataclass(frozen=True)
class Gathered:
    """What a store says: rankings of each part, the prompts of training; how many judgements, and those left out by reason."""

    rankings: dict[str, list[Ranking]]
    prompts: list[Conversation]
    num_judgements: int
    left_out: dict[str, int]

    @property
    def digest(self) -> str:
        """Of all that would be learned and judged by; another as soon as something is said that counts."""
        rows = [json_line([part, row.to_json()]) for part, rows in self.rankings.items() for row in rows]
        rows += [json_line(prompt.to_json()) for prompt in self.prompts]
        return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()[:32]


def gather(store: str, held_out: float, voices: str = "consensus") -> Gathered:
    """Read a store; a share of the prompts is held out. voices: as in JudgementsConfig.

    Raises:
        UsageError: the packages of the service are not installed.
        StoreError: no store is there.
    """
    feedback = reader()
    found = feedback.read(store, voices=voices)
    rankings: dict[str, list[Ranking]] = {part: [] for part in PARTS}
    for ranking in [*found.rankings, *of_thumbs(found.ratings)]:
        rankings[PARTS[feedback.is_held_out(ranking.prompt, held_out)]].append(ranking)
    seen: Sequence[Ranking | Rating] = [*rankings["train"], *found.ratings]
    prompts = prompts_of(one for one in seen if not feedback.is_held_out(one.prompt, held_out))
    return Gathered(rankings, prompts, found.num_judgements, dict(found.left_out))


def run(config: JudgementsConfig, work: Work) -> dict:
    """Reads the store and writes both parts; returns the counts.

    Raises:
        UsageError: no store is named, or the packages of the service are not installed.
        StoreError: no store is there.
        DataError: there is too little to learn from, or to judge by.
    """
    if not config.store:
        raise UsageError("[judgements] names no store", hint='store = "runs/demo", or --set judgements.store=runs/demo')
    found = gather(config.store, config.held_out, config.voices)
    numbers = {part: len({asked(ranking) for ranking in rows}) for part, rows in found.rankings.items()}
    _check(config, sum(numbers.values()), numbers["valid"], found.num_judgements, found.left_out)
    for part, rows in found.rankings.items():
        write_records(work.folder.path / f"{part}.jsonl", rows)
    write_records(work.folder.path / "prompts.jsonl", found.prompts)
    sizes = {part: {"rankings": len(found.rankings[part]), "prompts": numbers[part]} for part in PARTS}
    return {
        "line": f"{sizes['train']['rankings']} rankings of {numbers['train']} prompts to learn from, "
        f"{sizes['valid']['rankings']} of {numbers['valid']} to judge by; {found.num_judgements} judgements",
        "judgements": found.num_judgements,
        **sizes,
        "left_out": found.left_out,
        "digest": found.digest,
    }


def _check(
    config: JudgementsConfig, num: int, num_held_out: int, num_judgements: int, left_out: dict[str, int]
) -> None:
    because = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items())) or "none"
    if num < config.least:
        raise DataError(
            f"{num} prompts have a ranking, and {config.least} are needed: too little to learn from",
            hint=f"compare more answers ({num_judgements} judgements so far; left out: {because}), or lower judgements.least",
        )
    if num_held_out < LEAST_HELD_OUT:
        raise DataError(
            f"{num_held_out} of {num} prompts are held out, and {LEAST_HELD_OUT} are needed to tell whether it helped",
            hint="compare more answers, or raise judgements.held_out",
        )
