from __future__ import annotations

import math
import random

import pytest
import torch

from lyceum.engine import cache as cache_module
from lyceum.engine.cache import MIN_REUSE, Cache, Kept, Shelf, Stretch, Window, num_shared
from lyceum.model.attention import Reach

CPU = torch.device("cpu")


def append(window: Window, numbers: list[int]) -> list[Reach]:
    """One layer with one head of width 1; keys are the numbers, values their negatives."""
    k_N1 = torch.tensor(numbers, dtype=torch.float).view(-1, 1, 1)
    reaches = list(window.append(0, torch.stack((k_N1, -k_N1), dim=1)))
    for reach in reaches:
        assert torch.equal(reach.k_BKSE, -reach.v_BKSE)
    return reaches


def seen(reach: Reach) -> list[list[float]]:
    return reach.k_BKSE[:, 0, :, 0].tolist()


def filled(cache: Cache, *rows: list[int]) -> Cache:
    append(cache.window([], [Stretch(row, 0, len(numbers)) for row, numbers in enumerate(rows)]), sum(rows, []))
    return cache


def test_prompts_go_into_empty_slots_causally_and_without_a_mask() -> None:
    window = Cache(4, CPU).window([], [Stretch(1, 0, 3), Stretch(2, 0, 2)])
    assert window.positions(5).tolist() == [[0, 1, 2, 0, 1]]
    first, second = append(window, [1, 2, 3, 4, 5])
    assert (seen(first), seen(second)) == ([[1, 2, 3]], [[4, 5]])
    assert first.mask is None and first.is_causal and (first.num_rows, first.num_new) == (1, 3)


@pytest.mark.parametrize("is_padded", [True, False])
def test_a_step_sees_each_row_to_its_own_length(is_padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "CALL_CELLS", 1000 if is_padded else 0)
    cache = filled(Cache(2, CPU), [1, 2, 3], [4, 5])
    window = cache.window([3, 2])
    assert window.positions(2).tolist() == [[3, 2]]
    reaches = append(window, [6, 7])
    if is_padded:
        (both,) = reaches
        assert seen(both)[0] == [1, 2, 3, 6] and seen(both)[1][:3] == [4, 5, 7] and not both.is_causal
        assert both.mask is not None and both.mask[:, 0, 0].tolist() == [[0.0] * 4, [0.0, 0.0, 0.0, -math.inf]]
    else:
        assert [seen(reach) for reach in reaches] == [[[1, 2, 3, 6]], [[4, 5, 7]]]
        assert all(reach.mask is None for reach in reaches)


def test_rows_of_one_length_need_no_mask() -> None:
    (both,) = append(filled(Cache(2, CPU), [1, 2], [3, 4]).window([2, 2]), [5, 6])
    assert seen(both) == [[1, 2, 5], [3, 4, 6]] and both.mask is None and not both.is_causal


def test_a_pass_holds_steps_and_chunks_and_a_chunk_sees_itself_causally() -> None:
    cache = filled(Cache(3, CPU), [1, 2], [3, 4, 5])
    window = cache.window([2], [Stretch(1, 3, 2), Stretch(2, 0, 2)])
    assert window.positions(5).tolist() == [[2, 3, 4, 0, 1]]
    step, chunk, fresh = append(window, [6, 7, 8, 9, 10])
    assert (seen(step), seen(chunk), seen(fresh)) == ([[1, 2, 6]], [[3, 4, 5, 7, 8]], [[9, 10]])
    assert chunk.mask is not None and chunk.mask[0, 0].tolist() == [[0.0, 0.0, 0.0, 0.0, -math.inf], [0.0] * 5]
    assert fresh.is_causal and (chunk.num_rows, chunk.num_new) == (1, 2)


def test_steps_may_begin_at_any_row() -> None:
    cache = filled(Cache(3, CPU), [1], [2, 3], [4, 5])
    (two,) = append(cache.window([2, 2], first=1), [6, 7])
    assert seen(two) == [[2, 3, 6], [4, 5, 7]]
    (one,) = append(cache.window([1]), [8])
    assert seen(one) == [[1, 8]]


def test_memory_grows_with_use_and_keeps_what_it_holds() -> None:
    cache = filled(Cache(8, CPU), [1, 2])
    small = cache.num_bytes
    append(cache.window([], [Stretch(row, 0, 100) for row in range(1, 8)]), [7] * 700)
    assert small < cache.num_bytes == 2 * 8 * 128 * 4  # keys and values, 8 rows, 128 tokens, 4 bytes
    assert seen(append(cache.window([2]), [3])[0]) == [[1, 2, 3]]


def test_under_a_bound_memory_changes_its_shape_and_keeps_what_is_in_use() -> None:
    cache = Cache(8, CPU, max_tokens=300)
    cache.reserve(1, 200)
    append(cache.window([], [Stretch(0, 0, 200)]), list(range(200)))
    assert cache.slot_tokens == 256
    cache.reserve(4, 75)  # the long one has left
    append(cache.window([], [Stretch(row, 0, 75) for row in range(4)]), list(range(300)))
    cache.check()
    assert cache.slot_tokens == 300
    cache.reserve(5, 60)
    assert cache.slot_tokens == 300
    assert seen(append(cache.window([59], first=3), [-1])[0]) == [[*range(225, 284), -1]]


