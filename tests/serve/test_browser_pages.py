"""The arena, the playground and the page that looks inside, in a real browser: keys only, both languages, a phone.

A test skips where there is no Chromium. `LYCEUM_SCREENSHOTS=folder` keeps pictures of each state, for people to look at.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytest.importorskip("nh3", reason="needs the extra lyceum[serve]")

from lyceum.engine.engine import Engine  # noqa: E402
from lyceum.engine.sampling import SamplingParams  # noqa: E402
from lyceum.model.spec import ModelSpec  # noqa: E402
from lyceum.model.transformer import Decoder  # noqa: E402
from lyceum.serve.arena.battles import Battles, Contender  # noqa: E402
from lyceum.serve.feedback import harvest  # noqa: E402
from lyceum.serve.models import serve  # noqa: E402
from lyceum.tokens.tokenizer import Tokenizer  # noqa: E402


def sibling(name: str) -> Any:
    """Another file of tests, for its fixtures."""
    spec = spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


chat = sibling("test_browser")
browser, visit, shot, CONTRAST = chat.browser, chat.visit, chat.shot, chat.CONTRAST
pytestmark = chat.pytestmark
expect = sync_api.expect
Make = Callable[..., Any]
NAMES = ("demo", "older")
ANSWERS = {
    "How do I read a CSV file?": "Use the `csv` module:\n\n```python\nimport csv\n\nwith open('names.csv') as file:\n"
    "    rows = list(csv.reader(file))\n```\n\nEach row is a list of strings.",
    "And with names for the columns?": "Take `csv.DictReader`; each row is then a dictionary.",
}


def script(asked: str, params: SamplingParams) -> str:
    """Both models say the same, one of them at more length: the seed decides which."""
    text = ANSWERS.get(asked, f"You said: {asked}")
    return text if params.seed % 2 else text + "\n\n- It comes with Python.\n- It reads **any** dialect."


def go(tab: Any, server: Any, page: str, waits_for: str) -> None:
    tab.goto(f"{server.url}/{page}")
    tab.locator(waits_for).first.wait_for()


def fits(tab: Any) -> bool:
    """Whether nothing hangs over the page's right edge."""
    return bool(
        tab.evaluate(
            "document.documentElement.scrollWidth <= innerWidth && document.querySelector('main').scrollWidth <= innerWidth"
        )
    )


def votes(store: Any, counts: dict[tuple[str, str], tuple[int, int, int]]) -> None:
    """Put votes into a store: of each pair so many for the left, the right, and neither of them."""
    battles = Battles(store.database)
    for (left, right), (wins, losses, ties) in counts.items():
        for number, verdict in enumerate(["left"] * wins + ["right"] * losses + ["tie"] * ties):
            conversation = store.new("everybody")
            asked = store.say(
                "everybody", conversation.id, None, "user", "What does json.dumps do?" if number % 3 else "Hello"
            )
            texts = (
                ("short", "- one\n- **two**\n- three") if number % 2 else ("# Much longer\n\nthan the other", "brief")
            )
            both = [store.say("everybody", conversation.id, asked.id, "assistant", text) for text in texts]
            contenders = [Contender(one.id, name, {}) for one, name in zip(both, (left, right), strict=True)]
            battle = battles.seal("everybody", conversation.id, *contenders)
            battles.vote("everybody", battle.id, verdict, kind=("open_qa", "chat")[number % 2], consent=True)  # type: ignore[arg-type]


# -- the arena ---------------------------------------------------------------------------------------------------------


def test_a_battle_by_keys_alone_hides_the_names_until_the_vote(page: Make, visit: Make) -> None:
    server = page(script, names=NAMES, pause_s=0.004)
    tab = visit(server)
    go(tab, server, "arena", ".composer textarea")
    shot(tab, "arena-empty")
    heard: list[str] = []
    tab.on("response", lambda answer: heard.append(answer.url))
    tab.keyboard.type("How do I read a CSV file?")
    tab.keyboard.press("Enter")
    tab.locator(".side .growing").first.wait_for()
    shot(tab, "arena-streaming")
    expect(tab.locator(".verdict button").first).to_be_enabled()
    expect(tab.locator(".verdict button").first).to_be_focused()
    assert not set(NAMES) & set(tab.locator(".duel").inner_text().split())
    shot(tab, "arena-vote")
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        assert tab.evaluate(CONTRAST) == []
    shot(tab, "arena-vote-dark")
    tab.emulate_media(color_scheme="light")
    tab.keyboard.press("4")
    expect(tab.locator(".reveal")).to_contain_text("You voted for the right.")
    assert set(tab.locator(".side header > span:first-child").all_inner_texts()) == set(NAMES)
    shot(tab, "arena-reveal")
    expect(tab.locator(".composer textarea")).to_be_focused()
    tab.keyboard.type("And with names for the columns?")
    tab.keyboard.press("Enter")
    expect(tab.locator(".duel").nth(1).locator(".verdict button").first).to_be_enabled()
    tab.reload()  # the battle is where it was, still under seal
    expect(tab.locator(".duel")).to_have_count(2)
    assert tab.locator(".verdict").count() == 1
    tab.locator(".verdict select").select_option("open_qa")
    tab.locator("body").press("2")
    expect(tab.locator(".reveal").nth(1)).to_contain_text("equally good")
    shot(tab, "arena-two-turns")
    first, second = server.store.judgements.of("everybody")
    assert (first.choice, second.choice) == (1, "tie") and second.answers[0].parameters["kind"] == "open_qa"
    assert [one.said.content for one in first.answers] != [] and first.consent
    tab.get_by_role("button", name="New battle").press("Enter")
    expect(tab.locator(".duel")).to_have_count(0)
    assert "#" not in tab.url


