"""Answers as HTML: what Markdown becomes, that nothing hostile gets through, and that growing equals whole, in linear time."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("nh3", reason="needs the extra lyceum[serve]")

from lyceum.serve import render as module
from lyceum.serve.render import Blocks, formula, render

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<svg><style><img src=x onerror=alert(1)></style></svg>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=alert(1)&gt;'>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<a href='javascript:alert(1)'>x</a>",
    "<form action=//evil.example><button>x</button></form>",
    "<style>*{background:url(//evil.example)}</style>",
    "<base href=//evil.example>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](javascript&colon;alert(1))",
    "[x](vbscript:msgbox(1))",
    "[x](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "[x](data:image/svg+xml,<svg onload=alert(1)>)",
    "[x](//evil.example/path)",
    "[x](/api/conversations)",
    "[x](<javascript:alert(1)>)",
    '[x](http://a.example "\\" onmouseover=alert(1) x=\\"")',
    "[x](http://a.example/'onclick=alert(1))",
    "![x](http://evil.example/pixel.png)",
    "![x](javascript:alert(1))",
    '![" onerror="alert(1)](http://evil.example/p.png)',
    "[![x](http://evil.example/a.png)](javascript:alert(1))",
    "<javascript:alert(1)>",
    '<http://a.example/"onclick=alert(1)>',
    '```"><script>alert(1)</script>\ncode\n```',
    '```python" onclick="alert(1)\ncode\n```',
    "```html\n<script>alert(1)</script>\n```",
    "```\n</code></pre><script>alert(1)</script>\n```",
    "`</code><script>alert(1)</script>`",
    "| <script>alert(1)</script> | b |\n|:-:|--|\n| <img src=x onerror=alert(1)> | 1 |",
    "$\\text{<script>alert(1)</script>}$",
    "$$\n\\text{</math><img src=x onerror=alert(1)>}\n$$",
    "$\\href{javascript:alert(1)}{x}$",
    "\\(\\mathrm{&lt;script&gt;alert(1)&lt;/script&gt;}\\)",
    "$\\style{background:url(//evil.example)}{x}$",
    "$\\class{x}{y}$ $\\color{red;background:url(//evil.example)}{x}$",
    "$<img src=x onerror=alert(1)>$",
    "$\\begin{matrix}<svg onload=alert(1)>&2\\end{matrix}$",
    "[a]: javascript:alert(1)\n\n[a]",
    "x\0<script>alert(1)</script>",
    "<scr\0ipt>alert(1)</scr\0ipt>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "\u202e<script>alert(1)</script>",
]
SAFE_ADDRESS = re.compile(r"(https?://|mailto:)", re.IGNORECASE)


class Seen(HTMLParser):
    """Every tag and attribute of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.words = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words += data


def assert_harmless(html: str) -> None:
    seen = Seen(html)
    assert seen.tags <= {*module.TEXT_TAGS, *module.MATH_TAGS}
    for tag, name, value in seen.attributes:
        assert name in {*module.ATTRIBUTES.get(tag, ()), "class", "rel", "target"}, (tag, name)
        assert name != "href" or SAFE_ADDRESS.match(value), value
        assert name != "class" or set(value.split()) <= module.CLASSES[tag]
    links = [value for tag, name, value in seen.attributes if (tag, name) == ("a", "rel")]
    assert len(links) == html.count("<a ") and set(links) <= {"noopener noreferrer nofollow"}


def shown(text: str) -> str:
    return "".join(render(text))


# -- what Markdown becomes ---------------------------------------------------------------------------------------------


def test_the_parts_of_markdown_become_html() -> None:
    assert shown("# A *b*") == "<h1>A <em>b</em></h1>"
    assert shown("**a** ~~b~~ `<c>`") == "<p><strong>a</strong> <s>b</s> <code>&lt;c&gt;</code></p>"
    assert shown("1. a\n2. b") == "<ol>\n<li>a</li>\n<li>b</li>\n</ol>"
    assert shown("3. a") == '<ol start="3">\n<li>a</li>\n</ol>'
    table = shown("| a | b |\n|:-:|--:|\n| 1 | 2 |")
    assert '<th class="center">a</th>' in table and '<td class="right">2</td>' in table
    assert shown("") == "" and render(" \n\n") == []


