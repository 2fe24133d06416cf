"""Regular expressions as grammars of bytes, for the `pattern` of a string in a JSON schema.

Understood: characters, `.`, classes (`[a-z_]`, `[^,]`, `\\d`, `\\w`, `\\s` and their opposites), groups, `|`, the repeats
`*`, `+`, `?`, `{m}`, `{m,}`, `{m,n}`, and `^` and `$` at the ends. As JSON Schema has it, a pattern without them may stand
anywhere in the string. Look-around, back references, lazy repeats and `\\b` are refused.

A character is written as itself; where JSON does not let it stand in a string, by its escape. `\\d`, `\\w`, `\\s` and their
opposites are read over ASCII alone, as readers of patterns differ beyond it; `.` and `[^a]` take any character there.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from lyceum.engine.grammar import Grammar, Part
from lyceum.errors import UsageError

MAX_LENGTH, MAX_REPEATS = 500, 1000  # characters of a pattern; the largest count
ASCII = frozenset(map(chr, range(128)))
DIGITS, SPACES = frozenset("0123456789"), frozenset(" \t\n\r\f\v")
CLASSES = {"d": DIGITS, "s": SPACES, "w": frozenset("_abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") | DIGITS}
CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}
Characters = tuple[frozenset[str], bool]  # those named, and whether all beyond ASCII belong to them too


def written(text: str) -> str:
    """A text as it stands between the quotation marks of JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


class Pattern:
    """One pattern on its way to a part of a grammar.

    character: any character of a string. beyond: any beyond ASCII. at: where the pattern stands in a schema.
    """

    def __init__(self, pattern: Any, grammar: Grammar, character: Part, beyond: Part, at: str):
        self._text = pattern
        self._grammar = grammar
        self._anything = grammar.repeat(character, 0, None)
        self._beyond = beyond
        self._at = at
        self._next = 0

    def read(self) -> Part:
        """What stands between the quotation marks of a string in which the pattern is found.

        Raises:
            UsageError: the pattern is no regular expression, or uses what is not supported.
        """
        if not isinstance(self._text, str):
            self._refuse("it is no text")
        if len(self._text) > MAX_LENGTH:
            self._refuse(f"it has {len(self._text)} characters, at most {MAX_LENGTH} are read")
        ways = []
        while True:
            start = self._grammar.empty if self._take("^") else self._anything
            middle, _ = self._sequence()
            ways.append(self._grammar.seq(start, middle, self._grammar.empty if self._take("$") else self._anything))
            if not self._take("|"):
                break
        if self._ahead:
            self._refuse(f"{self._ahead!r} at character {self._next} is not supported there")
        return self._grammar.alt(*ways)

    # each of these returns the part, and whether it may be empty

    def _group(self) -> tuple[Part, bool]:
        if self._take("?") and not self._take(":"):
            self._refuse("groups that begin with (? are not supported, but for (?:")
        ways = [self._sequence()]
        while self._take("|"):
            ways.append(self._sequence())
        if not self._take(")"):
            self._refuse("a group is not closed")
        return self._grammar.alt(*(part for part, _ in ways)), any(is_empty for _, is_empty in ways)

    def _sequence(self) -> tuple[Part, bool]:
        parts, may_be_empty = [], True
        while self._ahead and self._ahead not in "|)^$":
            part, is_empty = self._repeated(*self._atom())
            parts.append(part)
            may_be_empty &= is_empty
        return self._grammar.seq(*parts), may_be_empty

    def _atom(self) -> tuple[Part, bool]:
        if self._take("("):
            return self._group()
        if self._take("["):
            return self._one_of(self._class()), False
        if self._take("."):
            return self._one_of((ASCII - {"\n", "\r"}, True)), False
        if self._ahead in "*+?{":
            self._refuse(f"there is nothing that {self._ahead!r} could repeat")
        return self._one_of((self._character(), False)), False

    def _repeated(self, part: Part, is_empty: bool) -> tuple[Part, bool]:
        least, most = 1, None
        if self._take("*"):
            least = 0
        elif self._take("?"):
            least, most = 0, 1
        elif self._take("{"):
            if is_empty:
                self._refuse("what may be empty cannot be counted")
            least = most = self._count()
            if self._take(","):
                most = None if self._ahead == "}" else self._count()
            if not self._take("}") or (most is not None and most < least):
                self._refuse("a count is {m}, {m,} or {m,n}")
        elif not self._take("+"):
            return part, is_empty
        if self._ahead and self._ahead in "*+?{":
            self._refuse(f"{self._ahead!r} after a repeat is not supported")
        return self._grammar.repeat(part, least, most), is_empty or least == 0

    def _count(self) -> int:
        start = self._next
        while self._ahead and self._ahead in DIGITS:
            self._next += 1
        digits = self._text[start : self._next]
        if not digits or len(digits) > 4 or int(digits) > MAX_REPEATS:
            self._refuse(f"a count is between 0 and {MAX_REPEATS}")
        return int(digits)

    def _class(self) -> Characters:
        is_negated = self._take("^")
        named, is_plain = frozenset[str](), True
        while not self._take("]"):
            chars = self._character()
            is_plain &= len(chars) == 1
            if self._ahead == "-" and self._text[self._next + 1 : self._next + 2] not in ("]", ""):
                self._next += 1
                last = self._character()
                low, high = min(chars, default=""), min(last, default="")
                if len(chars) != 1 or len(last) != 1 or not low <= high or high not in ASCII:
                    self._refuse("a range goes from one ASCII character up to another")
                chars = frozenset(map(chr, range(ord(low), ord(high) + 1)))
            named |= chars
        if not is_negated:
            return named, False
        if not named <= ASCII:
            self._refuse("what [^...] excludes is ASCII")
        return ASCII - named, is_plain

    def _character(self) -> frozenset[str]:
        if not self._take("\\"):
            return frozenset(self._any())
        letter = self._any()
        if letter in CLASSES:
            return CLASSES[letter]
        if letter.lower() in CLASSES:
            return ASCII - CLASSES[letter.lower()]
        if letter.isalnum() and letter not in CONTROLS:
            self._refuse(f"\\{letter} is not supported")
        return frozenset(CONTROLS.get(letter, letter))

    def _one_of(self, characters: Characters) -> Part:
        named, has_beyond = characters
        ways = [self._grammar.byte(ord(one) for one in named if one in ASCII and written(one) == one)]
        ways += [self._grammar.text(written(one)) for one in sorted(named) if one not in ASCII or written(one) != one]
        return self._grammar.alt(*ways, *([self._beyond] if has_beyond else []))

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def _ahead(self) -> str:
        return self._text[self._next : self._next + 1]

    def _take(self, letter: str) -> bool:
        is_there = self._ahead == letter
        self._next += is_there
        return is_there

    def _any(self) -> str:
        if not self._ahead:
            self._refuse("it ends too early")
        self._next += 1
        return self._text[self._next - 1]

    def _refuse(self, why: str) -> NoReturn:
        raise UsageError(
            f"{self._at} = {self._text!r} cannot be read: {why}",
            hint="supported: characters, ., classes, groups, |, *, +, ?, {m,n}, and ^ and $ at the ends",
        )
