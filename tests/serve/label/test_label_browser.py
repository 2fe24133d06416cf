"""The labelling page in a real browser: every kind of task by keyboard alone, both languages, a phone, dark and light.

A test skips where there is no Chromium. `LYCEUM_SCREENSHOTS=folder` keeps pictures of each state, for people to look at.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytest.importorskip("nh3", reason="needs the extra lyceum[serve]")

from lyceum.serve.feedback import read  # noqa: E402

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
expect = sync_api.expect
Make = Callable[..., Any]
ANSWERS = [
    "A noun is a **word for a thing**, a person or a place.",
    "Nouns are verbs.",
    "It names something:\n\n- a thing (*table*)\n- a person (*Ann*)\n- an idea (*joy*)\n\n" + "More of it. " * 150,
    "I do not know.",
]
WORDS = {
    "en": {"begin": "Begin", "done": "Done", "skip": "Skip", "kinds": ["Write a prompt", "Answer as the assistant"]},
    "zh": {"begin": "开始", "done": "完成", "skip": "跳过", "kinds": ["写提问", "以助手身份回答"]},
}
KINDS = ("prompt", "answer", "user", "rank", "label")


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
    """Open the labelling page in a fresh browser session; what the page itself does wrong fails the test."""
    contexts, wrong = [], []

    def make(
        server: Any, *kinds: str, name: str = "Ann", locale: str = "en-GB", scheme: str = "light", width: int = 1280,
        height: int = 800,
    ) -> Any:  # fmt: skip
        context = browser.new_context(
            locale=locale, color_scheme=scheme, viewport={"width": width, "height": height}, reduced_motion="reduce"
        )
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(20_000)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("console", lambda said: wrong.append(said.text) if "Content Security" in said.text else None)
        tab.on("dialog", lambda box: wrong.append(box.message))
        if kinds:  # who has been here before
            kept = {"label-name": name, "label-consent": "yes", "label-kinds": " ".join(kinds)}
            tab.add_init_script(f"for (const [k, v] of Object.entries({kept})) localStorage[k] ??= v")
        tab.goto(server.url + "/label")
        tab.locator(".task > *").first.wait_for()
        return tab

    yield make
    for context in contexts:
        context.close()
    assert not wrong


def shot(tab: Any, name: str) -> None:
    if folder := os.environ.get("LYCEUM_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        tab.wait_for_timeout(150)
        tab.screenshot(path=Path(folder) / f"{name}.png")


def serve(page: Make, **rules: Any) -> Any:
    server = page(lambda asked, params: f"Answer {params.seed % 1000} to it")
    given = {"gold_share": 0.0, "answers": 2, "written": 2, "reviews": 1, "rankings": 2, "turns": 2, **rules}
    assert server.post("/api/label/rules", given).status == 200
    return server


def bring(server: Any, *prompts: str, answers: list[str] | None = None) -> None:
    rows: list[Any] = [{"prompt": prompt} for prompt in prompts]
    if answers:
        said = [{"role": "assistant", "content": text} for text in answers]
        rows = [
            {"prompt": {"messages": [{"role": "user", "content": one}]}, "responses": said, "ranks": [1] * len(said)}
            for one in prompts
        ]
    as_what = "rankings" if answers else "conversations"
    assert server.post("/api/label/import", {"rows": rows, "as": as_what}).json["trees"] == len(prompts)


def tab_to(tab: Any, selector: str) -> None:
    """Press Tab until an element has the focus: nothing is clicked in these tests."""
    for _ in range(80):
        if tab.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            return
        tab.keyboard.press("Tab")
    raise AssertionError(f"Tab does not reach {selector}")


def tasks(server: Any, kind: str) -> int:
    return server.ask("GET", "/api/label?name=Ann").json["done"].get(kind, 0)


def test_who_comes_first_says_who_they_are_what_they_like_and_that_it_may_be_learned_from(
    page: Make, visit: Make
) -> None:
    server = serve(page)
    bring(server, "What is a noun?", answers=ANSWERS)
    tab = visit(server)
    expect(tab.locator(".start input[type=text]")).to_be_focused()
    shot(tab, "label-start")
    tab.keyboard.type("Ann")
    for kind in ("prompt", "answer", "user", "label"):
        tab_to(tab, f".chip:nth-child({KINDS.index(kind) + 1})")
        tab.keyboard.press("Space")
    tab_to(tab, ".start input[type=checkbox]")
    tab.keyboard.press("Space")
    tab_to(tab, ".start .primary")
    tab.keyboard.press("Enter")
    expect(tab.locator(".ranks > li").first).to_be_focused()
    tab.reload()
    expect(tab.locator(".ranks > li")).to_have_count(4)  # it is remembered


@pytest.mark.parametrize(("language", "width"), [("en", 1280), ("zh", 390)])
def test_every_kind_of_task_by_keyboard_alone(page: Make, visit: Make, language: str, width: int) -> None:
    server = serve(page, turns=3, trees=1000)
    bring(server, "What is a noun?")
    locale, scheme = ("en-GB", "light") if language == "en" else ("zh-CN", "dark")

    def come(kind: str, name: str) -> Any:
        tab = visit(server, kind, name=name, locale=locale, width=width, scheme=scheme)
        expect(tab.locator(f".of-{kind}")).to_be_visible()
        shot(tab, f"label-{kind}-{language}-{width}")
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it is wider than the screen"
        assert "null" not in tab.locator("body").inner_text() and "undefined" not in tab.locator("body").inner_text()
        return tab

    for name, text in (("Ann", "A word for a thing."), ("Bob", "A name.")):
        tab = come("answer", name)
        expect(tab.locator("textarea")).to_be_focused()
        tab.keyboard.press("Control+Enter")
        expect(tab.locator(".under .note")).not_to_be_empty()  # nothing is written
        tab.keyboard.type(text)
        tab.reload()
        expect(tab.locator("textarea")).to_have_value(text)  # nothing is lost
        tab.locator("textarea").focus()
        tab.keyboard.press("Control+Enter")
        expect(tab.locator(".rest")).to_be_visible()
    tab = come("label", "Cat")
    for count in (1, 2):
        expect(tab.locator("input[name=spam]").first).to_be_focused()
        tab.keyboard.press("Control+Enter")
        expect(tab.locator(".under .note")).not_to_be_empty()
        tab.keyboard.press("ArrowRight")  # no
        tab.keyboard.press("Tab")
        tab.keyboard.press("ArrowRight")
        tab.keyboard.press("Tab")
        for _ in range(5):
            tab.keyboard.press("ArrowRight")
        tab_to(tab, ".chip:nth-child(3)")
        tab.keyboard.press("Space")
        tab.keyboard.press("Control+Enter")
        if count == 1:
            expect(tab.locator(".chip[aria-pressed=true]")).to_have_count(0)  # the next one
    expect(tab.locator(".rest")).to_be_visible()
    (labelled, _) = read(server.store.database.place).labels
    labels = labelled.meta["labels"]
    assert (labels["spam"], labels["quality"], labels["hallucination"]) == (0, 6, 1)
    for name in ("Cat", "Dan"):
        tab = come("rank", name)
        cards = tab.locator(".ranks > li")
        expect(cards.first).to_be_focused()
        if "A name." in cards.first.inner_text():
            tab.keyboard.press("Alt+ArrowDown")
        expect(cards.last).to_contain_text("A name.")
        tab.keyboard.press("Control+Enter")
        expect(tab.locator(".rest")).to_be_visible()
    (ranking,) = read(server.store.database.place).rankings
    assert [one.content for one in ranking.responses if ranking.ranks[ranking.responses.index(one)] == 1] == [
        "A word for a thing."
    ]
    tab = come("user", "Bob")
    tab.keyboard.type("And what is a verb?")
    tab_to(tab, ".under .primary")
    tab.keyboard.press("Enter")
    expect(tab.locator(".rest")).to_be_visible()
    rows = [
        {"prompt": f"About {use}?", "meta": {"use": use, "language": code}}
        for use in server.ask("GET", "/api/label").json["uses"]
        for code in ("en", "zh")
    ]
    server.post("/api/label/import", {"rows": rows, "as": "conversations"})
    tab = visit(server, "prompt", locale=locale, width=width, scheme=scheme)
    seen = set()
    while len(seen) < 3:
        form = tab.locator(".of-prompt")
        expect(form).to_be_visible()
        few, after = tab.locator(".examples").count(), form.locator(".said").count()
        kind = "few_shot" if few else "after_user" if after else "plain"
        shot(tab, f"label-prompt-{kind}-{language}-{width}")
        for field in range(tab.locator(".of-prompt textarea").count()):
            if field:
                tab_to(
                    tab,
                    f".of-prompt textarea[name={tab.locator('.of-prompt textarea').nth(field).get_attribute('name')}]",
                )
            tab.keyboard.type(f"text {field}")
        before = tasks(server, "prompt")
        tab.keyboard.press("Control+Enter")
        expect(tab.locator(".of-prompt textarea").first).to_have_value("")  # the next one
        assert tasks(server, "prompt") == before + 1
        seen.add(kind)
        assert before < 60, f"only {seen}"


def test_ranking_with_ties_scores_flags_drag_and_none_acceptable(page: Make, visit: Make) -> None:
    server = serve(page, rankings=1)
    bring(server, "What is a noun?", answers=ANSWERS)
    tab = visit(server, "rank")
    cards = tab.locator(".ranks > li")
    names = lambda: [card.locator(".head strong").inner_text() for card in cards.all()]  # noqa: E731
    assert names() == ["Answer A", "Answer B", "Answer C", "Answer D"]
    tab.keyboard.press("Alt+ArrowDown")
    tab.keyboard.press("7")
    assert names() == ["Answer B", "Answer A", "Answer C", "Answer D"]
    expect(cards.nth(1)).to_be_focused()
    tab.keyboard.press("=")
    expect(cards.nth(1).locator(".badge")).to_have_text("1")
    expect(tab.locator("[aria-live=polite]")).to_contain_text("Answer A, place 1 of 4")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("2")
    tab.keyboard.press("f")
    expect(cards.nth(2).locator(".flags .chip").first).to_be_focused()
    tab.keyboard.press("Space")
    shot(tab, "label-rank-ties")
    cards.nth(3).locator(".handle").hover()  # waits until it stands still
    handle = cards.nth(3).locator(".handle").bounding_box()
    tab.mouse.down()
    for step in range(80):  # upwards, until it stands before the third
        tab.mouse.move(handle["x"] + 8, handle["y"] + 8 - 5 * step)
        if names()[2] == "Answer D":
            break
    tab.mouse.up()  # before the picture, which scrolls the page away under the pointer
    shot(tab, "label-rank-drag")
    assert names() == ["Answer B", "Answer A", "Answer D", "Answer C"]
    tab.locator(".none input").check()
    texts = [card.locator(".cut").inner_text() for card in cards.all()]
    tab.locator(".under .primary").click()
    expect(tab.locator(".rest")).to_be_visible()
    (one,) = read(server.store.database.place).rankings
    assert sorted(one.ranks) == [1, 1, 3, 4] and one.acceptable == (False,) * 4
    by_rank = sorted(zip(one.ranks, one.responses, one.meta["responses"], strict=True), key=lambda row: row[0])
    assert by_rank[-1][1].content[:10] in texts[-1] and by_rank[-1][2]["score"] == 2
    assert by_rank[-1][2]["flags"] == {"fails_task": 1.0} and 7 in [row[2]["score"] for row in by_rank[:2]]


def test_skip_guidelines_and_an_answer_that_models_are_still_writing(page: Make, visit: Make) -> None:
    server = serve(page, written=0)
    bring(server, "One?", answers=ANSWERS)
    tab = visit(server, "rank")
    expect(tab.locator(".ranks > li").first).to_be_focused()
    tab.keyboard.press("g")
    expect(tab.locator(".guide h2").first).to_have_text("What we are making")
    shot(tab, "label-guidelines")
    tab.keyboard.press("Escape")
    expect(tab.locator(".guide")).to_be_hidden()
    tab.keyboard.press("s")
    expect(tab.locator("dialog input").first).to_be_focused()
    shot(tab, "label-skip")
    tab.keyboard.press("ArrowDown")
    tab_to(tab, "dialog input[type=text]")
    tab.keyboard.type("too long")
    tab.keyboard.press("Enter")
    expect(tab.locator(".rest")).to_be_visible()
    expect(tab.locator(".rest p")).to_have_text("Nothing to do just now. Thank you!")
    shot(tab, "label-rest")
    bring(server, "A number?")
    tab_to(tab, ".rest .plain")
    tab.keyboard.press("Enter")
    expect(tab.locator(".ranks > li")).to_have_count(2)


@pytest.mark.parametrize(("locale", "scheme", "width"), [("en-GB", "light", 1280), ("zh-CN", "dark", 390)])
def test_the_dashboard_and_what_an_admin_sets(page: Make, visit: Make, locale: str, scheme: str, width: int) -> None:
    server = serve(page, rankings=4, gold_share=0.3)
    bring(server, *(f"{number}?" for number in range(14)), answers=ANSWERS)
    gold = [{"prompt": f"sure {n}?", "chosen": "good", "rejected": "bad"} for n in range(12)]
    server.post("/api/label/import", {"rows": gold, "as": "gold_rankings"})
    for name in ("Ann", "Bob", "Cat", "Eve"):
        while task := server.post("/api/label/next", {"name": name, "kinds": ["rank"]}).json["task"]:
            texts = [one["content"] for one in task["shown"]]
            ranks = [1 + sorted(texts).index(text) for text in texts] if name != "Eve" else [*range(1, len(texts) + 1)]
            if "good" in texts and name != "Eve":
                ranks = [1 + (text == "bad") for text in texts]
            done = {"name": name, "ranks": ranks, "consent": True}
            server.post(f"/api/label/tasks/{task['id']}", done)
    tab = visit(server, "rank", locale=locale, scheme=scheme, width=width)
    tab.locator("[role=tab]").nth(1).click()
    rows = tab.locator(".numbers tbody tr")
    expect(rows).to_have_count(4)
    expect(rows.first.locator("th")).to_contain_text("Eve")
    expect(tab.locator(".numbers tr.bad")).to_have_count(1)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shot(tab, f"label-board-{width}")
    tab.locator("[role=tab]").nth(2).click()
    tab.locator(".setup input[name=rankings]").fill("6")
    tab.locator(".setup form").first.locator(".primary").click()
    expect(tab.locator(".toast")).to_be_visible()
    shot(tab, f"label-setup-{width}")
    board = server.ask("GET", "/api/label/board").json
    assert board["rules"]["rankings"] == 6 and board["rules"]["answers"] == 2
    tab.locator(".setup textarea").fill("# Say **less**")
    tab.locator(".setup form").last.locator(".primary").click()
    tab.wait_for_timeout(300)
    tab.locator("[role=tab]").first.click()
    tab.keyboard.press("g")
    expect(tab.locator(".guide strong")).to_have_text("less")
    tab.keyboard.press("g")
    tab.locator("[role=tab]").nth(2).click()
    file = {"name": "rows.jsonl", "mimeType": "text/plain", "buffer": b'{"prompt": "new?"}\n{"prompt": "newer?"}\n'}
    tab.locator(".setup select").first.select_option("conversations")
    tab.locator(".setup input[type=file]").set_input_files(file)
    expect(tab.locator(".toast").last).to_contain_text("2")
    file["buffer"] = b'{"prompt": "new?"}\n{"prompt"\n'
    tab.locator(".setup input[type=file]").set_input_files(file)
    expect(tab.locator(".toast").last).to_contain_text("2")  # its line
    assert sum(server.ask("GET", "/api/label").json["states"].values()) == 16
