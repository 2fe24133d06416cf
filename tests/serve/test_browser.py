"""The chat page in a real browser (the system's Chromium): every feature, both languages, hostile answers, reloads.

A test skips where there is no Chromium. `LYCEUM_SCREENSHOTS=folder` keeps pictures of each state, for people to look at.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytest.importorskip("nh3", reason="needs the extra lyceum[serve]")

from lyceum.corpus.records import ToolCall  # noqa: E402

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
expect = sync_api.expect
ABOUT = {
    "studied": "json, csv and textwrap of Python's library",
    "cannot": "It knows nothing else.",
    "ask": ["What does json.dumps do?", "How do I read a CSV file?", "What is textwrap.dedent for?"],
}
RICH = """Yes. `json.dumps` turns a Python object into **JSON text**; here is how:

```python
import json

def save(value: dict, path: str) -> None:
    \"\"\"Write it down.\"\"\"
    with open(path, "w") as file:
        file.write(json.dumps(value, indent=2))  # two spaces
```

| Argument | Meaning | Default |
|---|---|---:|
| `indent` | spaces of each level | none |
| `sort_keys` | keys in order | `False` |

The time it takes grows with the size: $T(n) = O(n)$, and of a tree of depth $d$

$$\\sum_{i=0}^{d} b^i = \\frac{b^{d+1} - 1}{b - 1}$$

1. Strings are quoted.
2. Numbers stay as they are.
   - `NaN` is not JSON.