def test_code_is_highlighted_by_its_language_and_kept_to_the_letter() -> None:
    html = shown("```python\ndef f(x):\n    return x < 1\n\n\n```")
    assert html.startswith('<pre data-language="python"><code><span class="k">def</span>')
    assert Seen(html).words == "def f(x):\n    return x < 1\n\n"
    assert shown("```unheard-of\na < b\n```") == '<pre data-language="unheard-of"><code>a &lt; b</code></pre>'
    assert shown("    a < b") == "<pre><code>a &lt; b</code></pre>"


def test_links_lead_out_without_a_trace_and_pictures_are_links() -> None:
    link = '<a href="https://a.example/?b=1&amp;c=2" target="_blank" rel="noopener noreferrer nofollow">'
    assert shown("[x](https://a.example/?b=1&c=2)") == f"<p>{link}x</a></p>"
    assert shown("![a picture](https://a.example/?b=1&c=2)") == f"<p>{link}a picture</a></p>"


def test_formulas_are_mathml_and_money_is_not() -> None:
    assert shown("$x^2$") == shown("\\(x^2\\)")
    assert "<msup><mi>x</mi><mn>2</mn></msup>" in shown("$x^2$")
    for text in ("$$\n\\frac{1}{2}\n$$", "\\[\n\\frac{1}{2}\n\\]", "$$\\frac{1}{2}$$", "It is so:\n$$\\frac{1}{2}$$"):
        assert "<mfrac>" in shown(text) and '<math display="block">' in shown(text), text
    assert "<mo>&lt;</mo>" in shown("$a<b$")
    for text in ("It is $5 or $6.", "\\$x\\$", "`$x$`", "$ x $", "$$\n\n$$", "$x"):
        assert "<math" not in shown(text), text
    assert formula("\\frac{", False) == "<code>\\frac{</code>"


# -- what is hostile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_becomes_nothing_but_text(text: str) -> None:
    for around in ("{}", "- {}", "> {}", "a **{}** b", "# {}", "| {} |\n|--|\n| x |"):
        assert_harmless(shown(around.format(text)))
    growing = Blocks()
    for character in text:
        growing.feed(character)
        assert_harmless("".join([*growing.done, growing.open]))


def test_what_the_allow_list_is_for_would_be_seen() -> None:  # the control
    for html in (
        "<script>",
        "<a href='javascript:x' rel='noopener noreferrer nofollow'>x</a>",
        "<p onclick=x>",
        "<a href='http://x'>",
    ):
        with pytest.raises(AssertionError):
            assert_harmless(html)


PIECES = st.sampled_from(
    [
        "\n",
        "\n\n",
        " ",
        "  ",
        "    ",
        "- ",
        "* ",
        "1. ",
        "2) ",
        "> ",
        "```",
        "```python",
        "~~~",
        "#",
        "# ",
        "---",
        "===",
        "|",
        "|--|--|",
    ]
    + [
        "$",
        "$$",
        "\\[",
        "\\]",
        "\\(",
        "\\)",
        "a",
        "b c",
        "*",
        "**",
        "_",
        "`",
        "[",
        "](",
        ")",
        "[a]: http://x",
        "<",
        ">",
        "<b>",
        "&amp;",
        "\\",
    ]
    + [
        "\t",
        "\r\n",
        "\r",
        "\0",
        "中文",
        "javascript:",
        "onclick=",
        '"',
        "'",
        "![",
        "http://a.example",
        "\u2028",
        "\x0c",
        "\x85",
    ]
)
MARKDOWN = st.lists(PIECES, max_size=40).map("".join)


