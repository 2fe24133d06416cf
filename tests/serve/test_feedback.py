"""Judgements into records and files that other readers, ours and other people's, understand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lyceum.cli.main import main
from lyceum.corpus.records import (
    Conversation,
    Message,
    ToolCall,
    read_conversations,
    read_rankings,
    read_ratings,
)
from lyceum.corpus.watched import read_watched
from lyceum.errors import DataError, StoreError, UsageError
from lyceum.serve.feedback import FORMATS, export, harvest, is_held_out, pairs
from lyceum.serve.store import Store


class Person:
    """Somebody who asks and judges."""

    def __init__(self, store: Store, name: str = "alice", system: str = ""):
        self.store, self.name, self.system = store, name, system
        self.judge = store.judgements

    def ask(self, question: str, *answers: str, model: str = "demo") -> list[str]:
        """A new conversation with these answers to one question; their ids."""
        chat = self.store.new(self.name, system=self.system)
        asked = self.store.say(self.name, chat.id, None, "user", question)
        return [
            self.store.say(self.name, chat.id, asked.id, "assistant", text, model=model, parameters={"seed": place}).id
            for place, text in enumerate(answers)
        ]


@pytest.fixture
def alice(tmp_path: Path) -> Any:
    store = Store.open(tmp_path / "store.sqlite")
    yield Person(store)
    store.close()


def found(person: Person) -> Any:
    return harvest(person.judge.everybodys())


def texts(ranking: Any) -> list[tuple[str, float]]:
    return [(said.content, rank) for said, rank in zip(ranking.responses, ranking.ranks, strict=True)]


def test_a_comparison_becomes_a_ranking_that_keeps_who_which_and_where(alice: Person) -> None:
    left, right = alice.ask("2 + 2?", "5", "4")
    judged = alice.judge.compare("alice", [left, right], right, reason="right", consent=True)
    (ranking,) = found(alice).rankings
    assert ranking.prompt == Conversation((Message("user", "2 + 2?"),))
    assert texts(ranking) == [("5", 2.0), ("4", 1.0)] and ranking.origin == "human"
    assert ranking.meta["judgement"] == judged.id and ranking.meta["annotator"] == "alice"
    assert [(one["model"], one["parameters"], one["side"]) for one in ranking.meta["responses"]] == [
        ("demo", {"seed": 0}, 0),
        ("demo", {"seed": 1}, 1),
    ]


def test_a_ranking_keeps_ties_and_what_is_acceptable(alice: Person) -> None:
    answers = alice.ask("2 + 2?", "4", "four", "5")
    alice.judge.rank("alice", answers, [1, 1, 3], acceptable=[True, True, False], consent=True)
    (ranking,) = found(alice).rankings
    assert texts(ranking) == [("4", 1.0), ("four", 1.0), ("5", 3.0)] and ranking.acceptable == (True, True, False)
    assert [(better.content, worse.content) for better, worse in pairs(ranking)] == [("4", "5"), ("four", "5")]


def test_a_correction_is_a_pair_and_a_conversation_to_imitate(alice: Person) -> None:
    alice.system = "Be brief."
    (wrong,) = alice.ask("2 + 2?", "5")
    alice.judge.correct("alice", wrong, "4", consent=True)
    got = found(alice)
    assert texts(got.rankings[0]) == [("4", 1.0), ("5", 2.0)]
    (chat,) = got.conversations
    assert [(m.role, m.content) for m in chat.messages] == [
        ("system", "Be brief."),
        ("user", "2 + 2?"),
        ("assistant", "4"),
    ]


def test_thumbs_are_ratings_and_none_good_rates_them_all_bad(alice: Person) -> None:
    good, bad = alice.ask("2 + 2?", "4", "5")
    alice.judge.rate("alice", good, good=True, consent=True)
    alice.judge.rate("alice", bad, good=False, reason="sum", consent=True)
    alice.judge.compare("alice", alice.ask("3 + 3?", "7", "8"), "none", consent=True)
    got = found(alice)
    assert [(one.response.content, one.value, one.reason) for one in got.ratings] == [
        ("4", 1.0, ""),
        ("5", 0.0, "sum"),
        ("7", 0.0, ""),
        ("8", 0.0, ""),
    ]
    assert not got.rankings


def test_what_is_left_out_is_counted_by_reason(alice: Person) -> None:
    judge, bob = alice.judge, Person(alice.store, "bob")
    a, b = alice.ask("A?", "1", "2")
    judge.compare("alice", [a, b], a, consent=True)
    judge.compare("alice", [b, a], b, consent=True)  # changed her mind: superseded
    judge.compare("alice", alice.ask("B?", "1", "2"), "tie", consent=True)  # all_ties
    same = alice.ask("C?", "1", "1")
    judge.compare("alice", same, same[0], consent=True)  # equal_texts
    judge.rate("alice", a, good=True, consent=False)  # no_consent
    for _ in range(2):  # the same words, said of two conversations: repeated
        judge.rate("alice", alice.ask("D?", "yes")[0], good=True, consent=True)
    judge.rate("bob", bob.ask("D?", "yes")[0], good=True, consent=True)  # another person's is not a repetition
    chat = alice.store.new("alice")
    judge.rate("alice", alice.store.say("alice", chat.id, None, "assistant", "Hello").id, good=True, consent=True)
    judge.correct("alice", a, "1", consent=True)  # equal_texts
    got = found(alice)
    assert texts(got.rankings[0]) == [("2", 1.0), ("1", 2.0)] and len(got.rankings) == 1
    assert len(got.ratings) == 2 and got.num_judgements == 10
    reasons = {"superseded": 1, "all_ties": 1, "equal_texts": 2, "no_consent": 1, "repeated": 1, "no_prompt": 1}
    assert got.left_out == reasons
    kept = len(got.rankings) + len(got.ratings) + len(got.conversations)
    assert kept + sum(reasons.values()) == got.num_judgements


def test_who_says_the_same_again_is_heard_once(alice: Person) -> None:
    left, right = alice.ask("A?", "1", "2")
    for _ in range(2):
        alice.judge.compare("alice", [left, right], left, consent=True)
    got = found(alice)
    assert len(got.rankings) == 1 and got.left_out == {"superseded": 1}


def test_consent_withdrawn_later_counts(alice: Person) -> None:
    (answer,) = alice.ask("A?", "1")
    alice.judge.rate("alice", answer, good=True, consent=True)
    alice.judge.rate("alice", answer, good=True, consent=False)
    assert not found(alice).ratings


# -------------------------------------------------------------------------------- files


@pytest.fixture
def told(alice: Person, tmp_path: Path) -> Path:
    """A store with one ranking of three, one correction, two thumbs and a comparison."""
    alice.judge.rank("alice", alice.ask("2 + 2?", "4", "four", "5"), [1, 2, 3], consent=True)
    alice.judge.correct("alice", alice.ask("3 + 3?", "7")[0], "6", consent=True)
    for text, good in (("8", True), ("9", False)):
        alice.judge.rate("alice", alice.ask("4 + 4?", text)[0], good=good, consent=True)
    left, right = alice.ask("你好", "您好", "no")
    alice.judge.compare("alice", [left, right], left, consent=True)
    return tmp_path / "store.sqlite"


EXPECTED_PAIRS = [("2 + 2?", "4", "four"), ("2 + 2?", "4", "5"), ("2 + 2?", "four", "5")]
EXPECTED_PAIRS += [("3 + 3?", "6", "7"), ("你好", "您好", "no")]


@pytest.mark.parametrize("format", ["trl", "hh"])
def test_pairs_are_read_back_as_they_were_judged(told: Path, tmp_path: Path, format: str) -> None:
    done = export(told, tmp_path / "pairs.jsonl", format, held_out=0)
    read = [(r.prompt.messages[-1].content, *(m.content for m in r.responses)) for r in read_rankings(done.path)]
    assert read == EXPECTED_PAIRS
    assert (done.num_rows, done.num_records, done.num_judgements) == (5, 3, 5)


def test_rows_have_the_columns_that_other_programs_read(told: Path, tmp_path: Path) -> None:
    def first(format: str) -> Any:
        done = export(told, tmp_path / f"{format}.jsonl", format, held_out=0)
        return json.loads(done.path.read_text(encoding="utf-8").splitlines()[0])

    user = {"role": "user", "content": "2 + 2?"}
    assert first("trl") == {
        "prompt": [user],
        "chosen": [{"role": "assistant", "content": "4"}],
        "rejected": [{"role": "assistant", "content": "four"}],
    }
    assert first("hh") == {
        "chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4",
        "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: four",
    }
    completion = [{"role": "assistant", "content": "8"}]
    assert first("kto") == {"prompt": [{"role": "user", "content": "4 + 4?"}], "completion": completion, "label": True}
    turns = [{"role": "user", "content": "3 + 3?"}, {"role": "assistant", "content": "6"}]
    assert first("messages") == {"messages": turns}
    assert first("sharegpt") == {"conversations": [{"from": "human", "value": "3 + 3?"}, {"from": "gpt", "value": "6"}]}


def test_our_own_formats_are_read_back_whole(told: Path, tmp_path: Path, alice: Person) -> None:
    got = found(alice)
    for format, read, wanted in (
        ("rankings", read_rankings, got.rankings),
        ("ratings", read_ratings, got.ratings),
        ("conversations", read_conversations, got.conversations),
    ):
        assert list(read(export(told, tmp_path / "out.jsonl", format, held_out=0).path)) == wanted
    kto = list(read_ratings(export(told, tmp_path / "out.jsonl", "kto", held_out=0).path))
    assert [(one.response.content, one.value) for one in kto] == [("8", 1.0), ("9", 0.0)]
    for format in ("messages", "sharegpt"):
        (chat,) = read_conversations(export(told, tmp_path / "out.jsonl", format, held_out=0).path)
        assert chat.messages == got.conversations[0].messages


def test_presses_are_a_watched_reply_that_grows_in_its_place_and_each_showing_counts(
    alice: Person, tmp_path: Path
) -> None:
    (answer,) = alice.ask("2 + 2?", "4 it is")
    shown = [(0.0, 0.5, "4"), (0.5, 1.2, " it is")]
    first = alice.judge.press("alice", answer, shown[:1], [(0.4, 1.0)], consent=True)
    alice.judge.press("alice", answer, shown, [(0.4, 1.0), (1.1, -1.0)], consent=True, replaces=first)
    alice.judge.press("alice", answer, shown, [(0.7, -1.0)], consent=True)  # another showing
    alice.judge.press("alice", answer, shown, [(0.7, -1.0)], consent=False)
    got = found(alice)
    assert [one.presses for one in got.watched] == [((0.4, 1.0), (1.1, -1.0)), ((0.7, -1.0),)]
    assert got.watched[0].shown == tuple(shown) and got.left_out == {"no_consent": 1}
    assert list(read_watched(export(tmp_path, tmp_path / "out.jsonl", "presses", held_out=0).path)) == got.watched
    assert alice.judge.press("alice", answer, shown, [], consent=True) == ""
    for wrong in ([(0.4, 2.0)], [(float("nan"), 1.0)]):
        with pytest.raises(StoreError, match="presses that are none"):
            alice.judge.press("alice", answer, shown, wrong, consent=True)
    assert alice.judge.forget_presses("alice", "other") == 0 and alice.judge.forget_presses("alice", "demo") == 3
    assert not found(alice).watched


def test_every_format_is_of_a_kind_of_record_and_writes_something(told: Path, tmp_path: Path, alice: Person) -> None:
    (answer,) = alice.ask("5 + 5?", "10")
    alice.judge.press("alice", answer, [(0.0, 0.5, "1"), (0.5, 1.0, "0")], [(0.9, 1.0)], consent=True)
    for format in FORMATS.keys() - {"labels"}:  # of the labelling page: tests/serve/label
        assert export(told, tmp_path / "out.jsonl", format, held_out=0).num_rows > 0


def test_the_held_out_prompts_are_the_same_in_every_format_and_stay_it(alice: Person, tmp_path: Path) -> None:
    judge = alice.judge

    def judge_some(first: int, last: int) -> None:
        for number in range(first, last):
            a, b = alice.ask(f"{number}?", "yes", "no")
            judge.compare("alice", [a, b], a, consent=True)
            judge.rate("alice", a, good=True, consent=True)

    def held_out(format: str, read: Any) -> tuple[set[str], set[str]]:
        done = export(tmp_path, tmp_path / "out.jsonl", format, held_out=0.3)
        assert done.held_out_path == tmp_path / "out-held-out.jsonl"
        train, valid = ({r.prompt.messages[0].content for r in read(path)} for path in (done.path, done.held_out_path))
        assert (done.num_rows, done.num_held_out) == (len(train), len(valid)) and not train & valid
        return train, valid

    judge_some(0, 24)
    before = held_out("rankings", read_rankings)
    assert before == held_out("ratings", read_ratings) == held_out("trl", read_rankings)
    assert 1 <= len(before[1]) <= 16  # 24 prompts at 0.3; four deviations of the binomial above
    judge_some(24, 28)
    after = held_out("rankings", read_rankings)
    assert before[0] < after[0] and before[1] <= after[1]


def test_a_later_turn_is_on_the_side_of_the_conversations_beginning() -> None:
    first, answer = Message("user", "hi"), Message("assistant", "hello")
    later = Conversation((Message("system", "Be kind."), first, answer, Message("user", "more")))
    shares = [number / 200 for number in range(200)]
    assert [is_held_out(later, share) for share in shares] == [
        is_held_out(Conversation((first,)), share) for share in shares
    ]


def test_what_a_format_cannot_say_is_left_out_and_counted(alice: Person, tmp_path: Path) -> None:
    judge = alice.judge
    judge.correct("alice", alice.ask("2 + 2?", "5")[0], "4", consent=True)
    judge.correct("alice", alice.ask("Repeat!", "no")[0], "So:\n\nHuman: hello", consent=True)
    alice.system = "Be brief."
    judge.correct("alice", alice.ask("3 + 3?", "5")[0], "6", consent=True)
    alice.system = ""
    chat = alice.store.new("alice")
    asked = alice.store.say("alice", chat.id, None, "user", "len?")
    call = alice.store.say("alice", chat.id, asked.id, "assistant", "", tool_calls=[ToolCall("c1", "lookup", "{}")])
    told = alice.store.say("alice", chat.id, call.id, "tool", "a length", tool_call_id="c1")
    judge.correct("alice", alice.store.say("alice", chat.id, told.id, "assistant", "?").id, "A length.", consent=True)
    done = export(tmp_path, tmp_path / "out.jsonl", "hh", held_out=0)
    assert done.num_rows == 1 and done.left_out == {"hh_has_no_such_turn": 2, "hh_marker_in_a_text": 1}
    done = export(tmp_path, tmp_path / "out.jsonl", "sharegpt", held_out=0)
    assert done.num_rows == 3 and done.left_out == {"sharegpt_has_no_such_turn": 1}
    (last,) = list(read_rankings(export(tmp_path, tmp_path / "out.jsonl", "trl", held_out=0).path))[-1:]
    assert last.prompt.messages[1].tool_calls[0].name == "lookup" and last.prompt.messages[2].tool_call_id == "c1"


def test_nothing_to_write_is_an_error_that_says_what_there_was(alice: Person, tmp_path: Path) -> None:
    alice.judge.rate("alice", alice.ask("2 + 2?", "4")[0], good=True, consent=False)
    with pytest.raises(DataError, match="1 judgements; left out: .*no_consent"):
        export(tmp_path, tmp_path / "out.jsonl", "kto")
    assert not (tmp_path / "out.jsonl").exists()


def test_wrong_words_are_refused(alice: Person, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'rankings'"):
        export(tmp_path, "out.jsonl", "ranking")
    for to, share in (("out.json", 0.1), ("out.jsonl", 1.0), ("out.jsonl", -0.1)):
        with pytest.raises(UsageError, match="cannot hold out"):
            export(tmp_path, tmp_path / to, held_out=share)
    with pytest.raises(StoreError, match="there is no store"):
        export(tmp_path / "elsewhere.sqlite", tmp_path / "out.jsonl")


def test_the_command_writes_and_says_what_it_left_out(
    told: Path, alice: Person, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alice.judge.rate("alice", alice.ask("?", "!")[0], good=True, consent=False)
    out = tmp_path / "kto.jsonl"
    words = ["feedback", "export", str(tmp_path), "--to", str(out), "--format", "kto", "--held-out", "0"]
    assert main(words) == 0
    assert capsys.readouterr().out == f"6 judgements, 2 ratings\n{out}: 2 rows\nleft out: 1 no_consent\n"
    assert main(["feedback", "export", str(tmp_path / "none"), "--to", str(out)]) == 1
    assert "hint: `lyceum serve` makes one" in capsys.readouterr().err
    assert main(["feedback"]) == 2
