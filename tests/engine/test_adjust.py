from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lyceum.engine.adjust import Adjustment, adjusted
from lyceum.engine.constrain import Forms
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams, best, sample
from lyceum.errors import UsageError
from lyceum.model.transformer import Decoder

LOGITS = [2.0, -1.0, 0.5, 0.0, 3.0]


def after(
    params: SamplingParams, prompt: list[int], reply: list[int], logits: list[float] | None = None
) -> list[float]:
    logits = logits or LOGITS
    adjustment = Adjustment(params, prompt, len(logits))
    for number, token in enumerate(reply):
        adjustment.feed(token, is_drawn=number >= len(params.forced))
    return adjusted(torch.tensor([logits]), [adjustment])[0].tolist()


def test_presence_and_frequency_penalties_by_hand() -> None:
    # the reply has token 0 three times and token 2 once; the prompt does not count
    assert after(SamplingParams(frequency_penalty=0.5), [1, 4], [0, 0, 2, 0]) == [0.5, -1.0, 0.0, 0.0, 3.0]
    assert after(SamplingParams(presence_penalty=0.5), [1, 4], [0, 0, 2, 0]) == [1.5, -1.0, 0.0, 0.0, 3.0]
    both = SamplingParams(presence_penalty=1.0, frequency_penalty=-0.25)
    assert after(both, [], [0, 0, 2, 0]) == [2.0 + 0.75 - 1, -1.0, 0.5 + 0.25 - 1, 0.0, 3.0]


def test_the_repetition_penalty_by_hand() -> None:
    # positive logits are divided, negative ones multiplied; prompt and reply both count, and how often does not
    params = SamplingParams(repetition_penalty=2.0)
    assert after(params, [1, 1, 3], [4, 4]) == [2.0, -2.0, 0.5, 0.0, 1.5]


def test_penalties_come_before_the_bias() -> None:
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, logit_bias={4: 10.0, 2: -100.0})
    assert after(params, [], [4]) == [2.0, -1.0, -99.5, 0.0, 3.0 / 2 - 0.5 + 10]


def test_stop_tokens_cannot_come_before_min_tokens() -> None:
    params = SamplingParams(min_tokens=2, stop_ids=(0, 3, -1, 99), logit_bias={3: 1.5}, forced=(1,))
    for reply in ([], [1]):
        assert after(params, [2], reply) == [-math.inf, -1.0, 0.5, -math.inf, 3.0]
    assert after(params, [2], [1, 1]) == [2.0, -1.0, 0.5, 1.5, 3.0]


def test_a_token_outside_the_vocabulary_cannot_have_a_bias() -> None:
    for token in (5, -1):
        with pytest.raises(UsageError, match=f"token {token}") as caught:
            Adjustment(SamplingParams(logit_bias={token: 1.0}), [], 5)
        assert caught.value.hint


@given(st.data())
def test_a_mixed_batch_equals_each_request_alone(data: st.DataObject) -> None:
    size = 40
    numbers = st.floats(-2, 2, width=32)
    rows: list[tuple[SamplingParams, list[int], list[int]] | None] = []
    tokens = st.lists(st.integers(0, size - 1), max_size=50)
    for _ in range(data.draw(st.integers(1, 5))):
        if data.draw(st.integers(0, 2)) == 0:
            rows.append(None)
            continue
        params = SamplingParams(
            presence_penalty=data.draw(numbers),
            frequency_penalty=data.draw(numbers),
            repetition_penalty=data.draw(st.sampled_from([1.0, 1.5, 0.5])),
            logit_bias=data.draw(st.dictionaries(st.integers(0, size - 1), numbers, max_size=30)),
            min_tokens=data.draw(st.sampled_from([0, 5])),
            stop_ids=(1, 2),
        )
        rows.append((params, data.draw(tokens), data.draw(tokens)))
    logits_BV = torch.randn(len(rows), size, generator=torch.Generator().manual_seed(0))
    before = logits_BV.clone()
    each = [Adjustment(row[0], row[1], size) if row else None for row in rows]
    for row, adjustment in zip(rows, each, strict=True):
        for token in row[2] if row and adjustment else ():
            adjustment.feed(token)
    together = adjusted(logits_BV, each)
    assert torch.equal(logits_BV, before)  # the model's own logits are left as they were
    for number, row in enumerate(rows):
        if row is None:
            assert torch.equal(together[number], logits_BV[number])
            continue
        params, prompt, reply = row
        for token in range(size):
            logit, count = float(logits_BV[number, token]), reply.count(token)
            if token in prompt or count:
                logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
            logit -= count * params.frequency_penalty + (count > 0) * params.presence_penalty
            logit += params.logit_bias.get(token, 0.0)
            if len(reply) < params.min_tokens and token in params.stop_ids:
                logit = -math.inf
            assert float(together[number, token]) == pytest.approx(logit, abs=1e-4)


