"""Teaching while it talks and the runs page in a real browser: keys, buttons, traces, live curves; both languages, a phone.

A test skips where there is no Chromium. `LYCEUM_SCREENSHOTS=folder` keeps pictures of each state, for people to look at.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

from lyceum.engine.sampling import SamplingParams
from lyceum.engine.sequence import Output
from lyceum.tokens.tokenizer import Tokenizer

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytest.importorskip("nh3", reason="needs the extra lyceum[serve]")


def sibling(name: str) -> Any:
    """Another file of tests, for its fixtures."""
    spec = spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


chat = sibling("test_browser")
browser, visit, shot, last, CONTRAST = chat.browser, chat.visit, chat.shot, chat.last, chat.CONTRAST
pytestmark = chat.pytestmark
expect = sync_api.expect
Make = Callable[..., Any]
SENTENCES = [
    "The function returns a new string.", "I hope that this is of great help to you!", "It takes one argument, the text.",
    "Please do not hesitate to ask me anything else!", "Margins are removed from every line.", "What a wonderful question!",
]  # fmt: skip
NUM = 5  # sentences of an answer


class Teachable:
    """In an engine's place: says sentences drawn by the seed, a word a token; its hidden vectors tell polite ones apart."""

    max_batch, context_length, model = 8, 4096, None

    def __init__(self, tokenizer: Tokenizer, script: Any, pause_s: float):
        self.tokenizer, self.vocab_size, self.is_idle = tokenizer, tokenizer.vocab_size, True
        self.live: dict[int, tuple[list[int], SamplingParams, str]] = {}
        self.num_added = 0

    def add(self, prompt: list[int], params: SamplingParams, *, key: str = "", is_background: bool = False) -> int:
        said = b"".join(self.tokenizer.token_bytes[token] for token in prompt).decode().rsplit("assistant\n", 1)[1]
        done = sum(said.count(mark) for mark in ".!") % 1000
        rest = said[max(said.rfind("."), said.rfind("!")) + 1 :].lstrip()
        chance = torch.Generator().manual_seed(params.seed % 2**31 + done)
        sentence = SENTENCES[int(torch.randint(len(SENTENCES), (1,), generator=chance))]
        if rest:  # goes on with the sentence that was begun
            sentence = next(one for one in SENTENCES if one.startswith(rest))[len(rest) :]
        elif said:
            sentence = " " + sentence
        ids = self.tokenizer.encode(sentence) if done < NUM else [self.tokenizer.turn_end_id]
        self.num_added += 1
        self.live[self.num_added] = (ids, params, said)
        self.is_idle = False
        return self.num_added

    def step(self) -> list[Output]:
        found = []
        for id, (ids, params, _) in self.live.items():
            cut = next((n for n, token in enumerate(ids, 1) if token in params.stop_ids), len(ids))
            cut = min(cut, params.max_tokens)
            is_end = ids[cut - 1] in params.stop_ids
            found.append(Output(id, ids[:cut], "stop" if is_end else "length", stop=ids[cut - 1] if is_end else None))
        self.live.clear()
        self.is_idle = True
        return found

    def reply(self, id: int, start: int = 0) -> list[int]:
        return []

    def abort(self, id: int) -> None:
        self.live.pop(id, None)

    def encode(self, rows: list[list[int]], at: str) -> list[torch.Tensor]:
        found = []
        for row in rows:
            text = b"".join(self.tokenizer.token_bytes[token] for token in row).decode(errors="replace")
            tail = text.rstrip().rsplit("assistant\n", 1)[-1]
            sentence = max(SENTENCES, key=lambda one: tail.rfind(one[:8]))
            vector = torch.tensor([float(sentence.endswith("!")), float(sentence.endswith(".")), 1.0])
            found.append(vector.repeat(len(row), 1))
        return found


def ask(tab: Any, text: str) -> None:
    tab.locator(".composer textarea").fill(text)
    tab.keyboard.press("Enter")


def pace(tab: Any, tokens_a_second: int) -> None:
    tab.evaluate(f"localStorage.setItem('pace', '{tokens_a_second}')")


