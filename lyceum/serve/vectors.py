"""Embeddings: texts or tokens in, one vector each out, where the model is one for that.

The hidden vectors are the engine's (`Engine.encode`); what they become is said by the checkpoint's own files
(`lyceum.serve.models.read_pooling`). Shortened vectors (`dimensions`) are made as long as before again, as Matryoshka
embeddings are used (Kusupati et al. 2022, section 3). `base64` is little-endian float32, which the official client asks for
when its user asks for nothing.
"""

from __future__ import annotations

import base64
from typing import Any

import torch
from torch import Tensor

from lyceum.engine.scheduler import groups
from lyceum.serve.chat import check_size
from lyceum.serve.completions import read_prompts
from lyceum.serve.limits import Caller
from lyceum.serve.protocol import EmbeddingRequest
from lyceum.serve.refusals import Refusal, too_long
from lyceum.serve.service import Service, off_loop

GROUP_TOKENS = 2048  # read between two steps of the engine, so that nobody's stream stands still for long
MAX_INPUTS = 2048


async def embed(service: Service, request: EmbeddingRequest, caller: Caller) -> dict[str, Any]:
    """The answer of `/v1/embeddings`."""
    served = await service.find(request.model, caller)
    pooling = served.pooling
    if pooling is None:
        raise Refusal(
            400,
            f"The model {served.name!r} gives no embeddings: its folder has no modules.json that says how.",
            param="model",
            code="unsupported_model",
        )
    if len(request.input) > MAX_INPUTS:
        raise Refusal(400, f"{len(request.input)} inputs, at most {MAX_INPUTS} at once.", param="input")
    if "" in request.input:
        raise Refusal(400, "An input is an empty string.", param="input")
    for one in request.input:
        check_size(len(one), served, "input")
    rows = await off_loop(sum(map(len, request.input)), lambda: read_prompts(request.input, "", served))
    if pooling.at == "last":
        rows = [[*row, served.tokenizer.end_id] for row in rows]
    longest = max(map(len, rows))
    if longest > served.context_length:
        raise too_long(longest, served.context_length, "input")
    width = served.engine.model.spec.width
    if request.dimensions is not None and request.dimensions > width:
        raise Refusal(400, f"'dimensions' is {request.dimensions}, expected at most {width}.", param="dimensions")
    num_tokens = sum(map(len, rows))
    service.quota.take(caller, 1, num_tokens)
    try:
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        found: dict[int, Tensor] = {}
        for group in groups([len(rows[number]) for number in order], GROUP_TOKENS):
            numbers = order[group]
            part = [rows[number] for number in numbers]
            vectors = await service.worker.call(lambda part=part: served.engine.encode(part, pooling.at))  # type: ignore[misc]
            found.update(zip(numbers, vectors, strict=True))
    finally:
        service.quota.give_back(caller, 1)
    data = []
    for number in range(len(rows)):
        vector = found[number].detach().float().cpu()
        is_cut = request.dimensions is not None and request.dimensions < width
        vector = vector[: request.dimensions] if is_cut else vector
        if pooling.is_normalised or is_cut:
            vector = vector / vector.norm().clamp(min=1e-12)
        data.append({"object": "embedding", "index": number, "embedding": _written(vector, request.encoding_format)})
    used = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": served.name, "usage": used}


def _written(vector: Tensor, encoding: str | None) -> Any:
    if encoding == "base64":
        return base64.b64encode(vector.to(torch.float32).numpy().astype("<f4").tobytes()).decode()
    return vector.tolist()
