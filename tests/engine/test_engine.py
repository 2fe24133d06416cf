from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lyceum.engine import cache as cache_module
from lyceum.engine import score as score_module
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams
from lyceum.engine.sequence import Output
from lyceum.errors import DataError, UsageError
from lyceum.model.transformer import Decoder

VOCAB, CONTEXT = 97, 48
PROMPTS = [[1, 2, 3], [50, 4, 9, 60, 7, 7, 7], [5], [1, 2, 3], list(range(20)), [90, 91]]


def training_logprobs(decoder: Decoder, row: list[int], temperature: float = 1.0) -> list[float]:
    """Log-probability of every token but the first, by the graph that training runs."""
    logits_TV = decoder.logits(decoder(torch.tensor([row])))[0, :-1]
    logprobs_TV = torch.log_softmax(logits_TV / temperature, -1)
    return logprobs_TV.gather(1, torch.tensor(row[1:]).unsqueeze(1)).squeeze(1).tolist()


def naive_greedy(decoder: Decoder, prompt: list[int], num_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(decoder.logits(decoder(torch.tensor([ids]))[0, -1]).argmax()))
    return ids[len(prompt) :]


def seeded(num: int, **settings: object) -> list[SamplingParams]:
    return [SamplingParams(seed=seed, **settings) for seed in range(num)]  # type: ignore[arg-type]


def run_until_idle(engine: Engine) -> dict[int, Output]:
    outputs = {}
    while not engine.is_idle:
        for output in engine.step():
            assert output.id not in outputs
            outputs[output.id] = output
    return outputs


# -- the cache -------------------------------------------------------------------------------------------------------


class Crowd:
    """People who come and go at random, and what they were given: new prompts, stems that many share, further turns."""

    def __init__(self, engine: Engine, seed: int, abort_rate: float = 0.15, max_tokens: int = 12):
        self.engine = engine
        self.random = random.Random(seed)
        self.abort_rate = abort_rate
        self.max_tokens = max_tokens
        self.stems = [[self.random.randrange(VOCAB) for _ in range(length)] for length in (8, 12, 20, 30)]
        self.prompts: dict[int, list[int]] = {}
        self.temperatures: dict[int, float] = {}
        self.outputs: dict[int, Output] = {}
        self.growing: dict[int, list[int]] = {}

    def come(self) -> None:
        draw = self.random
        tail = [draw.randrange(VOCAB) for _ in range(draw.randint(1, 9))]
        kind = draw.randrange(4)
        prompt = tail if kind == 0 else draw.choice(self.stems) + (tail if kind == 1 else tail[:1])
        if kind == 3 and self.outputs:
            last = draw.choice(sorted(self.outputs))
            prompt = self.prompts[last] + self.outputs[last].ids + tail
        prompt = prompt[:CONTEXT]
        params = SamplingParams(
            draw.randint(0, self.max_tokens),
            temperature=draw.choice([0.0, 0.7, 1.0]),
            seed=len(self.prompts),
            stop_ids=(0, 1),
            forced=draw.choice([(), (), (3, 5)]),
            logprobs=True,
            top_logprobs=2,
            prompt_logprobs=draw.random() < 0.15,
        )
        for _ in range(draw.choice([1, 1, 1, 3])):  # several replies to one prompt
            id = self.engine.add(
                prompt,
                params,
                key=draw.choice("abc"),
                is_background=draw.random() < 0.2,
            )
            self.prompts[id], self.growing[id], self.temperatures[id] = prompt, [], params.temperature or 1.0

    def step(self) -> None:
        for output in self.engine.step():
            self.take(output)
        for id, seen in self.growing.items():
            seen += self.engine.reply(id, len(seen))

    def take(self, output: Output) -> None:
        assert output.id not in self.outputs, "answered twice"
        assert output.ids[: len(self.growing[output.id])] == self.growing.pop(output.id), "a token was lost, or twice"
        self.outputs[output.id] = output

    def abort_some(self) -> None:
        for id in list(self.growing):
            if self.random.random() < self.abort_rate / 10:
                output = self.engine.abort(id)
                if output is not None:
                    assert output.finish == "abort"
                    self.take(output)
                else:  # a limit of 0: finished when it came
                    del self.growing[id], self.prompts[id]

    def pass_through(self, num_requests: int) -> None:
        while len(self.prompts) < num_requests or not self.engine.is_idle:
            if len(self.prompts) < num_requests and len(self.growing) < 40:
                for _ in range(self.random.randint(0, 3)):
                    self.come()
            self.abort_some()
            self.step()
        assert not self.growing, "a request was never answered"

    def check(self, decoder: Decoder, ids: list[int] | None = None) -> None:
        for id in self.outputs if ids is None else ids:
            output, prompt = self.outputs[id], self.prompts[id]
            expected = training_logprobs(decoder, prompt + output.ids, self.temperatures[id])
            assert len(output.logprobs) == len(output.ids)
            assert output.logprobs == pytest.approx(expected[len(prompt) - 1 :], abs=1e-4)
            if output.prompt is not None and output.finish != "abort":
                assert output.prompt.logprobs == pytest.approx(
                    training_logprobs(decoder, prompt, self.temperatures[id]), abs=1e-4
                )
                for logprob, rank, top in zip(*vars(output.prompt).values(), strict=True):
                    assert (rank == 0) == (top[0][1] == pytest.approx(logprob, abs=1e-6)) and len(top) == 2


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_cached_decoding_equals_the_full_forward_whoever_comes_and_goes(
    decoder: Decoder, seed: int, pack: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "CALL_CELLS", (1 << 15, 0, 200)[seed % 3])  # padded, row by row, either
    draw = random.Random(seed)
    cell = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes
    engine = Engine(
        decoder,
        max_batch=draw.randint(1, 6),
        step_tokens=draw.choice([1, 3, 7, 512]),
        num_kept=draw.choice([0, 2, 8]),
        max_bytes=draw.choice([None, CONTEXT * cell, 3 * CONTEXT * cell]),
        pack=pack,
        checks=True,
    )
    crowd = Crowd(engine, seed)
    crowd.pass_through(40)
    assert {output.finish for output in crowd.outputs.values()} >= {"length", "abort"}
    crowd.check(decoder)


