"""docs/api.md is what the routes say, of all of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from lyceum.serve.describe import describe, routes
from lyceum.serve.protocol import REQUESTS, ChatRequest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"


def test_the_page_of_the_api_is_what_the_routes_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == describe(routes()), "python -m lyceum.serve.describe > docs/api.md"


def test_every_route_of_a_server_is_on_the_page_and_says_what_it_does(keep: Callable, chain: Callable) -> None:
    server = keep(m=chain("ab"))
    text = PAGE.read_text(encoding="utf-8")
    described = server.app.openapi()["paths"]
    assert len(described) > 15
    for path, methods in described.items():
        for method, about in methods.items():
            assert f"### {method.upper()} {path}\n" in text
            assert about.get("description"), (method, path)


def test_every_field_and_reason_is_on_the_page_and_what_differs_is_a_field() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for kind in REQUESTS:
        fields = {field.alias or name for name, field in kind.model_fields.items()}
        assert set(kind.DIFFERS) <= fields, kind
        for name in (*fields, *kind.NOT_FOLLOWED):
            assert f"\n| `{name}` | " in text
    why, _ = ChatRequest.NOT_FOLLOWED["verbosity"]
    assert f'| `verbosity` | {why} | null, `"medium"` |' in text  # by hand


def test_every_link_of_the_page_leads_to_an_object() -> None:
    text = PAGE.read_text(encoding="utf-8")
    headings = {heading.lower() for heading in re.findall(r"^### (\w+)$", text, re.MULTILINE)}
    links = set(re.findall(r"\]\(#(\w+)\)", text))
    assert len(links) > 10 and links <= headings
