from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lyceum.engine import engine as engine_module
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


@settings(max_examples=10)
@given(st.data())
def test_cached_decoding_equals_the_full_forward_whoever_comes_and_goes(decoder: Decoder, data: st.DataObject) -> None:
    engine = Engine(decoder, max_batch=data.draw(st.integers(1, 5)))
    prompts: dict[int, list[int]] = {}
    outputs: dict[int, Output] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        for _ in range(data.draw(st.integers(0, 3))):
            prompt = data.draw(
                st.sampled_from(PROMPTS) | st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=CONTEXT)
            )
            forced = data.draw(st.sampled_from([(), (3, 5)]))
            params = SamplingParams(
                data.draw(st.integers(1, 12)), seed=len(prompts), stop_ids=(0, 1), forced=forced, logprobs=True
            )
            prompts[engine.add(prompt, params)] = prompt
        if prompts and data.draw(st.booleans()):
            id = data.draw(st.sampled_from(sorted(prompts)))
            if (output := engine.abort(id)) is not None:
                outputs[id] = output
                assert output.finish == "abort"
        for output in engine.step():
            assert output.id not in outputs
            outputs[output.id] = output
    outputs |= run_until_idle(engine)
    for id, output in outputs.items():
        assert len(output.logprobs) == len(output.ids)
        if output.ids:
            expected = training_logprobs(decoder, prompts[id] + output.ids)[len(prompts[id]) - 1 :]
            assert output.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("max_batch", [1, 4, 16])
def test_greedy_equals_a_loop_without_a_cache(decoder: Decoder, max_batch: int) -> None:
    outputs = Engine(decoder, max_batch=max_batch).generate(PROMPTS, SamplingParams(max_tokens=15, temperature=0.0))
    assert [output.ids for output in outputs] == [naive_greedy(decoder, prompt, 15) for prompt in PROMPTS]


def test_equal_prompts_are_read_once(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    forward = decoder.forward

    def noted(tokens_BT: Tensor, **more: object) -> Tensor:
        sizes.append(tuple(tokens_BT.shape))
        return forward(tokens_BT, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder, "forward", noted)
    outputs = Engine(decoder).generate([[1, 2, 3, 4, 5]] * 7 + [[9, 9]], seeded(8, max_tokens=4))
    assert sizes == [(2, 4)] + [(8, 1)] * 4
    assert len({tuple(output.ids) for output in outputs[:7]}) > 1


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
    engine = Engine(decoder, max_batch=2)
    params = SamplingParams(max_tokens=10, temperature=0.0)
    ids = [engine.add(prompt, params) for prompt in PROMPTS[:3]]
    for _ in range(4):
        engine.step()
    engine.update_weights(other_decoder)
    outputs = run_until_idle(engine)
    for id, prompt in zip(ids[:2], PROMPTS, strict=False):
        old = naive_greedy(decoder, prompt, 4)
        assert outputs[id].ids == old + naive_greedy(other_decoder, prompt + old, 6)
    assert outputs[ids[2]].ids == naive_greedy(other_decoder, PROMPTS[2], 10)


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


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.5])
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
    assert (len(output.ids), output.finish) == (room, "length")


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
        monkeypatch.setattr(engine_module, "GROUP_TOKENS", group_tokens)
        monkeypatch.setattr(engine_module, "LOGIT_CELLS", cells)
        for scores, row in zip(Engine(decoder).score(PROMPTS, 0.7), expected, strict=True):
            assert scores == pytest.approx(row, abs=1e-4)
    with pytest.raises(UsageError, match="temperature"):
        Engine(decoder).score(PROMPTS, 0.0)


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
