"""The step as one function of tensors against the packed decoder, whose numbers are the model's own."""

from __future__ import annotations

import pytest
import torch

from lyceum.engine.cache import Cache
from lyceum.model import product as product_module
from lyceum.model.packed import PackedDecoder, rounded
from lyceum.model.step import Step
from tests.model.test_packed import FAMILIES


@pytest.mark.parametrize("starts", [[4], [0, 7, 3]])
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_step_is_the_packed_decoders(tiny_spec, random_decoder, family, starts, few, monkeypatch):
    monkeypatch.setattr(product_module, "MIN_NUMBERS", 0)
    packed = PackedDecoder(random_decoder(tiny_spec(**FAMILIES[family])))
    spec, ids = packed.spec, [9, 5, 90][: len(starts)]
    cache = Cache(len(starts), torch.device("cpu"))
    with torch.inference_mode():
        for time in range(9):  # what the slots hold
            packed(torch.tensor([[time + row for row in range(len(starts))]]), cache=cache.window([time] * len(starts)))
        slots = [memory.clone() for memory in cache.slots]
        wanted = packed.logits(packed(torch.tensor([ids]), cache=cache.window(starts))[0])
        names, tensors = zip(*packed.tensors(few=few and torch.backends.mkl.is_available()).items(), strict=True)
        now_2B, seen_S = torch.tensor([ids, starts]), torch.arange(max(starts) + 1)
        logits = Step(spec, names)(now_2B, seen_S, tuple(slots), tensors)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    for mine, memory in zip(slots, cache.slots, strict=True):
        torch.testing.assert_close(mine, memory, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_positions_that_fill_up_change_nothing_and_write_nothing(tiny_spec, random_decoder, family):
    packed = PackedDecoder(random_decoder(tiny_spec(**FAMILIES[family])))
    shape = (2, 4, packed.spec.num_kv_heads, 16, packed.spec.head_width)
    draw = torch.Generator().manual_seed(2)
    before = [torch.randn(shape, generator=draw) for _ in range(packed.spec.num_layers)]
    names, tensors = zip(*packed.tensors(few=False).items(), strict=True)
    step, results = Step(packed.spec, names), []
    with torch.inference_mode():
        for ids, starts, num_seen, is_real in (
            ([9, 5], [4, 7], 8, None),
            ([9, 5, 0, 0], [4, 7, 0, 0], 16, [1, 1, 0, 0]),
        ):
            slots = tuple(memory.clone() for memory in before)
            is_real_B = None if is_real is None else torch.tensor(is_real) > 0
            logits = step(torch.tensor([ids, starts]), torch.arange(num_seen), slots, tensors, is_real_B=is_real_B)
            results.append((logits[:2], slots))
    (wanted, kept), (logits, filled) = results
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    for one, other, old in zip(kept, filled, before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert torch.equal(other[:, 2:], old[:, 2:]) and not torch.equal(other[:, :2], old[:, :2])


@pytest.mark.parametrize("family", FAMILIES)
def test_with_weights_in_bf16_the_step_is_as_near_to_fp32_as_the_packed_decoder(tiny_spec, random_decoder, family):
    decoder, starts = random_decoder(tiny_spec(**FAMILIES[family])), [0, 7, 3]
    exact, packed = PackedDecoder(decoder), PackedDecoder(rounded(decoder, torch.bfloat16))
    found = {}
    with torch.inference_mode():
        for name, each in (("exact", exact), ("packed", packed)):
            cache = Cache(3, torch.device("cpu"))
            for time in range(9):
                each(torch.tensor([[time, time + 1, time + 2]]), cache=cache.window([time] * 3))
            slots = tuple(memory.clone() for memory in cache.slots)
            found[name] = each.logits(each(torch.tensor([[9, 5, 90]]), cache=cache.window(starts))[0]).float()
        names, tensors = zip(*packed.tensors(few=False).items(), strict=True)
        logits = Step(packed.spec, names)(torch.tensor([[9, 5, 90], starts]), torch.arange(8), slots, tensors)
    assert logits.dtype == torch.bfloat16 and slots[0].dtype == torch.bfloat16
    away, usual = ((it.float() - found["exact"]).norm() / found["exact"].norm() for it in (logits, found["packed"]))
    assert away < 0.03 and away < 1.5 * usual
