"""What a client may ask of fine-tuning: jobs, methods, hyperparameters and graders, field by field, by OpenAI's specification.

"auto" is the default of every hyperparameter, and what it comes to is decided with the data (`lyceum.serve.tuning.recipes`).
What the specification knows and is not followed here is refused by name, as everywhere (`lyceum.serve.protocol.Wish`).

What it is not: what becomes of a job.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lyceum.errors import ConfigError
from lyceum.evals.graders import SIMILARITIES, check_formula, places
from lyceum.serve.protocol import Name, Wish
from lyceum.serve.refusals import Refusal, unsupported

Auto = Literal["auto"]
Epochs = Auto | Annotated[int, Field(ge=1, le=50)]
Batch = Auto | Annotated[int, Field(ge=1, le=256)]
Multiplier = Auto | Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=20_000)]
GRADERS = ("string_check", "text_similarity", "score_model", "multi")
MAX_GRADERS = 16
NO_RANKS = "the models here answer at once"


class Hyperparameters(Wish):
    """How `supervised` learns."""

    batch_size: Batch | None = None
    learning_rate_multiplier: Multiplier | None = None
    n_epochs: Epochs | None = None

    def kept(self) -> dict[str, Any]:
        """All of them; what was left out is "auto"."""
        return {name: "auto" if value is None else value for name, value in self.model_dump().items()}


class DpoHyperparameters(Hyperparameters):
    """How `dpo` learns."""

    beta: Auto | Annotated[float, Field(gt=0, le=2, allow_inf_nan=False)] | None = None


class ReinforcementHyperparameters(Hyperparameters):
    """How `reinforcement` learns."""

    NOT_FOLLOWED = {
        "eval_interval": ("no evaluation runs beside the training", ("auto",)),
        "eval_samples": ("no evaluation runs beside the training", ("auto",)),
        "reasoning_effort": (NO_RANKS, ("default",)),
    }
    compute_multiplier: Auto | Annotated[float, Field(ge=0.25, le=8, allow_inf_nan=False)] | None = None


# -- graders -----------------------------------------------------------------------------------------------------------


class Grader(Wish):
    """What all graders have."""

    type: str
    name: Name

    @property
    def templates(self) -> Iterator[tuple[str, str]]:
        """(field, template) of all that it fills in."""
        return iter(())

    def check(self, where: str) -> None:
        """Raises Refusal for a template that names something else than the sample and the item."""
        for field, template in self.templates:
            for place in places(template):
                is_known = place == "sample.output_text" or place.startswith(("item.", "sample.output_json."))
                if not is_known:
                    raise Refusal(
                        400,
                        f"{place!r} is not known: sample.output_text, sample.output_json.NAME and item.NAME are.",
                        param=f"{where}.{field}",
                        code="invalid_value",
                    )


class StringCheck(Grader):
    """1 where two texts agree, else 0."""

    type: Literal["string_check"]
    input: Text
    reference: Text
    operation: Literal["eq", "ne", "like", "ilike"]

    @property
    def templates(self) -> Iterator[tuple[str, str]]:
        """Both texts."""
        yield "input", self.input
        yield "reference", self.reference


class TextSimilarity(Grader):
    """How alike two texts are."""

    type: Literal["text_similarity"]
    input: Text
    reference: Text
    evaluation_metric: str

    @property
    def templates(self) -> Iterator[tuple[str, str]]:
        """Both texts."""
        yield "input", self.input
        yield "reference", self.reference

    def check(self, where: str) -> None:
        """Its metric too."""
        super().check(where)
        if self.evaluation_metric in ("cosine", "meteor"):
            raise unsupported(f"{where}.evaluation_metric", f"{', '.join(SIMILARITIES)} are")
        if self.evaluation_metric not in SIMILARITIES:
            raise Refusal(
                400,
                f"{self.evaluation_metric[:40]!r} is no metric: {', '.join(SIMILARITIES)}.",
                param=f"{where}.evaluation_metric",
                code="invalid_value",
            )


class JudgeMessage(Wish):
    """What a judge is told."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Text
    type: Literal["message"] | None = None


class JudgeSampling(Wish):
    """How a judge's answer is drawn."""

    NOT_FOLLOWED = {"reasoning_effort": (NO_RANKS, ("none",))}
    max_completions_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None


class ScoreModel(Grader):
    """The number that a model answers."""

    type: Literal["score_model"]
    model: Name
    input: Annotated[list[JudgeMessage], Field(min_length=1, max_length=32)]
    range: Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=2, max_length=2)] | None = (
        None
    )
    sampling_params: JudgeSampling | None = None

    @property
    def templates(self) -> Iterator[tuple[str, str]]:
        """Its messages."""
        return ((f"input[{number}].content", message.content) for number, message in enumerate(self.input))

    def check(self, where: str) -> None:
        """Its range too."""
        super().check(where)
        if self.range is not None and not self.range[0] < self.range[1]:
            raise Refusal(400, "The range's first number must be the smaller.", param=f"{where}.range")


