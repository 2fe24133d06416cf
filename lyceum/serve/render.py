"""Answers as HTML: Markdown with highlighted code, tables and formulas, made harmless; whole, or while it grows.

    html = render("**Yes**: $x^2$")                       # a list of blocks of HTML
    growing = Blocks(); growing.feed("It is **l"); growing.done, growing.open, growing.tail

What a model writes is hostile until shown otherwise. Three walls, each enough alone: HTML in the text is text; what the
libraries make of it passes an allow list (`nh3`) without scripts, styles, images, forms, ids or relative addresses; and the
page's content-security policy lets no script in. A picture becomes a link, so that opening an answer asks nobody for anything.

**Blocks.** A top-level block of Markdown is finished when the next one has begun on a line of its own, and never changes
after that, because link references, which reach back, are not followed. So only the last block is made again as it grows, and
the longer it is the more seldom: by an eighth of its length, so that all the work is linear in the text. What came since is
plain text meanwhile (`tail`).

What it is not: a guard of what is said (`lyceum.safety`), or of what people type, which is shown as text.
"""

from __future__ import annotations

import html
import re
from functools import cache, lru_cache
from typing import Any

import nh3
from latex2mathml.converter import convert as to_mathml
from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import STANDARD_TYPES
from pygments.util import ClassNotFound

TEXT_TAGS = (
    "p h1 h2 h3 h4 h5 h6 ul ol li blockquote pre code em strong s a table thead tbody tr th td hr br span div".split()
)
MATH_TAGS = (
    "math mrow mi mn mo mtext mspace msup msub msubsup mfrac msqrt mroot mtable mtr mtd mover munder munderover mstyle "
    "mpadded mphantom menclose"
).split()
ATTRIBUTES: dict[str, set[str]] = {
    "*": set(),  # none that any tag may have
    "a": {"href"},
    "ol": {"start"},
    "pre": {"data-language"},
    "math": {"display"},
    "mo": {"stretchy", "fence", "form", "separator", "accent", "movablelimits", "largeop", "minsize", "maxsize"},
    "mi": {"mathvariant"},
    "mfrac": {"linethickness"},
    "mtable": {"columnalign"},
    "mspace": {"width"},
    "mover": {"accent"},
    "menclose": {"notation"},
}
CLASSES = {
    "span": {name for name in STANDARD_TYPES.values() if name},
    "th": {"left", "center", "right"},
    "td": {"left", "center", "right"},
    "div": {"formula"},
}
SCHEMES = {"http", "https", "mailto"}
MAX_HIGHLIGHTED = 50_000  # characters of one code block
MAX_FORMULA = 2_000  # characters; so far is looked for its end
LOOK_EVERY = 200  # characters at least between two looks for blocks that are finished
ALWAYS_MADE = 200  # characters up to which a growing block is made again each time
SHARE = 8  # of a longer one, by which it must have grown
MAX_BRACKETS = 200  # in one block; with more, which no answer needs, links are not looked for: that takes their square


def render(text: str) -> list[str]:
    """A whole text as blocks of HTML, the same that it became while it grew."""
    cuts = [*block_starts(text), len(text)]
    return [_block(text[start:end]) for start, end in zip(cuts, cuts[1:], strict=False)]


def block_starts(text: str) -> list[int]:
    """Where each top-level block begins, in characters; the first begins at 0 whatever stands before it."""
    tokens: list[Any] = []
    reader = _reader()
    # the reader's own first step, which moves no character that counts here
    reader.block.parse(text.replace("\r\n", " \n").replace("\r", "\n").replace("\0", "\ufffd"), reader, {}, tokens)
    lines = sorted({token.map[0] for token in tokens if token.level == 0 and token.map is not None})
    if not lines:
        return [0] if text.strip() else []
    offsets = [0, *(found.end() for found in re.finditer(r"\r\n|\r|\n", text))]
    return [0, *(offsets[line] for line in lines[1:])]