def test_earlier_prefixes_and_neighbours_are_reused_in_the_random_crowd(decoder: Decoder) -> None:  # or it tests little
    crowd = Crowd(Engine(decoder, max_batch=6, step_tokens=7, num_kept=40, checks=True), seed=0)
    crowd.pass_through(80)
    assert sum(output.num_reused > 0 for output in crowd.outputs.values()) > 10


def soak(decoder: Decoder, num_requests: int, every: int) -> None:
    cell = 2 * 2 * 2 * 8 * 4
    engine = Engine(decoder, max_batch=8, step_tokens=16, max_bytes=12 * CONTEXT * cell, checks=True)
    crowd = Crowd(engine, seed=1, abort_rate=0.5)
    held, resident = [], []
    for wanted in range(every, num_requests + 1, every):
        crowd.pass_through(wanted)
        ids = sorted(crowd.outputs)
        crowd.check(decoder, crowd.random.sample(ids[-50:], min(20, len(ids))))
        for id in ids[:-50]:
            crowd.outputs[id] = replace(crowd.outputs[id], logprobs=[], prompt=None)
        held.append(engine._cache.num_bytes)
        resident.append(resident_bytes())
    assert max(held) <= engine.max_bytes  # type: ignore[operator]
    assert resident[-1] <= 1.05 * resident[len(resident) // 3]
    aborted = sum(output.finish == "abort" for output in crowd.outputs.values())
    assert 0.1 < aborted / len(crowd.outputs) < 0.9


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell a process's memory")
def test_a_soak_of_random_requests_leaves_nothing_behind(decoder: Decoder) -> None:
    soak(decoder, 300, 100)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell a process's memory")
def test_a_long_soak_of_random_requests_leaves_nothing_behind(decoder: Decoder) -> None:
    soak(decoder, 10_000, 500)


@pytest.mark.parametrize("max_batch", [1, 4, 16])
def test_greedy_equals_a_loop_without_a_cache(decoder: Decoder, max_batch: int) -> None:
    outputs = Engine(decoder, max_batch=max_batch).generate(PROMPTS, SamplingParams(max_tokens=15, temperature=0.0))
    assert [output.ids for output in outputs] == [naive_greedy(decoder, prompt, 15) for prompt in PROMPTS]


class Passes:
    """How many tokens each pass of an engine brings."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch):
        self.sizes: list[int] = []
        run = engine._runner

        def noted(tokens_BT: Tensor, **more: object) -> Tensor:
            self.sizes.append(tokens_BT.shape[1])
            return run(tokens_BT, **more)

        noted.logits = run.logits  # type: ignore[attr-defined]
        monkeypatch.setattr(engine, "_runner", noted)


def test_a_prompt_asked_for_several_replies_is_read_once(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(decoder, checks=True)
    passes = Passes(engine, monkeypatch)
    stem = list(range(20))
    outputs = engine.generate([stem] * 7 + [[9, 9]], seeded(8, max_tokens=4))
    # the first of seven and the short prompt; then the other six's last token beside the two that decode
    assert passes.sizes == [22, 8, 8, 8, 6]
    assert len({tuple(output.ids) for output in outputs[:7]}) > 1
    assert [output.num_reused for output in outputs] == [0] + [19] * 6 + [0]


def test_a_second_turn_costs_its_new_tokens(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(decoder, checks=True)
    greedy = SamplingParams(max_tokens=6, temperature=0.0)
    first, turn = list(range(20)), [7, 7, 7]
    reply = engine.generate([first], greedy)[0].ids
    passes = Passes(engine, monkeypatch)
    again = engine.generate([first + reply + turn], greedy)[0]
    assert passes.sizes[0] == len(turn) + 1  # the reply's last token was drawn, and never read
    assert again.num_reused == 25 and again.ids == naive_greedy(decoder, first + reply + turn, 6)
    other = engine.generate([first[:15] + turn], greedy)[0]  # a branch
    assert other.num_reused == 15 and other.ids == naive_greedy(decoder, first[:15] + turn, 6)


def test_a_request_finds_only_what_its_own_key_left(decoder: Decoder) -> None:
    engine = Engine(decoder, checks=True)
    greedy, prompt = SamplingParams(max_tokens=3, temperature=0.0), list(range(20))
    reused = []
    for key in ("one", "other", "one"):
        engine.add(prompt, greedy, key=key)
        reused += [output.num_reused for output in run_until_idle(engine).values()]
    assert reused == [0, 0, 19]
    engine.add(prompt, greedy, key="one")
    engine.add(prompt, greedy, key="third")  # nor does it copy from a neighbour
    assert [output.num_reused for output in run_until_idle(engine).values()] == [19, 0]


def test_a_follower_reads_by_itself_when_the_one_it_waits_for_is_gone(decoder: Decoder) -> None:
    engine = Engine(decoder, step_tokens=4, checks=True)
    greedy, prompt = SamplingParams(max_tokens=3, temperature=0.0), list(range(30))
    busy = engine.add([5], SamplingParams(max_tokens=30, temperature=0.0))  # so that prompts are read by 4
    engine.step()
    leader, follower = engine.add(prompt, greedy), engine.add(prompt, greedy)
    for _ in range(3):
        engine.step()
    engine.abort(leader)
    outputs = run_until_idle(engine)
    assert outputs[follower].ids == naive_greedy(decoder, prompt, 3)
    assert outputs[follower].num_reused == 12  # what the other had read
    assert outputs[busy].ids == naive_greedy(decoder, [5], 30)


def test_a_long_prompt_does_not_hold_the_others_up(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(decoder, step_tokens=5, checks=True)
    passes = Passes(engine, monkeypatch)
    ids = [engine.add([1], SamplingParams(20, temperature=0.0)), engine.add([2], SamplingParams(20, temperature=0.0))]
    engine.step()
    engine.add(list(range(23)), SamplingParams(3, temperature=0.0))
    for length in range(2, 8):
        engine.step()
        assert [len(engine.reply(id)) for id in ids] == [length, length]
    assert passes.sizes == [2, 7, 7, 7, 7, 5, 3]


def test_memory_stays_within_its_bound_and_nobody_is_thrown_out(decoder: Decoder) -> None:
    cell = 2 * 2 * 2 * 8 * 4
    engine = Engine(decoder, max_batch=8, max_bytes=100 * cell, checks=True)
    params = SamplingParams(max_tokens=30, temperature=0.0)
    ids = [engine.add([number, number], params) for number in range(9)]  # 32 tokens each: three fit
    most = 0
    outputs: dict[int, Output] = {}
    while not engine.is_idle:
        outputs |= {output.id: output for output in engine.step()}
        most = max(most, len(engine._scheduler.running))
        assert engine._cache.num_bytes <= 100 * cell
    assert most == 3
    assert [outputs[id].ids for id in ids] == [naive_greedy(decoder, [number, number], 30) for number in range(9)]


def test_batch_mates_do_not_change_a_bit_where_that_is_asked_for(decoder: Decoder) -> None:
    def logprobs(others: int, order: int) -> list[list[float]]:
        engine = Engine(decoder, max_batch=16, step_tokens=6, batch_invariant=True, checks=True)
        for number in range(others):
            engine.add(list(range(number + 1, 2 * number + 3)), SamplingParams(9, seed=number))
        mine = {engine.add(PROMPTS[i], SamplingParams(12, seed=i, logprobs=True)): i for i in range(6)[::order]}
        outputs = run_until_idle(engine)
        return [outputs[id].logprobs for id, _ in sorted(mine.items(), key=lambda item: item[1])]

    assert logprobs(0, 1) == logprobs(7, 1) == logprobs(3, -1)  # to the last bit
    alone = [
        Engine(decoder, batch_invariant=True, step_tokens=6).generate(
            [PROMPTS[i]], SamplingParams(12, seed=i, logprobs=True)
        )
        for i in range(6)
    ]
    assert [output[0].logprobs for output in alone] == logprobs(5, 1)


def test_throughput_is_not_bound_by_the_longest_reply(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(decoder, max_batch=4)
    params = [SamplingParams(max_tokens=30)] + [SamplingParams(max_tokens=3)] * 20
    steps = 0
    step = engine.step

    def counted() -> list[Output]:
        nonlocal steps
        steps += 1
        return step()

    monkeypatch.setattr(engine, "step", counted)
    engine.generate([[1]] * 21, params)
    assert steps == 30  # 20 replies of 3 tokens pass through the other three slots meanwhile


def test_new_weights_are_used_at_once_and_nothing_cached_with_the_old_ones(
    decoder: Decoder, other_decoder: Decoder
) -> None:
    engine = Engine(decoder, max_batch=2, checks=True)
    params = SamplingParams(max_tokens=10, temperature=0.0)
    engine.generate([list(range(20))], params)
    ids = [engine.add(prompt, params) for prompt in PROMPTS[:3]]
    for _ in range(4):
        engine.step()
    engine.update_weights(other_decoder)
    outputs = run_until_idle(engine)
    for id, prompt in zip(ids[:2], PROMPTS, strict=False):
        old = naive_greedy(decoder, prompt, 4)
        assert outputs[id].ids == old + naive_greedy(other_decoder, prompt + old, 6)
    assert outputs[ids[2]].ids == naive_greedy(other_decoder, PROMPTS[2], 10)
    again = engine.generate([list(range(20))], params)[0]
    assert again.num_reused == 0 and again.ids == naive_greedy(other_decoder, list(range(20)), 10)


def test_weights_changed_in_place_count_from_update_weights_on(decoder: Decoder) -> None:
    trained = copy.deepcopy(decoder)
    engine, greedy = Engine(trained), SamplingParams(max_tokens=10, temperature=0.0)
    before = engine.generate(PROMPTS, greedy)
    packed = engine._packed
    assert packed is not None
    memory = packed._layers[0].qkv.data_ptr()
    with torch.no_grad():
        for weight in trained.parameters():
            weight.mul_(-0.8)
    engine.update_weights(trained)
    after = [output.ids for output in engine.generate(PROMPTS, greedy)]
    assert after == [naive_greedy(trained, prompt, 10) for prompt in PROMPTS]
    assert after != [output.ids for output in before]
    assert packed is engine._packed and packed._layers[0].qkv.data_ptr() == memory  # refreshed in place


def test_the_model_can_be_trained_after_it_has_generated(decoder: Decoder) -> None:
    engine = Engine(decoder)
    engine.generate(PROMPTS, SamplingParams(max_tokens=3))
    engine.score(PROMPTS)
    decoder.logits(decoder(torch.tensor(PROMPTS[1:2]))).logsumexp(-1).sum().backward()
    assert all(weight.grad is not None for weight in decoder.parameters())
    decoder.zero_grad()


# -- sampling --------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([0.0, 1.0, 2.0, -1.0, 1.5, 0.5])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 1.0}, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 0.6}, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 1.7, "top_k": 3}, [1, 2, 4]),
        ({"temperature": 1.0, "top_p": 0.7}, [2, 4, 1]),  # .42 + .25 + .15
        ({"temperature": 1.0, "top_k": 4, "top_p": 0.7}, [2, 4]),  # .45 + .28 of the four
    ],
)
def test_replies_have_the_exact_distribution(fixed_logits: Callable, settings: dict, kept: list[int]) -> None:
    num = 6000
    engine = Engine(fixed_logits(LOGITS), max_batch=1000)
    outputs = engine.generate([[0]] * (num // 3), seeded(num // 3, max_tokens=3, **settings))
    counts = Counter(token for output in outputs for token in output.ids)
    expected = torch.softmax(LOGITS.double()[kept] / settings["temperature"], 0) * num
    assert set(counts) == set(kept)
    chi_square = sum((counts[token] - e) ** 2 / e for token, e in zip(kept, expected.tolist(), strict=True))
    critical = {1: 10.83, 2: 13.82, 5: 20.52}[len(kept) - 1]  # 99.9 %
    assert chi_square < critical


def test_a_reply_is_the_same_alone_and_in_a_crowd(decoder: Decoder) -> None:
    params = seeded(len(PROMPTS), max_tokens=12, temperature=0.8, stop_ids=(3,))
    params[2] = replace(params[2], top_k=5)
    params[4] = replace(params[4], temperature=0.0)
    crowd = Engine(decoder, max_batch=3).generate(PROMPTS, params)
    for prompt, p, output in zip(PROMPTS, params, crowd, strict=True):
        alone = Engine(decoder, max_batch=1).generate([prompt], p)[0]
        assert (alone.ids, alone.finish, alone.is_biased) == (output.ids, output.finish, output.is_biased)


def test_a_seed_repeats_a_reply_and_another_seed_gives_another(decoder: Decoder) -> None:
    engine = Engine(decoder)
    first, again, other = engine.generate(
        [[1, 2]] * 3, [SamplingParams(20, seed=1), SamplingParams(20, seed=1), SamplingParams(20, seed=2)]
    )
    assert first.ids == again.ids != other.ids


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_the_samplers_logprobs_are_the_scores_and_the_training_graphs(decoder: Decoder, temperature: float) -> None:
    engine = Engine(decoder, max_batch=4)
    outputs = engine.generate(PROMPTS, seeded(len(PROMPTS), max_tokens=9, temperature=temperature, logprobs=True))
    rows = [prompt + output.ids for prompt, output in zip(PROMPTS, outputs, strict=True)]
    for prompt, row, output, scores in zip(PROMPTS, rows, outputs, engine.score(rows, temperature), strict=True):
        assert not output.is_biased
        assert output.logprobs == pytest.approx(scores[len(prompt) - 1 :], abs=1e-4)
        assert scores == pytest.approx(training_logprobs(decoder, row, temperature), abs=1e-4)


def test_logprobs_come_only_where_asked_for(decoder: Decoder) -> None:
    asked, plain = Engine(decoder).generate([[1], [1]], [SamplingParams(4, logprobs=True), SamplingParams(4)])
    assert len(asked.logprobs) == 4 and plain.logprobs == []


def test_a_processor_changes_the_logits_of_its_own_request(decoder: Decoder) -> None:
    def only_even(logits_V: Tensor, reply: list[int]) -> Tensor:
        seen.append(list(reply))
        return logits_V.index_fill(0, torch.arange(1, VOCAB, 2), float("-inf"))

    seen: list[list[int]] = []
    engine = Engine(decoder, checks=True)
    greedy = SamplingParams(6, temperature=0.0)
    free, bound = engine.add([5], greedy), engine.add([5], greedy, processor=only_even)
    outputs = run_until_idle(engine)
    assert outputs[free].ids == naive_greedy(decoder, [5], 6) and not all(t % 2 == 0 for t in outputs[free].ids)
    assert all(token % 2 == 0 for token in outputs[bound].ids) and outputs[bound].is_biased
    assert seen == [outputs[bound].ids[:length] for length in range(6)]


# -- the end of a reply ----------------------------------------------------------------------------------------------


def test_stopping_early_equals_cutting_a_full_reply_at_its_first_stop_token(decoder: Decoder) -> None:
    engine = Engine(decoder, max_batch=4)
    prompts, stops = PROMPTS * 4, (3, 40, 77, 12, 60, 5)  # more stop tokens than the batch has room for at first
    full = engine.generate(prompts, seeded(len(prompts), max_tokens=20))
    early = engine.generate(prompts, seeded(len(prompts), max_tokens=20, stop_ids=stops))
    assert {output.finish for output in early} == {"stop", "length"}
    for long, short in zip(full, early, strict=True):
        end = next((at for at, token in enumerate(long.ids) if token in stops), None)
        assert short.ids == (long.ids if end is None else long.ids[: end + 1])
        assert (short.finish, short.stop) == (("length", None) if end is None else ("stop", long.ids[end]))


def test_a_stop_string_ends_the_reply_and_says_where_its_text_ends(reciter: Callable) -> None:
    token_bytes = [b"", b"caf\xc3", b"\xa9 no", b"ir. Q", b"uestion", b": and"]
    model = reciter(len(token_bytes))
    model.script = [1, 2, 3, 4, 5, 1]
    engine = Engine(model, token_bytes=token_bytes)
    output = engine.generate([[0]], SamplingParams(10, temperature=0.0, stop_strings=("answer", "Question:")))[0]
    assert (output.ids, output.finish, output.stop) == ([1, 2, 3, 4, 5], "stop", "Question:")
    assert b"".join(token_bytes[token] for token in output.ids)[: output.text_bytes].decode() == "café noir. "


def test_stop_strings_of_one_request_do_not_stop_another(fixed_logits: Callable) -> None:
    engine = Engine(fixed_logits(LOGITS), token_bytes=[bytes([97 + token]) for token in range(6)])
    params = [replace(p, stop_strings=("c",) if p.seed % 2 else ()) for p in seeded(12, max_tokens=8)]
    plain = engine.generate([[0]] * 12, seeded(12, max_tokens=8))
    for p, full, output in zip(params, plain, engine.generate([[0]] * 12, params), strict=True):
        is_stopped = bool(p.stop_strings) and 2 in full.ids
        assert output.ids == (full.ids[: full.ids.index(2) + 1] if is_stopped else full.ids)
        assert output.finish == ("stop" if is_stopped else "length")


def test_stop_strings_without_token_bytes_are_refused(decoder: Decoder) -> None:
    with pytest.raises(UsageError, match="token_bytes"):
        Engine(decoder).add([1], SamplingParams(stop_strings=("x",)))


def test_forced_tokens_begin_the_reply_and_the_rest_follows_from_them(decoder: Decoder) -> None:
    forced = (10, 20, 30)
    params = SamplingParams(8, temperature=0.0, forced=forced, stop_ids=(20,), logprobs=True)
    output, plain = Engine(decoder).generate([[1, 2], [1, 2]], [params, SamplingParams(5, temperature=0.0)])
    assert output.ids == [*forced, *naive_greedy(decoder, [1, 2, *forced], 5)] and output.num_forced == 3
    assert output.logprobs == pytest.approx(training_logprobs(decoder, [1, 2, *output.ids])[1:], abs=1e-4)
    assert plain.ids == naive_greedy(decoder, [1, 2], 5) and plain.num_forced == 0


def test_forced_tokens_beyond_the_limit_are_cut(decoder: Decoder) -> None:
    output = Engine(decoder).generate([[1]], SamplingParams(2, forced=(10, 20, 30)))[0]
    assert (output.ids, output.finish, output.num_forced) == ([10, 20], "length", 2)


@pytest.mark.parametrize(("prompt_length", "room"), [(CONTEXT - 5, 5), (CONTEXT - 1, 1), (CONTEXT, 0)])
def test_a_full_context_ends_the_reply(decoder: Decoder, prompt_length: int, room: int) -> None:
    output = Engine(decoder).generate([[7] * prompt_length], SamplingParams(max_tokens=100))[0]
    assert (len(output.ids), output.finish) == (room, "context")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([1] * (CONTEXT + 1), "context of 48"), ([VOCAB], "vocabulary of 97"), ([-1], "vocabulary")],
)
def test_a_prompt_that_cannot_be_served_is_refused_with_a_hint(
    decoder: Decoder, prompt: list[int], message: str
) -> None:
    engine = Engine(decoder)
    for ask in (lambda: engine.add(prompt), lambda: engine.generate([[1], prompt]), lambda: engine.score([prompt])):
        with pytest.raises(DataError, match=message) as caught:
            ask()
        assert caught.value.hint
    assert engine.is_idle


def test_no_prompts_no_replies(decoder: Decoder) -> None:
    engine = Engine(decoder)
    assert engine.generate([]) == [] and engine.score([]) == [] and engine.step() == []
    with pytest.raises(UsageError):
        engine.generate([[1], [2]], [SamplingParams()])


# -- several askers --------------------------------------------------------------------------------------------------


def test_requests_of_others_are_served_while_one_generates(decoder: Decoder) -> None:
    engine = Engine(decoder)
    mine = engine.add([1, 2], SamplingParams(2, temperature=0.0))
    engine.generate([[5]], SamplingParams(6))
    assert [output.ids for output in engine.step() if output.id == mine] == [naive_greedy(decoder, [1, 2], 2)]
    assert engine.is_idle


def test_an_interrupted_generate_leaves_nothing_behind(decoder: Decoder) -> None:
    engine = Engine(decoder, max_batch=2)
    other = engine.add([3], SamplingParams(8, temperature=0.0))

    def interrupt(finished: int, wanted: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1]] * 5, [SamplingParams(n) for n in (2, 3, 4, 5, 6)], on_progress=interrupt)
    outputs = run_until_idle(engine)
    assert {id: output.ids for id, output in outputs.items()} == {other: naive_greedy(decoder, [3], 8)}


def test_progress_counts_finished_replies(decoder: Decoder) -> None:
    seen: list[tuple[int, int]] = []
    Engine(decoder).generate(
        [[1]] * 3, [SamplingParams(n) for n in (1, 2, 2)], on_progress=lambda *now: seen.append(now)
    )
    assert seen == [(1, 3), (3, 3)]


def test_following_a_reply_gives_its_ids_once_each_and_closing_aborts_it(decoder: Decoder) -> None:
    engine = Engine(decoder)
    growing = engine.follow([1, 2], SamplingParams(6, temperature=0.0))
    ids = [token for _ in range(5) for token in next(growing)]
    with pytest.raises(StopIteration) as end:
        next(growing)
    assert end.value.value.ids[:5] == ids and end.value.value.ids == naive_greedy(decoder, [1, 2], 6)
    growing = engine.follow([1, 2], SamplingParams(6))
    next(growing)
    assert not engine.is_idle
    growing.close()
    assert engine.is_idle


def test_abort_frees_the_slot_for_the_next_in_line(decoder: Decoder) -> None:
    engine = Engine(decoder, max_batch=1)
    first, second, third = (engine.add([n], SamplingParams(5, temperature=0.0)) for n in (1, 2, 3))
    engine.step()
    waiting, running = engine.abort(second), engine.abort(first)
    assert waiting is not None and waiting.ids == []
    assert running is not None and running.ids == naive_greedy(decoder, [1], 1)
    assert engine.abort(first) is None
    assert {id: output.ids for id, output in run_until_idle(engine).items()} == {third: naive_greedy(decoder, [3], 5)}


# -- whole rows ------------------------------------------------------------------------------------------------------


def test_scores_do_not_depend_on_how_rows_are_grouped_or_logits_are_cut(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [training_logprobs(decoder, row, 0.7) if len(row) > 1 else [] for row in PROMPTS]
    for group_tokens, cells in ((1, 1), (15, 3 * VOCAB), (4096, 1 << 22)):
        monkeypatch.setattr(score_module, "GROUP_TOKENS", group_tokens)
        monkeypatch.setattr(score_module, "LOGIT_CELLS", cells)
        for scores, row in zip(Engine(decoder).score(PROMPTS, 0.7), expected, strict=True):
            assert scores == pytest.approx(row, abs=1e-4)
    with pytest.raises(UsageError, match="temperature"):
        Engine(decoder).score(PROMPTS, 0.0)


def test_scores_say_the_rank_and_what_was_more_probable(fixed_logits: Callable) -> None:
    found = Engine(fixed_logits(LOGITS)).scores([[0, 2, 4, 3]], num_top=2)[0]  # 2.0, 1.5 and -1.0
    assert found.ranks == [0, 1, 5]
    logprobs = torch.log_softmax(LOGITS, 0)
    assert found.logprobs == pytest.approx(logprobs[[2, 4, 3]].tolist())
    assert [[token for token, _ in top] for top in found.top] == [[2, 4]] * 3
    assert found.top[0][0][1] == found.logprobs[0]  # the very same float


def test_a_prompts_scores_come_with_its_reply(decoder: Decoder) -> None:
    engine = Engine(decoder, step_tokens=4, checks=True)
    prompt = PROMPTS[4]
    engine.generate([prompt], SamplingParams(2))  # a prefix that must not be reused: nothing would be known of it
    for max_tokens in (0, 3):
        id = engine.add(prompt, SamplingParams(max_tokens, prompt_logprobs=True, top_logprobs=3))
        output = run_until_idle(engine)[id]
        expected = engine.scores([prompt], num_top=3)[0]
        assert output.prompt is not None and output.prompt.ranks == expected.ranks
        assert output.prompt.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
        assert len(output.ids) == max_tokens
        assert [[token for token, _ in top] for top in output.prompt.top] == [
            [token for token, _ in top] for top in expected.top
        ]


def test_encode_gives_the_hidden_vectors_of_each_row_alone(decoder: Decoder) -> None:
    engine = Engine(decoder)
    alone = [decoder(torch.tensor([row]))[0].detach() for row in PROMPTS]
    for vectors, expected in zip(engine.encode(PROMPTS, "all"), alone, strict=True):
        torch.testing.assert_close(vectors, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        engine.encode(PROMPTS), torch.stack([hidden[-1] for hidden in alone]), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        engine.encode(PROMPTS, "mean"), torch.stack([hidden.mean(0) for hidden in alone]), atol=1e-4, rtol=1e-4
    )
    with pytest.raises(UsageError, match="first"):
        engine.encode(PROMPTS, "first")  # type: ignore[arg-type]


def test_a_reply_can_be_followed_with_its_scores(decoder: Decoder) -> None:
    engine = Engine(decoder)
    id = engine.add(PROMPTS[1], SamplingParams(6, seed=3, logprobs=True, top_logprobs=2, prompt_logprobs=True))
    seen = []
    while (so_far := engine.so_far(id)) is not None:
        seen.append((so_far.ids, list(so_far.logprobs), list(so_far.top_logprobs)))
        finished = engine.step()
    (output,) = finished
    assert [ids for ids, _, _ in seen] == [output.ids[:length] for length in range(6)]
    assert seen[-1][1] == output.logprobs[:5] and seen[-1][2] == output.top_logprobs[:5]
    assert engine.so_far(id) is None
