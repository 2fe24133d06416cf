"""Filters for source code: keep a document, or drop it with a reason that is counted.

What: the filters of the Codex corpus (M. Chen et al., "Evaluating Large Language Models Trained on Code", 2021,
arXiv:2107.03374, section 3.1), each a named rule with its threshold. Why: generated tables, minified code and binary
blobs in text form teach nothing and eat the budget.

The paper drops files with a mean line over 100 characters, a line over 1000, a "small percentage" of alphanumeric
characters, and files that are "likely auto-generated"; it publishes neither the percentage nor the method. We take a
quarter for the share, as LLaMA's corpus of code does, and for generated files three signals that can be tested: a
marker in the first lines, one line that holds more than half the file, and a file that is mostly number literals.
Very small files (they hold no code, mostly empty `__init__.py`) are dropped as well.

Not here: natural language; near duplicates (`lyceum.corpus.dedup`); licences and personal data.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from lyceum.corpus.records import Document

MAX_MEAN_LINE, MAX_LINE = 100, 1000  # characters
MIN_ALPHANUMERIC = 0.25  # share of all characters
MIN_CHARACTERS = 100
MAX_ONE_LINE, ONE_LINE = 0.5, 200  # share of the file in its longest line; a shorter line than this is no blob
MAX_NUMBERS = 0.4  # share of characters in number literals
MARKER_LINES = 10

_MARKER = re.compile(
    r"\b(?:auto-?matically|auto|machine)[ -]?generated\b|@generated\b|\bdo not (?:edit|modify)\b"
    r"|\bthis (?:file|module|code) (?:is|was|has been) (?:\w+ )?generated\b"
    r"|^\W*(?:#|//|\*|;|--)(?: ?\w+){0,3} ?\bgenerated (?:by|from)\b",
    re.IGNORECASE | re.MULTILINE,
)
_NUMBER = re.compile(r"(?<![\w.])(?:0[xX][0-9a-fA-F]+|[0-9]+(?:\.[0-9]+)?)(?!\w)|\\x[0-9a-fA-F]{2}")


def is_tiny(text: str) -> bool:
    """Less than MIN_CHARACTERS characters that are not white space."""
    return len(text) < MIN_CHARACTERS or len("".join(text.split())) < MIN_CHARACTERS


def has_long_mean_line(text: str) -> bool:
    """Lines are longer than MAX_MEAN_LINE characters on average."""
    lines = text.splitlines()
    return sum(map(len, lines)) > MAX_MEAN_LINE * len(lines)


def has_long_line(text: str) -> bool:
    """One line is longer than MAX_LINE characters."""
    return max(map(len, text.splitlines()), default=0) > MAX_LINE


def has_few_letters(text: str) -> bool:
    """Less than MIN_ALPHANUMERIC of the characters are letters or digits."""
    return sum(map(str.isalnum, text)) < MIN_ALPHANUMERIC * len(text)


def is_marked_generated(text: str) -> bool:
    """One of the first MARKER_LINES lines says that a program wrote the file."""
    return _MARKER.search("\n".join(text.split("\n", MARKER_LINES)[:MARKER_LINES])) is not None


def is_one_line(text: str) -> bool:
    """A line of more than ONE_LINE characters holds more than MAX_ONE_LINE of the file (minified code, a blob)."""
    return max(map(len, text.splitlines()), default=0) > max(ONE_LINE, MAX_ONE_LINE * len(text))


def is_number_table(text: str) -> bool:
    """More than MAX_NUMBERS of the characters stand in number literals (tables, byte blobs)."""
    if sum(map(text.count, "0123456789")) + 4 * text.count("\\x") < MAX_NUMBERS / 8 * len(text):
        return False  # what follows is slow, and no literal has less than one digit in eight characters
    return sum(len(found.group()) for found in _NUMBER.finditer(text)) > MAX_NUMBERS * len(text)


# In the order in which they are asked; a dropped document counts for the first rule that names it.
CODE_RULES: dict[str, Callable[[str], bool]] = {
    "tiny file": is_tiny,
    "mean line too long": has_long_mean_line,
    "line too long": has_long_line,
    "few letters": has_few_letters,
    "marked as generated": is_marked_generated,
    "one line holds most": is_one_line,
    "table of numbers": is_number_table,
}


def reason_to_drop(text: str) -> str:
    """The name of the first rule in CODE_RULES that drops this source file; "" to keep it."""
    return next((name for name, drops in CODE_RULES.items() if drops(text)), "")


def clean_code(documents: Iterable[Document], drops: Counter[str]) -> Iterator[Document]:
    """Passes on the documents that no rule drops, and adds the others to `drops`, reason -> number."""
    for document in documents:
        reason = reason_to_drop(document.text)
        if reason:
            drops[reason] += 1
        else:
            yield document