def test_draws_follow_the_adjusted_logits_and_logprobs_the_models_own() -> None:
    num = 20_000
    adjustment = Adjustment(SamplingParams(logit_bias={0: -100.0, 3: 1.0}, presence_penalty=1.0), [], 5)
    adjustment.feed(4)
    logits_BV = torch.tensor([LOGITS])
    adjusted_BV = adjusted(logits_BV, [adjustment])
    noise_B = (torch.arange(num, dtype=torch.float64) + 0.5) / num  # even noise: counts are exact to one draw
    tokens_B, logprobs_B = sample(
        logits_BV.expand(num, -1), torch.full((num,), 0.5), noise_B, adjusted_BV=adjusted_BV.expand(num, -1)
    )
    expected = [math.exp(x / 0.5) for x in (-98.0, -1.0, 0.5, 1.0, 2.0)]
    counts = torch.bincount(tokens_B, minlength=5).tolist()
    assert all(abs(count - num * x / sum(expected)) <= 1 for count, x in zip(counts, expected, strict=True))
    own = torch.log_softmax(torch.tensor(LOGITS) / 0.5, -1)
    torch.testing.assert_close(logprobs_B, own[tokens_B])


def test_greedy_takes_the_best_of_the_adjusted_logits() -> None:
    adjusted_BV = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    tokens_B, logprobs_B = sample(torch.tensor([[2.0, 0.0]] * 2), torch.zeros(2), None, adjusted_BV=adjusted_BV)
    assert tokens_B.tolist() == [1, 0]
    torch.testing.assert_close(logprobs_B, torch.log_softmax(torch.tensor([2.0, 0.0]), -1)[[1, 0]])


def test_a_schema_leaves_only_what_fits_in_its_own_row() -> None:
    token_bytes = [*(bytes([byte]) for byte in range(256)), b"tru", b""]
    params = SamplingParams(json_schema={"type": "boolean"}, stop_ids=(257,), forced=(9,))
    constraint = Forms(token_bytes).constraint({"type": "boolean"}, params.stop_ids)
    adjustment = Adjustment(params, [], 260, constraint)
    adjustment.feed(9, is_drawn=False)  # what was forced stands before the JSON
    logits_BV = torch.zeros(2, 260)  # two more than there are tokens
    for allowed, token in (([ord("f"), ord("t"), 256], 256), ([ord("e")], ord("e")), ([257], 257)):
        adjusted_BV = adjusted(logits_BV, [None, adjustment])
        assert torch.equal(adjusted_BV[0], logits_BV[0])
        assert (adjusted_BV[1] > -math.inf).nonzero().flatten().tolist() == allowed
        adjustment.feed(token)


# -- in the engine ---------------------------------------------------------------------------------------------------


def test_a_frequency_penalty_makes_greedy_take_turns(fixed_logits: Callable) -> None:
    # logits 1, .7, 0: each time a token is said it loses .5
    engine = Engine(fixed_logits(torch.tensor([1.0, 0.7, 0.0])))
    greedy = SamplingParams(6, temperature=0.0, frequency_penalty=0.5)
    outputs = engine.generate([[0, 0, 0]] * 2, [greedy, SamplingParams(6, temperature=0.0)])
    # 1 .7 0 | .5 .7 0 | .5 .2 0 | 0 .2 0 | 0 -.3 0 | -.5 -.3 0
    assert [output.ids for output in outputs] == [[0, 1, 0, 1, 0, 2], [0] * 6]
    assert outputs[0].is_biased and outputs[0].logprobs == []


