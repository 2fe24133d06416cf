from __future__ import annotations

from dataclasses import replace

import pytest

from lyceum.corpus.describe import LAYOUTS, MAX_DOC_WORDS, documents, in_words, short_signature
from lyceum.corpus.packages import ObjectFact

FACT = ObjectFact(
    name="shop.sell",
    kind="function",
    module="shop",
    signature="(item, price=1)",
    parameters=("item", "price"),
    returns="the change",
    summary="Sell an item.",
    doc="Sell an item. The\nitem is gone then.\n\n" + "Many more words. " * 100,
    uses=3,
    package="shop",
)


def test_every_layout_carries_the_name_and_the_summary_word_for_word() -> None:
    made = documents(FACT)
    assert [document.meta["layout"] for document in made] == list(LAYOUTS)
    for document in made:
        assert "sell" in document.text and FACT.summary in document.text
        assert document.meta["object"] == "shop.sell" and document.meta["part"] == "docs"
    assert len({document.text for document in made}) == 6


def test_the_layouts_read_as_people_write_them() -> None:
    texts = {document.meta["layout"]: document.text for document in documents(FACT)}
    assert texts["prose"] == (
        "shop.sell is a function in the shop module. Sell an item. It takes item and price. It returns the change.\n"
    )
    assert texts["stub"] == '# shop.sell\ndef sell(item, price=1):\n    """Sell an item."""\n'
    assert texts["entry"] == "- `shop.sell(item, price=1)`: Sell an item.\n"
    assert texts["backwards"] == "Which function is this? Sell an item. It is shop.sell, in the shop module.\n"
    head = "Help on function shop.sell, in the shop module:\n\nsell(item, price=1)\n"
    assert texts["help"].startswith(head + "    Sell an item.\n\n    The item is gone")


@pytest.mark.parametrize("kind", ["function", "class", "method", "exception", "module"])
def test_documents_are_short(kind: str) -> None:
    long = replace(FACT, kind=kind, signature="(" + ", ".join(f"parameter_{n}=None" for n in range(40)) + ")")
    for document in documents(long):
        assert len(document.text.split()) < MAX_DOC_WORDS + 70


def test_long_signatures_are_cut_between_parameters() -> None:
    long = "(" + ", ".join(f"parameter_{n}" for n in range(20)) + ")"
    assert short_signature(long) == "(" + ", ".join(f"parameter_{n}" for n in range(6)) + ", ...)"
    assert short_signature("(a)") == "(a)"


def test_lists_of_names_are_sentences() -> None:
    assert [in_words(tuple("abcdefgh"[:n])) for n in (1, 2, 3, 8)] == [
        "a",
        "a and b",
        "a, b and c",
        "a, b, c, d, e, f and 2 more",
    ]
