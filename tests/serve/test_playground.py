"""The playground's corrections: in the store like any other, theirs alone, learned from with consent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("nh3", reason="needs the extra lyceum[serve]")
pytest.importorskip("sqlalchemy", reason="needs the extra lyceum[serve]")

from lyceum.serve.chat import EDITOR
from lyceum.serve.feedback import harvest

Make = Callable[..., Any]


def given(**more: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": "2 + 2 =", "completion": " 5", "correction": " 4", "consent": True, **more}


def test_a_correction_is_a_conversation_and_an_example_to_learn_from(page: Make) -> None:
    server = page()
    kept = server.post("/api/playground/corrections", given(checkpoint="fp_abc", parameters={"temperature": 0.5}))
    assert kept.status == 200, kept.text
    found = harvest(server.store.judgements.everybodys())
    (conversation,), (ranking,) = found.conversations, found.rankings
    assert [(one.role, one.content) for one in conversation.messages] == [("user", "2 + 2 ="), ("assistant", " 4")]
    assert [one.content for one in ranking.responses] == [" 4", " 5"] and ranking.meta["responses"][1][
        "model"
    ] == "demo"
    opened = server.ask("GET", f"/api/conversations/{kept.json['conversation']}").json
    assert opened["conversation"]["title"] == "2 + 2 =" and opened["messages"][1]["corrected"]
    assert opened["messages"][1]["parameters"] == {"temperature": 0.5, "playground": True, "checkpoint": "abc"}


def test_without_consent_it_is_kept_and_not_learned_from(page: Make) -> None:
    server = page()
    assert server.post("/api/playground/corrections", given(consent=False)).status == 200
    found = harvest(server.store.judgements.everybodys())
    assert (found.num_judgements, found.conversations, dict(found.left_out)) == (1, [], {"no_consent": 1})


def test_a_corrected_edit_stands_under_what_an_editor_is_told(page: Make) -> None:
    server = page()
    asked = given(prompt="Helo", instruction="Fix it.", completion="Helo", correction="Hello")
    assert server.post("/api/playground/corrections", asked).status == 200
    (conversation,) = harvest(server.store.judgements.everybodys()).conversations
    said = [(one.role, one.content) for one in conversation.messages]
    assert said == [("system", EDITOR), ("user", "Fix it.\n\nHelo"), ("assistant", "Hello")]
    server.post("/v1/edits", {"model": "demo", "instruction": "Fix it.", "input": "Helo"})
    assert EDITOR in server.engines["demo"].heard[-1] and "Fix it.\n\nHelo" in server.engines["demo"].heard[-1]


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({"model": "none"}, 404),
        ({"correction": " "}, 409),
        ({"correction": ""}, 400),
        ({"prompt": "\n"}, 409),
        ({"more": 1}, 400),
    ],
)
def test_what_says_nothing_is_refused_and_leaves_nothing_to_learn(
    page: Make, wrong: dict[str, Any], status: int
) -> None:
    server = page()
    assert server.post("/api/playground/corrections", given(**wrong)).status == status
    assert list(server.store.judgements.everybodys()) == []


def test_corrections_are_their_owners_alone(page: Make, known: Make) -> None:
    server = page(porter=known("alice", "bob"))
    alice, bob = ({"Authorization": f"Bearer {letter * 40}"} for letter in "ab")
    kept = server.post("/api/playground/corrections", given(), **alice).json["conversation"]
    assert server.ask("GET", f"/api/conversations/{kept}", None, alice).status == 200
    assert server.ask("GET", f"/api/conversations/{kept}", None, bob).status == 404
    assert server.post("/api/playground/corrections", given()).status == 401


def test_the_models_say_what_they_can(page: Make, decoder: Any) -> None:
    told = page(models={"real": decoder}, can_insert=True).ask("GET", "/api/playground").json["models"]
    assert [(one["id"], one["inserts"], one["chats"]) for one in told] == [("demo", False, True), ("real", True, True)]