@settings(max_examples=150, deadline=None)
@given(MARKDOWN)
def test_any_text_is_harmless(text: str) -> None:
    assert_harmless(shown(text))


# -- growing -----------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(MARKDOWN, st.integers(1, 9))
@example("- a\n*foo*\n\n", 1)
@example("$$\n\nx\n$$", 1)
@example("a\n\n    b\n\n    c\n\nd", 2)
def test_a_growing_answer_ends_as_the_whole_and_finished_blocks_never_change(text: str, size: int) -> None:
    growing = Blocks()
    growing.__dict__["_look_at"] = 0
    seen: list[str] = []
    for at in range(0, len(text), size):
        growing.__dict__["_look_at"] = 0  # look as often as can be
        growing.feed(text[at : at + size])
        assert growing.done[: len(seen)] == seen
        seen = list(growing.done)
    growing.close()
    assert growing.done[: len(seen)] == seen and growing.done == render(text)
    assert growing.tail == growing.open == "" and growing.num_characters == len(text)


@settings(max_examples=150, deadline=None)
@given(MARKDOWN)
def test_blocks_alone_are_what_they_are_in_the_whole(text: str) -> None:
    whole = module._cleaner().clean(module._reader().render(text))
    assert "".join(shown(text).split()) == "".join(whole.split())


def test_what_is_not_yet_made_is_given_as_text() -> None:
    growing = Blocks()
    growing.feed("a" * 1600)
    assert growing.open == f"<p>{'a' * 1600}</p>" and growing.tail == ""
    version = growing.version
    growing.feed("b" * 150)
    assert growing.tail == "b" * 150 and growing.version == version
    growing.feed("c" * 90)
    assert growing.tail == "" and growing.version == version + 1 and growing.open.endswith("c</p>")


LONG = {
    "paragraphs": "Some **bold** words with `code`, [a link](http://a.example) and $x_{N}$.\n\n",
    "one code block": "    value = compute({N}, 'text')  # a remark\n",
    "one list": "- point {N} with *words*\n",
    "one paragraph": "word {N} and *another* ",
    "a table": "| {N} | two |\n",
    "dollars": "$ $a \\( $$ ",
    "brackets": "[[![(",
    "stars": "*a **b _c ",
}


def long_text(kind: str, size: int) -> str:
    start = {"one code block": "```python\n", "a table": "| a | b |\n|--|--|\n"}.get(kind, "")
    parts, length, number = [start], len(start), 0
    while length < size:
        parts.append(LONG[kind].replace("{N}", str(number)))
        length += len(parts[-1])
        number += 1
    return "".join(parts)


def seconds_of(text: str, step: int = 8) -> float:
    """Of this thread's own work, to stream a text by eight characters and to show it whole."""
    module._block.cache_clear()
    start = time.thread_time()
    growing = Blocks()
    for at in range(0, len(text), step):
        growing.feed(text[at : at + step])
    growing.close()
    return time.thread_time() - start


@pytest.mark.parametrize("kind", LONG)
def test_streaming_takes_time_linear_in_the_text(kind: str) -> None:
    render("```python\nx\n```\n$x$")  # what is loaded at the first use
    short, long = (min(seconds_of(long_text(kind, size)) for _ in range(2)) for size in (1_500, 6_000))
    assert long < 8 * short + 0.02  # quadratic would be 16; linear is 4


def test_a_long_answer_is_made_in_milliseconds() -> None:
    text = "".join(long_text(kind, 4_000) for kind in ("paragraphs", "one list")) + "\n\n" + long_text("a table", 4_000)
    text += "\n\n" + long_text("one code block", 8_000) + "```\n"
    render("```python\nx\n```\n$x$")
    took = []
    for _ in range(3):
        module._block.cache_clear()
        formula.cache_clear()
        start = time.thread_time()
        assert len(render(text)) > 50
        took.append(time.thread_time() - start)
    assert len(text) > 20_000 and min(took) < 0.3
