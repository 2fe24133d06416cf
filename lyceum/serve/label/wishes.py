"""What the labelling page may send, field by field. What it is not: what a result says (`lyceum.serve.label.results`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lyceum.serve.protocol import Wish

Named = Annotated[str, Field(max_length=60)]  # of a labeller, where no keys are asked for
Kind = Literal["prompt", "answer", "user", "rank", "label"]
Language = Annotated[str, Field(max_length=35, pattern=r"^[A-Za-z0-9-]*$")]
Text = Annotated[str, Field(max_length=200_000)]
Flags = Annotated[list[Annotated[str, Field(max_length=40)]], Field(max_length=40)]


class Next(Wish):
    """The next task, of these kinds."""

    name: Named = ""
    kinds: Annotated[list[Kind], Field(min_length=1, max_length=5)]
    language: Language = ""


class Result(Wish):
    """What came of a task; which fields belong to which kind, `lyceum.serve.label.results` says."""

    name: Named = ""
    consent: bool = False
    text: Text | None = None
    instruction: Text | None = None
    examples: Annotated[list[Annotated[list[Text], Field(min_length=2, max_length=2)]], Field(max_length=20)] | None = (
        None
    )
    input: Text | None = None
    use: Annotated[str, Field(max_length=40)] | None = None
    ranks: Annotated[list[Annotated[float, Field(ge=1, le=99, allow_inf_nan=False)]], Field(max_length=16)] | None = (
        None
    )
    none_acceptable: bool | None = None
    scores: Annotated[list[int | None], Field(max_length=16)] | None = None
    flags: Flags | Annotated[list[Flags], Field(max_length=16)] | None = None
    spam: bool | None = None
    wrong_language: bool | None = None
    quality: int | None = None

    def given(self) -> dict[str, Any]:
        """The fields of the result itself."""
        return self.model_dump(exclude_none=True, exclude={"name", "consent"})


class Skip(Wish):
    """Why a task is not done."""

    name: Named = ""
    reason: Annotated[str, Field(max_length=40)]
    words: Annotated[str, Field(max_length=2000)] = ""


class Guidelines(Wish):
    """What people are told; an empty text brings ours back."""

    language: Language
    text: Text


class Change(Wish):
    """Rules to be changed; what is not named stays."""

    answers: int | None = None
    written: int | None = None
    turns: int | None = None
    reviews: int | None = None
    rankings: int | None = None
    trees: int | None = None
    max_tokens: int | None = None
    accept: Annotated[float, Field(allow_inf_nan=False)] | None = None
    minutes: Annotated[float, Field(allow_inf_nan=False)] | None = None
    gold_share: Annotated[float, Field(allow_inf_nan=False)] | None = None
    temperature: Annotated[float, Field(allow_inf_nan=False)] | None = None
    languages: Annotated[list[Language], Field(min_length=1, max_length=40)] | None = None
    models: Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=40)] | None = None


class Import(Wish):
    """Rows of a file, and what they are."""

    rows: Annotated[list[dict[str, Any] | str], Field(max_length=5000)]
    as_what: Literal["rankings", "conversations", "gold_rankings", "gold_labels"] = Field(alias="as")
    use: Annotated[str, Field(max_length=40)] = "other"
    language: Language = "en"