def test_min_tokens_stand_before_a_stop_token_and_a_stop_string(fixed_logits: Callable) -> None:
    engine = Engine(fixed_logits(torch.tensor([5.0, 1.0, 0.0])), token_bytes=[b"a", b"b", b"c"])
    params = SamplingParams(9, temperature=0.0, min_tokens=3, stop_ids=(0,))
    string = SamplingParams(9, temperature=0.0, min_tokens=3, stop_strings=("aa",))
    by_token, by_string = engine.generate([[1], [1]], [params, string])
    assert by_token.ids == [1, 1, 1, 0] and by_token.finish == "stop"
    assert by_string.ids == [0] * 5 and by_string.text_bytes == 3 and by_string.stop == "aa"


def test_settings_of_each_request_hold_alone_and_in_a_crowd(decoder: Decoder) -> None:
    params = [
        SamplingParams(12, seed=1),
        SamplingParams(12, seed=2, min_p=0.2),
        SamplingParams(12, seed=3, repetition_penalty=1.5, top_k=20),
        SamplingParams(12, seed=4, presence_penalty=2.0, frequency_penalty=1.0, logit_bias={3: 5.0, 9: -100.0}),
        SamplingParams(12, seed=5, min_tokens=6, stop_ids=tuple(range(40)), top_p=0.9),
        SamplingParams(12, temperature=0.0, frequency_penalty=2.0, top_logprobs=3, logprobs=True),
    ]
    prompts = [[1, 2, 3], [4], [5, 6, 3, 3], [7], [8], [9, 10]]
    crowd = Engine(decoder, max_batch=4).generate(prompts, params)
    for prompt, one, output in zip(prompts, params, crowd, strict=True):
        alone = Engine(decoder).generate([prompt], one)[0]
        assert alone.ids == output.ids and alone.finish == output.finish
    assert 9 not in crowd[3].ids and 3 in crowd[3].ids
    assert not set(crowd[4].ids[:6]) & set(range(40))


def test_alternatives_and_prompt_come_with_their_log_probabilities(decoder: Decoder) -> None:
    prompt = [1, 2, 3]
    params = SamplingParams(5, seed=3, temperature=0.8, logprobs=True, top_logprobs=4, prompt_logprobs=True)
    plain, output = Engine(decoder).generate([prompt, prompt], [SamplingParams(5, seed=3, temperature=0.8), params])
    assert plain.ids == output.ids and plain.top_logprobs == [] and plain.prompt is None
    row = prompt + output.ids
    logits_TV = decoder.logits(decoder(torch.tensor([row])))[0, :-1]
    logprobs_TV = torch.log_softmax(logits_TV / 0.8, -1).detach()
    expected = logprobs_TV.gather(1, torch.tensor(row[1:]).unsqueeze(1)).squeeze(1).tolist()
    assert output.prompt is not None
    assert output.prompt.logprobs + output.logprobs == pytest.approx(expected, abs=1e-4)
    for ids, logprob, top, own_V in zip(output.ids, output.logprobs, output.top_logprobs, logprobs_TV[2:], strict=True):
        assert [token for token, _ in top] == own_V.topk(4).indices.tolist()
        assert [value for _, value in top] == pytest.approx(own_V.topk(4).values.tolist(), abs=1e-4)
        assert dict(top).get(ids, logprob) == logprob
    (only_prompt,) = Engine(decoder).generate([prompt], SamplingParams(0, prompt_logprobs=True))
    assert only_prompt.ids == [] and only_prompt.prompt is not None and len(only_prompt.prompt.logprobs) == 2


def test_the_best_of_several_are_those_the_model_finds_likeliest(decoder: Decoder) -> None:
    several = SamplingParams(6, n=2, best_of=8, seed=1)
    with pytest.raises(UsageError, match="best_of = 8") as caught:
        Engine(decoder).add([1, 2], several)
    assert caught.value.hint
    outputs = Engine(decoder).generate([[1, 2]] * 8, several.each())
    assert len({tuple(output.ids) for output in outputs}) > 4
    means = [sum(output.logprobs) / len(output.logprobs) for output in outputs]
    first, second = best([output.logprobs for output in outputs], 2)
    assert means[first] == max(means) and means[second] == sorted(means)[-2]
