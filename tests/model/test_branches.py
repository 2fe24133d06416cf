"""Rows that begin alike, computed once: the same hidden states and gradients as row by row, and fewer tokens."""

from __future__ import annotations

import pytest
import torch

from lyceum.batches.pack import pad
from lyceum.model.branches import Branches, beginnings, read
from lyceum.model.heads import ScoreModel

SHARED = [[5, 6, 7, 8, 9, 10], [20, 21, 22], [30, 31, 32, 33]]
OWN = [[[1, 2, 3], [4], [1, 3, 2, 2]], [[2, 3], [9, 8, 7, 6]], [[3]]]  # the last prompt has one response


def rows_and_groups(order: list[int] | None = None):
    rows = [shared + own for shared, each in zip(SHARED, OWN, strict=True) for own in each]
    groups = [7 * number for number, each in enumerate(OWN) for _ in each]
    order = order or list(range(len(rows)))
    tokens, lengths = pad([rows[i] for i in order], 0)
    return tokens, lengths, torch.tensor([groups[i] for i in order])


def test_beginnings_are_what_all_rows_of_a_group_share_and_never_a_whole_row():
    tokens, lengths, groups = rows_and_groups()
    # of [1, 2, 3], [4], [1, 3, 2, 2] nothing more; the lone row shares as much as the longest of the others
    assert beginnings(tokens, lengths, groups).tolist() == [6, 6, 6, 3, 3, 4]
    same, ends = pad([[1, 2, 3], [1, 2, 3]], 0)
    assert beginnings(same, ends, torch.tensor([0, 0])).tolist() == [2, 2]
    assert beginnings(same, ends, torch.tensor([0, 1])).tolist() == [0, 0]


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [3, 0, 5, 2, 4, 1]])
@pytest.mark.parametrize("shape", [{}, {"qk_norm": False, "num_kv_heads": 1}])
@pytest.mark.usefixtures("both_forms")
def test_hidden_states_and_gradients_are_those_of_whole_rows(tiny_spec, random_decoder, order, shape):
    tokens, lengths, groups = rows_and_groups(order)
    real = (torch.arange(tokens.shape[1]) < lengths[:, None]).flatten().nonzero().squeeze(1)
    grad = torch.randn(len(real), tiny_spec(**shape).width, generator=torch.Generator().manual_seed(2)).double()
    results = []
    for branches in (None, Branches(tokens, lengths, beginnings(tokens, lengths, groups), groups)):
        decoder = random_decoder(tiny_spec(**shape)).double()
        hidden = read(decoder, tokens, real, branches)
        hidden.backward(grad)
        results.append([hidden, *(weight.grad for weight in decoder.parameters() if weight.grad is not None)])
    for whole, branched in zip(*results, strict=True):
        torch.testing.assert_close(branched, whole, rtol=1e-9, atol=1e-11)


def test_scores_at_the_ends_are_those_of_whole_rows(tiny_spec, random_decoder):
    tokens, lengths, groups = rows_and_groups()
    model = ScoreModel.from_decoder(random_decoder(tiny_spec()))
    ends = torch.arange(len(lengths)) * tokens.shape[1] + lengths - 1
    branches = Branches(tokens, lengths, beginnings(tokens, lengths, groups), groups)
    torch.testing.assert_close(read(model, tokens, ends, branches), read(model, tokens, ends, None))


def test_what_is_shared_is_computed_once_and_only_where_it_pays(tiny_spec, random_decoder):
    decoder, seen = random_decoder(tiny_spec()), []
    decoder.model.layers[0].mlp.register_forward_hook(lambda module, given, out: seen.append(out[..., 0].numel()))
    prompt, responses = list(range(10)), [[50 + k, 60, 61] for k in range(4)]
    tokens, lengths = pad([prompt + response for response in responses], 0)
    branches = Branches.of(tokens, lengths, torch.zeros(4, dtype=torch.long))
    read(decoder, tokens, torch.tensor([12]), branches)
    assert seen == [10 + 4 * 3]
    assert Branches.of(tokens, lengths, torch.arange(4)) is None  # nobody shares
    assert Branches.of(tokens[:, 9:], lengths - 9, torch.zeros(4, dtype=torch.long)) is not None  # 13 tokens for 16
    assert Branches.of(tokens[:, 10:], lengths - 10, torch.zeros(4, dtype=torch.long)) is None  # nothing in common
