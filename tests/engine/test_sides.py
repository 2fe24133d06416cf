from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from lyceum.engine import sides
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams
from lyceum.errors import DataError
from lyceum.model.transformer import Decoder

PROMPTS = [[1 + (7 * i + k) % 90 for k in range(1 + i % 9)] for i in range(40)]
PARAMS = [SamplingParams(max_tokens=8, temperature=float(i % 2), seed=i, logprobs=True) for i in range(40)]


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(sides, "MIN_PROMPTS", 8)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def thread_names(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The threads on which any engine takes a step."""
    names: set[str] = set()
    step = Engine.step

    def noted(self: Engine) -> list:
        names.add(threading.current_thread().name)
        return step(self)

    monkeypatch.setattr(Engine, "step", noted)
    return names


def test_the_answers_are_those_of_one_engine(decoder: Decoder, thread_names: set[str]) -> None:
    alone = Engine(decoder, max_batch=16).generate(PROMPTS, PARAMS)
    thread_names.clear()
    together = sides.generate(Engine(decoder, max_batch=16, checks=True), PROMPTS, PARAMS)
    assert len(thread_names) == 2
    assert [output.ids for output in together] == [output.ids for output in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert torch.get_num_threads() == 2


def test_progress_counts_all_of_them_and_never_falls(decoder: Decoder) -> None:
    seen: list[int] = []
    sides.generate(
        Engine(decoder, max_batch=4), PROMPTS, PARAMS, on_progress=lambda done, of: seen.append(done) or of == 40
    )
    assert seen == sorted(seen) and seen[-1] == 40


def test_few_prompts_or_a_busy_engine_stay_with_one(decoder: Decoder, thread_names: set[str]) -> None:
    sides.generate(Engine(decoder), PROMPTS[:15], PARAMS[:15])
    busy = Engine(decoder)
    queued = busy.add([5], PARAMS[0])
    sides.generate(busy, PROMPTS, PARAMS)
    assert len(thread_names) == 1
    assert [output.id for output in busy.step()] == [queued]


def test_a_bad_prompt_leaves_nothing_behind(decoder: Decoder) -> None:
    engine = Engine(decoder)
    with pytest.raises(DataError, match="empty"):
        sides.generate(engine, [*PROMPTS, []], [*PARAMS, PARAMS[0]])
    assert engine.is_idle and torch.get_num_threads() == 2
