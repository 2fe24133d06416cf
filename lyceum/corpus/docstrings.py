"""Doc strings as plain text: signature lines off, one plain first sentence, what the object returns, a short body.

What: pure functions from text to text. Why: `len`, `str.join` and `math.sqrt` are written in C, and their doc strings
carry signatures in half a dozen old spellings ("S.find(sub[, start]) -> int", "D.pop(k[,d]) -> v, remove ...").
Not here: where doc strings come from (`lyceum.corpus.packages`). This reads English doc strings; it understands no
Sphinx directives beyond leaving them out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_SUMMARY_WORDS, MIN_SUMMARY_WORDS = 25, 2


@dataclass(frozen=True)
class Parsed:
    """A doc string taken apart: `signature` "(a, b=1)" or "", `result` what stands after its arrow, `body` the rest."""

    signature: str
    result: str
    body: str


_SIGNATURE = re.compile(r"^(?:class )?[A-Za-z_][\w.]*(\((?:[^()]|\([^()]*\))*\))")
_ARROW = re.compile(r"^\s*(?:-{1,2}>|=>|→)\s*")
_ARTICLE = re.compile(r"^(?:an?|the|new|list of|x in|True|None|bool)\b", re.IGNORECASE)


def split_signature(doc: str, leaves: tuple[str, ...]) -> Parsed:
    """Takes the signature lines off the beginning of `doc`, the doc string of an object whose last name is in `leaves`.

    The first signature counts, unless a later one has the same names and more: "range(stop)" and "range(start, stop[,
    step])" give the second; "type(object)" and "type(name, bases, dict)" give the first.
    """
    signature, result, lines = "", "", doc.strip().split("\n")
    first = ""
    while lines:
        start = " ".join(lines[:3]) if lines[0].count("(") > lines[0].count(")") else lines[0]
        found = _SIGNATURE.match(start)
        if not found or start[: found.start(1)].split()[-1].split(".")[-1] not in leaves:
            break
        first = first or found.group(1)
        if not signature or set(parameter_names(signature)) < set(parameter_names(found.group(1))):
            signature = found.group(1)
        tail = start[found.end() :]
        lines = lines[3:] if start is not lines[0] else lines[1:]
        arrow = _ARROW.match(tail)
        if arrow:
            value, text = _result(tail[arrow.end() :])
            if not text and lines and lines[0][:1].islower() and not _SIGNATURE.match(lines[0]):
                value, text = "", tail[arrow.end() :]  # "-> create an iterator which ...", over several lines
            result = result or value
        elif re.match(r"\s*(?:--?|:|–)\s+\w", tail):  # "partial(func, ...) - new function with ..."
            value, text = "", re.sub(r"^\s*(?:--?|:|–)\s+", "", tail)
        elif tail.strip(" .:"):
            break  # a sentence that only begins like a call: "foo(x) is the same as ..."
        else:
            value, text = "", ""
        if text:
            lines.insert(0, text)
            break
        while lines and lines[0][:1].isspace():  # the arrow's phrase goes on
            del lines[0]
        while lines and (not lines[0].strip() or lines[0].strip() == "--"):
            del lines[0]
    body = "\n".join(lines).strip()
    signature = signature if body else first  # where all we have is the first line's arrow, its signature belongs to it
    return Parsed(" ".join(signature.split()), " ".join(result.split()), body)


def parameter_names(signature: str) -> tuple[str, ...]:
    """Names in a signature, in order, stars and defaults off; also from the old style "(name[, default])"."""
    inside = re.sub(r"=\s*(?:'[^']*'|\"[^\"]*\"|\([^()]*\)|[^,\[\]()]*)", "", signature.strip()[1:-1])
    names = (part.strip(" []*().\n") for part in inside.split(","))
    words = (name.split(":")[0].strip() for name in names)
    return tuple(dict.fromkeys(word for word in words if word.isidentifier() and word not in ("self", "cls")))


def _result(tail: str) -> tuple[str, str]:
    """What stands after an arrow: (what is returned, the sentence that follows it on the same line)."""
    value, _, text = tail.partition(".  ")
    if not text and (short := re.match(r"^(\w+)\s*(?:,|--|\. )\s*(\w.*)$", tail)):  # "-> v, remove the key ..."
        value, text = short.group(1), short.group(2)
    elif not text and re.match(r"^[A-Z]\w+s? [a-z]", tail):  # "--> Yield tuples until ..."
        value, text = "", tail
    return value.strip(" ."), text.strip()


def strip_markup(text: str) -> str:
    """Text without reStructuredText marks: ``x`` and :class:`x` become x, *x* becomes x; white space is kept."""
    text = re.sub(r":(?:[a-z]+:)?[a-z]+:`~?([^`<>]+?)(?:\s*<[^`]*>)?`", r"\1", text)
    text = re.sub(r" ?<https?://[^>\s]*>", "", re.sub(r"``([^`]+)``", r"\1", text))
    text = re.sub(r"`([^`']+)[`']", r"\1", text)
    text = re.sub(r"(?<![\w*])\*\*(\w[^*\n]*?\w|\w)\*\*(?![\w*])", r"\1", text)
    return re.sub(r"(?<![\w*])\*(\w[\w ]*)(?<! )\*(?![\w*])", r"\1", text)


_END = re.compile(r"[.!?][\"')]*(?=\s|$)")
_NO_END = re.compile(r"(?:\b(?:e\.g|i\.e|eg|ie|etc|vs|cf|approx|resp|incl|max|min|no|Mr|Dr|St|No)|\.\.)\.$")


def first_sentence(text: str) -> str:
    """The first sentence of the first paragraph, on one line; the whole paragraph if no sentence ends in it."""
    paragraph: list[str] = []
    for line in text.strip().split("\n"):
        if not line.strip() or _STARTS_BLOCK.match(line):
            break
        paragraph.append(line.strip())
    text = "\n".join(paragraph)
    for end in _END.finditer(text):
        before = text[: end.start() + 1]
        if not _NO_END.search(before) and before.count("(") <= before.count(")"):
            text = text[: end.end()]
            break
    return " ".join(text.split())


_STARTS_BLOCK = re.compile(
    r"\s*(?:>>>|\.\. |:\w+|@\w+|[-*+] |[-=~^]{3,}|(?:Args|Arguments|Parameters|Returns?|Raises)\s*:?\s*$)"
)


def summary(body: str, result: str = "") -> str:
    """One plain sentence that says what the object is or does; "" if the doc string holds none that is worth learning.

    Args:
        body: the doc string without its signature lines.
        result: what stood after the signature's arrow; "the object's type" becomes "Return the object's type."
    """
    text = strip_markup(first_sentence(body)).rstrip()
    if not text and _ARTICLE.match(result):
        text = f"Return {result}"
    text = re.sub(r"\s+([.,;])(?=\s|$)", r"\1", text)
    text = re.sub(
        r"(?<!\.)\.\.$",
        ".",
        re.sub(r"^(?:\([^()]*\)\s*|[-:]+\s*|(?:module )?[\w.]+(?: module)? --? )", "", text, flags=re.I),
    )
    if not text.endswith((".", "!", "?", ".)", ":")):
        text += "."
    first = text.split(" ", 1)[0]
    if first.islower() and first.isalpha() and first not in ("x", "s"):
        text = text[0].upper() + text[1:]
    if len(text.split()) > MAX_SUMMARY_WORDS or _USELESS.search(text):
        text = _without_last_clauses(text)
    if not MIN_SUMMARY_WORDS <= len(text.split()) <= MAX_SUMMARY_WORDS or _USELESS.search(text):
        return ""
    closed = re.sub(r"[\[(]\w+, ?[\w.]+[\])]", "", text)  # half-open intervals: [0, 1)
    unbalanced = any(closed.count(left) != closed.count(right) for left, right in ("()", "[]"))
    useless = unbalanced or not text.isprintable() or not text[0].isalpha() or _BEGINS_USELESS.match(text)
    return "" if useless else text


def _without_last_clauses(text: str) -> str:
    """A sentence up to a comma where a further clause begins, if what is left is short and plain; else as it is."""
    for cut in reversed(list(re.finditer(r"; |, (?:then|and|or|which|but|so|where|with|using|unless|except)\b", text))):
        head = text[: cut.start()]
        plain = head.count("(") == head.count(")") and not _USELESS.search(head)
        if plain and 6 <= len(head.split()) <= MAX_SUMMARY_WORDS:
            return head + "."
    return text


_USELESS = re.compile(
    r">>>|::|[<>{}|\\`=#^]|https?:|\bsee help|\bTODO\b|\bXXX\b|\bFIXME\b|\bdeprecated\b|(?:^|\s)@\w|:$|\bdocstring\b"
    r"|\$\w|\.\.\.\.|^\S+\([^)]*\)\.?$",
    re.IGNORECASE,
)
_BEGINS_USELESS = re.compile(
    r"(?:abstract |alias |and |as |author|base class|c\.f\.|called |cf\.|copyright|default implementation|do not |"
    r"don't |dummy |example|for internal|helper |if (?!.*, return )|implement(?:s|ation of)? |initiali[sz]e self|"
    r"internal|it |like |not implemented|note|obsolete|overrid|part of the |private |same as|see |shorthand for |"
    r"the following|these |they |this (?:method|function|class) is |undocumented|usage|version |warning|when |"
    r"(?:a )?wrapper )",
    re.IGNORECASE,
)

_RETURNS = re.compile(r"(?:^|\band |, |; )[Rr]eturn(?:s|ing)? (.+)$")


def returns(sentence: str, body: str = "", result: str = "") -> str:
    """The short phrase for what is returned, "" where the text does not say: "Return a list." gives "a list".

    Args:
        sentence: the summary; if it does not say it, the first sentence of `body` that begins with "Return" is tried.
        result: what stood after the signature's arrow, the last resort.
    """
    sentences = [sentence]
    for paragraph in re.split(r"\n\s*\n", body):
        later = re.search(r"(?:^|[.!?]\s+|\n)(Returns? (?:an?|the|True if|whether|new)\b[^>]*)", paragraph)
        if later:
            sentences.append(strip_markup(first_sentence(later.group(1))))
    for text in sentences:
        found = _RETURNS.search(text.rstrip(".!"))
        if found:
            phrase = _shortened(found.group(1))
            if phrase:
                return phrase
    usable = len(result.split()) > 1 or result in _TYPES
    return result if usable and re.match(r"[A-Za-z]", result) and not _USELESS.search(result) else ""


_TYPES = frozenset("bool bytes dict float int integer iterator list set str string tuple".split())


def _shortened(phrase: str, most: int = 14) -> str:
    """The phrase itself, or up to the first comma or clause that makes it short enough; "" if none does."""
    marks = (
        r"(?<!\.)[.;] |, (?!or\b|and\b)| (?=(?:where|that|which|containing|so|using|as|by|for|in|from|with|if|when)\b)"
    )
    if _USELESS.search(phrase) or not re.match(r"[A-Za-z]", phrase):
        return ""
    if len(phrase.split()) <= most:
        return re.split(r"(?<!\.)[.;] ", phrase)[0].strip()
    for cut in reversed(list(re.finditer(marks, phrase))):
        head = re.sub(r"[ ,]+(?:such|(?:and|or|either|both)(?: \w+)?)?$", "", phrase[: cut.start()])
        if 2 <= len(head.split()) <= most and head.count("(") == head.count(")"):
            return head
    return ""


def clean_body(body: str) -> str:
    """The doc string's text without marks, doctests and underlines, paragraphs kept, trailing white space off."""
    lines, in_example = [], False
    for line in strip_markup(body).split("\n"):
        if line.lstrip().startswith(">>>"):
            in_example = True
        elif not line.strip():
            in_example = False
        if not in_example and not re.fullmatch(r"\s*[-=~^]{3,}\s*", line):
            lines.append(line.rstrip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def shortened_body(body: str, most_words: int) -> str:
    """Whole paragraphs, then whole sentences, from the beginning of `body`, at most `most_words` words."""
    kept: list[str] = []
    left = most_words
    for paragraph in re.split(r"\n\s*\n", body):
        words = len(paragraph.split())
        if words > left:
            part = _sentences_up_to(" ".join(paragraph.split()), left)
            if part:
                kept.append(part)
            break
        kept.append(paragraph)
        left -= words
    return "\n\n".join(kept)


def _sentences_up_to(text: str, most_words: int) -> str:
    best = ""
    for end in _END.finditer(text):
        head = text[: end.end()]
        if len(head.split()) > most_words:
            break
        if not _NO_END.search(head):
            best = head
    return best
