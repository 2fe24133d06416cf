"""Lists that are read in pages: what a request says of its page, and a page as OpenAI's API shows it.

    page = Page.of(request)                       # limit, after, order, within bounds
    as_list(rows, has_more)                       # {"object": "list", "data", "first_id", "last_id", "has_more"}

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
    def of(cls, request: Request, *, most: int = MOST, has_order: bool = True) -> Page:
        """The page that a request's query asks for, newest first unless it has an order and says so. Raises Refusal."""
        given = request.query_params
        for name in given:
            if name not in ("limit", "after", "order") or (name == "order" and not has_order):
                raise Refusal(400, f"Unknown query parameter: '{name[:60]}'.", param=name, code="unknown_parameter")
        limit, order = given.get("limit", str(USUAL)), given.get("order", "desc")
        check_page(order, limit, most)
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
        return as_list(ordered[start : start + self.limit], len(ordered) > start + self.limit)


def as_list(rows: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """A page of a list that goes on after the id of its last row."""
    ends = {"first_id": rows[0]["id"], "last_id": rows[-1]["id"]} if rows else {"first_id": None, "last_id": None}
    return {"object": "list", "data": list(rows), **ends, "has_more": has_more}


def check_page(order: str, limit: str, most: int) -> None:
    """Raises Refusal for an order or a length of a page that is none."""
    if order not in ("asc", "desc"):
        raise Refusal(400, f"'order' is {order[:20]!r}, expected asc or desc.", param="order", code="invalid_value")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 10 and 1 <= int(limit) <= most):
        raise Refusal(400, f"'limit' is {limit[:20]!r}, expected 1 to {most}.", param="limit", code="invalid_value")