Single = Annotated[StringCheck | TextSimilarity | ScoreModel, Field(discriminator="type")]


class MultiGrader(Grader):
    """A formula over the scores of others."""

    type: Literal["multi"]
    graders: Annotated[dict[str, Single], Field(min_length=1, max_length=MAX_GRADERS)]
    calculate_output: Annotated[str, Field(max_length=1000)]

    def check(self, where: str) -> None:
        """Those of which it is made, and its formula."""
        for name, grader in self.graders.items():
            if not name.isidentifier():
                raise Refusal(
                    400, f"{name[:40]!r} cannot stand in a formula: letters and digits.", param=f"{where}.graders"
                )
            grader.check(f"{where}.graders.{name}")
        try:
            check_formula(self.calculate_output, [*self.graders])
        except ConfigError as error:
            raise Refusal(400, f"{error.message} ({error.hint})", param=f"{where}.calculate_output") from None


AnyGrader = Annotated[StringCheck | TextSimilarity | ScoreModel | MultiGrader, Field(discriminator="type")]


def judges_of(grader: Grader) -> list[ScoreModel]:
    """The graders within one that ask a model."""
    parts = grader.graders.values() if isinstance(grader, MultiGrader) else [grader]
    return [part for part in parts if isinstance(part, ScoreModel)]


# -- jobs --------------------------------------------------------------------------------------------------------------


class Supervised(Wish):
    """The method `supervised`."""

    hyperparameters: Hyperparameters | None = None


class Dpo(Wish):
    """The method `dpo`."""

    hyperparameters: DpoHyperparameters | None = None


class Reinforcement(Wish):
    """The method `reinforcement`."""

    grader: AnyGrader
    hyperparameters: ReinforcementHyperparameters | None = None

    @model_validator(mode="before")
    @classmethod
    def _can_grade(cls, given: Any) -> Any:
        """Graders that the specification knows and that do not stand here, by name."""
        outer = given.get("grader") if isinstance(given, dict) else None
        inner = outer.get("graders") if isinstance(outer, dict) else None
        for grader in [outer, *(inner.values() if isinstance(inner, dict) else ())]:
            kind = grader.get("type") if isinstance(grader, dict) else None
            if kind == "python":
                raise unsupported("method.reinforcement.grader", "python needs a sandbox, which is not here")
            if kind == "label_model":
                raise unsupported("method.reinforcement.grader", f"{', '.join(GRADERS)} are")
        return given


class Method(Wish):
    """How a job learns."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Reinforcement | None = None


class JobRequest(Wish):
    """POST /v1/fine_tuning/jobs"""

    NOT_FOLLOWED = {"integrations": ("metrics are events of the job, and a file at its end", ([],))}
    model: Name
    training_file: Annotated[str, Field(min_length=1, max_length=64)]
    validation_file: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    suffix: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9_.-]*$")] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None

    @property
    def kind(self) -> str:
        """The method's name."""
        return self.method.type if self.method is not None else "supervised"

    @property
    def grader(self) -> Grader | None:
        """What judges replies, of the method that needs it."""
        return self.method.reinforcement.grader if self.method and self.method.reinforcement else None

    def wanted(self) -> dict[str, Any]:
        """Every hyperparameter of the method, "auto" where it was left open."""
        part = getattr(self.method, self.kind) if self.method is not None else None
        kinds = {"supervised": Hyperparameters, "dpo": DpoHyperparameters}
        given = (part.hyperparameters if part is not None else self.hyperparameters) or kinds.get(
            self.kind, ReinforcementHyperparameters
        )()
        return given.kept()

    def check(self) -> None:
        """What one field says of another. Raises Refusal."""
        if self.method is not None:
            for name in ("supervised", "dpo", "reinforcement"):
                if name != self.kind and getattr(self.method, name) is not None:
                    raise Refusal(400, f"'{name}' does not belong to the method {self.kind!r}.", param=f"method.{name}")
            if self.hyperparameters is not None:
                raise Refusal(400, "Give 'hyperparameters' within 'method', or without one.", param="hyperparameters")
        if self.kind == "reinforcement":
            if self.grader is None:
                raise Refusal(
                    400,
                    "Missing required parameter: 'method.reinforcement.grader'.",
                    param="method.reinforcement.grader",
                    code="missing_required_parameter",
                )
            self.grader.check("method.reinforcement.grader")
            if self.validation_file is not None:
                raise unsupported("validation_file", "what the grader says of new replies is measured in training")