def test_fork_and_move_copy_slots() -> None:
    cache = filled(Cache(4, CPU), [1, 2, 3], [4, 5, 6], [7, 8])
    cache.copy(3, 0, 0, 2)
    assert seen(append(cache.window([2], first=3), [9])[0]) == [[1, 2, 9]]
    cache.move([0, 1], [1, 0], 3)  # at once: no slot is read after it was written
    assert [seen(append(cache.window([3], first=row), [0])[0]) for row in (0, 1)] == [[[4, 5, 6, 0]], [[1, 2, 3, 0]]]


def test_whoever_runs_has_a_slot_before_all_have_passed() -> None:
    cache = Cache(64, CPU)
    cache.reserve(40, 3)
    filled(cache, [1, 2, 3], [4, 5, 6])  # a first pass of two
    cache.move([1, 2], [39, 1], 3)  # one has left: who has read goes there, and who has not into its place
    assert seen(append(cache.window([3], first=2), [0])[0]) == [[4, 5, 6, 0]]
    cache.move([3], [50], 3)


# -- the shelf ---------------------------------------------------------------------------------------------------------


def kept(ids: list[int], key: str = "") -> Kept:
    return Kept(key, ids, {0: torch.zeros(2, 1, len(ids), 1)})


def test_the_longest_common_prefix_is_counted_to_the_token() -> None:
    draw = random.Random(0)
    for _ in range(300):
        stem = [draw.randrange(3) for _ in range(draw.randrange(20))]
        one, other = ([*stem, *(draw.randrange(3) for _ in range(draw.randrange(9)))] for _ in range(2))
        by_hand = next(
            (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
        )
        assert num_shared(one, other) == (by_hand if by_hand >= MIN_REUSE or one == other else 0)


def test_the_shelf_finds_the_longest_prefix_of_the_same_key() -> None:
    shelf = Shelf(5)
    for ids, key in ((list(range(10)), "a"), ([*range(14), 99], "a"), (list(range(30)), "b"), ([5] * 20, "a")):
        shelf.put(kept(ids, key))
    found, num = shelf.find(list(range(25)), "a")
    assert found is not None and (found.ids[-1], num) == (99, 14)
    assert shelf.find(list(range(MIN_REUSE - 1)), "a") == (None, 0)  # too short to pay
    assert shelf.find(list(range(25)), "c") == (None, 0)
    shelf.check()


def test_the_least_recently_used_goes_first_and_a_continued_one_is_replaced() -> None:
    shelf = Shelf(3)
    for number in range(3):
        shelf.put(kept([number] * 10))
    shelf.find([0] * 12, "")
    shelf.put(kept([7] * 10))
    assert [shelf.find([number] * 10, "")[1] for number in range(3)] == [10, 0, 10]
    shelf.put(kept([0] * 15))  # the same conversation, a turn later
    assert len(shelf) == 3 and shelf.num_tokens == 35
    shelf.shrink(15)
    assert shelf.find([0] * 20, "")[1] == 15 and len(shelf) == 1
    shelf.check()


def test_what_left_comes_back_as_it_was() -> None:
    cache = filled(Cache(2, CPU, num_kept=2), list(range(10)), [0] * 12)
    cache.keep(0, list(range(100, 110)), "")
    cache.move([0], [1], 12)
    found, num = cache.shelf.find([*range(100, 109), 0], "")
    assert found is not None and num == 9
    cache.take(1, found, num)
    assert seen(append(cache.window([9], first=1), [77])[0]) == [[*range(9), 77]]


def test_of_a_chat_that_goes_on_only_what_is_new_is_copied() -> None:
    cache = filled(Cache(2, CPU, num_kept=3), list(range(40)))
    cache.keep(0, list(range(20)), "")
    kept = cache.shelf.find(list(range(20)), "")[0]
    assert kept is not None and cache.shelf.num_tokens == kept.size == 30
    memory = kept.layers[0].data_ptr()
    append(cache.window([], [Stretch(0, 0, 15)]), [-1] * 15)  # what is there already is not read again
    cache.keep(0, list(range(28)), "")
    assert kept.ids == list(range(28)) and kept.layers[0].data_ptr() == memory and len(cache.shelf) == 1
    cache.take(1, kept, 28)
    assert seen(append(cache.window([28], first=1), [7])[0]) == [[*range(28), 7]]
    cache.keep(0, [*range(15, 35), 5], "")  # another one
    cache.keep(0, list(range(31)), "")  # no room behind it: a new copy, of all of it
    assert [len(one.ids) for one in cache.shelf._kept] == [21, 31]
    cache.shelf.check()


def test_the_shelf_gives_way_to_what_runs() -> None:
    cache = filled(Cache(4, CPU, max_tokens=100, num_kept=4), list(range(30)))
    cache.keep(0, list(range(30)), "")
    cache.keep(0, [5, *range(29)], "")
    assert cache.shelf.num_tokens == 60
    cache.reserve(2, 30)
    cache.check()
    assert cache.shelf.num_tokens == 30 and len(cache.shelf) == 1
    cache.keep(0, [6, *range(29)], "")  # no room for both
    assert cache.shelf.find([6, *range(29)], "")[1] == 30 and len(cache.shelf) == 1
    cache.check()
