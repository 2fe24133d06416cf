"""From what people said to what the stages read: judgements as rankings, ratings and conversations, in files.

    found = harvest(store.judgements.everybodys())          # records, and why the rest was left out
    export("runs/demo", "rankings.jsonl", "rankings")       # the same, as `lyceum feedback export` writes it

| a judgement | becomes |
|---|---|
| a comparison | a ranking: the best before the others; "tie" and "none" order nothing |
| a ranking | a ranking, ties and acceptability as given |
| a correction | a ranking, the corrected text before the answer; and a conversation that ends in the corrected text |
| a thumb | a rating, 1 or 0 |
| a comparison that says "none" | a rating of 0 for each of its answers |
| keys pressed while an answer was shown | a watched reply: its pieces with their times, and the presses |

What people wrote, ranked and labelled on the labelling page joins them (`lyceum.serve.label.harvest`): of several who ranked the
same answers their consensus, or each one's ranking.

Left out, and counted by reason: what was given without consent; what the same person said again later of the same answers
(`superseded`: the last one counts) or said twice in the same words of equal texts (`repeated`); what orders nothing
(`all_ties`), or only texts that are the same (`equal_texts`); answers to nothing (`no_prompt`); what a format cannot say.

**Held out.** A share of the prompts is kept for measuring, by a hash of how the conversation began: its first message after
the system prompt. So all turns of a conversation are on one side, with every conversation that began alike; a prompt stays on
its side when more feedback comes, and in every format (the reward model's held-out prompts are KTO's). InstructGPT splits
by person (Ouyang et al. 2022, 3.2); on a machine for one there is only one.

Not here: what is learned from them (`lyceum.stages.reward`, `lyceum.stages.preference`, `lyceum.stages.sft`,
`lyceum.stages.tamer`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lyceum.corpus.records import Conversation, Message, Ranking, Rating, Row, content_id
from lyceum.corpus.rows import json_line
from lyceum.corpus.watched import Watched
from lyceum.errors import DataError, UsageError, did_you_mean
from lyceum.run import write_lines
from lyceum.serve.database import Database
from lyceum.serve.judgements import Answer, Judgement, Judgements
from lyceum.serve.label.harvest import CONSENSUS, VOICES, gather
from lyceum.serve.label.queue import Labels

Record = Ranking | Rating | Conversation | Watched


@dataclass
class Harvest:
    """What can be learned from, and how many judgements were left out, by reason."""

    rankings: list[Ranking] = field(default_factory=list)
    ratings: list[Rating] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    watched: list[Watched] = field(default_factory=list)
    labels: list[Conversation] = field(default_factory=list)
    num_judgements: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def harvest(judgements: Iterable[Judgement]) -> Harvest:
    """Judgements, oldest first, as records."""
    everything = list(judgements)
    found = Harvest(num_judgements=len(everything))
    last = {_target(one): one.id for one in everything}
    seen: set[str] = set()
    for one in everything:
        texts = [answer.said.to_json() for answer in one.answers]
        verdict = [one.value, one.text, one.ranks, one.acceptable, one.choice, one.shown, one.presses]
        words = json_line([one.owner, one.kind, one.prompt and one.prompt.to_json(), texts, verdict])
        if last[_target(one)] != one.id:
            found.left_out["superseded"] += 1
            continue  # it says nothing any more: who says the same again is not repeating it
        if not one.consent:
            found.left_out["no_consent"] += 1
        elif one.prompt is None:
            found.left_out["no_prompt"] += 1
        elif words in seen:
            found.left_out["repeated"] += 1
        elif reason := _add(found, one, one.prompt):
            found.left_out[reason] += 1
        seen.add(words)
    return found


def read(place: str | Path, *, voices: str = CONSENSUS) -> Harvest:
    """All judgements of a store, as records: those of the pages where people talk, then those of the labelling page.

    Args:
        place: a run's folder, a store's file, or a URL.
        voices: of several who ranked the same answers the "consensus", or "each" one.

    Raises:
        StoreError: no store is there.
        UsageError: there are no such voices.
    """
    if voices not in VOICES:
        raise UsageError(f"there are no voices {voices!r}", hint=did_you_mean(voices, VOICES))
    database = Database.open(place, must_exist=True)
    try:
        found, labelled = harvest(Judgements(database).everybodys()), gather(Labels(database), voices)
        found.rankings += labelled.rankings
        found.ratings += labelled.ratings
        found.conversations += labelled.conversations
        found.labels += labelled.labels
        found.num_judgements += labelled.num
        found.left_out += labelled.left_out
        return found
    finally:
        database.close()


def _target(one: Judgement) -> tuple[str, str, frozenset[str]]:
    """What a judgement is of: a later one of the same takes its place, a comparison that of a ranking too."""
    kind = "order" if one.kind in ("comparison", "ranking") else one.kind
    if kind == "presses":  # each showing of an answer is taught by itself
        return one.owner, f"presses {one.id}", frozenset()
    return one.owner, kind, frozenset(answer.message for answer in one.answers)


def _add(found: Harvest, one: Judgement, prompt: Conversation) -> str:
    """Add what a judgement says to what was found; "" or why it says nothing."""
    if one.value is not None:
        found.ratings.append(_rating(one, prompt, one.answers[0], one.value))
    elif one.text is not None:
        answer = one.answers[0]
        if one.text == answer.said.content:
            return "equal_texts"
        right = Message("assistant", one.text)
        meta = _meta(one, [{"model": "person"}, _about(answer)])
        found.rankings.append(Ranking(prompt, (right, answer.said), (1.0, 2.0), meta=meta))
        found.conversations.append(Conversation((*prompt.messages, right), prompt.tools, _meta(one)))
    elif one.shown is not None:
        meta = _meta(one, [_about(one.answers[0])])
        found.watched.append(Watched(prompt, one.shown, one.presses or (), meta))
    elif one.ranks is not None:
        if one.choice == "none":
            found.ratings += [_rating(one, prompt, answer, 0.0) for answer in one.answers]
            return ""
        texts = [json_line(answer.said.to_json()) for answer in one.answers]
        if len(set(one.ranks)) == 1:
            return "all_ties"
        if len(set(texts)) == 1:
            return "equal_texts"
        said = tuple(answer.said for answer in one.answers)
        meta = _meta(one, [_about(answer, side) for side, answer in enumerate(one.answers)])
        found.rankings.append(Ranking(prompt, said, one.ranks, acceptable=one.acceptable, meta=meta))
    return ""


def _rating(one: Judgement, prompt: Conversation, answer: Answer, value: float) -> Rating:
    return Rating(prompt, answer.said, value, one.reason, meta=_meta(one, [_about(answer)]))


def _meta(one: Judgement, responses: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Where a record is from. `responses` stand in the order in which they were shown, as the record's do."""
    time = datetime.fromtimestamp(one.created, UTC).isoformat(timespec="seconds")
    meta = {"source": "feedback", "kind": one.kind, "judgement": one.id, "annotator": one.owner, "time": time}
    return {**meta, "consent": True, "reason": one.reason, **({"responses": list(responses)} if responses else {})}


