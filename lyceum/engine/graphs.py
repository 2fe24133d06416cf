"""The decode step on a GPU as one launch: recorded once for so many rows and positions, in memory that stays, then replayed.

Why: a step of a small model is some hundred short kernels, and a GPU has done one before the next has been asked for. A CUDA
graph is a recording of them that is asked for once. It reads and writes the addresses that it was recorded with, so what
changes from step to step is copied into tensors that stay. Rows and positions are rounded up to powers of two, and a recording is
made for each pair that comes up: rows that fill up write nothing, positions that fill up are masked.

    graphs = Graphs(packed)
    logits_BV = graphs.logits(ids, starts, slots, usual)     # usual(): the step as it is without it

What is recorded is `lyceum.model.step.Step`, over the slots of `lyceum.engine.cache`. When these move, as when they grow, the
recordings are dropped and made anew. Whether a replay is faster than the usual step is measured on the steps themselves
(`lyceum.engine.probe`), since filling up costs something too. A recording that fails leaves steps as they are, and the log
says why.

Run by: `Engine(swift=True)` of a model on a GPU.
Shapes: B rows that decode, S positions that may be seen, V vocabulary.
What it is not: for prompts, or for a CPU (`lyceum.engine.compiled`). Its tests replay recordings on a CPU, operator by operator;
on a GPU it has not run yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Any, Protocol

import torch
from torch import Tensor

from lyceum import device
from lyceum.engine.probe import Probe
from lyceum.log import log
from lyceum.model.packed import PackedDecoder
from lyceum.model.step import Step

LEAST_SEEN = 128  # positions of the smallest recording
WARM_UPS = 3  # passes before a recording, in which libraries choose their kernels and take their memory
Size = tuple[int, int]  # rows, positions


class Recorder(Protocol):
    """What keeps the kernels of one piece of work."""

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        """Record what `work` asks of the device; returns the tensor that every replay writes its result to."""

    def replay(self) -> None:
        """Do all of it again, with what now stands in the memory that it reads."""


class CudaGraph:
    """A CUDA graph; all of a `pool` share the memory of what is computed on the way."""

    def __init__(self, where: torch.device, pool: Any) -> None:
        self._where, self._pool, self._graph = where, pool, torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        with torch.cuda.device(self._where):
            now, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(now)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    work()
            now.wait_stream(side)
            # of this thread alone: another may be loading a model, which must not spoil the recording
            with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
                return work()

    def replay(self) -> None:
        self._graph.replay()


class Recording:
    """The step for `num_rows` rows and `num_seen` positions."""

    def __init__(
        self, step: Step, weights: tuple[Tensor, ...], slots: Many[Tensor], size: Size, recorder: Recorder
    ) -> None:
        self.num_rows, num_seen = size
        where = slots[0].device
        self._now_3B = torch.zeros(3, self.num_rows, dtype=torch.long, device=where)  # of rows that fill up, all of it
        seen_S, memory = torch.arange(num_seen, device=where), tuple(slots)
        self._recorder = recorder
        self._logits_BV = recorder.record(
            lambda: step(self._now_3B[:2], seen_S, memory, weights, is_real_B=self._now_3B[2] > 0)
        )

    def run(self, ids: list[int], starts: list[int]) -> Tensor:
        """The logits (B, V), which stand where the next replay writes its own."""
        rest = [0] * (self.num_rows - len(ids))
        self._now_3B.copy_(torch.tensor([[*ids, *rest], [*starts, *rest], [1] * len(ids) + rest]))
        self._recorder.replay()
        return self._logits_BV[: len(ids)]


class Graphs:
    """The decode steps of one engine. Not safe to call from several threads, as the engine is not."""

    def __init__(self, packed: PackedDecoder, recorder: Callable[[torch.device, Any], Recorder] = CudaGraph) -> None:
        self._recorder = recorder
        self._is_able = True
        self._memory: tuple[Any, ...] = ()
        self._pool: Any = None
        self._recordings: dict[Size, Recording] = {}
        self._probes: dict[Size, Probe[bool]] = {}  # whether to replay
        self.update(packed)

    def update(self, packed: PackedDecoder) -> None:
        """The weights have changed."""
        tensors = packed.tensors(few=False)
        names = sorted(tensors)
        self._step, self._weights = Step(packed.spec, tuple(names)), tuple(tensors[name] for name in names)
        self._forget(())

    def logits(self, ids: list[int], starts: list[int], slots: Many[Tensor], usual: Callable[[], Tensor]) -> Tensor:
        """The logits (B, V) of the tokens that follow, replayed or as usual; to be used before the next step.

        ids, starts: of each row its token, and how many tokens its slot holds. slots: of each layer (2, rows, K, time, E);
        row b is slot b.
        """
        if not (slots and self._is_able):
            return usual()
        if (memory := tuple((slot.data_ptr(), slot.shape) for slot in slots)) != self._memory:
            self._forget(memory)
            self._room = min(slot.shape[1] for slot in slots), min(slot.shape[3] for slot in slots)
        size = min(_rounded(len(ids)), self._room[0]), min(max(_rounded(max(starts) + 1), LEAST_SEEN), self._room[1])
        probe = self._probes.setdefault(size, Probe([False, True]))
        take = usual
        if probe.choose():
            if (recording := self._recording(size, slots)) is None:
                return usual()
            take = lambda: recording.run(ids, starts)  # noqa: E731
        begun = time.perf_counter()
        logits_BV = take()
        device.finish_queue(logits_BV.device)  # else it was asked for only, not done
        probe.note(time.perf_counter() - begun)
        return logits_BV

    def _recording(self, size: Size, slots: Many[Tensor]) -> Recording | None:
        if size not in self._recordings:
            where = slots[0].device
            if self._pool is None and where.type == "cuda":
                self._pool = torch.cuda.graph_pool_handle()
            try:
                recorder = self._recorder(where, self._pool)
                self._recordings[size] = Recording(self._step, self._weights, slots, size, recorder)
            except RuntimeError as error:  # no memory for it; an operator that cannot be recorded
                log.warning(f"the decode step is not recorded: {str(error).splitlines()[0]}")
                self._is_able = False
                self._forget(())
                return None
        return self._recordings[size]

    def _forget(self, memory: tuple[Any, ...]) -> None:
        self._memory, self._pool = memory, None  # a pool in which nothing is left cannot be used again
        self._recordings.clear()


def _rounded(count: int) -> int:
    """The power of two that is not below it."""
    return 1 << (count - 1).bit_length()
