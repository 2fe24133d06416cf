"""Recorded steps: replayed on a CPU operator by operator, with the same replies; on a GPU, where there is one, as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lyceum.engine import compiled as compiled_module
from lyceum.engine import graphs as graphs_module
from lyceum.engine.engine import Engine
from lyceum.engine.graphs import Graphs, Size
from lyceum.engine.probe import Probe
from lyceum.engine.sampling import SamplingParams
from lyceum.model.packed import PackedDecoder
from lyceum.model.transformer import Decoder
from tests.engine.test_engine import PROMPTS, Crowd

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, logprobs=True)


class Tape(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: the operators with the very tensors they had, done again into those they gave.

    Whatever Python knew while it was recorded (a length, an address) stays as it was, as in a graph; and as there, no number may
    be asked for on the way.
    """

    def __init__(self, where: torch.device, pool: Any) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.num_replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a number is asked for while the device has not worked it out")
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, found))
        return found

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        with self:
            return work()

    def replay(self) -> None:
        self.num_replays += 1
        for func, args, kwargs, found in self.calls:
            for old, new in zip(tree_leaves(found), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # else a view, or done in place
                    old.copy_(new)


class Taped(Graphs):
    """Recorded by tapes; notes every size, and how many rows came."""

    def __init__(self, packed: PackedDecoder) -> None:
        super().__init__(packed, Tape)
        self.seen: list[tuple[int, Size]] = []
        self.tapes: set[Tape] = set()

    def _recording(self, size: Size, slots: Any) -> Any:
        found = super()._recording(size, slots)
        assert found is not None
        self.tapes.add(found._recorder)
        run = found.run
        return type(
            "Noted", (), {"run": lambda _, ids, starts: self.seen.append((len(ids), size)) or run(ids, starts)}
        )()


class Mostly(Probe[bool]):
    """Two of three steps replayed, for ever."""

    def choose(self) -> bool:
        self._turn += 1
        return self._turn % 3 > 0

    def note(self, seconds: float) -> None:
        pass


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_module, "_kind", lambda packed: Taped)
    monkeypatch.setattr(graphs_module, "Probe", Mostly)
    monkeypatch.setattr(graphs_module, "LEAST_SEEN", 8)


def test_replies_do_not_depend_on_which_steps_are_replayed(decoder: Decoder, taped: None) -> None:
    engine = Engine(decoder, max_batch=6, swift=True, checks=True)
    crowd = Crowd(engine, 0)
    crowd.pass_through(24)
    crowd.check(decoder)
    for prompts, num in ((PROMPTS[:1], 40), (PROMPTS, 20)):
        params = SamplingParams(max_tokens=num, temperature=0.0)
        usual = [one.ids for one in Engine(decoder).generate(prompts, params)]
        assert [one.ids for one in engine.generate(prompts, params)] == usual
    graphs = engine._swift
    assert isinstance(graphs, Taped) and sum(tape.num_replays for tape in graphs.tapes) == len(graphs.seen) > 30
    rows, positions = ({size[at] for _, size in graphs.seen} for at in (0, 1))
    assert rows == {1, 2, 4, 6} and positions == {8, 16, 32, 64}, "powers of two, as far as there are slots"
    assert any(count < rows for count, (rows, _) in graphs.seen), "some rows only filled up"


def test_a_size_is_recorded_once_and_again_when_the_slots_move(decoder: Decoder, taped: None) -> None:
    engine = Engine(decoder, max_batch=2, swift=True)
    engine.generate([[5]], SamplingParams(max_tokens=7, temperature=0.0))
    graphs = engine._swift
    assert isinstance(graphs, Taped)
    assert [size for _, size in graphs.seen] == [(1, 8)] * 4 and len(graphs.tapes) == 1
    engine.generate([[6]], SamplingParams(max_tokens=7, temperature=0.0))
    assert len(graphs.tapes) == 1
    engine.generate([[7] * 30], SamplingParams(max_tokens=9, temperature=0.0))  # 32 positions were there
    engine.generate([[8]], SamplingParams(max_tokens=7, temperature=0.0))
    assert len(graphs.tapes) == 4, "to 32 positions, to 48, and to 8 anew"


def test_new_weights_are_recorded_anew(decoder: Decoder, other_decoder: Decoder, taped: None) -> None:
    engine = Engine(decoder, swift=True)
    engine.generate(PROMPTS, GREEDY)
    before = engine._swift
    engine.update_weights(other_decoder)
    found = engine.generate(PROMPTS, GREEDY)
    assert engine._swift is before and isinstance(before, Taped)
    for got, wanted in zip(found, Engine(other_decoder).generate(PROMPTS, GREEDY), strict=True):
        assert got.ids == wanted.ids and got.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)


def test_a_recording_that_fails_leaves_steps_as_they_are_and_is_told_once(
    decoder: Decoder, taped: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(tape: Tape, work: Callable[[], Tensor]) -> Tensor:
        raise RuntimeError("out of memory\nmore than anybody reads")

    class Failing(Graphs):
        def __init__(self, packed: PackedDecoder) -> None:
            super().__init__(packed, Tape)

    monkeypatch.setattr(compiled_module, "_kind", lambda packed: Failing)
    monkeypatch.setattr(Tape, "record", full)
    found = Engine(decoder, swift=True).generate(PROMPTS, GREEDY)
    assert [one.ids for one in found] == [one.ids for one in Engine(decoder).generate(PROMPTS, GREEDY)]
    said = capsys.readouterr().err
    assert said.count("not recorded: out of memory") == 1 and "anybody" not in said


def test_a_tape_refuses_what_a_graph_cannot_hold() -> None:
    numbers = torch.tensor([1, 2])
    with pytest.raises(RuntimeError, match="a number is asked for"):
        Tape(torch.device("cpu"), None).record(lambda: numbers[: int(numbers[0])])


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@gpu
def test_on_a_gpu_recorded_steps_give_the_usual_replies(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "Probe", Mostly)
    there = Decoder(decoder.spec)
    there.load_state_dict(decoder.state_dict())
    there.cuda()
    engine = Engine(there, max_batch=6, swift=True, checks=True)
    crowd = Crowd(engine, 0)
    crowd.pass_through(14)
    crowd.check(decoder)
    assert isinstance(engine._swift, Graphs) and engine._swift._recordings


@gpu
@pytest.mark.parametrize("swift", [False, True])
def test_on_a_gpu_weights_in_16_bits_are_the_rounded_weights(decoder: Decoder, swift: bool) -> None:
    there = Decoder(decoder.spec)
    there.load_state_dict(decoder.state_dict())
    engine = Engine(there.cuda(), half=True, swift=swift)
    for output, prompt in zip(engine.generate(PROMPTS, GREEDY), PROMPTS, strict=True):
        (scores,) = Engine(decoder).score([prompt + output.ids])
        assert output.logprobs == pytest.approx(scores[len(prompt) - 1 :], abs=0.3)
