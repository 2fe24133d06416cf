"""`docs/api.md`, made from the routes themselves: what each takes, what it refuses by name, and what differs from OpenAI's.

    python -m lyceum.serve.describe > docs/api.md

A route's first words are its function's docstring; its fields and their bounds are those of the class that reads its body
(`lyceum.serve.app.post`), and so are the reasons for what is not followed (`NOT_FOLLOWED`) and for what is followed in a way of
our own (`DIFFERS`). Nothing is started and no model is needed. A test holds the page to the routes.

What it is not: /openapi.json, which says the same to machines; and the service's own page (docs/serve.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema

from lyceum.serve.app import SCHEMAS, api, every_route, kinds
from lyceum.serve.batch.routes import batches
from lyceum.serve.files.routes import file_routes
from lyceum.serve.protocol import Wish
from lyceum.serve.responses.routes import responses
from lyceum.serve.tuning.routes import tuning_routes

HEAD = """# The API, route by route

*Made from the routes by `python -m lyceum.serve.describe`, and held to them by a test. [The service](serve.md) says how to run
it, who is let in, and what errors look like.*

Bodies are JSON objects and read strictly: a number is no text, null is as good as leaving a field out, and an unknown field is
refused with its nearest neighbour (400, `unknown_parameter`). A field that the original knows and this server does not follow
is refused by its name (400, `unsupported_parameter`), unless its value asks for nothing. Where nothing is said beside a field, it
means what it means at OpenAI's.

The routes that keep something (responses, files, batches) are there where the server has a store, which `lyceum serve` always
gives it; those of fine-tuning where it was started with `--jobs`. What is kept is its owner's, the owner of the key that asked;
for another it is not there (404).
"""


class _Nothing:
    """What stands behind routes that are not asked."""

    def __getattr__(self, name: str) -> None:
        return None


def routes() -> FastAPI:
    """An application that has the routes of the API, and nothing behind them."""
    nothing: Any = _Nothing()
    routers = [api(nothing), responses(nothing), file_routes(nothing, nothing), batches(nothing)]
    app = FastAPI()
    for router in [*routers, tuning_routes(nothing, nothing, nothing, nothing)]:
        app.include_router(router)
    return app


def describe(app: FastAPI) -> str:
    """The page, as Markdown."""
    taken = kinds(app)
    _, found = models_json_schema([(kind, "validation") for kind in taken.values()], ref_template=SCHEMAS)
    schemas: dict[str, Any] = found.get("$defs", {})
    known = {kind.__name__: kind for kind in _below(Wish)}
    lines = [HEAD, "## Routes\n"]
    for route in every_route(app):
        if route.include_in_schema:
            lines += _route(route, schemas)
    lines.append("## Objects\n")
    for name in sorted(set(schemas) - set(taken)):
        lines.append(f"### {name}\n")
        lines += _kind(known[name], schemas[name])
    return "\n".join(lines).rstrip() + "\n"


def _route(route: APIRoute, schemas: dict[str, Any]) -> Iterator[str]:
    for method in sorted(route.methods or ()):
        yield f"### {method} {route.path_format}\n"
    yield f"{_prose(route.endpoint.__doc__)}\n"
    kind: type[Wish] | None = getattr(route.endpoint, "kind", None)
    if kind is not None:
        yield from _kind(kind, schemas[kind.__name__], has_words=False)
        return
    content = (route.openapi_extra or {}).get("requestBody", {}).get("content", {})
    for form in content.values():
        yield from _kind(Wish, form["schema"], has_words=False)


def _kind(kind: type[Wish], schema: dict[str, Any], *, has_words: bool = True) -> Iterator[str]:
    if has_words:
        yield f"{_prose(kind.__doc__)}\n"
    required = schema.get("required", ())
    yield "| field | takes | here |\n|---|---|---|"
    for name, field in schema.get("properties", {}).items():
        must = "**required** " if name in required else ""
        yield f"| `{name}` | {must}{_cell(_takes(field))} | {_cell(kind.DIFFERS.get(name, ''))} |"
    yield ""
    if kind.NOT_FOLLOWED:
        yield "| known and refused | why | unless it is |\n|---|---|---|"
        for name, (why, harmless) in sorted(kind.NOT_FOLLOWED.items()):
            values = ", ".join(["null", *(f"`{json.dumps(value)}`" for value in harmless[:3])])
            yield f"| `{name}` | {_cell(why)} | {_cell(values)}{', ...' if len(harmless) > 3 else ''} |"
        yield ""


def _takes(schema: dict[str, Any]) -> str:
    """What a field takes, in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for word in ("anyOf", "oneOf"):
        if word in schema:
            parts = [_takes(one) for one in schema[word] if one.get("type") != "null"]
            return " or ".join(dict.fromkeys(parts))
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    type = schema.get("type", "anything")
    if type == "array":
        return f"list{_bounds(schema, 'minItems', 'maxItems')} of {_takes(schema.get('items', {}))}"
    if type == "object" and isinstance(schema.get("additionalProperties"), dict) and schema["additionalProperties"]:
        return f"object{_bounds(schema, 'minProperties', 'maxProperties')} of {_takes(schema['additionalProperties'])}"
    if type == "string":
        pattern = f" like `{schema['pattern']}`" if "pattern" in schema else ""
        return f"text{_bounds(schema, 'minLength', 'maxLength', ' characters')}{pattern}"
    if type in ("integer", "number"):
        return f"{type}{_bounds(schema, 'minimum', 'maximum')}"
    return {"boolean": "true or false"}.get(type, type)


def _bounds(schema: dict[str, Any], least: str, most: str, of: str = "") -> str:
    """The bounds of a number, or of the length of a text or a list; those of a machine's integers say nothing."""
    low, high = schema.get(least, schema.get("exclusiveMinimum")), schema.get(most)
    if low is None or abs(low) >= 2**31:
        return "" if high is None else f" (at most {high:.12g}{of})"
    least_of_all = f"{low:.12g}" if least in schema else f"above {low:.12g}"
    if high is not None:
        return f" ({least_of_all} to {high:.12g}{of})"
    return f" (at least {least_of_all}{of})" if least in schema else f" ({least_of_all}{of})"


def _prose(text: str | None) -> str:
    return " ".join((text or "").split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _below(kind: type[Wish]) -> Iterator[type[Wish]]:
    for one in kind.__subclasses__():
        yield one
        yield from _below(one)


if __name__ == "__main__":
    print(describe(routes()), end="")
