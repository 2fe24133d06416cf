"""The step as one function of tensors against the packed decoder, whose numbers are the model's own."""

from __future__ import annotations

import pytest
import torch

from lyceum.engine.cache import Cache
from lyceum.model import product as product_module
from lyceum.model.packed import PackedDecoder
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