def test_the_table_by_keys_with_kinds_style_and_models_that_never_met(page: Make, visit: Make) -> None:
    server = page(names=NAMES)
    votes(
        server.store,
        {("ppo", "sft"): (30, 12, 6), ("sft", "base"): (20, 3, 1), ("ppo", "base"): (12, 0, 0), ("x", "y"): (3, 0, 0)},
    )
    tab = visit(server)
    go(tab, server, "arena", "[role=tab]")
    tab.locator("#tab-battle").focus()
    tab.keyboard.press("ArrowRight")
    rows = tab.locator(".ratings tbody tr")
    expect(rows.first).to_contain_text("ppo")
    assert (
        "x" in rows.nth(4).inner_text() and tab.locator(".apart").count() == 1 and "above" in rows.nth(4).inner_text()
    )
    shot(tab, "arena-table")
    tab.locator("select[name=of-kind]").select_option("code")
    expect(tab.locator(".ratings")).to_contain_text(f"{sum(1 for n in range(48) if n % 3) + 16 + 8 + 2} votes")
    tab.locator("input[name=style]").check()
    expect(tab.locator(".effects")).to_contain_text("Length")
    shot(tab, "arena-table-style")
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        assert tab.evaluate(CONTRAST) == []
    shot(tab, "arena-table-dark")


def test_the_arena_on_a_phone_in_chinese_and_alone(page: Make, visit: Make) -> None:
    server = page(script, names=NAMES)
    votes(server.store, {("ppo", "sft"): (30, 12, 6)})
    tab = visit(server, locale="zh-CN", width=390, height=800)
    go(tab, server, "arena", ".composer textarea")
    assert fits(tab)
    shot(tab, "arena-phone-empty")
    tab.locator(".composer textarea").fill("How do I read a CSV file?")
    tab.keyboard.press("Enter")
    expect(tab.locator(".verdict button").first).to_be_enabled()
    assert fits(tab) and "一样好" in tab.locator(".verdict").inner_text()
    shot(tab, "arena-phone-vote")
    tab.get_by_role("button", name="左边").click()
    expect(tab.locator(".reveal")).to_contain_text("你选择了左边")
    tab.locator("#tab-ratings").click()
    expect(tab.locator(".ratings tbody tr")).to_have_count(5)  # two groups of two, and the line between
    assert fits(tab)
    shot(tab, "arena-phone-table")
    alone = visit(page())
    alone.goto(alone.url.split("#")[0] + "arena")
    expect(alone.locator(".lonely")).to_contain_text("lyceum serve runs/demo --model")
    shot(alone, "arena-alone")


