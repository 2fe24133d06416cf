"""The tool `lookup`: the exact dotted name of an object in, one sentence of its documentation out.

What: a function from a call's arguments (JSON text) to a result (text), for `Session(tools=...)`, and its schema. Why: a
small model cannot hold a package, but it can ask for the one name it needs and repeat what it is told. The sentence is the
object's `summary` as `lyceum.corpus.packages` makes it, the same that a studied object is learned by.

    lookup = Lookup.of_packages(["numpy"])
    lookup('{"name": "numpy.sort"}')     # 'Return a sorted copy of an array.'
    lookup('{"name": "numpy.sorted"}')   # 'no entry for numpy.sorted'

Whatever is wrong with a call is said in the result: the model is told, and the talk goes on. Importing a package runs its
code, so name packages that you trust. What it is not: a search; a name that is almost right has no entry.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lyceum.corpus.packages import ObjectFact, Survey, describe

NAME = "lookup"

# In the shape of OpenAI's API, and nothing in it that may be left out: it stands in every system turn that offers the
# tool, where a description would take tokens from a context of 192 and tell a small model nothing.
SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {"name": NAME, "parameters": {"type": "object", "properties": {"name": {"type": "string"}}}},
}

MALFORMED = 'error: the arguments must be {"name": "..."}'


def no_entry(name: str) -> str:
    """The result for a name that is not there."""
    return f"no entry for {name}"


def arguments(name: str) -> str:
    """A call's arguments, as text, that look `name` up.

    The name stands after a space, as it does in a sentence: so it is cut into the same tokens as in the question, and a
    model calls by copying ids. Right after the quotation mark it would be cut otherwise, and the model would have to
    know for every piece how it is spelled without its space.
    """
    return json.dumps({"name": f" {name}"}, ensure_ascii=False)


def asked_name(arguments: str) -> str | None:
    """The name that a call's arguments ask for, without white space around it; None if they fit no schema of ours."""
    try:
        given = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    name = given.get("name") if isinstance(given, dict) and list(given) == ["name"] else None
    return name.strip() or None if isinstance(name, str) else None


class Lookup:
    """The tool over given entries.

    Args:
        names: every name it may have an entry for, each once.
        find: the sentence of a name, or None if there is none; asked when a name is looked up.
    """

    def __init__(self, names: Sequence[str], find: Callable[[str], str | None]) -> None:
        self.names = list(names)
        self.find = find

    @classmethod
    def of_mapping(cls, entries: Mapping[str, str]) -> Lookup:
        """Over a mapping from names to sentences."""
        return cls(list(entries), entries.get)

    @classmethod
    def of_facts(cls, facts: Iterable[ObjectFact]) -> Lookup:
        """Over facts, such as those of a corpus section's `objects.jsonl`."""
        return cls.of_mapping({fact.name: fact.summary for fact in facts})

    @classmethod
    def of_packages(cls, packages: Sequence[str]) -> Lookup:
        """Over all public objects of some packages; other names of the same object find it too.

        Args:
            packages: "stdlib", "builtins", or names of installed packages.

        Raises:
            DataError: a package is not installed.
        """
        survey = Survey(packages)

        def find(name: str) -> str | None:
            public = survey.known.get(name, name)
            if public not in survey.objects:
                return None
            with warnings.catch_warnings():  # a stranger's object may warn that it is deprecated
                warnings.simplefilter("ignore")
                fact = describe(public, survey.objects[public], survey.package_of[public], 0)
            return fact.summary if fact is not None else None

        return cls(survey.names(), find)

    def __call__(self, arguments: str) -> str:
        """The result of one call.

        Args:
            arguments: JSON text, as the model wrote it.

        Returns:
            The sentence; `no_entry` for a name that has none; `MALFORMED` for arguments that are none of this tool's.
        """
        name = asked_name(arguments)
        if name is None:
            return MALFORMED
        return self.find(name) or no_entry(name)
