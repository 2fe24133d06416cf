"""Long texts in pieces, cut where a token ends, so that no step ever holds or encodes a gigabyte at once.

What: `cut` divides a text into pieces of at most so many characters. A cut stands where a letter or a digit is followed
by white space or punctuation, at the last such place in the piece. Why there: the tokenizer's pattern
(`lyceum.tokens.tokenizer`) ends a pre-token at each such place, whatever stands before and after it, so the ids of the
pieces, one after the other, are the ids of the whole text; a test holds it to that. Where a piece has no such place (a
million letters in a row, or blanks) it ends at its full length, and there the ids may differ from the whole text's.

Documents are cut when they are read (`DOCUMENT` characters), texts once more before they are encoded (`ENCODED`):
the library behind the tokenizer needs some hundred bytes of memory for each character of a text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

DOCUMENT, ENCODED = 1 << 20, 1 << 14  # characters

# letter or digit, then white space, ASCII or Chinese punctuation: kinds that no version of Unicode changes
_END = re.compile(r"[^\W_][\s!-/:-@\[-`{-~\u3001\u3002\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f]")
_NEAR = 4096  # characters before a piece's end that are searched first


def cut(text: str, most: int = DOCUMENT) -> Iterator[str]:
    """Pieces of at most `most` characters that joined are the text; an empty text is one empty piece."""
    start = 0
    while len(text) - start > most:
        end = _last_end(text, start, start + most)
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def cut_stream(chunks: Iterable[str], most: int = DOCUMENT) -> Iterator[str]:
    """The pieces of a text that arrives in chunks, as `cut` makes them, never all in memory."""
    rest = ""
    for chunk in chunks:
        *whole, rest = cut(rest + chunk, most)
        yield from whole
    if rest:
        yield rest


def _last_end(text: str, start: int, limit: int) -> int:
    for begin in (max(start, limit - _NEAR), start):
        found = 0
        for match in _END.finditer(text, begin, limit):
            found = match.start() + 1
        if found:
            return found
    return limit
