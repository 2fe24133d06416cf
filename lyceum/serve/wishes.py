"""What the chat page may send: its requests, field by field, as strictly as those of the API.

What it is not: what becomes of them (`lyceum.serve.pages`).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field

from lyceum.serve.protocol import Wish
from lyceum.serve.refusals import Refusal

EXACT = 1 << 53  # JavaScript's numbers are exact below

# what people use such models for (Ouyang et al. 2022, table 1)
Use = Literal[
    "generation", "open_qa", "brainstorming", "chat", "rewrite", "summary", "classification", "closed_qa", "extraction", "other"
]  # fmt: skip

Text = Annotated[str, Field(min_length=1, max_length=1_000_000)]
Model = Annotated[str, Field(max_length=256)]
Id = Annotated[str, Field(max_length=64)]
Second = Annotated[float, Field(ge=0, lt=1e6, allow_inf_nan=False)]


class Parameters(Wish):
    """How answers are drawn, as the page keeps it: OpenAI's names and bounds, and which model answers."""

    model: Model | None = None
    second: Model | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, lt=EXACT)] | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=512)]], Field(max_length=4)] | None = None

    def kept(self) -> dict[str, Any]:
        """What was given."""
        return self.model_dump(exclude_none=True)


class Begin(Wish):
    """A new conversation."""

    title: Annotated[str, Field(max_length=1000)] = ""
    system: Annotated[str, Field(max_length=20_000)] = ""
    parameters: Parameters = Field(default_factory=Parameters)


class Change(Wish):
    """What is to be changed of a conversation. leaf: a message whose branch is to be shown."""

    title: Annotated[str, Field(max_length=1000)] | None = None
    pinned: bool | None = None
    system: Annotated[str, Field(max_length=20_000)] | None = None
    parameters: Parameters | None = None
    leaf: Id | None = None


class Teach(Wish):
    """How an answer is told to somebody who teaches: candidates for each segment, and tokens shown a second."""

    candidates: Annotated[int, Field(ge=1, le=16)] = 4
    pace: Annotated[float, Field(ge=0.5, le=50, allow_inf_nan=False)] = 6.0


class Again(Wish):
    """Answers: one from each model named, one or two; one where it is taught while it talks."""

    models: Annotated[list[Model], Field(min_length=1, max_length=2)]
    parameters: Parameters = Field(default_factory=Parameters)
    teach: Teach | None = None

    def check(self) -> None:
        """Raises Refusal where two are to be taught at once."""
        if self.teach is not None and len(self.models) > 1:
            raise Refusal(400, "One answer at a time can be taught.", param="teach")


class Turn(Again):
    """Something said below a message (null: at the beginning), to be answered."""

    parent: Id | None
    content: Text


class Nothing(Wish):
    """An empty object."""


class Thumb(Wish):
    """A thumb up (1), down (-1), or taken back (0)."""

    value: Literal[-1, 0, 1]
    reason: Annotated[str, Field(max_length=5000)] = ""
    consent: bool = False


class Correction(Wish):
    """An answer as it should have been."""

    content: Text
    consent: bool = False


class Comparison(Wish):
    """Which of the two answers shown is better."""

    left: Id
    right: Id
    verdict: Literal["left", "right", "tie", "neither"]
    reason: Annotated[str, Field(max_length=5000)] = ""
    consent: bool = False


class Arrivals(Wish):
    """Conversations from a file, of ours or of ChatGPT's, and judgements whose conversation is gone."""

    conversations: Annotated[list[dict[str, Any]], Field(max_length=5000)] = Field(default_factory=list)
    judgements: Annotated[list[dict[str, Any]], Field(max_length=5000)] = Field(default_factory=list)


class Presses(Wish):
    """An answer as one view of the page has shown it so far, and the keys pressed meanwhile; all of both, each time.

    view: a name that the page gives to its showing. shown_tokens, shown_s: so many tokens were on the screen from this second on.
    press_s, press_values: when, and 1 for good or -1 for bad.
    """

    view: Annotated[str, Field(min_length=1, max_length=64)]
    shown_tokens: Annotated[list[Annotated[int, Field(ge=1, lt=2**31)]], Field(min_length=1, max_length=20_000)]
    shown_s: Annotated[list[Second], Field(max_length=20_000)]
    press_s: Annotated[list[Second], Field(max_length=2_000)]
    press_values: Annotated[list[Literal[-1, 1]], Field(max_length=2_000)]
    consent: bool = False

    def check(self) -> None:
        """Raises Refusal where its lists do not fit together."""
        if len(self.shown_tokens) != len(self.shown_s) or len(self.press_s) != len(self.press_values):
            raise Refusal(400, "Of what was shown and pressed there must be as many times.", param="shown_s")
        for name in ("shown_tokens", "shown_s"):
            numbers = getattr(self, name)
            if any(a > b or (a == b and name == "shown_tokens") for a, b in pairwise(numbers)):
                raise Refusal(400, f"'{name}' does not rise.", param=name)
