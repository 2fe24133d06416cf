from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lyceum.engine.sampling import SamplingParams
from lyceum.engine.scheduler import Scheduler, groups
from lyceum.engine.sequence import Sequence


def sequences(*lengths: int) -> list[Sequence]:
    return [Sequence(i, [0] * length, SamplingParams(), 10) for i, length in enumerate(lengths)]


@given(st.lists(st.integers(0, 50)), st.integers(1, 100))
def test_groups_cover_all_rows_in_order_within_the_budget(lengths: list[int], max_tokens: int) -> None:
    found = list(groups(lengths, max_tokens))
    assert [i for group in found for i in range(group.start, group.stop)] == list(range(len(lengths)))
    for group in found:
        rows = lengths[group]
        assert rows and (len(rows) == 1 or len(rows) * max(rows) <= max_tokens)


def test_first_come_first_served_and_short_prompts_side_by_side() -> None:
    scheduler = Scheduler(max_batch=3)
    scheduler.waiting.extend(sequences(9, 2, 5, 1))
    chosen = scheduler.next()
    assert [sequence.id for sequence in chosen] == [1, 2, 0]  # the last comer waits, short as it is
    scheduler.start(chosen)
    assert [sequence.id for sequence in scheduler.waiting] == [3]
    assert scheduler.next() == []


def test_newcomers_start_by_groups_while_many_wait_and_at_once_when_all_fit() -> None:
    scheduler = Scheduler(max_batch=16)
    scheduler.waiting.extend(sequences(*[3] * 20))
    scheduler.start(scheduler.next())
    scheduler.leave([4])
    assert scheduler.next() == []  # one row is free, four wait
    scheduler.leave([0])
    assert len(scheduler.next()) == 2  # an eighth of the batch
    for _ in range(3):
        scheduler.waiting.pop()
    scheduler.running.append(sequences(1)[0])
    assert len(scheduler.next()) == 1  # one row, one waiting


@given(st.integers(1, 20), st.data())
def test_rows_stay_dense_and_keep_their_sequences_when_some_leave(num_running: int, data: st.DataObject) -> None:
    rows = data.draw(st.sets(st.integers(0, num_running - 1), min_size=1))
    scheduler = Scheduler(max_batch=num_running)
    scheduler.running = sequences(*[1] * num_running)
    slots = list(range(num_running))  # what lies in each row, moved as the engine moves memory
    into, out_of = scheduler.leave(sorted(rows))
    for hole, row in zip(into, out_of, strict=True):
        slots[hole] = slots[row]
    left = [sequence.id for sequence in scheduler.running]
    assert slots[: len(left)] == left
    assert set(left) == set(range(num_running)) - rows