> See also [the documentation](https://docs.python.org/3/library/json.html).
"""
CHATGPT = {
    "title": "Capital of France", "create_time": 1.7e9, "update_time": 1.7e9, "current_node": "a",
    "mapping": {
        "root": {"id": "root", "message": None, "parent": None},
        "u": {"parent": "root", "message": {"author": {"role": "user"}, "content": {"parts": ["Which city?"]}}},
        "a": {"parent": "u", "message": {"author": {"role": "assistant"}, "content": {"parts": ["Paris"]}}},
    },
}  # fmt: skip
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield launched
        launched.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a server's page in a fresh browser session; what the page itself does wrong fails the test."""
    contexts, wrong = [], []

    def make(
        server: Any, *, locale: str = "en-GB", scheme: str = "light", width: int = 1280, height: int = 800,
        waits_for: str = ".composer textarea",
    ) -> Any:  # fmt: skip
        context = browser.new_context(
            locale=locale, color_scheme=scheme, viewport={"width": width, "height": height}, reduced_motion="reduce"
        )
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(20_000)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on(
            "console",
            lambda said: wrong.append(said.text) if "Content Security" in said.text else None,
        )
        tab.on(
            "request",
            lambda asked: wrong.append(asked.url) if not asked.url.startswith((server.url, "blob:")) else None,
        )
        tab.on("dialog", lambda box: wrong.append(box.message))
        tab.goto(server.url)
        tab.locator(waits_for).wait_for()
        return tab

    yield make
    for context in contexts:
        context.close()
    assert not wrong, wrong


def shot(tab: Any, name: str) -> None:
    if folder := os.environ.get("LYCEUM_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        tab.wait_for_timeout(150)
        tab.screenshot(path=Path(folder) / f"{name}.png")


def ask(tab: Any, text: str, *, waits: bool = True) -> None:
    tab.locator(".composer textarea").fill(text)
    tab.keyboard.press("Enter")
    if waits:
        tab.locator(".turn.assistant").last.locator(".facts").wait_for()


def last(tab: Any) -> Any:
    return tab.locator(".turn.assistant").last


# -- every feature -----------------------------------------------------------------------------------------------------


def test_the_beginning_offers_questions_and_an_answer_is_rendered(page: Make, visit: Make) -> None:
    tab = visit(page(lambda asked, params: RICH, about=ABOUT))
    expect(tab.locator(".questions button")).to_have_count(3)
    expect(tab.locator(".hello")).to_contain_text("It studied json, csv and textwrap")
    expect(tab.locator(".send")).to_be_disabled()
    assert "null" not in tab.locator("body").inner_text()
    shot(tab, "empty")
    tab.locator(".questions button").first.click()
    last(tab).locator(".facts").wait_for()
    expect(tab.locator(".bubble")).to_have_text("What does json.dumps do?")
    for what, count in ((".code .k", 3), ("table td", 6), ("math", 3), ("ol > li", 2), ("blockquote a", 1)):
        assert last(tab).locator(what).count() >= count, what
    expect(last(tab).locator("blockquote a")).to_have_attribute("rel", "noopener noreferrer nofollow")
    expect(tab.locator(".top h1")).to_have_text("What does json.dumps do?")
    expect(tab.locator(".sidebar li")).to_have_count(1)
    assert re.search(r"\d+ tokens · [\d.,]+ tokens/s", last(tab).locator(".facts").inner_text())
    expect(tab.locator(".meter")).to_have_attribute("title", re.compile(r"[\d,]+ of 4,096 tokens of context"))
    last(tab).locator(".bar button").click()
    assert "def save(value" in tab.evaluate("navigator.clipboard.readText()")
    last(tab).get_by_role("button", name="Copy", exact=True).click()
    assert tab.evaluate("navigator.clipboard.readText()") == RICH
    shot(tab, "answer")


def test_an_answer_streams_and_stop_stops_the_engine(page: Make, visit: Make) -> None:
    server = page(lambda asked, params: "Some words, **again** and again.\n\n" * 300, pause_s=0.01)
    tab = visit(server)
    ask(tab, "go", waits=False)
    growing = tab.locator(".prose.growing")
    expect(growing).to_contain_text("again and again")
    expect(tab.locator(".send")).to_have_attribute("title", "Stop")
    shot(tab, "streaming")
    tab.locator(".send").click()
    expect(last(tab).locator(".note")).to_have_text("Stopped")
    assert server.idle(2.0)
    text = last(tab).locator(".prose").inner_text()
    server.engines["demo"].pause_s = 0
    last(tab).get_by_role("button", name="Continue").click()
    expect(last(tab).locator(".note")).to_have_count(0)
    last(tab).locator(".facts").wait_for()
    expect(tab.locator(".growing")).to_have_count(0)
    assert len(last(tab).locator(".prose").inner_text()) > len(text)
    expect(tab.locator(".turn")).to_have_count(2)


def test_a_reload_during_an_answer_loses_nothing(page: Make, visit: Make) -> None:
    text = "\n\n".join(f"Paragraph **{number}** of the answer." for number in range(60))
    server = page(lambda asked, params: text, pause_s=0.008)
    tab = visit(server)
    ask(tab, "go", waits=False)
    expect(tab.locator(".prose")).to_contain_text("Paragraph 3 of")
    tab.locator(".composer textarea").fill("what I was writing")
    tab.reload()
    expect(tab.locator(".prose.growing")).to_contain_text("Paragraph 4 of")
    expect(tab.locator(".composer textarea")).to_have_value("what I was writing")
    tab.context.set_offline(True)
    tab.wait_for_timeout(300)
    tab.context.set_offline(False)
    last(tab).locator(".facts").wait_for()
    expect(last(tab).locator(".prose p")).to_have_count(60)
    assert server.engines["demo"].num_added == 1
    assert last(tab).locator(".prose").inner_text().split() == text.replace("**", "").split()


def test_regenerate_edit_and_branches(page: Make, visit: Make) -> None:
    numbers = iter(range(1, 100))
    server = page(lambda asked, params: f"Answer {next(numbers)} to {asked}")
    tab = visit(server)
    ask(tab, "one")
    expect(last(tab).locator(".prose")).to_have_text("Answer 1 to one")
    last(tab).get_by_role("button", name="Regenerate").click()
    expect(last(tab).locator(".prose")).to_have_text("Answer 2 to one")
    expect(last(tab).locator(".count")).to_have_text("2/2")
    last(tab).get_by_role("button", name="Previous version").click()
    expect(last(tab).locator(".prose")).to_have_text("Answer 1 to one")
    ask(tab, "two")
    expect(tab.locator(".turn")).to_have_count(4)
    tab.locator(".turn.user").first.hover()
    tab.locator(".turn.user").first.get_by_role("button", name="Edit").click()
    tab.locator(".editing textarea").fill("one, better")
    shot(tab, "editing")
    tab.keyboard.press("Enter")
    expect(last(tab).locator(".prose")).to_have_text("Answer 4 to one, better")
    expect(tab.locator(".turn")).to_have_count(2)
    tab.locator(".turn.user").get_by_role("button", name="Previous version").click()
    expect(last(tab).locator(".prose")).to_have_text("Answer 2 to one")  # the newest branch below
    last(tab).get_by_role("button", name="Previous version").click()
    expect(tab.locator(".turn")).to_have_count(4)
    tab.reload()
    expect(tab.locator(".turn")).to_have_count(4)
    expect(last(tab).locator(".prose")).to_have_text("Answer 3 to two")
    shot(tab, "branches")
    tab.locator(".composer textarea").focus()
    tab.keyboard.press("ArrowUp")  # the last message, to be edited
    expect(tab.locator(".editing textarea")).to_have_value("two")
    tab.keyboard.press("Escape")
    expect(tab.locator(".editing")).to_have_count(0)


def test_thumbs_corrections_and_two_answers(page: Make, visit: Make) -> None:
    server = page(lambda asked, params: f"An answer, drawn with {params.seed % 97}.")
    tab = visit(server)
    ask(tab, "hello")
    last(tab).get_by_role("button", name="Bad answer").click()
    tab.get_by_role("button", name="Not correct").click()
    tab.locator(".why input[type=text]").fill("it is not so")
    shot(tab, "reason")
    tab.locator(".why").get_by_role("button", name="Save").click()
    expect(tab.locator(".toast")).to_contain_text("Thank you")
    (id,) = [one.id for one in server.store.latest("everybody")]
    judged = server.store.judgements.of("everybody", id)
    assert (
        [one.value for one in judged] == [0.0, 0.0]
        and judged[-1].reason == "wrong; it is not so"
        and judged[-1].consent
    )
    last(tab).get_by_role("button", name="Correct this answer").click()
    tab.locator(".editing textarea").fill("**Right** answer.")
    shot(tab, "correction")
    tab.locator(".editing .consent input").uncheck()
    tab.locator(".editing").get_by_role("button", name="Save").click()
    expect(last(tab).locator(".prose strong")).to_have_text("Right")
    expect(last(tab).locator(".facts")).to_contain_text("Corrected")
    assert not server.store.judgements.of("everybody", id)[-1].consent
    tab.get_by_role("button", name="Two answers").click()
    ask(tab, "again", waits=False)
    expect(tab.locator(".side")).to_have_count(2)
    expect(tab.locator(".verdict .primary").first).to_be_enabled()
    shot(tab, "two")
    tab.reload()
    expect(tab.locator(".side")).to_have_count(2)
    right = tab.locator(".side").last.locator(".prose").inner_text()
    tab.locator(".verdict").get_by_role("button", name="Right").click()
    expect(last(tab).locator(".prose")).to_have_text(right)
    expect(last(tab).locator(".count")).to_have_text("2/2")
    judged = server.store.judgements.of("everybody", id)[-1]
    assert judged.kind == "comparison" and judged.choice == 1 and judged.answers[1].said.content == right


def test_history_is_searched_renamed_pinned_exported_and_deleted(page: Make, visit: Make) -> None:
    server = page()
    tab = visit(server)
    for word in ("apples", "pears", "中文词语"):
        ask(tab, f"about {word}")
        tab.get_by_role("button", name="New chat").first.click()
        expect(tab.locator(".hello")).to_be_visible()
    rows = tab.locator(".sidebar li")
    expect(rows).to_have_count(3)
    tab.keyboard.press("Control+k")
    expect(tab.locator(".find input")).to_be_focused()
    tab.keyboard.type("apple")
    expect(rows).to_have_count(1)
    shot(tab, "search")
    tab.locator(".find input").fill("词语")
    expect(rows).to_contain_text(["about 中文词语"])
    tab.locator(".find input").fill("nothing like it")
    expect(tab.locator(".sidebar .none")).to_have_text("Nothing found")
    tab.locator(".find input").fill("")
    expect(rows).to_have_count(3)

    def choose(row: Any, name: str) -> None:
        row.hover()
        row.locator(".sign").click()
        tab.get_by_role("menuitem", name=name).click()

    rows.last.hover()
    rows.last.locator(".sign").click()
    shot(tab, "menu")
    tab.keyboard.press("Escape")
    choose(rows.last, "Rename")
    tab.locator(".dialog input").fill("Fruit")
    tab.keyboard.press("Enter")
    expect(rows.last).to_contain_text("Fruit")
    choose(rows.last, "Pin")
    expect(rows.first).to_contain_text("Fruit")
    expect(tab.locator(".sidebar h2").first).to_have_text("Pinned")
    with tab.expect_download() as download:
        choose(rows.first, "Export as Markdown")
    assert download.value.suggested_filename == "Fruit.md"
    written = Path(download.value.path()).read_text(encoding="utf-8")
    assert written.startswith("# Fruit\n") and "about apples" in written
    choose(rows.first, "Delete")
    expect(rows).to_have_count(2)
    tab.get_by_role("button", name="Undo").click()
    expect(rows).to_have_count(3)
    choose(rows.first, "Delete")
    expect(rows).to_have_count(2)
    tab.reload()  # leaving the page makes it final
    expect(rows).to_have_count(2)
    assert len(server.store.latest("everybody")) == 2


def test_settings_belong_to_the_chat_and_looks_to_the_page(page: Make, visit: Make) -> None:
    server = page(names=("demo", "older"))
    tab = visit(server)
    tab.get_by_role("button", name="Settings").click()
    panel = tab.locator(".settings")
    panel.locator("textarea[name=system]").fill("Be brief.")
    panel.locator("input[name=temperature]").fill("0.3")
    panel.locator("input[name=max_tokens]").fill("4")
    panel.locator("input[name=top_p]").fill("7")  # out of bounds: shown, not sent
    expect(panel.locator("input[name=top_p]")).to_have_attribute("aria-invalid", "true")
    panel.locator("select[name=model]").select_option("older")
    shot(tab, "settings")
    ask(tab, "one two three four five")
    expect(last(tab).locator(".note")).to_have_text("Cut off at the token limit")
    expect(last(tab).locator(".by")).to_have_text("older")
    assert "system\nBe brief." in server.engines["older"].heard[0]
    panel.locator("input[name=top_k]").fill("9")
    expect(panel.locator("input[name=top_k]")).to_have_value("9")
    tab.wait_for_timeout(800)
    tab.get_by_role("button", name="New chat").first.click()
    expect(panel.locator("textarea[name=system]")).to_have_value("")
    tab.locator(".sidebar li a").first.click()
    expect(panel.locator("textarea[name=system]")).to_have_value("Be brief.")
    expect(panel.locator("input[name=top_k]")).to_have_value("9")
    (about,) = server.store.latest("everybody")
    assert about.parameters == {"temperature": 0.3, "max_tokens": 4, "top_k": 9, "model": "older"}
    tab.get_by_text("Dark", exact=True).click()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(27, 26, 25)"
    tab.get_by_text("中文", exact=True).click()
    expect(tab.locator(".settings h2")).to_have_text("设置")
    expect(last(tab).locator(".note")).to_have_text("达到长度上限，回答被截断")
    assert tab.evaluate("document.documentElement.lang") == "zh-Hans"
    shot(tab, "settings-zh-dark")
    tab.reload()
    expect(tab.locator(".new")).to_have_text("新对话")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(27, 26, 25)"


def test_the_settings_show_where_the_chosen_model_comes_from(page: Make, visit: Make) -> None:
    documents, hostile = {"kind": "documents", "count": 9216, "source": "corpus"}, "<img src=x onerror=alert(1)>"
    people = {"kind": "rankings", "count": 1200, "source": "x", "origins": {"human": 300, "rule": 900}}
    line = [
        {"model": hostile, "stage": "", "data": []},
        {"model": "base", "stage": "pretrain", "data": [documents]},
        {"model": "better", "stage": "preference", "data": [people]},
    ]
    tab = visit(page(names=("demo", "older"), lines={"demo": line}))
    tab.get_by_role("button", name="Settings").click()
    shown = tab.locator(".lineage")
    expect(shown.locator("summary")).to_have_text("Where it comes from")
    shown.locator("summary").click()
    rows = [f"{hostile} made elsewhere", "base 9,216 documents", "better 1,200 rankings (300 by people)"]
    expect(shown.locator("li")).to_have_text(rows)
    shot(tab, "lineage")
    tab.get_by_text("中文", exact=True).click()
    expect(shown.locator("li").last).to_have_text("better 1,200 组排序 (其中 300 个来自真人)")
    expect(shown).to_have_attribute("open", "")
    shot(tab, "lineage-zh")
    tab.locator("select[name=model]").select_option("older")
    expect(shown).to_have_count(0)  # nobody knows where that one comes from


def test_the_keys_do_what_their_sheet_says(page: Make, visit: Make) -> None:
    server = page(lambda asked, params: "word " * 2000, pause_s=0.01)
    tab = visit(server)
    tab.keyboard.press("Control+/")
    expect(tab.locator(".keys dt")).to_have_count(11)
    shot(tab, "keys")
    tab.keyboard.press("Escape")
    expect(tab.locator(".keys")).to_have_count(0)
    field = tab.locator(".composer textarea")
    expect(field).to_be_focused()
    tab.keyboard.type("first")
    tab.keyboard.press("Shift+Enter")
    tab.keyboard.type("second")
    expect(field).to_have_value("first\nsecond")
    field.dispatch_event("keydown", {"key": "Enter", "isComposing": True})  # an input method's own Enter sends nothing
    expect(field).to_have_value("first\nsecond")
    tab.keyboard.press("Enter")
    expect(tab.locator(".prose.growing")).to_contain_text("word")
    tab.keyboard.press("Escape")
    expect(last(tab).locator(".note")).to_have_text("Stopped")
    tab.keyboard.press("Control+Shift+C")
    assert tab.evaluate("navigator.clipboard.readText()").startswith("word word")
    tab.keyboard.press("Control+Shift+S")
    expect(tab.locator(".sidebar")).to_be_hidden()
    tab.keyboard.press("Control+Shift+S")
    expect(tab.locator(".sidebar")).to_be_visible()
    tab.keyboard.press("Control+,")
    expect(tab.locator(".settings")).to_be_visible()
    tab.keyboard.press("Escape")
    expect(tab.locator(".settings")).to_be_hidden()
    expect(field).to_be_focused()
    tab.keyboard.press("Control+Shift+O")
    expect(tab.locator(".hello")).to_be_visible()


def test_a_key_is_asked_for_where_the_server_wants_one(page: Make, visit: Make, known: Make) -> None:
    tab = visit(page(porter=known("alice")), waits_for=".dialog input")
    shot(tab, "key")
    for key in ("b", "a"):  # a wrong one is asked for again
        tab.locator(".dialog input").fill(key * 40)
        tab.get_by_role("button", name="Continue").click()
    ask(tab, "hello")
    expect(last(tab).locator(".prose")).to_have_text("You said: hello")
    tab.reload()
    expect(last(tab).locator(".prose")).to_have_text("You said: hello")


def test_calls_of_tools_are_cards_that_hold_text(page: Make, visit: Make) -> None:
    server = page()
    store, script = server.store, "<img src=x onerror=alert(1)>"
    id = store.new("everybody", title="Sums").id
    asked = store.say("everybody", id, None, "user", "2 + 2?")
    calls = [ToolCall("c", "add", '{"a": 2, "b": 2}'), ToolCall("d", f"run {script}", "not json")]
    called = store.say("everybody", id, asked.id, "assistant", "I will add them.", tool_calls=calls, model="demo")
    result = store.say("everybody", id, called.id, "tool", f"4 {script}", tool_call_id="c")
    stray = store.say("everybody", id, result.id, "tool", "of no call", tool_call_id="x")
    store.say("everybody", id, stray.id, "assistant", "It is 4.", model="demo")
    tab = visit(server)
    tab.locator(".sidebar li a").click()
    cards = tab.locator(".call")
    expect(cards).to_have_count(3)
    expect(tab.locator(".turn")).to_have_count(4)  # the result is in its call's card, the stray one by itself
    expect(cards.nth(0).locator("summary")).to_contain_text("add")
    expect(cards.nth(0).locator("pre").first).to_be_hidden()
    cards.nth(0).locator("summary").click()
    expect(cards.nth(0).locator("pre").first).to_have_text('{\n  "a": 2,\n  "b": 2\n}')
    expect(cards.nth(0).locator("pre").last).to_have_text(f"4 {script}")
    expect(cards.nth(1).locator("summary")).to_contain_text("no result")
    cards.nth(1).locator("summary").click()
    expect(cards.nth(1).locator("pre")).to_have_text("not json")
    expect(tab.locator(".call img")).to_have_count(0)
    shot(tab, "calls")
    tab.emulate_media(color_scheme="dark")
    shot(tab, "calls-dark")


def test_ones_own_data_is_taken_along_brought_in_and_deleted(page: Make, visit: Make, tmp_path: Path) -> None:
    tab = visit(page())
    ask(tab, "hello")
    tab.keyboard.press("Control+,")
    section = tab.locator(".settings section").last
    with tab.expect_download() as download:
        section.get_by_role("button", name="Export everything").click()
    file = tmp_path / "all.json"
    download.value.save_as(file)
    told = json.loads(file.read_text())
    assert [chat["title"] for chat in told["conversations"]] == ["hello"]
    section.get_by_role("button", name="Delete everything").scroll_into_view_if_needed()
    shot(tab, "data")
    section.get_by_role("button", name="Delete everything").click()
    shot(tab, "data-sure")
    tab.locator(".dialog").get_by_role("button", name="Cancel").click()
    expect(tab.locator(".sidebar li")).to_have_count(1)
    section.get_by_role("button", name="Delete everything").click()
    tab.locator(".dialog").get_by_role("button", name="Delete everything").click()
    expect(tab.locator(".toast").last).to_contain_text("Chats deleted: 1")
    expect(tab.locator(".sidebar li")).to_have_count(0)
    expect(tab.locator(".hello")).to_be_visible()
    for name, text, said in (
        ("all.json", file.read_text(), "Chats imported: 1."),
        ("conversations.json", json.dumps([CHATGPT, {"title": "broken"}]), "Chats imported: 1. Not understood: 1."),
        ("one.json", json.dumps(told["conversations"][0]), "Chats imported: 1."),
        ("wrong.json", "{", "This file is not JSON."),
    ):
        (tmp_path / name).write_text(text)
        section.locator("input[type=file]").set_input_files(tmp_path / name)
        expect(tab.locator(".toast").last).to_have_text(said)
    expect(tab.locator(".sidebar li")).to_have_count(3)
    tab.locator(".sidebar li a", has_text="Capital").click()
    expect(last(tab).locator(".prose")).to_have_text("Paris")


def test_chinese_on_a_phone(page: Make, visit: Make) -> None:
    server = page(
        lambda asked, params: (
            "好的。**json.dumps** 把对象变成文本：\n\n```python\njson.dumps({'a': 1})\n```\n\n就是这样。"
        ),
        about=ABOUT,
    )
    tab = visit(server, locale="zh-CN", scheme="dark", width=390, height=844)
    expect(tab.locator(".hello h2")).to_have_text("想了解什么？")
    shot(tab, "phone-empty-zh-dark")
    tab.locator(".composer textarea").fill("怎样把字典写成 JSON？")
    tab.locator(".send").click()
    last(tab).locator(".facts").wait_for()
    expect(tab.locator(".sidebar")).to_be_hidden()
    shot(tab, "phone-answer-zh-dark")
    tab.get_by_role("button", name="对话列表").click()
    expect(tab.locator(".sidebar li")).to_have_count(1)
    shot(tab, "phone-drawer-zh-dark")
    tab.keyboard.press("Escape")
    expect(tab.locator(".sidebar")).to_be_hidden()
    tab.get_by_role("button", name="设置").click()
    shot(tab, "phone-settings-zh-dark")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shown = tab.locator(".settings").inner_text()
    for name in ("Light", "demo", "English", "Top", "ChatGPT", "conversations.json"):
        shown = shown.replace(name, "")
    assert not re.search(r"[A-Za-z]{4,}", shown), shown


# -- what is hostile, what is large ------------------------------------------------------------------------------------


def test_hostile_answers_titles_and_names_run_nothing(page: Make, visit: Make) -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("render_tests", Path(__file__).with_name("test_render.py"))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    hostile = "\n\n".join(module.HOSTILE)
    name = "<img src=x onerror=alert(1)>"
    server = page(lambda asked, params: hostile, names=(name,), about={"studied": name, "ask": [name]})
    tab = visit(server)
    tab.evaluate("window.alert = () => { document.title = 'broken' }")
    ask(tab, "<script>alert(1)</script><img src=x onerror=alert(2)>")
    tab.get_by_role("button", name="Settings").click()
    tab.wait_for_timeout(300)
    tab.reload()
    last(tab).locator(".prose").wait_for()
    assert (
        tab.locator(".thread :is(script, img, iframe, style, form[action], svg:not(.icon), object, embed)").count() == 0
    )
    assert tab.evaluate(
        "[...document.querySelectorAll('.thread *')].every(e => e.getAttributeNames().every(n => !n.startsWith('on')))"
    )
    for address in tab.evaluate(
        "[...document.querySelectorAll('.thread a')].filter(a => a.hasAttribute('href')).map(a => a.href)"
    ):
        assert address.startswith(("http://", "https://", "mailto:")), address
    assert tab.evaluate(
        "(() => { try { document.body.innerHTML = '<b>x</b>'; return false } catch { return true } })()"
    )
    assert "broken" not in tab.title()


def test_a_conversation_of_500_messages_does_not_lag(page: Make, visit: Make) -> None:
    server = page(lambda asked, params: "A last answer.\n\n" * 20, pause_s=0.003)
    about = server.store.new("everybody", title="Long")
    parent = None
    for number in range(250):
        parent = server.store.say("everybody", about.id, parent, "user", f"Question {number}").id
        text = f"Answer **{number}**.\n\n```python\nx = {number}\n```\n\n- one\n- two\n"
        parent = server.store.say("everybody", about.id, parent, "assistant", text, model="demo").id
    tab = visit(server)
    start = time.monotonic()
    tab.locator(".sidebar li a").first.click()
    expect(tab.locator(".turn")).to_have_count(500)
    opened_s = time.monotonic() - start
    assert tab.evaluate(
        "(() => { const t = document.querySelector('.thread'); return t.scrollHeight - t.scrollTop - t.clientHeight < 100 })()"
    )
    tab.evaluate(
        "() => { window.longest = 0; let at = performance.now(); const tick = (now) => "
        "{ window.longest = Math.max(window.longest, now - at); at = now; requestAnimationFrame(tick) }; "
        "requestAnimationFrame(tick) }"
    )
    tab.evaluate("window.longest = 0")
    ask(tab, "One more")
    expect(tab.locator(".turn")).to_have_count(502)
    longest_ms = tab.evaluate("window.longest")
    print(f"opened in {opened_s:.2f} s, longest frame {longest_ms:.0f} ms")
    assert opened_s < 10 and longest_ms < 1500


def test_names_roles_contrast_and_focus(page: Make, visit: Make) -> None:
    server = page(lambda asked, params: RICH, about=ABOUT)
    for scheme in ("light", "dark"):
        tab = visit(server, scheme=scheme)
        ask(tab, "hello")
        tab.get_by_role("button", name="Settings").click()
        nameless = tab.evaluate(
            "[...document.querySelectorAll('button, input, select, textarea')].filter(e => "
            "e.checkVisibility() && !e.ariaHidden && !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length))"
            ".map(e => e.outerHTML)"
        )
        assert nameless == []
        pale = tab.evaluate(CONTRAST)
        assert pale == [], f"{scheme}: {pale}"
        expect(tab.locator("[aria-live=polite]")).to_have_text("The answer is complete.")
        assert tab.locator("main").count() == 1 and tab.locator("h1").count() == 1
        shot(tab, f"answer-settings-{scheme}")
        tab.locator(".composer textarea").focus()
        seen = set()
        for _ in range(60):
            tab.keyboard.press("Tab")
            seen.add(
                tab.evaluate(
                    "document.activeElement.title || document.activeElement.ariaLabel || document.activeElement.name || ''"
                )
            )
        assert {"Regenerate", "Good answer", "Settings", "system", "Temperature"} <= seen


CONTRAST = """() => {
  const channel = (v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4 };
  const read = (c) => { const canvas = new OffscreenCanvas(1, 1).getContext('2d'); return (base) => {
    canvas.fillStyle = base; canvas.fillRect(0, 0, 1, 1); canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3) } };
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const css = (rgb) => `rgb(${rgb.join(',')})`;
  const behind = (e) => e ? read(getComputedStyle(e).backgroundColor)(css(behind(e.parentElement))) : [255, 255, 255];
  const found = [];
  for (const e of document.querySelectorAll('#app *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    const isShown = e.checkVisibility({opacityProperty: true, visibilityProperty: true});
    if (!own || !isShown || e.closest('.hidden, :disabled')) continue;
    const above = [];
    for (let p = e; p; p = p.parentElement) above.push(getComputedStyle(p).opacity);
    if (above.some(o => o < 1)) continue;
    const back = behind(e), front = read(getComputedStyle(e).color)(css(back));
    const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push(`${e.className || e.tagName} ${e.textContent.slice(0, 20)} ${ratio.toFixed(2)}`);
  }
  return [...new Set(found)];
}"""