def test_keys_teach_while_it_talks_and_the_trace_shows_what_they_meant(page: Make, visit: Make) -> None:
    server = page(engine=Teachable)
    tab = visit(server)
    expect(tab.locator(".teach")).to_be_hidden()
    tab.get_by_role("button", name="Teach", exact=True).click()
    pace(tab, 30)
    expect(tab.locator(".teach .said")).to_contain_text("Ask something.")
    expect(tab.locator(".press.good")).to_be_disabled()
    shot(tab, "teach-idle")
    ask(tab, "What does dedent do?")
    expect(tab.locator(".prose.growing")).to_contain_text("e")
    tab.wait_for_timeout(700)
    tab.keyboard.press("ArrowDown")
    expect(tab.locator(".trace .bad").first).to_be_visible()
    expect(tab.locator(".teach .said")).to_contain_text("0 good, 1 bad")
    tab.wait_for_timeout(500)
    tab.keyboard.press("ArrowUp")
    tab.wait_for_timeout(300)
    shot(tab, "teach-streaming")
    tab.locator(".teach").get_by_role("button", name="Take the last key back").click()
    expect(tab.locator(".teach .said")).to_contain_text("0 good, 1 bad")
    last(tab).locator(".actions").wait_for()
    expect(tab.locator(".press.good")).to_be_disabled(timeout=8000)
    expect(last(tab).locator(".facts")).to_contain_text("0 good, 1 bad")
    shot(tab, "teach-done")
    (judged,) = server.store.judgements.presses("everybody")
    assert judged.presses[0][1] == -1 and judged.consent
    seconds = [begin for begin, _, _ in judged.shown]
    assert seconds == sorted(seconds) and len(seconds) > 5  # as the page saw them
    tab.reload()
    expect(last(tab).locator(".facts")).to_contain_text("0 good, 1 bad")
    tab.locator(".composer textarea").press("ArrowUp")  # nothing is told now: the key has its own meaning again
    expect(tab.locator(".editing textarea")).to_have_value("What does dedent do?")


def test_what_was_taught_chooses_what_is_said_and_can_be_forgotten(page: Make, visit: Make) -> None:
    server = page(engine=Teachable)
    tab = visit(server)
    pace(tab, 30)
    tab.get_by_role("button", name="Teach", exact=True).click()
    for number in range(3):
        ask(tab, f"Question {number}")
        begun = time.monotonic()
        while tab.locator(".composer .send").get_attribute("title") == "Stop" or time.monotonic() - begun < 0.5:
            text = tab.locator(".prose").last.inner_text()
            sentence = text[max(text.rfind("."), text.rfind("!"), 0) :]
            polite = any(one.endswith("!") and one[:6] in sentence for one in SENTENCES)
            tab.wait_for_timeout(250)
            tab.keyboard.press("ArrowDown" if polite else "ArrowUp")
            assert time.monotonic() - begun < 60
    tab.wait_for_timeout(2600)
    ask(tab, "And now?")
    last(tab).locator(".actions").wait_for(timeout=30_000)
    said = last(tab).locator(".prose").inner_text()
    assert said.count("!") < said.count("."), said  # half of what is said otherwise
    tab.get_by_role("button", name="Settings").click()
    section = tab.locator(".settings section", has_text="Teaching")
    expect(section.locator(".taught p")).to_contain_text("demo:")
    section.scroll_into_view_if_needed()
    shot(tab, "teach-settings")
    section.get_by_role("button", name="Forget").click()
    tab.locator(".dialog").get_by_role("button", name="Forget").click()
    expect(section.locator(".taught")).to_have_text("Nothing was taught yet.")
    assert server.store.judgements.presses("everybody") == []


