from __future__ import annotations

import copy

import pytest
import torch

from lyceum.model.heads import ScoreModel


def test_scores_are_the_heads_product_with_each_hidden_state(tiny_spec, random_decoder):
    decoder = random_decoder(tiny_spec())
    model = ScoreModel.from_decoder(copy.deepcopy(decoder))
    tokens = torch.randint(96, (2, 7), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(tokens), decoder(tokens) @ model.score.weight[0])
    assert model(tokens).shape == (2, 7)


def test_rescaled_scores_are_scores_times_the_factor(tiny_spec, random_decoder):
    model = ScoreModel(random_decoder(tiny_spec()))
    tokens = torch.randint(96, (2, 7), generator=torch.Generator().manual_seed(1))
    before = model(tokens).detach()
    model.rescale(0.25)
    torch.testing.assert_close(model(tokens), 0.25 * before)


@pytest.mark.parametrize("tied", [True, False])
def test_a_score_model_trains_every_weight_it_has(tiny_spec, random_decoder, tied):
    model = ScoreModel(random_decoder(tiny_spec(tied=tied)))
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_head_starts_with_the_papers_deviation(tiny_spec, random_decoder):
    decoder = random_decoder(tiny_spec(width=1024, num_layers=1))
    heads = [ScoreModel(decoder, torch.Generator().manual_seed(seed)).score.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].std().item() == pytest.approx(1025**-0.5, rel=0.1)


def test_scores_at_some_positions_are_those_of_all(tiny_spec, random_decoder):
    model = ScoreModel.from_decoder(random_decoder(tiny_spec()))
    tokens = torch.randint(96, (2, 7), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(tokens, at_N=torch.tensor([6, 8])), model(tokens).flatten()[[6, 8]])
