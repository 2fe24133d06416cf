"""The tool says what the documentation says, and in words what is wrong with a call."""

from __future__ import annotations

import json
import textwrap

import pytest

from lyceum.corpus.packages import ObjectFact
from lyceum.errors import DataError
from lyceum.tools import lookup
from lyceum.tools.lookup import MALFORMED, SCHEMA, Lookup


@pytest.fixture(scope="module")
def book() -> Lookup:
    return Lookup.of_packages(["textwrap", "json"])


def ask(book: Lookup, name: str) -> str:
    return book(lookup.arguments(name))


def test_a_name_of_a_package_gives_the_first_sentence_of_its_documentation(book: Lookup) -> None:
    doc = (textwrap.dedent.__doc__ or "").strip()
    assert doc.startswith("Remove any common leading whitespace from every line in `text`.")
    assert ask(book, "textwrap.dedent") == "Remove any common leading whitespace from every line in text."
    assert "textwrap.dedent" in book.names


def test_another_name_of_the_same_object_finds_it(book: Lookup) -> None:
    assert json.decoder.JSONDecoder is json.JSONDecoder
    assert ask(book, "json.decoder.JSONDecoder") == ask(book, "json.JSONDecoder") != ""


@pytest.mark.parametrize("name", ["textwrap.dedents", "dedent", "Textwrap.dedent", "textwrap. dedent", "numpy.sort"])
def test_only_the_exact_dotted_name_has_an_entry(book: Lookup, name: str) -> None:
    assert ask(book, name) == f"no entry for {name}"


@pytest.mark.parametrize(
    "arguments", ["", "{", "[]", '"len"', "{}", '{"name": 3}', '{"name": " "}', '{"name": "a", "b": 1}', "[" * 100_000]
)
def test_arguments_that_are_none_of_its_own_are_said_to_be(book: Lookup, arguments: str) -> None:
    assert book(arguments) == MALFORMED


def test_white_space_around_a_name_does_not_count_and_a_call_is_written_with_a_space(book: Lookup) -> None:
    assert lookup.arguments("textwrap.dedent") == '{"name": " textwrap.dedent"}'
    assert (
        book('{"name": "textwrap.dedent"}') == book('{"name": " textwrap.dedent\\n"}') == ask(book, "textwrap.dedent")
    )


def test_a_book_can_be_a_mapping_or_facts() -> None:
    assert ask(Lookup.of_mapping({"a.b": "Do it."}), "a.b") == "Do it."
    fact = ObjectFact("a.b", "function", "a", "", (), "", "Do it.", "", 0, "a")
    assert ask(Lookup.of_facts([fact]), "a.b") == "Do it."


def test_a_package_that_is_not_installed_is_an_error() -> None:
    with pytest.raises(DataError, match="no_such_package"):
        Lookup.of_packages(["no_such_package"])


def test_the_schema_is_a_tool_in_openais_shape_and_short() -> None:
    assert SCHEMA["type"] == "function" and SCHEMA["function"]["name"] == lookup.NAME
    parameters = SCHEMA["function"]["parameters"]
    assert parameters["type"] == "object" and list(parameters["properties"]) == ["name"]
    assert len(json.dumps(SCHEMA)) < 140
    assert list(json.loads(lookup.arguments("é.b"))) == list(parameters["properties"])