class Blocks:
    """One answer as it grows.

    done: HTML of the blocks that are finished. open: HTML of what follows them, as of the last time it was made;
    version: how often that was. tail: the text since, not yet in `open`.
    """

    def __init__(self) -> None:
        self.done: list[str] = []
        self.open = ""
        self.version = 0
        self._text = ""  # after what is done
        self._num_made = 0  # characters of it that `open` shows
        self._look_at = LOOK_EVERY  # length at which finished blocks are looked for again
        self.num_characters = 0

    @property
    def tail(self) -> str:
        """The text that `open` does not show yet."""
        return self._text[self._num_made :]

    def feed(self, piece: str) -> None:
        """Add text."""
        self._text += piece
        self.num_characters += len(piece)
        if len(self._text) >= self._look_at:
            self._settle()
        if len(self.tail) * SHARE >= (len(self._text) if len(self._text) > ALWAYS_MADE else 0):
            self._make()

    def close(self) -> None:
        """The text is whole: all blocks are finished."""
        self.done += render(self._text)
        self._text, self._num_made, self.open = "", 0, ""
        self.version += 1

    def _settle(self) -> None:
        whole = self._text[: self._text.rfind("\n") + 1]  # a line that goes on may yet belong to what stands before it
        starts = block_starts(whole)
        if len(starts) > 1:
            last = starts[-1]
            self.done += [_block(whole[start:end]) for start, end in zip(starts, starts[1:], strict=False)]
            self._text, self._num_made = self._text[last:], 0
            self._make()
        self._look_at = len(self._text) + max(LOOK_EVERY, len(self._text) // 4)

    def _make(self) -> None:
        self.open, self._num_made = "".join(render(self._text)), len(self._text)
        self.version += 1


@lru_cache(maxsize=2048)
def _block(text: str) -> str:
    return _cleaner().clean(_reader(text.count("[") <= MAX_BRACKETS).render(text)).strip()


@cache
def _cleaner() -> nh3.Cleaner:
    return nh3.Cleaner(
        tags={*TEXT_TAGS, *MATH_TAGS},
        attributes=ATTRIBUTES,
        allowed_classes=CLASSES,
        url_schemes=SCHEMES,
        url_relative="deny",
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )


@cache
def _math_cleaner() -> nh3.Cleaner:
    return nh3.Cleaner(tags=set(MATH_TAGS), attributes={tag: ATTRIBUTES.get(tag, set()) for tag in ("*", *MATH_TAGS)})


# -- Markdown ----------------------------------------------------------------------------------------------------------


@cache
def _reader(has_links: bool = True) -> MarkdownIt:
    reader = MarkdownIt("commonmark", {"html": False, "highlight": None, "breaks": True}).enable(
        ["table", "strikethrough"]
    )
    reader.disable(["reference", "html_block", "html_inline"])
    reader.block.ruler.before("fence", "formula", _formula_block, {"alt": ["paragraph", "blockquote", "list"]})
    reader.inline.ruler.before("escape", "formula", _formula_inline)
    if not has_links:
        reader.disable(["link", "image"])
    reader.add_render_rule("fence", _render_code)
    reader.add_render_rule("code_block", _render_code)
    reader.add_render_rule("image", _render_image)
    reader.add_render_rule("formula_inline", _render_formula)
    reader.add_render_rule("formula_display", _render_display)
    reader.add_render_rule("th_open", _render_cell)
    reader.add_render_rule("td_open", _render_cell)
    return reader


def _render_code(self: Any, tokens: Any, at: int, options: Any, env: Any) -> str:
    token = tokens[at]
    language = (token.info.split() or [""])[0].lower()
    language = language if re.fullmatch(r"[a-z0-9+#._-]{1,30}", language) else ""
    code = token.content.removesuffix("\n")  # the end of the last line, which some browsers show as a line
    named = f' data-language="{language}"' if language else ""
    return f"<pre{named}><code>{_highlighted(code, language)}</code></pre>\n"


def _highlighted(code: str, language: str) -> str:
    lexer = _lexer(language) if language and len(code) <= MAX_HIGHLIGHTED else None
    if lexer is None:
        return html.escape(code)
    parts = []
    for kind, text in lexer.get_tokens(code):
        name = STANDARD_TYPES.get(kind) or STANDARD_TYPES.get(kind.parent, "")
        name = "" if name == "w" or text.isspace() else name
        parts.append(f'<span class="{name}">{html.escape(text)}</span>' if name else html.escape(text))
    return "".join(parts)


@lru_cache(maxsize=64)
def _lexer(language: str) -> Lexer | None:
    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None


def _render_image(self: Any, tokens: Any, at: int, options: Any, env: Any) -> str:
    token = tokens[at]
    source = str(token.attrs.get("src", ""))
    shown = self.renderInlineAsText(token.children or [], options, env) or source
    return f'<a href="{html.escape(source)}">{html.escape(shown)}</a>'


def _render_cell(self: Any, tokens: Any, at: int, options: Any, env: Any) -> str:
    style = str(tokens[at].attrs.get("style", ""))  # a class, since the page's policy allows no style in text
    side = style.removeprefix("text-align:")
    return f'<{tokens[at].tag} class="{side}">' if style else f"<{tokens[at].tag}>"


# -- formulas ----------------------------------------------------------------------------------------------------------


def _formula_block(state: StateBlock, first: int, last: int, is_silent: bool) -> bool:
    """`$$ ... $$` and `\\[ ... \\]` that begin a line and end one, without a blank line between."""
    if state.is_code_block(first):
        return False
    start = state.bMarks[first] + state.tShift[first]
    opener = state.src[start : start + 2]
    if opener not in ("$$", "\\["):
        return False
    closer = "$$" if opener == "$$" else "\\]"
    lines: list[str] = []
    size = 0
    for line in range(first, last):
        begin, end = state.bMarks[line] + state.tShift[line], state.eMarks[line]
        if line > first and (state.isEmpty(line) or state.sCount[line] < state.blkIndent):
            return False
        text = state.src[begin + 2 if line == first else begin : end].rstrip()
        size += len(text)
        if size > MAX_FORMULA:
            return False
        if closer in text:
            content, _, rest = text.partition(closer)
            if rest.strip() or not "".join([*lines, content]).strip():
                return False
            if not is_silent:
                token = state.push("formula_display", "", 0)
                token.block, token.map, token.content = True, [first, line + 1], "\n".join([*lines, content])
                state.line = line + 1
            return True
        lines.append(text)
    return False


INLINE = (("$$", "$$"), ("\\(", "\\)"), ("\\[", "\\]"), ("$", "$"))


def _formula_inline(state: StateInline, is_silent: bool) -> bool:
    """`$...$`, `\\(...\\)`; `$$...$$` and `\\[...\\]` inside a line. A dollar before a space or a figure is money."""
    if state.src[state.pos] not in "$\\":
        return False
    for opener, closer in INLINE:
        if not state.src.startswith(opener, state.pos):
            continue
        start = state.pos + len(opener)
        end = state.src.find(closer, start, start + MAX_FORMULA)
        content = state.src[start:end] if end > start else ""
        after = state.src[end + len(closer) : end + len(closer) + 1]
        if not content.strip() or end + len(closer) > state.posMax:
            return False
        if opener == "$" and (content[0].isspace() or content[-1].isspace() or after.isdigit() or "\\" == content[-1]):
            return False
        if not is_silent:
            token = state.push("formula_inline" if opener in ("$", "\\(") else "formula_display", "", 0)
            token.content = content
        state.pos = end + len(closer)
        return True
    return False


def _render_formula(self: Any, tokens: Any, at: int, options: Any, env: Any) -> str:
    return formula(tokens[at].content, False)


def _render_display(self: Any, tokens: Any, at: int, options: Any, env: Any) -> str:
    is_block = tokens[at].block
    made = formula(tokens[at].content, True)
    return f'<div class="formula">{made}</div>\n' if is_block else made


@lru_cache(maxsize=1024)
def formula(source: str, is_display: bool) -> str:
    """LaTeX as MathML; what cannot be read is shown as it was written."""
    try:
        made = to_mathml(source.strip(), display="block" if is_display else "inline")
    except Exception:  # whatever the library says of a model's slip, the reader sees the source
        return f"<code>{html.escape(source)}</code>"
    return _math_cleaner().clean(made)
