"""Imports, rules, guidelines, and what becomes of labelling: records to learn from, the dashboard, deletion."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlalchemy", reason="needs the extra lyceum[serve]")

from lyceum.cli import judgements
from lyceum.corpus.records import Conversation, read_conversations, read_rankings
from lyceum.errors import StoreError, UsageError
from lyceum.serve import feedback
from lyceum.serve.label.board import board
from lyceum.serve.label.guidelines import GUIDELINES
from lyceum.serve.label.office import Office, understood
from lyceum.serve.label.queue import Labels
from lyceum.serve.label.rules import Rules
from lyceum.serve.label.tree import conversation, path_to
from lyceum.serve.store import Store

RULES = Rules(answers=2, written=2, turns=1, reviews=1, rankings=3, gold_share=0.0, languages=("en",))
FINE = {"spam": False, "wrong_language": False}
USER, ANSWER = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "store.sqlite")
    yield opened
    opened.close()


@pytest.fixture
def office(store: Store) -> Office:
    made = Office(Labels(store.database, chance=random.Random(0)))
    made.set_rules("boss", RULES)
    return made


def ranking(prompt: str, *answers: str, **more: Any) -> dict[str, Any]:
    turns = {"messages": [{"role": "user", "content": prompt}]}
    said = [{"role": "assistant", "content": text} for text in answers]
    return {"prompt": turns, "responses": said, "ranks": list(range(1, len(answers) + 1)), **more}


def rank(office: Office, who: str, order: str, *, consent: bool = True, **more: Any) -> None:
    """Rank answers of one letter each; "a=b" is a tie. more: of each letter its score, its flags."""
    task = office.labels.next(who, ("rank",))
    assert task is not None
    _, nodes = office.labels.seen(task)
    places, place = {}, 0
    for at, letter in enumerate(order.replace("=", "")):
        if f"={letter}" not in order:
            place = at + 1
        places[letter] = place
    texts = [nodes[id].content for id in task.shown]
    given: dict[str, Any] = {"ranks": [places[text] for text in texts], "none_acceptable": more.pop("none", False)}
    given |= {name: [each.get(text, default) for text in texts] for name, (each, default) in more.items()}
    office.labels.submit(who, task.id, given, consent=consent)


def write(office: Office, who: str, kind: str, consent: bool = True, **result: Any) -> None:
    task = office.labels.next(who, (kind,))
    assert task is not None
    office.labels.submit(who, task.id, result, consent=consent)


def found(store: Store, voices: str = "consensus") -> feedback.Harvest:
    return feedback.read(store.database.place, voices=voices)


def texts(one: Conversation) -> list[str]:
    return [message.content for message in one.messages]


# -- imports -----------------------------------------------------------------------------------------------------------


def test_a_conversation_is_imported_with_its_system_prompt_and_an_answer_behind_it(office: Office) -> None:
    turns = [{"role": "system", "content": "Be brief."}, USER, ANSWER, {"role": "user", "content": "Two?"}, ANSWER]
    assert office.bring([{"messages": turns, "meta": {"use": "chat", "language": "zh"}}], "conversations") == 1
    task = office.labels.next("ann", ("answer",))
    assert task is not None and task.about == {"use": "chat", "language": "zh"}
    tree, nodes = office.labels.seen(task)
    assert tree is not None
    talk = conversation(tree, path_to(nodes, task.node))
    assert texts(talk) == ["Be brief.", "One?", "1", "Two?"]  # the middle is as it was given: nobody ranks it


@pytest.mark.parametrize(
    ("as_what", "row", "said"),
    [
        ("rankings", {"prompt": "x", "chosen": "a"}, "no rankings"),
        ("rankings", ranking("x", *"abcdefghij"), "9 can be ranked"),
        ("conversations", {"messages": [USER, USER]}, "take turns"),
        ("conversations", {"messages": [{"role": "user", "content": " "}]}, "is empty"),
        ("conversations", {"x": 1}, "fits no known format"),
        ("gold_rankings", {**ranking("x", "a", "b"), "ranks": [1, 1]}, "nothing is known"),
        ("gold_labels", {"messages": [USER]}, "'labels' needs"),
        ("conversations", {"messages": [USER], "tools": [{"type": "function"}]}, "calls of tools"),
    ],
)
def test_a_row_that_is_none_is_named_and_nothing_is_imported(office: Office, as_what: str, row: Any, said: str) -> None:
    good = {"gold_labels": {"messages": [USER], "labels": FINE}, "conversations": {"messages": [USER]}}
    rows = [good.get(as_what, ranking("x", "a", "b")), row]
    with pytest.raises(StoreError, match=rf"rows\[1\]: .*{said}"):
        office.bring(rows, as_what)
    assert office.counts()["states"] == {} and office.counts()["gold"] == 0


def test_every_format_of_rankings_and_conversations_is_understood() -> None:
    pair = {"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: x\n\nAssistant: b"}
    assert [len(one.answers) for one in understood(pair, "rankings")] == [2]
    alpaca = {"instruction": "x", "output": "a"}
    assert [texts(one.prompt) for one in understood(alpaca, "conversations")] == [["x"]]


def test_rules_are_kept_and_checked(office: Office) -> None:
    office.set_rules("boss", replace(office.rules(), rankings=7, models=("demo",)))
    assert office.rules().rankings == 7 and office.rules().models == ("demo",)
    for wrong in ({"answers": 10}, {"written": 5}, {"accept": 2}, {"languages": ()}, {"minutes": 0}):
        with pytest.raises(StoreError):
            Rules(**wrong)
    with pytest.raises(StoreError, match="no rule 'ranking'") as error:
        Rules.from_json({"ranking": 3})
    assert "rankings" in error.value.hint


def test_guidelines_are_ours_until_they_are_others_and_ours_again(office: Office) -> None:
    assert office.guidelines("zh") == GUIDELINES["zh"] and office.guidelines("fr") == GUIDELINES["en"]
    office.set_guidelines("boss", "fr", "Soyez bref.")
    assert office.guidelines("fr") == "Soyez bref." and office.guidelines("en") == GUIDELINES["en"]
    office.set_guidelines("boss", "fr", " ")
    assert office.guidelines("fr") == GUIDELINES["en"]
    with pytest.raises(StoreError, match="guidelines of"):
        office.set_guidelines("boss", "en", "x" * 50_001)


# -- what becomes of it ------------------------------------------------------------------------------------------------


def test_several_rankings_become_their_consensus_or_each_ones(store: Store, office: Office) -> None:
    office.bring([ranking("x?", "a", "b", "c")], "rankings")
    for who, order in (("ann", "abc"), ("bob", "bca"), ("cat", "ab=c")):
        rank(office, who, order, scores=({"a": 7, "b": 4}, None), flags=({"c": ["fails_task"]}, []))
    got = found(store)
    (one,) = got.rankings
    ranks = {said.content: rank for said, rank in zip(one.responses, one.ranks, strict=True)}
    assert ranks == {"a": 1, "b": 2, "c": 3} and one.acceptable is None and one.origin == "human"
    assert one.meta["annotator"] == "consensus" and one.meta["annotators"] == 3 and one.meta["kind"] == "label_ranking"
    about = dict(zip([said.content for said in one.responses], one.meta["responses"], strict=True))
    assert about["c"]["flags"] == {"fails_task": 1.0} and about["a"]["score"] == 7 and "side" not in about["a"]
    assert {(r.response.content, r.value) for r in got.ratings} == {("a", 1.0), ("b", 0.5)}
    each = found(store, "each")
    assert [one.meta["annotator"] for one in each.rankings] == ["ann", "bob", "cat"]
    for one, order in zip(each.rankings, ("abc", "bca", "abc"), strict=True):
        said = [(rank, message.content) for message, rank in zip(one.responses, one.ranks, strict=True)]
        assert "".join(text for _, text in sorted(said)) == order
        assert [response["side"] for response in one.meta["responses"]] == [0, 1, 2]
    assert got.num_judgements == 3 and not got.left_out
    with pytest.raises(UsageError, match="no voices"):
        found(store, "loudest")


def test_none_acceptable_by_most_is_said_and_ends_the_tree(store: Store, office: Office) -> None:
    office.set_rules("boss", replace(RULES, turns=3))
    office.bring([ranking("x?", "a", "b")], "rankings")
    for who, none in (("ann", True), ("bob", True), ("cat", False)):
        rank(office, who, "ab", none=none)
    assert office.counts()["states"] == {"finished": 1}
    got = found(store)
    assert got.rankings[0].acceptable == (False, False) and got.conversations == []


def test_a_finished_tree_becomes_a_conversation_through_the_best_and_what_people_wrote(
    store: Store, office: Office
) -> None:
    office.set_rules("boss", replace(RULES, turns=2, rankings=1))
    office.bring([{"prompt": "x?"}], "conversations", use="chat")
    for who, text in (("ann", "a"), ("bob", "b")):
        write(office, who, "answer", text=text)
    for who in ("cat", "cat"):
        write(office, who, "label", **FINE)
    rank(office, "cat", "ab")
    write(office, "dan", "user", text="y?")
    write(office, "cat", "label", **FINE)
    assert [texts(one) for one in found(store).conversations] == [
        ["x?", "a"],
        ["x?", "b"],
    ]  # under way: what people wrote
    for who, text in (("ann", "c"), ("bob", "d")):
        write(office, who, "answer", text=text)
    for who in ("cat", "cat"):
        write(office, who, "label", **FINE)
    rank(office, "cat", "dc")
    got = found(store).conversations
    assert [texts(one) for one in got] == [["x?", "b"], ["x?", "a", "y?", "c"], ["x?", "a", "y?", "d"]]
    assert {one.meta["use"] for one in got} == {"chat"} and got[2].meta["responses"][0]["author"] == "bob"


def test_labels_become_shares_and_known_questions_nothing(store: Store, office: Office) -> None:
    office.set_rules("boss", replace(RULES, reviews=2, gold_share=0.9))
    office.bring([{"messages": [USER], "labels": {"spam": True, "wrong_language": False}}], "gold_labels")
    office.bring([ranking("sure?", "a", "b")], "gold_rankings")
    office.bring([{"prompt": "x?"}], "conversations")
    write(office, "ann", "answer", text="1")
    for who, spam in (("bob", True), ("cat", False)):
        for _ in range(2):  # the one that is known, and the other
            task = office.labels.next(who, ("label",))
            if task is not None:
                flags = ["opinion"] if spam else []
                result = {"spam": spam, "wrong_language": False, "quality": 6, "flags": flags}
                office.labels.submit(who, task.id, result, consent=True)
    got = found(store)
    assert [texts(one) for one in got.labels] == [["x?", "1"]] and got.rankings == []
    labels = got.labels[0].meta["labels"]
    assert (labels["spam"], labels["wrong_language"], labels["quality"], labels["opinion"]) == (0.5, 0, 6, 0.5)
    assert got.num_judgements == 2 and "sure?" not in json.dumps([one.to_json() for one in got.conversations])
    told = {one["annotator"]: one for one in board(office.labels, {"bob": "Bob"})["people"]}
    assert (
        told["bob"]["gold_labels"] == [1.0, 1]
        and told["cat"]["gold_labels"] == [0.5, 1]
        and told["bob"]["name"] == "Bob"
    )


def test_what_was_given_without_consent_or_halted_is_left_out_and_counted(store: Store, office: Office) -> None:
    office.bring([ranking("x?", "a", "b"), ranking("y?", "a", "b"), ranking("z?", "a", "b")], "rankings")
    for consent in (True, False, True):
        rank(office, "ann", "ab", consent=consent)
    with store.database.reading() as connection:
        trees = [grown for page in office.labels.pages(connection, ("ranking",)) for grown in page]
    last = next(tree for tree, _, tasks in trees if tasks[0].consent)
    office.halt(last.id)
    got = found(store)
    assert len(got.rankings) == 1 and got.left_out == {"no_consent": 1, "halted": 1} and got.num_judgements == 3
    rank(office, "bob", "a=b")
    assert found(store, "each").left_out["all_ties"] == 1


def test_a_text_without_consent_takes_what_was_said_of_it_along(store: Store, office: Office) -> None:
    office.bring([{"prompt": "x?"}], "conversations")
    write(office, "ann", "answer", consent=False, text="a")
    write(office, "bob", "answer", text="b")
    for _ in range(2):
        write(office, "cat", "label", **FINE)
    rank(office, "dan", "ab")
    got = found(store)
    assert got.rankings == [] and [texts(one) for one in got.labels] == [["x?", "b"]]
    assert got.left_out == {"no_consent": 2}


def test_it_joins_the_export_and_the_improvement(store: Store, office: Office, tmp_path: Path) -> None:
    office.bring([ranking(f"{n}?", "a", "b") for n in range(8)], "rankings")
    for who in ("ann", "bob"):
        for _ in range(8):
            rank(office, who, "ba", scores=({"a": 1, "b": 7}, None))
    chat = store.new("eve")
    asked = store.say("eve", chat.id, None, "user", "hi")
    sides = [store.say("eve", chat.id, asked.id, "assistant", text).id for text in ("yes", "no")]
    store.judgements.compare("eve", sides, sides[0], consent=True)
    to = tmp_path / "out.jsonl"
    done = feedback.export(store.database.place, to, held_out=0)
    assert done.num_rows == 9 and len(list(read_rankings(to))) == 9 and done.num_judgements == 17
    assert feedback.export(store.database.place, to, held_out=0, voices="each").num_rows == 17
    assert feedback.export(store.database.place, to, "kto", held_out=0).num_rows == 16
    with pytest.raises(feedback.DataError, match="labels"):
        feedback.export(store.database.place, to, "labels", held_out=0)
    write(office, "ann", "prompt", text="q?", instruction="i", examples=[["a", "b"]], input="c")
    write(office, "bob", "label", **FINE)
    assert feedback.export(store.database.place, to, "labels", held_out=0).num_rows == 1
    assert len(list(read_conversations(to))) == 1
    thumbs = judgements.of_thumbs(feedback.read(store.database.place).ratings)
    assert thumbs == []  # scores are of the same people and answers as the rankings: not told twice


def test_what_somebody_wrote_and_said_is_deleted_with_their_account(store: Store, office: Office) -> None:
    office.bring([{"prompt": "x?"}], "conversations")
    write(office, "ann", "answer", text="my secret words")
    write(office, "bob", "answer", text="b")
    for _ in range(2):
        write(office, "cat", "label", **FINE)
    store.forget("ann")
    assert b"my secret words" not in Path(store.database.place).read_bytes()
    assert office.counts()["states"] == {"halted": 1} and office.progress("ann") == {}
    assert office.progress("cat") == {"label": 2} and found(store).conversations == []