def test_teaching_on_a_phone_in_chinese_with_buttons(page: Make, visit: Make) -> None:
    tab = visit(page(engine=Teachable), locale="zh-CN", scheme="dark", width=390, height=844)
    pace(tab, 30)
    tab.get_by_role("button", name="边听边教").click()
    ask(tab, "它做什么？")
    expect(tab.locator(".press.good")).to_be_enabled()
    tab.wait_for_timeout(800)
    tab.locator(".press.bad").click()
    expect(tab.locator(".trace .bad").first).to_be_visible()
    tab.wait_for_timeout(600)
    tab.locator(".press.good").click()
    expect(tab.locator(".teach .said")).to_contain_text("好 1 次，不好 1 次")
    shot(tab, "phone-teach-zh-dark")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_switches_exclude_each_other_and_colours_can_be_read(page: Make, visit: Make) -> None:
    for scheme in ("light", "dark"):
        tab = visit(page(engine=Teachable), scheme=scheme)
        two, teach = tab.get_by_role("button", name="Two answers"), tab.get_by_role("button", name="Teach", exact=True)
        two.click()
        teach.click()
        expect(two).to_have_attribute("aria-pressed", "false")
        pace(tab, 10)
        ask(tab, "go")
        expect(tab.locator(".press.good")).to_be_enabled()
        tab.wait_for_timeout(1200)
        tab.keyboard.press("ArrowUp")
        expect(tab.locator(".trace .good").first).to_be_visible()
        assert tab.evaluate(CONTRAST) == []
        shot(tab, f"teach-{scheme}")
        two.click()
        expect(teach).to_have_attribute("aria-pressed", "false")
        expect(tab.locator(".teach")).to_be_hidden()


# -- the runs page -----------------------------------------------------------------------------------------------------

RECIPE = 'name = "{name}"\nseed = {seed}\n\n[model]\ndepth = 4\n\n[pretrain]\nlr = {lr}\n\n[sft]\nlr = {lr}\n'