def _about(answer: Answer, side: int | None = None) -> dict[str, Any]:
    """side: the place on the screen, from 0."""
    about = {"model": answer.model, "parameters": answer.parameters, "finish_reason": answer.finish_reason}
    return about if side is None else {**about, "side": side}


# -------------------------------------------------------------------------------- formats


class CannotSay(ValueError):
    """A record that a format has no words for; its text is the reason, as it is counted."""


def _own(record: Record) -> list[Row]:
    return [record.to_json()]


def pairs(ranking: Ranking) -> Iterator[tuple[Message, Message]]:
    """(better, worse) for all that the ranks decide between two different texts."""
    for better, above in zip(ranking.responses, ranking.ranks, strict=True):
        for worse, below in zip(ranking.responses, ranking.ranks, strict=True):
            if above < below and better != worse:
                yield better, worse


def _trl(record: Record) -> list[Row]:
    """TRL's preference columns, as conversations."""
    assert isinstance(record, Ranking)
    prompt = _turns(record.prompt)
    tools = {"tools": list(record.prompt.tools)} if record.prompt.tools else {}
    return [
        {"prompt": prompt, "chosen": [better.to_json()], "rejected": [worse.to_json()], **tools}
        for better, worse in pairs(record)
    ]


def _hh(record: Record) -> list[Row]:
    """HH-RLHF's pairs of whole transcripts: turns of a person and the assistant, one after the other, without outer spaces."""
    assert isinstance(record, Ranking)
    rows: list[Row] = []
    for better, worse in pairs(record):
        whole = [(*record.prompt.messages, last) for last in (better, worse)]
        rows.append({"chosen": _transcript(whole[0]), "rejected": _transcript(whole[1])})
    return rows