# -- the playground ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schooled() -> tuple[Tokenizer, Decoder]:
    """A model of two layers that has learned a few sentences by heart, and its tokenizer: what it says looks like text."""
    texts = [
        "the cat sat on the mat and looked at the door. the dog lay on the rug and looked at the cat. ",
        "Q: What is the capital of France?\nA: Paris.\n\nQ: Which planet is the largest?\nA: Jupiter.\n\n",
        "user\nassistant\nsystem\ntool\n今天天气很好，明天天气也很好。",
    ]
    tokenizer = Tokenizer.train(texts * 40, 420)
    model = Decoder(
        ModelSpec(tokenizer.vocab_size, 2, 64, 4, 2, head_width=16, ffn_width=128, context_length=256),
        torch.Generator().manual_seed(0),
    )
    ids = torch.tensor([tokenizer.encode(text * 12)[:96] for text in texts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(60):
        logits = model.logits(model(ids[:, :-1]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tokenizer, model.eval()


@pytest.fixture
def real(page: Make, schooled: tuple[Tokenizer, Decoder]) -> Iterator[Make]:
    """A server of that model alone, which can insert if asked."""

    def make(*, can_insert: bool = True, pause_s: float = 0.0) -> Any:
        tokenizer, model = schooled
        running = page()
        engine = Engine(model, max_batch=4, token_bytes=tokenizer.token_bytes, pack=not pause_s)
        if pause_s:
            hooks.append(model.register_forward_pre_hook(lambda *given: time.sleep(pause_s)))
        served = serve("tiny", engine, tokenizer, can_insert=can_insert)
        running.serve([served])
        return running

    hooks: list[Any] = []
    yield make
    for hook in hooks:
        hook.remove()


def test_a_text_goes_on_token_by_token_and_from_another_token_by_keys_alone(real: Make, visit: Make) -> None:
    server = real()
    tab = visit(server)
    go(tab, server, "playground", "textarea[name=text]")
    shot(tab, "playground-empty")
    tab.locator("input[name=temperature]").fill("0")
    tab.locator("input[name=max_tokens]").fill("12")
    tab.locator("textarea[name=text]").fill("the cat sat")
    tab.keyboard.press("Control+Enter")
    tab.get_by_role("button", name="Regenerate").wait_for()
    said = tab.locator(".strip").inner_text()
    assert " on the mat" in said, said
    first = tab.locator(".token").first
    first.focus()
    tab.keyboard.press("ArrowRight")
    expect(tab.locator(".token[aria-selected=true]")).to_have_count(1)
    assert tab.locator(".token[aria-selected=true]").get_attribute("data-place") == "1"
    expect(tab.locator(".bars li")).to_have_count(6)  # five, and all the rest
    shares = [int(one.strip("<%")) for one in tab.locator(".chance").all_inner_texts()]
    assert shares[0] == max(shares) and 97 <= sum(shares) <= 104
    shot(tab, "playground-alternatives")
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        assert tab.evaluate(CONTRAST) == []
    shot(tab, "playground-dark")
    tab.emulate_media(color_scheme="light")
    kept = first.inner_text()
    other = tab.locator("button.bar-row").first
    name = other.locator("code").inner_text().replace("␣", " ")
    other.press("Enter")
    tab.get_by_role("button", name="Regenerate").wait_for()
    tokens = tab.locator(".token").all_inner_texts()
    assert tokens[0] == kept and tokens[1].strip() == name.strip() and len(tokens) > 2
    tab.get_by_role("button", name="Keep and go on").press("Enter")
    assert tab.locator("textarea[name=text]").input_value().startswith("the cat sat" + kept)


def test_modes_examples_links_and_corrections(real: Make, visit: Make) -> None:
    server = real()
    tab = visit(server)
    go(tab, server, "playground", "textarea[name=text]")
    tab.locator("select[name=example]").select_option("qa")
    assert "Which planet is the largest?" in tab.locator("textarea[name=text]").input_value()
    tab.get_by_role("button", name="Submit").click()
    tab.get_by_role("button", name="Correct it").wait_for()
    shot(tab, "playground-example")
    tab.get_by_role("button", name="Copy a link").click()
    link = tab.evaluate("navigator.clipboard.readText()")
    assert link.startswith(f"{server.url}/playground#") and "sk-" not in link
    tab.get_by_role("button", name="Correct it").click()
    tab.locator(".editing textarea").fill(" Jupiter.")
    shot(tab, "playground-correct")
    tab.get_by_role("button", name="Save").click()
    expect(tab.locator(".toast").last).to_contain_text("noted")
    (conversation,) = harvest(server.store.judgements.everybodys()).conversations
    assert conversation.messages[-1].content == " Jupiter." and conversation.messages[0].content.startswith("Q: What")

    other = visit(server, locale="zh-CN")
    other.evaluate("sessionStorage.setItem('key', 'sk-lyceum-secret')")
    other.goto(link)
    other.locator("textarea[name=text]").wait_for()
    assert "Which planet" in other.locator("textarea[name=text]").input_value()
    assert other.locator("input[name=temperature]").input_value() == "0"
    other.get_by_role("button", name="复制链接").click()
    assert "secret" not in json.dumps(
        other.evaluate("atob(location.hash.slice(1).replaceAll('-', '+').replaceAll('_', '/'))")
    )

    tab.locator("input[value=insert]").check()
    tab.locator("textarea[name=text]").fill("the cat sat on")
    tab.locator("textarea[name=after]").fill("and looked at the door.")
    tab.get_by_role("button", name="Submit").click()
    expect(tab.locator(".token").first).to_be_visible()
    shot(tab, "playground-insert")
    tab.locator("input[value=edit]").check()
    tab.locator("textarea[name=instruction]").fill("Make it short.")
    tab.locator("textarea[name=text]").fill("the cat sat on the mat")
    with tab.expect_response("**/v1/edits") as edited:
        tab.get_by_role("button", name="Submit").click()
    assert edited.value.status == 200
    shot(tab, "playground-edit")


def test_what_a_model_cannot_do_is_said_on_a_phone_in_chinese(real: Make, visit: Make) -> None:
    server = real(can_insert=False)
    tab = visit(server, locale="zh-CN", width=390, height=800)
    go(tab, server, "playground", "textarea[name=text]")
    assert fits(tab)
    tab.locator("input[value=insert]").check()
    expect(tab.locator(".note.bad")).to_contain_text("没有学过填空")
    tab.locator("input[value=complete]").check()
    tab.locator("textarea[name=text]").fill("今天")
    tab.locator("input[name=temperature]").fill("0")
    tab.get_by_role("button", name="提交").click()
    tab.get_by_role("button", name="重新生成").wait_for()
    tab.locator(".token").nth(1).click()
    expect(tab.locator(".bars li").first).to_be_visible()
    assert fits(tab) and tab.evaluate(CONTRAST) == []
    shot(tab, "playground-phone")


def test_what_is_being_written_can_be_stopped_and_stays(real: Make, visit: Make) -> None:
    server = real(pause_s=0.1)
    tab = visit(server)
    go(tab, server, "playground", "textarea[name=text]")
    tab.locator("input[name=max_tokens]").fill("200")
    tab.locator("textarea[name=text]").fill("the cat sat")
    tab.keyboard.press("Control+Enter")
    tab.locator(".token").nth(2).wait_for()
    shot(tab, "playground-writing")
    tab.get_by_role("button", name="Stop").press("Enter")
    tab.get_by_role("button", name="Regenerate").wait_for()
    assert server.idle(3.0)
    num = tab.locator(".token").count()
    assert 3 <= num < 100
    tab.locator(".token").nth(1).click()
    expect(tab.locator(".bars li").first).to_be_visible()
    expect(tab.locator(".foot-of-output .facts")).to_contain_text(f"{num} tokens")


# -- inside ------------------------------------------------------------------------------------------------------------


def test_looking_inside_by_keys_alone(real: Make, visit: Make) -> None:
    server = real()
    tab = visit(server)
    go(tab, server, "inside", "textarea[name=text]")
    shot(tab, "inside-empty")
    field = tab.locator("textarea[name=text]")
    field.fill("the cat sat on the mat and looked at the")
    field.press("Enter")
    expect(tab.locator(".heads button")).to_have_count(8)
    shot(tab, "inside")
    tab.locator(".part .strip .token").nth(1).focus()
    tab.keyboard.press("ArrowRight")
    expect(tab.locator(".detail").first).to_contain_text("The model expected")
    tab.locator(".heads button[aria-checked=true]").focus()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowRight")
    expect(tab.locator(".one-head h4")).to_have_text("Layer 2, head 2")
    tab.locator(".looks [aria-selected=true]").focus()
    for _ in range(3):
        tab.keyboard.press("ArrowLeft")
    assert "looks at" in tab.locator(".said").inner_text()
    assert tab.locator(".looks .future").count() == 3
    tab.locator(".lens td[aria-selected=true]").focus()
    last = tab.locator(".detail").last.inner_text()
    assert last.startswith("Output, after")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowLeft")
    assert tab.locator(".detail").last.inner_text().startswith("Layer 1, after")
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        assert tab.evaluate(CONTRAST) == []
    shot(tab, "inside-dark")
    rows = tab.locator(".lens tbody tr")
    expect(rows).to_have_count(3)
    told = server.post("/api/inside", {"model": "tiny", "text": "the cat sat on the mat and looked at the"}).json
    shown = rows.first.locator("td").all_inner_texts()
    assert [one.replace("␣", " ") for one in shown] == [place[0][0] for place in told["lens"][-1]]
    tab.mouse.move(0, 0)
    box = tab.locator("canvas.map").bounding_box()
    tab.mouse.move(box["x"] + 2, box["y"] + box["height"] - 2)
    num = len(told["tokens"])
    assert tab.locator(".looks [aria-selected=true]").get_attribute("data-place") == str(num - 1)
    assert told["tokens"][0].strip() in tab.locator(".said").inner_text()


def test_looking_inside_on_a_phone_in_chinese_and_what_is_too_long(real: Make, visit: Make) -> None:
    server = real()
    tab = visit(server, locale="zh-CN", width=390, height=800)
    go(tab, server, "inside", "textarea[name=text]")
    tab.locator("textarea[name=text]").press("Enter")
    expect(tab.locator(".heads button")).to_have_count(8)
    assert fits(tab) and "谁在看谁" in tab.locator(".found").inner_text()
    shot(tab, "inside-phone")
    tab.locator("input[name=as-chat]").check()
    tab.get_by_role("button", name="查看内部").click()
    expect(tab.locator(".looks")).to_contain_text("assistant")
    tab.locator("textarea[name=text]").fill("很好 " * 300)
    tab.get_by_role("button", name="查看内部").click()
    expect(tab.locator(".toast").last).to_contain_text("128")