def make_run(folder: Path, *, lr: float = 0.5, num: int = 120, finished: bool = True) -> Path:
    """A run of two trained sections."""
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(RECIPE.format(name=folder.name, seed=0, lr=lr))
    for name in ("pretrain", "sft"):
        (folder / name).mkdir()
        is_done = finished or name == "pretrain"
        state = {"key": "k", "kind": name, "settings": {}, "inputs": {}, "finished": is_done, "wall_s": 754.0}
        (folder / name / "state.json").write_text(json.dumps(state))
        metric = "loss/text" if name == "pretrain" else "loss/reply"
        grow(folder / name, 0, num, lr, metric)
        if is_done:
            report = {
                "line": f"validation loss {1 / lr:.3f}",
                "params": 4_200_000,
                "rows": [{"model": "sft", "f1": 0.51}],
            }
            (folder / name / "report.json").write_text(json.dumps(report))
    samples = [
        {"step": step, "prompt": "What does json.dumps do?", "reply": f"<b>It</b> turns {step} objects into text."}
        for step in (10, 600, 1200)
    ]
    (folder / "sft" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return folder


def grow(section: Path, start: int, stop: int, lr: float, metric: str) -> None:
    with open(section / "metrics.jsonl", "a") as file:
        for n in range(start, stop):
            loss = 1.2 + 6 / (1 + lr * n / 8) + 0.15 * ((n * 7919) % 13 - 6) / 13
            row = {
                "step": 10 * n,
                "loss": loss,
                metric: loss,
                "tokens": 20480 * n,
                "tokens_per_s": 9000 + n,
                "lr": lr * (1 - n / 400),
            }
            if n % 20 == 0:
                row["valid/accuracy" if metric == "loss/reply" else "valid/bpb_docs"] = 0.3 + n / 400
            file.write(json.dumps(row) + "\n")


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    make_run(tmp_path / "runs" / "demo", finished=False)
    make_run(tmp_path / "runs" / "second", lr=0.25, num=90)
    (make_run(tmp_path / "runs" / "third", num=30) / "traceback.txt").write_text("Traceback")
    os.utime(tmp_path / "runs" / "demo" / "sft" / "state.json")
    return tmp_path / "runs"


def opened(visit: Make, server: Any, where: str = "", **given: Any) -> Any:
    tab = visit(server, **given)
    tab.goto(f"{server.url}/runs{where}")
    tab.locator(".runs li").first.wait_for()
    return tab


def test_a_run_is_followed_while_it_trains(page: Make, visit: Make, shelf: Path) -> None:
    tab = opened(visit, page(shelf=shelf))
    expect(tab.locator(".runs li")).to_have_count(3)
    expect(tab.locator(".run h1")).to_contain_text("demo")
    expect(tab.locator(".run h1 .badge")).to_have_text("running")
    expect(tab.locator(".run tbody").first.locator("tr")).to_have_count(2)
    first = tab.locator(".chart").first
    expect(first.locator("figcaption")).to_contain_text("Loss, nats a token")
    expect(first.locator("path.line")).to_have_count(1)
    shot(tab, "runs")
    before = first.locator(".value").inner_text()
    length = len(first.locator("path.line").get_attribute("d"))
    grow(shelf / "demo" / "sft", 120, 240, 0.5, "loss/reply")
    expect(first.locator(".value")).not_to_have_text(before, timeout=10_000)
    assert len(first.locator("path.line").get_attribute("d")) != length
    expect(first.locator("svg")).to_have_attribute(
        "aria-label", "Loss, nats a token: 240 points, last " + first.locator(".value").inner_text()
    )
    first.locator("svg").focus()
    tab.keyboard.press("ArrowLeft")
    expect(first.locator(".value .at")).to_contain_text("step 2,3")
    tab.locator(".curves details summary").click()
    expect(tab.locator(".charts").last.locator(".chart")).to_have_count(4)
    expect(tab.locator(".say td").last).to_have_text("<b>It</b> turns 1200 objects into text.")
    tab.locator("select[name=step]").select_option("10")
    expect(tab.locator(".say td").last).to_have_text("<b>It</b> turns 10 objects into text.")
    tab.get_by_role("link", name="pretrain").click()
    expect(tab.locator(".chart").nth(1).locator("figcaption")).to_contain_text("Docs, bits a byte")
    tab.get_by_text("Report", exact=True).click()
    expect(tab.locator(".run details table").first).to_contain_text("4,200,000")
    shot(tab, "runs-pretrain")


def test_two_runs_beside_each_other_and_what_is_not_there(page: Make, visit: Make, shelf: Path) -> None:
    server = page(shelf=shelf)
    tab = opened(visit, server, "#demo/sft", scheme="dark")
    tab.locator("select[name=other]").select_option("second")
    expect(tab.locator(".chart").first.locator("path.line")).to_have_count(2)
    expect(tab.locator(".legend")).to_contain_text("second")
    expect(tab.locator(".run")).to_contain_text("Settings that differ")
    expect(tab.locator(".run")).to_contain_text("sft.lr")
    box = tab.locator(".chart svg").first.bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + 40)
    expect(tab.locator(".chart .value").first).to_contain_text("step")
    shot(tab, "runs-two-dark")
    assert tab.evaluate(CONTRAST) == []
    tab.goto(f"{server.url}/runs#none")
    expect(tab.locator(".run")).to_contain_text("There is no run 'none'")


def test_the_runs_page_on_a_phone_in_chinese_and_without_a_folder(page: Make, visit: Make, shelf: Path) -> None:
    server = page(shelf=shelf)
    tab = opened(visit, server, "#second/sft", locale="zh-CN", width=390, height=844)
    expect(tab.locator(".run h1 .badge")).to_have_text("已完成")
    expect(tab.locator(".chart").first).to_be_visible()
    shot(tab, "phone-runs-zh")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    tab.locator(".frame").get_by_role("button", name="English").click()
    expect(tab.locator(".run h1 .badge")).to_have_text("finished")
    expect(tab.locator(".chart").first.locator("figcaption")).to_contain_text("Loss, nats a token")
    assert tab.evaluate(CONTRAST) == []
    other = page()
    tab = visit(other)
    tab.get_by_role("link", name="Runs").click()
    expect(tab.locator(".broken")).to_contain_text("--runs")
