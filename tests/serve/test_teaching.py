"""Live teaching on a real server with a real engine: what is told, credited, kept, learned again and forgotten."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nh3", reason="needs the extra lyceum[serve]")

from lyceum.engine.engine import Engine
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.serve.feedback import export, harvest
from lyceum.serve.teaching import shown_pieces
from lyceum.tokens.tokenizer import Tokenizer

Make = Callable[..., Any]
FAST = {"candidates": 3, "pace": 50.0}
KEYS = [(1.5, 1), (5.2, -1)]  # where each token takes a quarter of a second: on the first segment and on the second


class Speaker(Decoder):
    """A decoder that says whole words and marks only, each one token, so that its text has its very ids again."""

    def __init__(self, spec: ModelSpec, seed: int, token_bytes: Sequence[bytes]):
        super().__init__(spec, torch.Generator().manual_seed(seed))
        words = [piece in (b".", b",") or re.fullmatch(rb" [a-z]+", piece) is not None for piece in token_bytes]
        self.silent = torch.where(torch.tensor(words), 0.0, -1e9)
        with torch.no_grad():
            for weight in self.parameters():
                weight *= 5 if weight.dim() > 1 else 1

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().logits(hidden) + self.silent


def speaking(decoder: Decoder, seed: int = 0) -> Callable[..., Engine]:
    """Makes the page's engine: real, with random weights."""

    def make(tokenizer: Tokenizer, script: Any = None, pause_s: float = 0.0) -> Engine:
        speaker = Speaker(decoder.spec, seed, tokenizer.token_bytes)
        return Engine(speaker, max_batch=8, token_bytes=tokenizer.token_bytes, pack=False)

    return make


@pytest.fixture
def server(page: Make, decoder: Decoder) -> Any:
    return page(engine=speaking(decoder))


def begin(server: Any) -> str:
    return server.post("/api/conversations", {}).json["id"]


def say(server: Any, content: str = "go", teach: Any = FAST, most: int = 24, **more: Any) -> dict[str, Any]:
    """An answer under way."""
    given = {
        "parent": None,
        "content": content,
        "models": ["demo"],
        "parameters": {"max_tokens": most, "seed": 3},
        **more,
    }
    said = server.post(f"/api/conversations/{begin(server)}/turns", given | ({"teach": teach} if teach else {}))
    assert said.status == 200, said.text
    return said.json["messages"][1]


