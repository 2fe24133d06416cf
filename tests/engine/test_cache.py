from __future__ import annotations

import math

import torch
from torch import Tensor

from lyceum.engine.cache import Cache, Window

CPU = torch.device("cpu")


def keys(*rows: list[int]) -> Tensor:
    """(B, 1 head, T, width 1) out of one list of numbers a row."""
    return torch.tensor(rows, dtype=torch.float).view(len(rows), 1, -1, 1)


def append(window: Window, *rows: list[int]) -> tuple[list, Tensor | None, bool]:
    k, v, mask, is_causal = window.append(0, keys(*rows), -keys(*rows))
    assert torch.equal(k, -v)
    return k[:, 0, :, 0].tolist(), mask, is_causal


def test_prompts_go_into_empty_slots_causally_and_without_a_mask() -> None:
    window = Cache(4, CPU).window(1, 2, 3)
    assert window.positions(3).tolist() == [[0, 1, 2], [0, 1, 2]]
    seen, mask, is_causal = append(window, [1, 2, 3], [4, 5, 0])
    assert seen == [[1, 2, 3], [4, 5, 0]] and mask is None and is_causal


def test_a_step_sees_each_row_to_its_own_length_and_padding_is_overwritten() -> None:
    cache = Cache(2, CPU)
    append(cache.window(0, 2, 3), [1, 2, 3], [4, 5, 99])
    cache.advance(0, torch.tensor([3, 2]))
    window = cache.window(0, 2, 1)
    assert window.positions(1).tolist() == [[3], [2]]
    seen, mask, is_causal = append(window, [6], [7])
    assert seen[0] == [1, 2, 3, 6] and seen[1][:3] == [4, 5, 7] and not is_causal
    assert mask is not None and mask[:, 0, 0].tolist() == [[0.0] * 4, [0.0, 0.0, 0.0, -math.inf]]


def test_rows_of_one_length_need_no_mask() -> None:
    cache = Cache(2, CPU)
    append(cache.window(0, 2, 2), [1, 2], [3, 4])
    cache.advance(0, torch.tensor([2, 2]))
    assert append(cache.window(0, 2, 1), [5], [6]) == ([[1, 2, 5], [3, 4, 6]], None, False)


def test_a_prompt_may_be_read_in_two_parts() -> None:
    cache = Cache(1, CPU)
    append(cache.window(0, 1, 2), [1, 2])
    cache.advance(0, torch.tensor([2]))
    seen, mask, _ = append(cache.window(0, 1, 2), [3, 4])
    assert seen == [[1, 2, 3, 4]]
    assert mask is not None and mask[0, 0].tolist() == [[0.0, 0.0, 0.0, -math.inf], [0.0] * 4]


def test_reach_ends_with_the_longest_row_in_the_window() -> None:
    cache = Cache(2, CPU)
    append(cache.window(0, 2, 30), [1] * 30, [2] * 30)
    cache.advance(0, torch.tensor([3, 30]))
    seen, _, _ = append(cache.window(0, 1, 1), [9])
    assert seen == [[1, 1, 1, 9]]


def test_memory_grows_with_use_and_keeps_what_it_holds() -> None:
    cache = Cache(8, CPU)
    append(cache.window(0, 1, 2), [1, 2])
    cache.advance(0, torch.tensor([2]))
    small = cache.num_bytes
    append(cache.window(1, 7, 100), *[[7] * 100] * 7)
    assert small < cache.num_bytes <= 2 * 8 * 128 * 4  # keys and values, 8 rows, 128 tokens, 4 bytes
    seen, _, _ = append(cache.window(0, 1, 1), [3])
    assert seen == [[1, 2, 3]]


def test_fork_copies_the_sources_even_where_it_overwrites_them() -> None:
    cache = Cache(4, CPU)
    append(cache.window(0, 2, 2), [1, 2], [3, 4])
    append(cache.window(2, 2, 2), [0, 0], [0, 0])
    cache.advance(0, torch.tensor([2, 2]))
    cache.spread(0, [0, 0, 1, 1])
    assert append(cache.window(0, 4, 1), [5], [6], [7], [8])[0] == [[1, 2, 5], [1, 2, 6], [3, 4, 7], [3, 4, 8]]


def test_a_moved_row_brings_its_length_and_a_cleared_one_is_empty() -> None:
    cache = Cache(3, CPU)
    append(cache.window(0, 3, 3), [1, 2, 3], [4, 5, 6], [7, 8, 9])
    cache.advance(0, torch.tensor([1, 2, 3]))
    cache.move([0], [2])
    assert cache.lengths_B.tolist() == [3, 2, 3]
    assert append(cache.window(0, 1, 1), [0])[0] == [[7, 8, 9, 0]]
    cache.clear(1, 2)
    assert cache.lengths_B.tolist() == [3, 0, 0]
