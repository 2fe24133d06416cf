"""The rules of the labelling page: kinds of tasks and of use, what may be said of a text, how many people are asked.

    rules = Rules(answers=6, rankings=5)

Sources: kinds of use and their mix, the scale from 1 to 7 and the flags are InstructGPT's (Ouyang et al. 2022, tables 1 and 3;
the three ways to write a prompt: section 3.2). Trees, reviews, the score at which a text is accepted and the weights of the queue
are Open-Assistant's (Köpf et al. 2023, section 2), reduced; its numbers are for thousands of people, the defaults here for a few.

What it is not: what follows from the rules for one tree (`lyceum.serve.label.tree`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lyceum.errors import StoreError, did_you_mean
from lyceum.serve.wishes import Use

KINDS = ("prompt", "answer", "user", "rank", "label")  # write a prompt; answer it; answer as the user; rank; label
VARIANTS = ("plain", "few_shot", "after_user")  # of a prompt: any; an instruction with examples; as a user's was
MIX: dict[Use, float] = {  # kinds of use of prompts, and their shares in percent
    "generation": 45.6,
    "open_qa": 12.4,
    "brainstorming": 11.2,
    "chat": 8.4,
    "rewrite": 6.6,
    "summary": 4.2,
    "classification": 3.5,
    "other": 3.5,
    "closed_qa": 2.6,
    "extraction": 1.9,
}
FLAGS = (  # yes or no, of one text
    "fails_task", "inappropriate", "hallucination", "keeps_constraint", "sexual", "violent", "encourages_harm", "denigrates",
    "harmful_advice", "opinion", "moral_judgement",
)  # fmt: skip
SCALE = (1, 7)
REASONS = ("unclear", "cannot_judge", "language", "personal_data", "harmful", "other")  # why a task is skipped
REPORTS = 3  # people who skip anything of a tree as harmful or as somebody's personal data: it is halted
WEIGHTS = {"rank": 10.0, "label": 5.0, "answer": 2.0, "user": 2.0, "prompt": 0.01}  # of what is handed out
MOST_SHOWN = 9  # answers to rank
DRAWS = 3  # times as many answers are drawn as are wanted, before equal texts are put up with


@dataclass(frozen=True)
class Rules:
    """How many people are asked, and for what.

    answers: to one prompt, which are ranked together; written: of these by people, the others are drawn from the models.
    turns: of the user in one conversation. reviews, accept: people who label a text that somebody wrote, and the score above
    which it is accepted. rankings: people who rank the same answers. minutes: until a task goes to somebody else. gold_share:
    of tasks whose answer is known. trees: unfinished ones, up to which new prompts are asked for. languages: in which. models,
    temperature, max_tokens: how answers are drawn; no model named: all that are served.
    """

    answers: int = 4
    written: int = 1
    turns: int = 1
    reviews: int = 2
    accept: float = 0.6
    rankings: int = 3
    minutes: float = 60.0
    gold_share: float = 0.1
    trees: int = 20
    languages: tuple[str, ...] = ("en", "zh")
    models: tuple[str, ...] = ()
    temperature: float = 1.0
    max_tokens: int = 256

    def __post_init__(self) -> None:
        bounds: dict[str, tuple[float, float]] = {
            "answers": (2, MOST_SHOWN), "written": (0, self.answers), "turns": (1, 10), "reviews": (1, 99),
            "accept": (-1, 1), "rankings": (1, 99), "minutes": (0.01, 10_080), "gold_share": (0, 0.9),
            "trees": (1, 100_000), "temperature": (0.05, 2), "max_tokens": (1, 1 << 20),
        }  # fmt: skip
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise StoreError(f"{name} is {getattr(self, name)}", hint=f"from {low:g} to {high:g}")
        if not self.languages or not all(language.strip() for language in self.languages):
            raise StoreError("no language is named", hint='such as "en", "zh"')

    def to_json(self) -> dict[str, Any]:
        """They as JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Rules:
        """What `to_json` gave; what is missing is as by default. Raises StoreError for what is no rule, or out of bounds."""
        known = {field.name for field in fields(cls)}
        for name in row:
            if name not in known:
                raise StoreError(f"there is no rule {name!r}", hint=did_you_mean(name, known))
        given: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in row.items()}
        return cls(**given)
