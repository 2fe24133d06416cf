"""Errors as OpenAI's API says them: a status, and `{"error": {"message", "type", "param", "code"}}`.

    raise Refusal(400, "'n' is 300, expected at most 128", param="n")

Everything that can go wrong with a request becomes a `Refusal`, here and nowhere else: what pydantic found in a body
(`of_validation`), what the engine or the chat format said (`of_error`). `type` follows from the status; `param` and `code`
are a text or null, never a number. A message never repeats what was sent at length: a short body must not make a long
answer. The client retries 408, 409, 429 and 5xx, so what would fail again says `x-should-retry: false`.

What it is not: the errors of the command line (`lyceum.errors`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lyceum.errors import LyceumError, NotFound, ResourceError, StoreError, did_you_mean

TYPES = {  # of a status; any other 4xx is an invalid request, any other 5xx a server error
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
MAX_MESSAGE = 600  # characters
MAX_PARAM = 120


class Refusal(Exception):
    """A request that is not answered as asked.

    status: of HTTP. param: the field at fault. code: a word that programs look at. retry_after_s: when to come again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float = 0.0,
    ):
        super().__init__(message)
        self.status = status
        self.message = _cut(message, MAX_MESSAGE)
        self.param = None if param is None else _cut(param, MAX_PARAM)
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def content(self) -> dict[str, Any]:
        """The body of the answer."""
        type = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": type, "param": self.param, "code": self.code}}

    @property
    def body(self) -> bytes:
        """It as JSON."""
        return json.dumps(self.content).encode()

    @property
    def headers(self) -> dict[str, str]:
        """What the client is told about trying again, and how to prove who it is."""
        found = {}
        if self.retry_after_s:
            found = {
                "retry-after": str(max(1, round(self.retry_after_s))),
                "retry-after-ms": str(round(1000 * self.retry_after_s)),
            }
        elif self.status in (408, 409, 429) or self.status == 500:
            found = {"x-should-retry": "false"}
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found


def unsupported(param: str, why: str) -> Refusal:
    """A field that OpenAI's API knows and this server does not follow."""
    return Refusal(400, f"{param!r} is not supported here: {why}", param=param, code="unsupported_parameter")


def too_long(num_tokens: int, context_length: int, param: str) -> Refusal:
    """A prompt that leaves no room for a reply."""
    return Refusal(
        400,
        f"This model's maximum context length is {context_length} tokens. However, your {param} resulted in {num_tokens} "
        f"tokens. Please reduce the length of the {param}.",
        param=param,
        code="context_length_exceeded",
    )


def of_error(error: Exception) -> Refusal:
    """What an error of ours means to a client: a wish that cannot be granted, or our own mistake, which is not told."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ResourceError):
        return Refusal(503, error.message, code="overloaded", retry_after_s=5.0)
    if isinstance(error, NotFound):  # what is another's is not there either
        return Refusal(404, error.message, code="not_found")
    if isinstance(error, StoreError):  # it cannot be done now
        return Refusal(409, error.message, code="conflict")
    if isinstance(error, LyceumError):
        return Refusal(400, f"{error.message} ({error.hint})" if error.hint else error.message)
    return Refusal(500, "The server had an error while processing your request.", code="internal_error")


def of_validation(errors: Sequence[Mapping[str, Any]], given: Any, known: Sequence[str]) -> Refusal:
    """The first thing that pydantic found wrong in a body.

    errors: as `ValidationError.errors()` lists them. given: the body. known: fields at the top, for a misspelt one.
    """
    # a value of a union is reported once for each of its types: the deepest place says most, then what is no other type
    first = max(errors, key=lambda error: (len(_place(error, given)), not str(error["type"]).endswith("_type")))
    path = _place(first, given)
    param, kind = _written(path), str(first["type"])
    if kind == "extra_forbidden":
        hint = did_you_mean(str(path[-1]), known) if len(path) == 1 else ""
        close = f" ({hint})" if hint.startswith("did you") else ""
        return Refusal(
            400,
            f"Unrecognized request argument supplied: {_cut(param, 80)}{close}",
            param=param,
            code="unknown_parameter",
        )
    if kind == "missing":
        return Refusal(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    where = f"'{_cut(param, 80)}'" if param else "the body"
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return Refusal(400, f"Invalid value for {where}: {first['msg']}.", param=param or None, code=code)


def _place(error: Mapping[str, Any], given: Any) -> list[str | int]:
    """The path of an error in what was given, without the names that pydantic gives the types of a union."""
    path: list[str | int] = []
    here = given
    for step in error["loc"]:
        is_there = isinstance(here, dict) and step in here
        if is_there or (isinstance(here, list) and isinstance(step, int) and step < len(here)):
            path.append(step)
            here = here[step]
        elif error["type"] == "missing" and isinstance(here, dict) and step == error["loc"][-1]:
            path.append(step)
    return path


def _written(path: Sequence[str | int]) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _cut(text: str, most: int) -> str:
    plain = "".join(letter if letter.isprintable() else " " for letter in text[: most + 1])
    return plain if len(plain) <= most else plain[: most - 3] + "..."
