"""What a finished task says, checked: the same whether a page or a program sends it.

| kind | result |
|---|---|
| prompt | `text`; few-shot also `instruction`, `examples` ([input, output] each) and `input`, of which the text is made; `use` |
| answer, user | `text` |
| rank | `ranks` (1 is best, ties allowed), `none_acceptable`, `scores` (1 to 7, or null), `flags` (names, of each answer) |
| label | `spam`, `wrong_language`, `quality` (1 to 7, or null), `flags`, and of a prompt `use` |

What it is not: the form of a request (`lyceum.serve.label.wishes`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lyceum.errors import StoreError, did_you_mean
from lyceum.serve.label.rules import FLAGS, MIX, SCALE
from lyceum.serve.label.tree import Task

MOST_TEXT = 100_000  # characters
MOST_EXAMPLES = 20


def checked(task: Task, given: Mapping[str, Any], is_prompt: bool) -> dict[str, Any]:
    """A result as it is kept. is_prompt: the message that is labelled is a user's first. Raises StoreError for what is none."""
    if task.kind == "prompt":
        return _prompt(task, given)
    if task.kind in ("answer", "user"):
        return {"text": _text(given.get("text"))}
    if task.kind == "rank":
        return _ranks(len(task.shown), given)
    return _labels(given, is_prompt)


def _text(text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise StoreError("nothing is written", hint="write a text, or skip the task")
    if len(text) > MOST_TEXT:
        raise StoreError(f"a text of {len(text)} characters", hint=f"at most {MOST_TEXT}")
    return text.strip()


def _prompt(task: Task, given: Mapping[str, Any]) -> dict[str, Any]:
    use = _name("use", given.get("use") or task.about["use"], MIX)
    if task.about["variant"] != "few_shot":
        return {"text": _text(given.get("text")), "use": use}
    examples = [[_text(part) for part in pair] for pair in given.get("examples") or ()]
    if not 1 <= len(examples) <= MOST_EXAMPLES or any(len(pair) != 2 for pair in examples):
        raise StoreError(f"{len(examples)} examples", hint=f"1 to {MOST_EXAMPLES}, each an input and its output")
    instruction, last = _text(given.get("instruction")), _text(given.get("input"))
    shots = [f"Input: {asked}\nOutput: {answered}" for asked, answered in examples]
    text = "\n\n".join([instruction, *shots, f"Input: {last}\nOutput:"])
    return {"text": _text(text), "use": use, "instruction": instruction, "examples": examples, "input": last}


def _ranks(num: int, given: Mapping[str, Any]) -> dict[str, Any]:
    ranks, scores, flags = (
        given.get("ranks") or [],
        given.get("scores") or [None] * num,
        given.get("flags") or [[]] * num,
    )
    if {len(ranks), len(scores), len(flags)} != {num}:
        raise StoreError(
            f"{len(ranks)} ranks for {num} answers", hint="one rank, score and list of flags for each answer"
        )
    if not all(math.isfinite(rank) and rank >= 1 for rank in ranks):
        raise StoreError(f"ranks {list(ranks)}", hint="a number from 1 for each answer; equal numbers are ties")
    return {
        "ranks": [float(rank) for rank in ranks],
        "none_acceptable": bool(given.get("none_acceptable")),
        "scores": [_score(score) for score in scores],
        "flags": [_flags(each) for each in flags],
    }


def _labels(given: Mapping[str, Any], is_prompt: bool) -> dict[str, Any]:
    if given.get("spam") is None or given.get("wrong_language") is None:
        raise StoreError("two questions are not answered", hint="spam and wrong_language, yes or no")
    found: dict[str, Any] = {"spam": bool(given["spam"]), "wrong_language": bool(given["wrong_language"])}
    found |= {"quality": _score(given.get("quality")), "flags": _flags(given.get("flags") or ())}
    return found | ({"use": _name("use", given["use"], MIX)} if is_prompt and given.get("use") else {})


def _score(score: Any) -> int | None:
    if score is not None and not SCALE[0] <= score <= SCALE[1]:
        raise StoreError(f"a score of {score}", hint=f"from {SCALE[0]} to {SCALE[1]}")
    return None if score is None else int(score)


def _flags(names: Sequence[str]) -> list[str]:
    given = {_name("flag", name, FLAGS) for name in names}
    return [name for name in FLAGS if name in given]


def _name(what: str, name: str, known: Any) -> str:
    if name not in known:
        raise StoreError(f"there is no {what} {name!r}", hint=did_you_mean(name, known))
    return name
