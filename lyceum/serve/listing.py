"""Lists that are read in pages: what a request says of its page, and a page as OpenAI's API shows it.

    page = Page.of(request, order="desc")         # limit, after, order, within bounds
    shown(rows, has_more)                         # {"object": "list", "data", "first_id", "last_id", "has_more"}

The next page is asked for with `after`, the id that the page before ended with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from lyceum.serve.refusals import Refusal

MOST = 100  # rows on a page
USUAL = 20


@dataclass(frozen=True)
class Page:
    """Which page is asked for. after: the id that the one before ended with. is_newest_first: the order."""

    limit: int
    after: str | None
    is_newest_first: bool

    @classmethod
    def of(cls, request: Request, *, order: str = "desc", most: int = MOST, also: Sequence[str] = ()) -> Page:
        """The page that a request's query asks for. also: other names that the query may hold. Raises Refusal."""
        given = request.query_params
        for name in given:
            if name not in ("limit", "after", "order", *also):
                raise Refusal(400, f"Unknown query parameter: '{name[:60]}'.", param=name, code="unknown_parameter")
        limit, order = given.get("limit", str(USUAL)), given.get("order", order)
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= most):
            raise Refusal(400, f"'limit' is {limit[:20]!r}, expected 1 to {most}.", param="limit", code="invalid_value")
        if order not in ("asc", "desc"):
            raise Refusal(400, f"'order' is {order[:20]!r}, expected asc or desc.", param="order", code="invalid_value")
        return cls(int(limit), given.get("after"), order == "desc")

    def cut(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The page of rows that are all there, oldest first. Raises Refusal where `after` is none of them."""
        ordered = list(reversed(rows)) if self.is_newest_first else list(rows)
        start = 0
        if self.after is not None:
            ids = [row["id"] for row in ordered]
            if self.after not in ids:
                raise Refusal(
                    400, f"There is nothing with the id {self.after[:60]!r}.", param="after", code="not_found"
                )
            start = ids.index(self.after) + 1
        return shown(ordered[start : start + self.limit], len(ordered) > start + self.limit)


def shown(rows: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """A page, as it is told."""
    first, last = (rows[0]["id"], rows[-1]["id"]) if rows else (None, None)
    return {"object": "list", "data": list(rows), "first_id": first, "last_id": last, "has_more": has_more}
