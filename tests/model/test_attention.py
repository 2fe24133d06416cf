from __future__ import annotations

import pytest
import torch
from torch import nn

from lyceum.model.attention import Reach, attend


class GrowingCache:
    """The plainest cache of one sequence: it keeps everything and concatenates."""

    is_kept = True

    def __init__(self) -> None:
        self.num_seen = 0
        self.layers: dict[int, torch.Tensor] = {}

    def positions(self, num_new: int) -> torch.Tensor:
        return torch.arange(self.num_seen, self.num_seen + num_new).unsqueeze(0)

    def append(self, layer, kv_N2KE):
        kept = self.layers[layer] = torch.cat((*([self.layers[layer]] if layer in self.layers else []), kv_N2KE))
        num_new = len(kv_N2KE)
        k_BKSE, v_BKSE = kept.permute(1, 2, 0, 3).unsqueeze(1)
        if num_new == len(kept):
            return [Reach(1, num_new, k_BKSE, v_BKSE, None, True)]
        hidden = torch.full((num_new, len(kept)), float("-inf"), dtype=kept.dtype).triu(self.num_seen + 1)
        return [Reach(1, num_new, k_BKSE, v_BKSE, hidden[None, None])]


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("pieces", [(1,) * 12, (5, 1, 6), (12,)])
@pytest.mark.usefixtures("both_forms")
def test_cached_forward_is_the_full_forward(tiny_spec, random_decoder, qk_norm, pieces):
    decoder = random_decoder(tiny_spec(qk_norm=qk_norm, num_kv_heads=2))
    tokens = torch.randint(96, (1, 12), generator=torch.Generator().manual_seed(1))
    cache, parts = GrowingCache(), []
    with torch.no_grad():
        for part in tokens.split(pieces, dim=1):
            parts.append(decoder(part, cache=cache))
            cache.num_seen += part.shape[1]
        torch.testing.assert_close(torch.cat(parts, dim=1), decoder(tokens), rtol=1e-5, atol=1e-5)


def test_sequences_side_by_side_see_only_their_own():
    generator = torch.Generator().manual_seed(0)
    q_NHE, k_BKSE, v_BKSE = (torch.randn(*s, generator=generator) for s in ((5, 4, 8), (3, 2, 6, 8), (3, 2, 6, 8)))
    length_mask = torch.tensor([0.0, 0.0, 0.0, 0.0, float("-inf"), float("-inf")]).expand(2, 1, 1, 6)
    mixed = attend(
        q_NHE,
        [
            Reach(2, 1, k_BKSE[:2], v_BKSE[:2], length_mask),
            Reach(1, 3, k_BKSE[2:, :, :3], v_BKSE[2:, :, :3], None, True),
        ],
    )
    assert mixed.shape == (5, 32)
    for token, (row, num_seen) in enumerate(((0, 4), (1, 4), (2, 1), (2, 2), (2, 3))):
        for head in range(4):  # softmax(q k / sqrt(8)) v, by hand; two heads share a key
            k_SE, v_SE = k_BKSE[row, head // 2, :num_seen], v_BKSE[row, head // 2, :num_seen]
            wanted = torch.softmax(k_SE @ q_NHE[token, head] / 8**0.5, 0) @ v_SE
            torch.testing.assert_close(mixed[token, 8 * head : 8 * head + 8], wanted)


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
