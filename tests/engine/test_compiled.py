"""Decoding by the fastest way: the same replies whichever way a step goes, and the compiled step itself."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lyceum import device
from lyceum.engine import compiled as compiled_module
from lyceum.engine.compiled import Library, Swift, Way, _give_up, _halves, renewed
from lyceum.engine.engine import Engine
from lyceum.engine.probe import Probe
from lyceum.engine.sampling import SamplingParams
from lyceum.model.packed import PackedDecoder
from lyceum.model.product import can_halve
from lyceum.model.step import Step
from lyceum.model.transformer import Decoder
from tests.engine.test_engine import PROMPTS, Crowd

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch was built without MKL")
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, logprobs=True)


class Traced(Library):
    """The step that would be compiled, run as it is; ready from the third look on."""

    def __init__(self, packed: PackedDecoder, is_several: bool) -> None:
        self.names = sorted(packed.tensors(few=is_several))
        self.step, self.num_layers, self.num_runs = Step(packed.spec, tuple(self.names)), packed.spec.num_layers, 0
        self.looks = 0

    @property
    def is_ready(self) -> bool:
        self.looks += 1
        return self.looks > 2

    def run(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        self.num_runs += 1
        slots, weights = inputs[2 : 2 + self.num_layers], inputs[2 + self.num_layers :]
        return self.step(inputs[0], inputs[1], tuple(slots), tuple(weights))


class Turns(Probe[Way]):
    """All ways in turn, for ever."""

    def choose(self) -> Way:
        self._turn += 1
        return self._ways[self._turn % len(self._ways)]

    def note(self, seconds: float) -> None:
        pass


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _give_up.cache_clear()
    return tmp_path / "lyceum" / "steps"


def test_replies_do_not_depend_on_the_way_that_steps_go(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_module, "Library", Traced)
    monkeypatch.setattr(compiled_module, "Probe", Turns)
    engine = Engine(decoder, max_batch=8, swift=True, checks=True)
    crowd = Crowd(engine, 0)
    crowd.pass_through(20)
    crowd.check(decoder)
    for prompts, num in ((PROMPTS[:1], 40), (PROMPTS, 20)):
        params = SamplingParams(max_tokens=num, temperature=0.0)
        usual = [one.ids for one in Engine(decoder).generate(prompts, params)]
        assert [one.ids for one in engine.generate(prompts, params)] == usual
    assert engine._swift is not None
    runs = {several: library.num_runs for several, library in engine._swift._libraries.items()}  # type: ignore[attr-defined]
    assert min(runs[False], runs[True]) > 5, runs


def test_new_weights_are_used_by_the_compiled_step(
    decoder: Decoder, other_decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_module, "Library", Traced)
    engine = Engine(decoder, swift=True)
    engine.generate(PROMPTS, GREEDY)
    assert engine._swift is not None
    before = engine._swift._libraries[True]
    engine.update_weights(other_decoder)
    outputs = engine.generate(PROMPTS, GREEDY)
    assert engine._swift._libraries[True] is before
    assert [one.ids for one in outputs] == [one.ids for one in Engine(other_decoder).generate(PROMPTS, GREEDY)]


def test_without_a_compiler_steps_go_as_before_and_the_log_says_so_once(
    decoder: Decoder, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    for prompts in (PROMPTS, PROMPTS[:1]):  # for which there are two libraries
        engine = Engine(decoder, swift=True)
        outputs = engine.generate(prompts, GREEDY)
        assert [one.ids for one in outputs] == [one.ids for one in Engine(decoder).generate(prompts, GREEDY)]
        assert engine._swift is not None and engine._swift._libraries  # type: ignore[union-attr]
    said = capsys.readouterr().err
    assert said.count("stays uncompiled: there is no C++ compiler") == 1, said
    assert not cache_folder.exists()


def test_a_broken_file_and_a_failing_compiler_leave_steps_as_they_are(
    decoder: Decoder, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.executable", "false")  # what is to compile ends at once
    monkeypatch.setattr("shutil.which", lambda name: name)
    packed = PackedDecoder(decoder)
    library = Library(packed, False)
    while library._process is not None:
        assert not library.is_ready
    assert "stays uncompiled: compiling ended with 1" in capsys.readouterr().err
    cache_folder.mkdir(parents=True)
    library.path.write_bytes(b"no package")
    assert not Library(packed, False).is_ready
    assert "cannot be read" in capsys.readouterr().err


def test_a_compiled_step_is_found_again_only_where_all_is_the_same(
    decoder: Decoder, other_decoder: Decoder, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    one = PackedDecoder(decoder)
    path = Library(one, False).path
    assert Library(PackedDecoder(other_decoder), False).path == path, "weights are not part of it"
    assert Library(one, True).path != path
    wider = PackedDecoder(Decoder(replace(decoder.spec, context_length=64)))
    assert Library(wider, False).path != path
    order = json.loads(Library(one, True)._order)
    assert order["spec"]["width"] == decoder.spec.width and order["is_several"]


def test_ways_are_tried_on_all_threads_half_of_them_and_so_on_to_one() -> None:
    assert [_halves(count) for count in (1, 2, 6, 8)] == [[1], [2, 1], [6, 3, 1], [8, 4, 2, 1]]


def test_what_must_repeat_is_never_measured(decoder: Decoder) -> None:
    assert Engine(decoder)._swift is None
    assert Engine(decoder, swift=True, batch_invariant=True)._swift is None
    assert not can_halve(decoder.output_weight) or Engine(decoder, swift=True, half=True)._swift is None
    assert Engine(decoder, swift=True).sibling()._swift is None
    assert isinstance(renewed(None, PackedDecoder(decoder)), Swift)
    assert renewed(None, PackedDecoder(Decoder(decoder.spec).double())) is None


@pytest.mark.slow
@pytest.mark.skipif(not device.has_compiler(), reason="there is no C++ compiler")
def test_the_compiled_step_is_the_step_itself(
    decoder: Decoder, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(decoder, max_batch=8, swift=True, checks=True)
    usual = Engine(decoder, max_batch=8).generate(PROMPTS, GREEDY)
    assert [one.ids for one in engine.generate(PROMPTS, GREEDY)] == [one.ids for one in usual]
    engine.generate(PROMPTS[:1], GREEDY)  # a single row, which is compiled by itself
    assert engine._swift is not None
    libraries = engine._swift._libraries
    until = time.monotonic() + 600
    while not all(library.is_ready for library in libraries.values()):
        assert all(library.is_ready or library._process for library in libraries.values()), "compiling failed"
        assert time.monotonic() < until
        time.sleep(0.2)
    assert len(os.listdir(cache_folder)) == len(libraries) == 2
    runs = dict.fromkeys(libraries, 0)

    def counted(several: bool):
        run = libraries[several].run

        def go(inputs: list[torch.Tensor]) -> torch.Tensor:
            runs[several] += 1
            return run(inputs)

        return go

    for several in libraries:
        monkeypatch.setattr(libraries[several], "run", counted(several))
    for _ in range(3):
        for got, wanted in zip(engine.generate(PROMPTS, GREEDY), usual, strict=True):
            assert got.ids == wanted.ids and got.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
        assert engine.generate(PROMPTS[:1], GREEDY)[0].ids == usual[0].ids
    crowd = Crowd(engine, 0)
    crowd.pass_through(60)
    crowd.check(decoder)
    assert min(runs.values()) > 5
    again = Library(PackedDecoder(decoder), True)  # the next process
    assert again.is_ready and again._process is None
