"""A fact about an object as documents: the same words in the forms in which people meet documentation.

What: up to six layouts of one `ObjectFact`, each a document of its own that carries the name and, word for word, the
summary. Why: a small model learns a fact from many differently worded exposures, not from one (and not backwards: one
layout begins with what the object does and ends with its name). Not here: questions and answers
(`lyceum.synth.lessons`).
"""

from __future__ import annotations

from collections.abc import Callable

from lyceum.corpus.docstrings import shortened_body
from lyceum.corpus.packages import ObjectFact
from lyceum.corpus.records import Document

MAX_DOC_WORDS = 60  # of the doc string, where a layout shows it: about 100 tokens
MAX_SIGNATURE = 90  # characters; a longer one is cut between parameters


def documents(fact: ObjectFact) -> list[Document]:
    """All layouts of one fact; `meta` says which object and which layout."""
    meta = {"part": "docs", "source": fact.package, "object": fact.name}
    texts = {name: layout(fact) for name, layout in LAYOUTS.items()}
    return [Document(text, meta={**meta, "layout": name}) for name, text in texts.items() if text]


def short_signature(signature: str) -> str:
    """A signature of at most MAX_SIGNATURE characters: whole parameters, then "...)"."""
    if len(signature) <= MAX_SIGNATURE:
        return signature
    return signature[: MAX_SIGNATURE - 5].rpartition(", ")[0] + ", ...)"


def where(fact: ObjectFact) -> str:
    """ "in the json module", or "built into Python"."""
    return "built into Python" if fact.module == "built-in" else f"in the {fact.module} module"


def a_kind(fact: ObjectFact) -> str:
    """The kind with its article: "a function", "an exception"."""
    return ("an " if fact.kind[0] in "aeiou" else "a ") + fact.kind


def in_words(names: tuple[str, ...], most: int = 6) -> str:
    """ "x", "x and y", "x, y and z", "a, b, c, d, e, f and 3 more"."""
    if len(names) > most:
        return ", ".join(names[:most]) + f" and {len(names) - most} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _details(fact: ObjectFact) -> str:
    """What the doc string says after the summary, bounded."""
    first, _, rest = fact.doc.partition("\n\n")
    first = " ".join(first.split())
    after = first.removeprefix(fact.summary).strip() if first.startswith(fact.summary) else ""
    return shortened_body(f"{after}\n\n{rest}".strip(), MAX_DOC_WORDS)


def _indented(text: str) -> str:
    return "\n".join("    " + line if line.strip() else "" for line in text.split("\n"))


def _help(fact: ObjectFact) -> str:
    """As `help()` prints it."""
    leaf = fact.name.rpartition(".")[2]
    head = f"Help on {fact.kind} {fact.name}" + ("" if fact.kind == "module" else f", {where(fact)}") + ":"
    body = f"{fact.summary}\n\n{_details(fact)}".strip()
    return f"{head}\n\n{leaf}{short_signature(fact.signature)}\n{_indented(body)}\n"


def _prose(fact: ObjectFact) -> str:
    """In sentences."""
    if fact.kind == "module":
        return (
            f"{fact.name} is a module of the standard library. {fact.summary}\n"
            if fact.package == "stdlib"
            else (f"{fact.name} is a module of the package {fact.package}. {fact.summary}\n")
        )
    sentences = [f"{fact.name} is {a_kind(fact)} {where(fact)}.", fact.summary]
    if fact.parameters:
        sentences.append(f"It takes {in_words(fact.parameters)}.")
    elif fact.signature == "()":
        sentences.append("It takes no arguments.")
    if fact.returns:
        sentences.append(f"It returns {fact.returns}.")
    return " ".join(sentences) + "\n"


def _stub(fact: ObjectFact) -> str:
    """As code: a definition with its doc string."""
    leaf = fact.name.rpartition(".")[2]
    if fact.kind == "module":
        return f'# {fact.name}\n"""{fact.summary}"""\n'
    if fact.kind in ("class", "exception"):
        return f'# {fact.name}\nclass {leaf}:\n    """{fact.summary}"""\n'
    arguments = short_signature(fact.signature) or "(...)"
    return f'# {fact.name}\ndef {leaf}{arguments}:\n    """{fact.summary}"""\n'


def _entry(fact: ObjectFact) -> str:
    """As an entry of a list."""
    return f"- `{fact.name}{short_signature(fact.signature)}`: {fact.summary}\n"


def _card(fact: ObjectFact) -> str:
    """As a reference card, field by field."""
    lines = [f"## {fact.name}", f"Kind: {fact.kind}"]
    lines += [] if fact.kind == "module" else [f"Module: {fact.module}"]
    lines += [f"Summary: {fact.summary}"]
    lines += [f"Parameters: {', '.join(fact.parameters)}"] if fact.parameters else []
    lines += [f"Returns: {fact.returns}"] if fact.returns else []
    return "\n".join(lines) + "\n"


def _backwards(fact: ObjectFact) -> str:
    """From what it does to its name."""
    if fact.kind == "module":
        return f"Which module is this? {fact.summary} It is {fact.name}.\n"
    return f"Which {fact.kind} is this? {fact.summary} It is {fact.name}, {where(fact)}.\n"


LAYOUTS: dict[str, Callable[[ObjectFact], str]] = {
    "help": _help,
    "prose": _prose,
    "stub": _stub,
    "entry": _entry,
    "card": _card,
    "backwards": _backwards,
}
