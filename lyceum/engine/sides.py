"""Many replies at once on a CPU: engines of one model side by side, each on a thread of its own.

Why: in a model of a few million parameters one step of an engine is many short operators, too short to be cut over cores,
with Python between them. Two engines of half the prompts each, on one thread of torch's each, keep both cores busy. Rankings,
PPO's rollouts and the examination are drawn so.

    outputs = generate(engine, prompts, params)        # as engine.generate, and its answers

The noise of a reply is a function of its own seed and position, so that replies do not depend on who drew them, but for the
rounding of another batch.

What it is not: for a GPU, nor for few prompts; there it is `Engine.generate` itself. Only the first engine is the caller's: the
others live as long as the call, with a cache of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock

import torch

from lyceum import device
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import PLAIN, SamplingParams
from lyceum.engine.sequence import Output

MIN_PROMPTS = 16  # of one engine: fewer rows than that and a step costs the same for less


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] = PLAIN,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Output]:
    """Replies to all prompts, in their order, each with the id that its engine gave it.

    params: for all, or one for each prompt. on_progress(finished, all), from any of the threads, one at a time.
    """
    count = min(torch.get_num_threads(), len(prompts) // MIN_PROMPTS)
    if count < 2 or engine.device.type != "cpu" or not engine.is_idle:
        return engine.generate(prompts, params, on_progress=on_progress)
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    shares = [order[number::count] for number in range(count)]
    engines = [engine, *(engine.sibling() for _ in shares[1:])]
    finished, lock = [0] * count, Lock()

    def go(number: int) -> list[Output]:
        def note(done: int, _: int) -> None:
            with lock:
                finished[number] = done
                if on_progress is not None:
                    on_progress(sum(finished), len(prompts))

        share = shares[number]
        return engines[number].generate([prompts[i] for i in share], [each[i] for i in share], on_progress=note)

    outputs: dict[int, Output] = {}
    for share, found in zip(shares, device.side_by_side(go, count), strict=True):
        outputs.update(zip(share, found, strict=True))
    return [outputs[i] for i in range(len(prompts))]
