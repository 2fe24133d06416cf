"""The labelling queue on both databases: trees from their first prompt to the end, and who gets which task."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("sqlalchemy", reason="needs the extra lyceum[serve]")

from lyceum.errors import NotFound, StoreError
from lyceum.serve.label.office import Office
from lyceum.serve.label.queue import Labels
from lyceum.serve.label.rules import KINDS, MIX, REPORTS, Rules
from lyceum.serve.label.tree import Task, ranks_of
from lyceum.serve.store import Store

RULES = Rules(answers=2, written=2, turns=2, reviews=1, rankings=2, gold_share=0.0, languages=("en",))
FINE = {"spam": False, "wrong_language": False, "quality": 5}
EXAMPLES = {"instruction": "x", "examples": [["a", "b"]], "input": "c"}  # which prompts of the other kinds do not need


class Clock:
    """Seconds that pass when they are told to."""

    now = 1e9

    def __call__(self) -> float:
        return self.now


class Room:
    """A queue, and people at it."""

    def __init__(self, store: Store, rules: Rules = RULES):
        self.clock = Clock()
        self.labels = Labels(store.database, chance=random.Random(0), clock=self.clock)
        self.office = Office(self.labels)
        self.office.set_rules("boss", rules)

    def next(self, who: str, *kinds: str) -> Task | None:
        return self.labels.next(who, kinds or KINDS)

    def do(self, who: str, kind: str, **result: Any) -> Task:
        """The next task of a kind, done at once."""
        task = self.next(who, kind)
        assert task is not None and task.kind == kind, f"no {kind} for {who}"
        return self.labels.submit(who, task.id, result, consent=True)

    def rank(self, who: str, best: str = "") -> Task:
        """Rank so that the answers stand in the order of their texts, or one of them before all."""
        task = self.next(who, "rank")
        assert task is not None
        _, nodes = self.labels.seen(task)
        texts = [nodes[id].content for id in task.shown]
        order = sorted(texts, key=lambda text: (text != best, text))
        ranks = [order.index(text) + 1 for text in texts]
        return self.labels.submit(who, task.id, {"ranks": ranks}, consent=True)

    def states(self) -> dict[str, int]:
        return self.office.counts()["states"]

    def bring(self, *prompts: str, answers: int = 0, **more: Any) -> None:
        if answers:
            rows = [{"prompt": p, "responses": [{"role": "assistant", "content": f"{p} {n}"} for n in range(answers)],
                     "ranks": [1] * answers} for p in prompts]  # fmt: skip
            rows = [{**row, "prompt": {"messages": [{"role": "user", "content": row["prompt"]}]}} for row in rows]
            self.office.bring(rows, "rankings", **more)
        else:
            self.office.bring([{"prompt": p} for p in prompts], "conversations", **more)


@pytest.fixture
def room(store: Store) -> Iterator[Room]:
    yield Room(store)


def test_a_tree_from_its_first_prompt_to_the_end(room: Room) -> None:
    asked = room.do("ann", "prompt", text=" What is a noun? ", use="open_qa", **EXAMPLES)
    assert asked.about["variant"] in ("plain", "few_shot") and room.states() == {"review": 1}
    assert room.next("ann", "label", "rank", "answer", "user") is None  # her own
    room.do("bob", "label", **FINE, use="open_qa")
    assert room.states() == {"growing": 1}
    room.do("ann", "answer", text="A word for a thing.")
    room.do("bob", "answer", text="A name.")
    assert room.next("cat", "answer") is None  # two are wanted
    labelled = [room.do(who, "label", **FINE) for who in ("bob", "cat")]
    assert {task.node for task in labelled} == set(labelled[0].shown + labelled[1].shown) or len(labelled) == 2
    assert room.states() == {"ranking": 1} and room.next("ann", "rank") is None  # she wrote one of them
    for who in ("cat", "dan"):
        room.rank(who, best="A name.")
    assert room.next("eve", "rank") is None and room.next("bob", "user") is None  # bob wrote the best one
    said = room.do("ann", "user", text="And a verb?")
    _, nodes = room.labels.seen(said)
    assert nodes[said.node or ""].content == "A name."
    room.do("eve", "label", **FINE)
    for who, text in (("ann", "What one does."), ("bob", "A deed.")):
        room.do(who, "answer", text=text)
    for who in ("bob", "ann"):
        room.do(who, "label", **FINE)
    for who in ("cat", "dan"):
        room.rank(who)
    assert room.states() == {"finished": 1} and room.next("eve", "rank", "label", "answer", "user") is None


def test_a_prompt_that_is_not_accepted_ends_there_and_a_bad_answer_is_asked_for_again(room: Room) -> None:
    room.do("ann", "prompt", text="buy now", **EXAMPLES)
    room.do("bob", "label", spam=True, wrong_language=False)
    assert room.states() == {"low_grade": 1}
    room.bring("Why?")
    room.do("ann", "answer", text="Because.")
    room.do("bob", "answer", text="asdf")
    for who in ("cat", "dan"):
        task = room.next(who, "label")
        assert task is not None
        text = room.labels.seen(task)[1][task.node or ""].content
        room.labels.submit(who, task.id, {"spam": text == "asdf", "wrong_language": False}, consent=True)
    assert room.next("bob", "answer") is None and room.next("ann", "answer") is None  # both have written there
    again = room.next("cat", "answer")
    assert again is not None and again.kind == "answer"


def test_nobody_gets_the_same_thing_twice_nor_what_they_skipped(room: Room) -> None:
    room.bring("One?", "Two?", answers=3)
    seen = {room.rank("ann").node, room.rank("ann").node}
    assert len(seen) == 2 and room.next("ann", "rank") is None
    task = room.next("bob", "rank")
    assert task is not None
    room.labels.skip("bob", task.id, "cannot_judge", "too hard")
    other = room.next("bob", "rank")
    assert other is not None and other.node != task.node
    with pytest.raises(StoreError, match="skipped already"):
        room.labels.skip("bob", task.id, "unclear")
    with pytest.raises(StoreError, match="is no reason"):
        room.labels.skip("bob", other.id, "lazy")


def test_one_task_at_a_time_is_kept_over_a_reload_and_given_back_for_another_kind(room: Room) -> None:
    room.bring("One?", "Two?", answers=2)
    task = room.next("ann", "rank")
    assert task is not None and room.next("ann", "rank", "label") == task
    room.bring("Three?")
    other = room.next("ann", "answer")
    assert other is not None and other.kind == "answer"
    assert room.labels.task("ann", task.id).state == "expired"
    for who in ("bob", "cat", "dan", "eve"):
        assert room.next(who, "rank") is not None  # nothing is blocked by what she gave back
    assert room.labels.submit("ann", task.id, {"ranks": [1, 2]}, consent=True).state == "done"  # nor is her work lost


def test_a_task_whose_time_is_over_goes_to_another_and_late_work_counts(room: Room) -> None:
    room.office.set_rules("boss", replace(RULES, rankings=1, turns=1))
    room.bring("One?", answers=2)
    task = room.next("ann", "rank")
    assert task is not None and room.next("bob", "rank") is None
    room.clock.now += 60 * RULES.minutes + 1
    second = room.next("bob", "rank")
    assert second is not None and second.node == task.node
    room.labels.submit("ann", task.id, {"ranks": [1, 2]}, consent=True)
    assert room.states() == {"finished": 1}
    room.labels.submit("bob", second.id, {"ranks": [1, 2]}, consent=True)
    with pytest.raises(StoreError, match="done already"):
        room.labels.submit("bob", second.id, {"ranks": [1, 2]}, consent=True)


def test_late_work_that_was_handed_out_again_and_done_does_not_count_twice(room: Room) -> None:
    room.bring("One?", answers=2)
    late = room.next("ann", "rank")
    assert late is not None
    room.clock.now += 60 * RULES.minutes + 1
    room.rank("ann")
    with pytest.raises(StoreError, match="handed out again"):
        room.labels.submit("ann", late.id, {"ranks": [1, 2]}, consent=True)


def test_a_task_is_its_labellers_own(room: Room) -> None:
    room.bring("One?", answers=2)
    task = room.next("ann", "rank")
    assert task is not None
    for deed in (
        lambda: room.labels.task("bob", task.id),
        lambda: room.labels.submit("bob", task.id, {"ranks": [1, 2]}, consent=True),
        lambda: room.labels.skip("bob", task.id, "other"),
    ):
        with pytest.raises(NotFound):
            deed()


def test_answers_stand_in_an_order_by_lot_that_is_kept_and_ranks_belong_to_them(room: Room) -> None:
    room.office.set_rules("boss", replace(RULES, rankings=12))
    room.bring("One?", answers=4)
    done = [room.rank(f"p{number}") for number in range(12)]
    assert len({task.shown for task in done}) > 6 and len({frozenset(task.shown) for task in done}) == 1
    _, nodes = room.labels.seen(done[0])
    for task in done:
        kept = room.labels.task(task.labeller, task.id)
        assert {nodes[id].content: rank for id, rank in ranks_of(kept).items()} == {
            f"One? {n}": n + 1 for n in range(4)
        }


def test_two_at_once_do_not_get_the_last_place_both(room: Room) -> None:
    room.office.set_rules("boss", replace(RULES, rankings=1))
    room.bring("One?", answers=2)
    got: list[Any] = []
    threads = [threading.Thread(target=lambda n=n: got.append(room.next(f"p{n}", "rank"))) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 6 and sum(task is not None for task in got) == 1


def test_a_known_question_comes_now_and_then_looks_like_any_other_and_is_never_wanted(room: Room) -> None:
    room.office.set_rules("boss", replace(RULES, gold_share=0.5, rankings=50))
    room.bring(*(f"{n}?" for n in range(20)), answers=3)
    rows = [{"prompt": f"sure {n}?", "chosen": "good", "rejected": "bad"} for n in range(10)]
    assert room.office.bring(rows, "gold_rankings") == 10
    labels = {"spam": True, "wrong_language": False}
    assert room.office.bring([{"prompt": "asdf", "labels": labels}], "gold_labels") == 1
    done = [room.rank("ann") for _ in range(20)]
    known = [task for task in done if task.is_gold]
    assert 5 <= len(known) <= 10 and len({task.node for task in known}) == len(known)
    assert set(vars(known[0])) == set(vars(done[0])) and known[0].about.keys() == done[0].about.keys()
    assert room.office.counts()["gold"] == 11 and sum(room.states().values()) == 20
    asked = next(task for _ in range(40) if (task := room.next("bob", "label")) is not None)
    assert asked.is_gold and asked.kind == "label"


def test_reports_of_several_people_halt_a_tree(room: Room) -> None:
    room.bring("Bad?", answers=2)
    for number in range(REPORTS):
        assert room.states() == {"ranking": 1}
        task = room.next(f"p{number}", "rank")
        assert task is not None
        room.labels.skip(f"p{number}", task.id, "harmful", "it hurts")
    assert room.states() == {"halted": 1} and room.next("ann", "rank") is None


def test_prompts_are_asked_for_by_the_mix_until_enough_are_under_way(room: Room) -> None:
    room.office.set_rules("boss", replace(RULES, trees=400))
    for number in range(40):
        room.do("ann", "prompt", text=f"{number}?", **EXAMPLES)
    uses = room.office.counts()["uses"]
    for use, share in MIX.items():
        assert abs(100 * uses.get(use, 0) / 40 - share) < 10, use
    assert uses["generation"] > 13 > uses["open_qa"]
    room.office.set_rules("boss", replace(RULES, trees=40))
    assert room.next("bob", "prompt") is None and room.next("bob") is not None
    with pytest.raises(StoreError, match="no such kinds"):
        room.next("bob", "read")


def test_every_way_to_write_a_prompt_is_asked_for_and_checked(room: Room) -> None:
    room.office.set_rules("boss", replace(RULES, trees=400))
    room.office.bring([{"prompt": f"{use}?", "meta": {"use": use}} for use in MIX], "conversations")
    seen: dict[str, Task] = {}
    for number in range(60):
        task = room.next(f"p{number}", "prompt")
        assert task is not None
        seen[task.about["variant"]] = task
        if len(seen) == 3:
            break
    assert set(seen) == {"plain", "few_shot", "after_user"}
    tree, nodes = room.labels.seen(seen["after_user"])
    assert tree is None and [node.content for node in nodes.values()] == [f"{seen['after_user'].about['use']}?"]
    few = seen["few_shot"]
    with pytest.raises(StoreError, match="examples"):
        room.labels.submit(few.labeller, few.id, {"instruction": "x", "input": "c"}, consent=True)
    given = {"instruction": "Is it a noun?", "examples": [["cat", "yes"], ["run", "no"]], "input": "dog"}
    done = room.labels.submit(few.labeller, few.id, given, consent=True)
    text = "Is it a noun?\n\nInput: cat\nOutput: yes\n\nInput: run\nOutput: no\n\nInput: dog\nOutput:"
    assert done.result["text"] == text


def test_models_answers_fill_what_people_do_not_write_and_equal_ones_are_dropped(room: Room) -> None:
    room.office.set_rules("boss", replace(RULES, answers=4, written=1))
    room.bring("One?")
    ((_, _, want),) = room.labels.to_draw()
    assert want.kind == "draw" and want.missing == 3
    drawn = [(text, "demo", {"seed": n}) for n, text in enumerate(["a", "b", " a ", ""])]
    assert room.labels.drawn(want.node, 4, drawn) == 2
    assert room.labels.to_draw()[0][2].missing == 1
    assert room.labels.drawn(want.node, 8, [("a", "demo", {})] * 8) == 0
    assert room.labels.to_draw() == []  # three times as many as wanted: it has no more to say
    room.do("ann", "answer", text="mine")
    room.do("bob", "label", **FINE)
    assert room.states() == {"ranking": 1}
    task = room.next("cat", "rank")
    assert task is not None and len(task.shown) == 3


def test_where_a_model_says_one_thing_only_people_write_the_rest(room: Room) -> None:
    room.office.set_rules("boss", replace(RULES, answers=2, written=0))
    room.bring("One?")
    ((_, _, want),) = room.labels.to_draw()
    room.labels.drawn(want.node, 6, [("same", "demo", {})] * 6)
    assert room.next("ann", "rank") is None
    assert room.do("ann", "answer", text="another").kind == "answer"


@pytest.mark.parametrize(
    ("kind", "result", "said"),
    [
        ("rank", {"ranks": [1]}, "ranks for 2 answers"),
        ("rank", {"ranks": [0, 1]}, "ranks"),
        ("rank", {"ranks": [1, 2], "scores": [8, None]}, "a score of 8"),
        ("rank", {"ranks": [1, 2], "flags": [["rude"], []]}, "no flag"),
        ("label", {"spam": True}, "not answered"),
        ("label", {"spam": True, "wrong_language": False, "use": "war"}, "no use"),
        ("answer", {"text": "  "}, "nothing is written"),
    ],
)
def test_a_result_that_is_none_is_refused_and_the_task_stays(
    room: Room, kind: str, result: dict[str, Any], said: str
) -> None:
    room.bring("One?", answers=2)
    room.bring("Two?")
    if kind == "label":
        room.do("bob", "prompt", text="x", **EXAMPLES)
    task = room.next("ann", kind)
    assert task is not None
    with pytest.raises(StoreError, match=said):
        room.labels.submit("ann", task.id, result, consent=True)
    assert room.labels.task("ann", task.id).state == "open"