def follow(server: Any, message: str) -> dict[str, Any]:
    """The whole answer, once it is there."""
    text = server.ask("GET", f"/api/messages/{message}/events").text
    return [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")][-1]["message"]


def report(tokens: list[int], presses: list[tuple[float, int]], **more: Any) -> dict[str, Any]:
    """A token every quarter of a second."""
    given = {"view": "v", "shown_tokens": tokens, "shown_s": [token / 4 for token in tokens], "consent": True}
    return {**given, "press_s": [s for s, _ in presses], "press_values": [value for _, value in presses], **more}


def teach(server: Any, **more: Any) -> tuple[str, dict[str, Any]]:
    """An answer on which two keys were pressed; its id, and what the server said of them."""
    answer = say(server, **more)
    follow(server, answer["id"])
    told = server.post(f"/api/messages/{answer['id']}/presses", report(list(range(1, more.get("most", 24) + 1)), KEYS))
    assert told.status == 200, told.text
    return answer["id"], told.json


def kept(server: Any, num: int, owner: str = "everybody") -> list[Any]:
    """The presses in the store, once there are so many."""
    end = time.monotonic() + 5
    while len(found := server.store.judgements.presses(owner)) != num and time.monotonic() < end:
        time.sleep(0.01)
    assert len(found) == num
    return found


# -- what is told ------------------------------------------------------------------------------------------------------


def test_untaught_it_says_what_it_would_have_said_at_a_pace(server: Any) -> None:
    plain = follow(server, say(server, teach=None, parameters={"max_tokens": 24, "seed": 3, "temperature": 1.0})["id"])
    start = time.monotonic()
    answer = say(server)
    told = follow(server, answer["id"])
    assert told["content"] == plain["content"] and told["state"] == "done" and told["finish_reason"] == "length"
    assert time.monotonic() - start >= 24 / 50 and told["completion_tokens"] == 24
    assert answer["parameters"]["temperature"] == 1.0  # teaching needs something to choose from
    assert answer["parameters"]["taught"] == {**FAST, "answers": 0}


@pytest.mark.slow
def test_stopping_stops_it_and_the_engine(server: Any) -> None:
    answer = say(server, most=400, teach={"candidates": 3, "pace": 20.0})
    time.sleep(0.3)
    assert server.post(f"/api/messages/{answer['id']}/stop", {}).json["stopped"]
    told = follow(server, answer["id"])
    assert told["state"] == "stopped" and 0 < told["completion_tokens"] < 100
    assert server.idle(2.0)


def test_two_answers_cannot_be_taught_at_once_and_bounds_are_held(server: Any) -> None:
    id = begin(server)
    given = {"parent": None, "content": "go", "models": ["demo", "demo"], "teach": FAST}
    assert server.post(f"/api/conversations/{id}/turns", given).json["error"]["param"] == "teach"
    for wrong in ({"candidates": 0}, {"candidates": 17}, {"pace": 0.0}, {"pace": "5"}):
        given = {"parent": None, "content": "go", "models": ["demo"], "teach": wrong}
        assert server.post(f"/api/conversations/{id}/turns", given).status == 400


# -- what is credited --------------------------------------------------------------------------------------------------


def test_a_press_means_what_was_shown_a_moment_before(server: Any) -> None:
    answer = say(server)
    whole = follow(server, answer["id"])
    presses = report(list(range(1, 25)), [(1.2, 1), (6.0, -1)])
    segments = server.post(f"/api/messages/{answer['id']}/presses", presses).json["segments"]
    assert "".join(segment["text"] for segment in segments) == whole["content"] and len(segments) > 3
    encode, at = server.service.models["demo"].tokenizer.encode, 0
    for place, segment in enumerate(segments):  # token k, from 0, was there at (k + 1) / 4 s
        begin_s, at = (at + 1) / 4, at + len(encode(segment["text"]))
        end_s = (at + 1) / 4 if place + 1 < len(segments) else 99.0
        # the presses mean 0.4 to 1.0 s and 5.2 to 5.8 s
        shares = [max(0.0, min(end_s, upto) - max(begin_s, since)) / 0.6 for since, upto in ((0.4, 1.0), (5.2, 5.8))]
        assert segment["weight"] == pytest.approx(sum(shares), abs=1e-3)
        assert segment["label"] == (1 if shares[0] else -1 if shares[1] else 0)


@pytest.mark.slow
def test_keys_pressed_while_it_talks_change_what_it_says_next(server: Any) -> None:
    answer = say(server, most=300, teach={"candidates": 4, "pace": 50.0})
    time.sleep(0.5)
    first = server.post(f"/api/messages/{answer['id']}/presses", report([1, 2, 3, 4, 5], [(0.9, 1)]))
    assert first.status == 200 and first.json["lessons"] == 1
    pupil = server.teaching.pupils["everybody", "demo"]
    assert pupil.taste.is_taught and server.store.judgements.presses("everybody") == []  # it is not whole yet
    server.post(f"/api/messages/{answer['id']}/stop", {})
    follow(server, answer["id"])
    (judged,) = kept(server, 1)
    assert judged.presses == ((0.9, 1.0),) and judged.consent and judged.answers[0].model == "demo"


@pytest.mark.slow
def test_the_next_answer_is_chosen_by_what_was_taught(server: Any) -> None:
    plain = follow(server, say(server, content="and now")["id"])
    id, _ = teach(server)
    answer = say(server, content="and now")
    assert answer["parameters"]["taught"]["answers"] == 1
    chosen = follow(server, answer["id"])
    assert chosen["content"] != plain["content"]  # the same seed: only the choice differs
    pupil, telling = server.teaching.pupils["everybody", "demo"], server.teaching.watched[answer["id"]].telling
    # each segment taken scores at least as well as the one that would have been said by itself
    served = server.service.models["demo"]
    row: list[int] = list(telling.prompt)
    for (begin_at, end), phi in zip(telling.spans, telling.phi, strict=True):
        (own,) = served.engine.sibling().generate([row], replace(telling.params, max_tokens=min(12, 24 - begin_at),
            stop_ids=(*telling.params.stop_ids, *telling.ends.ids)))  # fmt: skip
        state = served.engine.sibling().encode([[*row, *own.ids]], at="all")[0][-len(own.ids) :].mean(0)
        assert pupil.taste.values(phi[None]) >= pupil.taste.values(state[None].float()) - 1e-6
        row += telling.reply[begin_at:end]


def test_reports_that_do_not_fit_are_refused(server: Any) -> None:
    answer = say(server)
    follow(server, answer["id"])
    path = f"/api/messages/{answer['id']}/presses"
    for wrong in (
        report([], []), report([1, 1], []), report([2, 1], []), report([1, 99], []), report([1], [(1.0, 2)]),
        report([1], [(-1.0, 1)]), report([1, 2], [], shown_s=[1.0]), report([1, 2], [], shown_s=[1.0, 0.5]),
        report([1], [(1.0, 1)], press_s=[]), report([1], [], view=""), report([1], [], more=1),
    ):  # fmt: skip
        assert server.post(path, wrong).status == 400, wrong
    plain = follow(server, say(server, teach=None)["id"])
    for id in (plain["id"], "msg_none"):
        assert server.post(f"/api/messages/{id}/presses", report([1], [(1.0, 1)])).status == 404
    assert server.ask("GET", "/api/teaching").json == {"taught": {}}


# -- what is kept, learned again, forgotten ----------------------------------------------------------------------------


def test_presses_are_kept_once_for_each_showing_and_the_last_report_counts(server: Any) -> None:
    id, _ = teach(server)
    server.post(f"/api/messages/{id}/presses", report([1, 2, 3, 4], [(1.5, 1), (2.2, -1), (2.5, -1)]))
    server.post(f"/api/messages/{id}/presses", report([5, 6], [(2.0, 1)], view="another tab"))
    first, second = kept(server, 2)
    assert [len(one.presses) for one in (first, second)] == [3, 1]
    assert server.ask("GET", "/api/teaching").json == {"taught": {"demo": {"answers": 2, "presses": 4}}}
    server.post(f"/api/messages/{id}/presses", report([5, 6], [], view="another tab"))  # all of it taken back
    (left,) = kept(server, 1)
    assert "".join(text for _, _, text in left.shown) and left.shown[0][0] == 0.25
    assert len(server.teaching.pupils["everybody", "demo"].lessons) == 1


def test_after_a_restart_the_same_is_known_from_what_was_kept(server: Any) -> None:
    teach(server)
    kept(server, 1)
    before = server.teaching.pupils["everybody", "demo"].taste
    server.teaching.pupils.clear()  # as a new process begins
    follow(server, say(server)["id"])
    after = server.teaching.pupils["everybody", "demo"].taste
    assert after.is_taught and after is not before
    probe = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    one, two = before.values(probe), after.values(probe)
    torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_new_weights_behind_the_name_are_taught_anew(server: Any, decoder: Decoder) -> None:
    teach(server)
    kept(server, 1)
    old = server.teaching.pupils["everybody", "demo"]
    served = server.service.models["demo"]
    other = speaking(decoder, seed=5)(served.tokenizer)
    server.service.replace(replace(served, seat=type(served.seat)(other), fingerprint="new"))
    follow(server, say(server)["id"])
    new = server.teaching.pupils["everybody", "demo"]
    assert new is not old and new.fingerprint == "new" and new.taste.is_taught
    assert not torch.allclose(new.taste.weight_D, old.taste.weight_D)


def test_forgetting_deletes_and_nothing_comes_back(server: Any) -> None:
    id, _ = teach(server)
    kept(server, 1)
    assert server.ask("DELETE", "/api/teaching/demo").json == {"forgotten": 1}
    kept(server, 0)
    assert server.post(f"/api/messages/{id}/presses", report([1, 2], [(1.0, 1)])).status == 404
    assert say(server)["parameters"]["taught"]["answers"] == 0


@pytest.mark.slow
def test_a_deleted_conversation_takes_its_lessons_along(server: Any) -> None:
    id, _ = teach(server)
    conversation = server.store.message("everybody", id).conversation
    kept(server, 1)
    server.ask("DELETE", f"/api/conversations/{conversation}")
    kept(server, 0)
    assert say(server)["parameters"]["taught"]["answers"] == 0


@pytest.mark.slow
def test_one_persons_keys_teach_nobody_else(page: Make, decoder: Decoder, known: Make) -> None:
    server = page(engine=speaking(decoder), porter=known("ann", "bob"))

    def ask(name: str, method: str, path: str, body: Any = None) -> Any:
        return server.ask(method, path, body, {"authorization": f"Bearer {name[0] * 40}"})

    def answer(name: str) -> dict[str, Any]:
        id = ask(name, "POST", "/api/conversations", {}).json["id"]
        given = {
            "parent": None,
            "content": "go",
            "models": ["demo"],
            "parameters": {"max_tokens": 8, "seed": 1},
            "teach": FAST,
        }
        said = ask(name, "POST", f"/api/conversations/{id}/turns", given).json["messages"][1]
        ask(name, "GET", f"/api/messages/{said['id']}/events")
        return said

    first = answer("ann")
    path = f"/api/messages/{first['id']}/presses"
    assert ask("bob", "POST", path, report([1, 2, 3], [(1.0, 1)])).status == 404
    assert ask("ann", "POST", path, report([1, 2, 3], [(1.0, 1)])).status == 200
    assert answer("ann")["parameters"]["taught"]["answers"] == 1
    assert answer("bob")["parameters"]["taught"]["answers"] == 0
    assert ask("bob", "DELETE", "/api/teaching/demo").json == {"forgotten": 0}
    kept(server, 1, "ann")


# -- for training ------------------------------------------------------------------------------------------------------


def test_the_same_presses_are_a_log_for_training(server: Any, tmp_path: Path) -> None:
    id, _ = teach(server)
    kept(server, 1)
    (watched,) = harvest(server.store.judgements.everybodys()).watched
    assert watched.presses == ((1.5, 1.0), (5.2, -1.0)) and watched.prompt.messages[-1].content == "go"
    assert server.store.message("everybody", id).content.startswith(watched.text.rstrip("\ufffd"))
    done = export(tmp_path / "store.sqlite", tmp_path / "presses.jsonl", "presses", held_out=0)
    assert done.num_rows == 1
    again = server.ask("GET", "/api/account/export")
    judged = json.loads(again.text)["conversations"][0]["judgements"][0]
    assert judged["kind"] == "presses" and judged["presses"] == [[1.5, 1.0], [5.2, -1.0]]
    server.ask("DELETE", "/api/account")
    kept(server, 0)
    assert server.post("/api/account/import", {"conversations": json.loads(again.text)["conversations"]}).status == 200
    (back,) = kept(server, 1)
    assert back.presses == ((1.5, 1.0), (5.2, -1.0)) and back.shown == watched.shown


def test_pieces_are_whole_characters_with_the_seconds_in_which_each_was_the_newest() -> None:
    token_bytes = [b"a", "é".encode()[:1], "é".encode()[1:], b"b"]
    found = shown_pieces([0, 1, 2, 3], [1, 2, 4], [0.5, 1.0, 1.25], 2.0, token_bytes)
    assert found == ((0.5, 1.0, "a"), (1.0, 1.25, ""), (1.25, 2.0, "éb"))
