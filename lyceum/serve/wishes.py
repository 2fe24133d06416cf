"""What the chat page may send: its requests, field by field, as strictly as those of the API.

What it is not: what becomes of them (`lyceum.serve.pages`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lyceum.serve.protocol import Wish

EXACT = 1 << 53  # JavaScript's numbers are exact below

Text = Annotated[str, Field(min_length=1, max_length=1_000_000)]
Model = Annotated[str, Field(max_length=256)]
Id = Annotated[str, Field(max_length=64)]


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


class Again(Wish):
    """Answers: one from each model named, one or two."""

    models: Annotated[list[Model], Field(min_length=1, max_length=2)]
    parameters: Parameters = Field(default_factory=Parameters)


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
