from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lyceum.engine import scheduler as scheduler_module
from lyceum.engine.sampling import SamplingParams
from lyceum.engine.scheduler import Scheduler, groups
from lyceum.engine.sequence import Sequence


def sequence(id: int, length: int = 1, *, limit: int = 10, **more: object) -> Sequence:
    return Sequence(id, [0] * length, SamplingParams(), limit, **more)  # type: ignore[arg-type]


def always(sequence: Sequence) -> bool:
    return True


def ids(sequences: list[Sequence]) -> list[int]:
    return [sequence.id for sequence in sequences]


@given(st.lists(st.integers(0, 50)), st.integers(1, 100))
def test_groups_cover_all_rows_in_order_within_the_budget(lengths: list[int], max_tokens: int) -> None:
    found = list(groups(lengths, max_tokens))
    assert [i for group in found for i in range(group.start, group.stop)] == list(range(len(lengths)))
    for group in found:
        rows = lengths[group]
        assert rows and (len(rows) == 1 or len(rows) * max(rows) <= max_tokens)


def test_first_come_first_served_as_rows_become_free() -> None:
    scheduler = Scheduler(max_batch=2)
    for number in range(4):
        scheduler.add(sequence(number))
    first = scheduler.admit(always)
    assert ids(first) == [0, 1] and scheduler.num_waiting == 2
    scheduler.leave([first[0]])
    scheduler.arrange([])
    assert ids(scheduler.admit(always)) == [2]
    scheduler.check()


def test_nobody_overtakes_one_that_waits_for_memory() -> None:
    scheduler = Scheduler(max_batch=8)
    for number, length in enumerate((5, 50, 5)):
        scheduler.add(sequence(number, length))
    assert ids(scheduler.admit(lambda sequence: len(sequence.tokens) < 10)) == [0]
    assert ids(scheduler.admit(always)) == [1, 2]


def test_people_go_before_the_background_which_leaves_them_rows() -> None:
    scheduler = Scheduler(max_batch=16)
    for number in range(20):
        scheduler.add(sequence(number, is_background=True))
    scheduler.add(sequence(20))
    running = scheduler.admit(always)
    assert ids(running) == [20, *range(14)]  # two of sixteen rows stay free
    scheduler.add(sequence(21))
    assert ids(scheduler.admit(always)) == [21]
    alone = Scheduler(max_batch=1)
    alone.add(sequence(0, is_background=True))
    assert ids(alone.admit(always)) == [0]


def test_keys_are_served_evenly_whoever_asks_more() -> None:
    scheduler = Scheduler(max_batch=1)
    for number in range(60):
        scheduler.add(sequence(number, 10, limit=10, key="greedy"))
    for number in range(60, 70):
        scheduler.add(sequence(number, 10, limit=10, key="modest"))
    served = []
    for _ in range(20):
        (one,) = scheduler.admit(always)
        one.tokens += [0] * 10
        scheduler.leave([one])
        scheduler.arrange([])
        served.append(one.key)
    assert served.count("modest") == 10 and served[:4] == ["greedy", "modest", "greedy", "modest"]


def test_tokens_count_not_requests_and_idleness_saves_nothing_up() -> None:
    scheduler = Scheduler(max_batch=1)
    for number in range(40):
        scheduler.add(sequence(number, 30 if number % 2 else 10, limit=0, key="long" if number % 2 else "short"))
    tokens = {"long": 0, "short": 0, "late": 0}

    def serve(num: int) -> None:
        for _ in range(num):
            (one,) = scheduler.admit(always)
            tokens[one.key] += len(one.tokens)
            scheduler.leave([one])
            scheduler.arrange([])

    serve(16)
    assert abs(tokens["long"] - tokens["short"]) <= 30  # though one asks for three times as much each time
    for number in range(40, 60):
        scheduler.add(sequence(number, 10, limit=0, key="late"))
    before = dict(tokens)
    serve(9)
    assert tokens["late"] <= 40 and tokens["long"] > before["long"] and tokens["short"] > before["short"]


def test_a_reply_that_ended_early_is_not_charged_for_the_rest() -> None:
    scheduler = Scheduler(max_batch=1)
    for number, key in enumerate("aabb"):
        scheduler.add(sequence(number, 5, limit=1000 if key == "a" else 20, key=key))
    (first,) = scheduler.admit(always)
    assert first.key == "a"
    scheduler.leave([first])  # 5 tokens, not 1005
    scheduler.arrange([])
    (second,) = scheduler.admit(always)
    second.tokens += [0] * 20
    scheduler.leave([second])
    scheduler.arrange([])
    assert (second.key, scheduler.admit(always)[0].key) == ("b", "a")


def test_counters_of_the_idle_are_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "MAX_COUNTERS", 10)
    scheduler = Scheduler(max_batch=4)
    for number in range(50):
        scheduler.add(sequence(number, key=str(number)))
        scheduler.leave(scheduler.admit(always))
        scheduler.arrange([])
        scheduler.check()
    assert len(scheduler._served) <= 11


def test_chunks_share_the_budget_people_first() -> None:
    scheduler = Scheduler(max_batch=8)
    for number, length in enumerate((30, 10, 40)):
        scheduler.add(sequence(number, length, is_background=number == 0))
    scheduler.admit(always)
    scheduler.arrange([])
    assert [(one.id, num) for one, num in scheduler.chunks(45)] == [(1, 10), (2, 35)]
    assert [(one.id, num) for one, num in scheduler.chunks(100)] == [(1, 10), (2, 40), (0, 30)]
    waiting, ahead = (next(one for one in scheduler.running if one.id == id) for id in (2, 1))
    waiting.leader = ahead
    assert [one.id for one, _ in scheduler.chunks(100)] == [1, 0]


@given(st.integers(1, 12), st.integers(0, 10_000))
def test_rows_stay_dense_and_keep_their_sequences_whoever_leaves_or_changes(num_running: int, seed: int) -> None:
    draw = random.Random(seed)
    scheduler = Scheduler(max_batch=num_running)
    for number in range(num_running):
        scheduler.add(sequence(number))
    scheduler.admit(always)
    slots = list(range(num_running))  # what lies in each row, moved as the engine moves memory
    for _ in range(4):
        gone = [one for one in scheduler.running if draw.random() < 0.25]
        scheduler.leave(gone)
        decoding = [one for one in scheduler.running if draw.random() < 0.5]
        into, out_of = scheduler.arrange(decoding)
        moved = [slots[row] for row in out_of]
        for hole, content in zip(into, moved, strict=True):
            slots[hole] = content
        scheduler.check()
        assert ids(scheduler.running) == slots[: len(scheduler.running)]
        assert {one.id for one in decoding} == set(ids(scheduler.running[: scheduler.num_decoding]))
