from __future__ import annotations

import pytest
import torch
from torch import nn


class GrowingCache:
    """The plainest cache: it keeps everything and concatenates. `start` shifts the rows' positions."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows, self.num_seen = num_rows, 0
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def positions(self, num_new: int) -> torch.Tensor:
        return torch.arange(self.num_seen, self.num_seen + num_new).expand(self.num_rows, -1)

    def append(self, layer, k, v):
        if layer in self.layers:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = (k, v)
        num_new = k.shape[2] - self.num_seen
        if self.num_seen == 0:
            return k, v, None, True
        return k, v, torch.ones(num_new, k.shape[2], dtype=torch.bool).tril(self.num_seen), False


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("pieces", [(1,) * 12, (5, 1, 6), (12,)])
@pytest.mark.usefixtures("both_forms")
def test_cached_forward_is_the_full_forward(tiny_spec, random_decoder, qk_norm, pieces):
    decoder = random_decoder(tiny_spec(qk_norm=qk_norm))
    tokens = torch.randint(96, (3, 12), generator=torch.Generator().manual_seed(1))
    cache, parts = GrowingCache(3), []
    with torch.no_grad():
        for part in tokens.split(pieces, dim=1):
            parts.append(decoder(part, cache=cache))
            cache.num_seen += part.shape[1]
        torch.testing.assert_close(torch.cat(parts, dim=1), decoder(tokens), rtol=1e-5, atol=1e-5)


def test_what_stands_after_a_token_never_reaches_it(tiny_spec, random_decoder):
    decoder = random_decoder(tiny_spec())
    tokens = torch.randint(1, 96, (2, 10), generator=torch.Generator().manual_seed(1))
    padded = tokens.clone()
    padded[:, 6:] = 0
    torch.testing.assert_close(decoder(tokens)[:, :6], decoder(padded)[:, :6], rtol=0, atol=1e-6)
    assert not torch.allclose(decoder(tokens)[:, 6:], decoder(padded)[:, 6:])


def test_shared_key_value_heads_are_repeated_heads(tiny_spec, random_decoder):
    grouped = random_decoder(tiny_spec(num_kv_heads=2))
    full = random_decoder(tiny_spec(num_kv_heads=4))
    state = grouped.state_dict()
    for name in list(state):
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].unflatten(0, (2, 16)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    tokens = torch.randint(96, (2, 10), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(full(tokens), grouped(tokens))


@pytest.mark.usefixtures("both_forms")
def test_layers_with_something_put_on_them_give_the_same(tiny_spec, random_decoder):
    class Adapted(nn.Linear):  # any other class than nn.Linear: the decoder must call it, not read its weight
        num_calls = 0

        def forward(self, x):
            Adapted.num_calls += 1
            return super().forward(x)

    decoder = random_decoder(tiny_spec())
    tokens = torch.randint(96, (2, 10), generator=torch.Generator().manual_seed(1))
    bare = decoder(tokens)
    for block in decoder.model.layers:
        block.self_attn.k_proj.__class__ = Adapted
        block.mlp.up_proj.__class__ = Adapted
    torch.testing.assert_close(decoder(tokens), bare, rtol=1e-4, atol=1e-5)
    assert Adapted.num_calls == 4