def _transcript(messages: Sequence[Message]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    for place, message in enumerate(messages):
        if message.role not in names or message.tool_calls:
            raise CannotSay("hh_has_no_such_turn")
        if message.role != ("user", "assistant")[place % 2]:
            raise CannotSay("hh_turns_alternate")
        if "\n\nHuman:" in message.content or "\n\nAssistant:" in message.content:
            raise CannotSay("hh_marker_in_a_text")
    return "".join(f"\n\n{names[message.role]}: {message.content.strip()}" for message in messages)


def _kto(record: Record) -> list[Row]:
    """KTO's labels in TRL's columns; a value in the middle of a scale is no label."""
    assert isinstance(record, Rating)
    if record.value not in (0.0, 1.0):
        raise CannotSay("no_label")
    row = {"prompt": _turns(record.prompt), "completion": [record.response.to_json()], "label": record.value == 1.0}
    return [row]


def _messages(record: Record) -> list[Row]:
    """OpenAI's fine-tuning rows."""
    assert isinstance(record, Conversation)
    return [{"messages": _turns(record), **({"tools": list(record.tools)} if record.tools else {})}]


def _sharegpt(record: Record) -> list[Row]:
    """ShareGPT's turns, with the system prompt beside them."""
    assert isinstance(record, Conversation)
    names = {"user": "human", "assistant": "gpt"}
    turns, system = [], {}
    for place, message in enumerate(record.messages):
        if message.role == "system" and place == 0:
            system = {"system": message.content}
        elif message.role in names and not message.tool_calls:
            turns.append({"from": names[message.role], "value": message.content})
        else:
            raise CannotSay("sharegpt_has_no_such_turn")
    return [{"conversations": turns, **system}]


def _turns(conversation: Conversation) -> list[dict[str, Any]]:
    return [message.to_json() for message in conversation.messages]


@dataclass(frozen=True)
class Format:
    """of: which records it is made from; rows: those of one record."""

    of: str
    rows: Callable[[Record], list[Row]]
    help: str


FORMATS: Mapping[str, Format] = {
    "rankings": Format("rankings", _own, "our rankings, K answers each: for [reward] and [preference]"),
    "ratings": Format("ratings", _own, "our ratings of single answers: for [preference] with kto"),
    "conversations": Format("conversations", _own, "our conversations that end in a correction: for [sft]"),
    "trl": Format("rankings", _trl, "pairs in TRL's columns: prompt, chosen, rejected"),
    "hh": Format("rankings", _hh, "pairs as HH-RLHF's transcripts: chosen, rejected"),
    "kto": Format("ratings", _kto, "thumbs in TRL's columns for KTO: prompt, completion, label"),
    "messages": Format("conversations", _messages, "corrections as OpenAI's fine-tuning rows"),
    "presses": Format("watched", _own, "replies as they were shown, with the keys pressed: for [tamer]"),
    "sharegpt": Format("conversations", _sharegpt, "corrections as ShareGPT's turns"),
    "labels": Format("labels", _own, "what was labelled, with the shares of those who said so in its meta"),
}


# -------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Export:
    """What was written: rows and the records behind them, for training and held out; what was not, by reason."""

    path: Path
    held_out_path: Path | None
    num_rows: int
    num_held_out: int
    num_records: int
    num_judgements: int
    left_out: dict[str, int]


def export(
    place: str | Path, to: str | Path, format: str = "rankings", *, held_out: float = 0.1, voices: str = CONSENSUS
) -> Export:
    """Write a store's feedback as a file of rows, and the held-out share beside it.

    Args:
        place: a run's folder, a store's file, or a URL.
        to: the file; the held-out rows go into one of the same name with ``-held-out``.
        format: one of FORMATS.
        held_out: the share of prompts that is held out, from 0 to below 1.
        voices: as for `read`.

    Raises:
        UsageError: no such format, share, or voices.
        StoreError: no store is there.
        DataError: there is nothing to write in this format; no file is made.
    """
    if format not in FORMATS:
        raise UsageError(f"there is no format {format!r}", hint=did_you_mean(format, FORMATS))
    path = Path(to)
    if path.suffix != ".jsonl" or not 0 <= held_out < 1:
        raise UsageError(f"cannot hold out {held_out} of {path}", hint="--to FILE.jsonl, --held-out from 0 to below 1")
    found = read(place, voices=voices)
    records: list[Record] = list(getattr(found, FORMATS[format].of))
    sides: tuple[list[str], list[str]] = ([], [])
    left_out = Counter(found.left_out)
    for record in records:
        prompt = record if isinstance(record, Conversation) else record.prompt
        try:
            rows = [json_line(row) for row in FORMATS[format].rows(record)]
        except CannotSay as reason:
            left_out[str(reason)] += 1
            continue
        sides[is_held_out(prompt, held_out)].extend(rows)
    if not any(sides):
        hint = f"{found.num_judgements} judgements; left out: {dict(left_out) or 'none'}; other formats: {', '.join(FORMATS)}"
        raise DataError(f"no feedback in {place} that can be written as {format}", hint=hint)
    beside = path.with_name(path.stem + "-held-out.jsonl") if held_out else None
    for target, lines in zip((path, beside), sides, strict=True):
        if target is not None:
            write_lines(target, lines)
    num = (len(sides[0]), len(sides[1]), len(records))
    return Export(path, beside, *num, found.num_judgements, dict(left_out))


def is_held_out(prompt: Conversation, share: float) -> bool:
    """Whether a prompt is of those kept for measuring: a fixed property of how its conversation began."""
    first = next((message for message in prompt.messages if message.role != "system"), prompt.messages[0])
    return int(content_id(f"held out: {first.content}"), 16) / (1 << 128) < share
