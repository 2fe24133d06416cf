"""Direct preference learning: files, edge cases, invariances, resume, ranks; and that it learns while controls do not.

Run as a script, `python test_preference.py FOLDER` under torchrun's environment, it is one rank of small runs.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lyceum
from lyceum import dist
from lyceum.batches.preferences import Encoded, Judged, PreferenceBatch, collate
from lyceum.config import Recipe
from lyceum.corpus.records import Conversation, Message, Ranking, Rating, write_records
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams
from lyceum.errors import ConfigError, DataError, RunError, TrainingError
from lyceum.log import read_metrics
from lyceum.model.checkpoint import load_checkpoint, save_checkpoint
from lyceum.model.lora import load_adapters
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import StageFolder, Work
from lyceum.stages import preference
from lyceum.stages.preference import Preference, PreferenceConfig
from lyceum.stages.reference_logprobs import FILE, with_reference
from lyceum.tokens.tokenizer import Tokenizer
from lyceum.train import loop
from lyceum.train.preference import PRESETS
from lyceum.train.stage import Step

SPEC = ModelSpec(16, 1, 32, 2, 2, 16, 64, 32, tied=False)
PAD, END, MARK = 0, 1, 15
CHAT: Any = SimpleNamespace(tokenizer=SimpleNamespace(pad_id=PAD))
SMALL = PreferenceConfig(epochs=2, batch_prompts=6, lr=3e-3, warmup=0.0, log_every=1, micro_tokens=64)


def small_policy(seed: int = 0, double: bool = False) -> Decoder:
    model = Decoder(SPEC, torch.Generator().manual_seed(seed))
    with torch.no_grad():  # a reference that prefers something
        model.output_weight.mul_(8)
        model.model.embed_tokens.weight.mul_(10)
    return model.double() if double else model


def judged_prompts(count: int, responses: int, seed: int = 0) -> list[Judged]:
    """Prompts with responses of several lengths, the first best and the last worst."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        rows = [rng.integers(2, 14, rng.integers(1, 7)).tolist() + [END] for _ in range(responses)]
        pairs = tuple((i, j, 1.0) for i in range(responses) for j in range(i + 1, responses))
        prompt = [MARK, *rng.integers(2, 14, rng.integers(1, 4)).tolist()]
        found.append(Judged(prompt, rows, pairs, (0,), name=f"ranking {number + 1}"))
    return found


def rated_responses(count: int, seed: int = 0) -> list[Judged]:
    """Single responses, two good ones to every bad one."""
    whole = judged_prompts(count, 1, seed)
    return [replace(one, pairs=(), best=(0,) if number % 3 else ()) for number, one in enumerate(whole)]


def data_for(algorithm: str, count: int, seed: int = 0) -> list[Judged]:
    return judged_prompts(count, 3, seed) if PRESETS[algorithm].is_paired else rated_responses(3 * count, seed)


class InMemory(Preference):
    """The stage over judged responses in memory."""

    double = False

    def __init__(
        self,
        config: PreferenceConfig,
        train: list[Judged],
        valid: Sequence[Judged] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(config)
        self.given, self.init_seed = (Encoded(train), Encoded(list(valid))), seed

    def start(self, work: Work) -> None:
        model = small_policy(self.init_seed, self.double)
        self.begin(model, *self.given, CHAT, seed=work.seed, folder=work.folder.path)


def work_in(folder: Path, inputs: dict[str, Path] | None = None, seed: int = 0) -> Work:
    return Work(StageFolder(folder), inputs or {}, seed, Recipe("test", seed, {}, (), folder / "recipe.toml"))


def train(stage: Preference, folder: Path, seed: int = 0) -> dict[str, Any]:
    return loop.run_stage(stage, work_in(folder, seed=seed))


def begun(config: PreferenceConfig, judged: list[Judged]) -> InMemory:
    stage = InMemory(config, judged)
    stage.begin(small_policy(), *stage.given, CHAT, seed=0)
    return stage


def lines(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in loop.TIMINGS} for row in read_metrics(folder / "metrics.jsonl")]


# ---------------------------------------------------------------- what a step is


@pytest.mark.parametrize("algorithm", PRESETS)
def test_the_first_step_is_at_the_reference(algorithm: str, tmp_path: Path) -> None:
    train(InMemory(replace(SMALL, algorithm=algorithm), data_for(algorithm, 8)), tmp_path)
    first, *_, last = lines(tmp_path)
    at_first = {"dpo": math.log(2), "dpo_norm": math.log(2), "cdpo": math.log(2), "ipo": 25.0, "kto": 0.5}
    if algorithm in at_first:
        assert first["loss"] == pytest.approx(at_first[algorithm], rel=1e-4)
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last["loss"] < first["loss"] and last["rewards/margins"] > first["rewards/margins"]
    assert ("rewards/accuracies" in last) == PRESETS[algorithm].is_paired and ("kl" in last) == (algorithm == "kto")
    assert ("loss/nll" in last) == (algorithm == "orpo")


def test_metrics_by_hand_on_one_pair() -> None:
    one = Judged([MARK, 3], [[4, 5, END], [6, END]], ((0, 1, 1.0),), (0,))
    stage = begun(replace(SMALL, beta=0.5), [one])
    with torch.no_grad():
        for p in stage.model.parameters():
            p.add_(0.01)
    (step,) = list(stage.steps(stage.num_steps - 1))
    _, metrics = stage.loss(step.micro_batches[0])
    now, reference = (
        torch.tensor([sum(row[1:]) for row in Engine(model).score(one.rows())])
        for model in (stage.model, small_policy())
    )
    shown = {name: float(total) / count for name, (total, count) in metrics.items()}
    assert shown["logps/chosen"] == pytest.approx(float(now[0]), abs=1e-4)
    assert shown["logps/rejected"] == pytest.approx(float(now[1]), abs=1e-4)
    rewards = 0.5 * (now - reference)
    assert shown["rewards/chosen"] == pytest.approx(float(rewards[0]), abs=1e-4)
    assert shown["rewards/rejected"] == pytest.approx(float(rewards[1]), abs=1e-4)
    assert shown["rewards/accuracies"] == float(rewards[0] > rewards[1])
    assert (shown["tokens/chosen"], shown["tokens/rejected"]) == (3, 2)


@pytest.mark.parametrize("algorithm", PRESETS)
def test_padding_changes_no_loss_and_no_metric(algorithm: str) -> None:
    stage = begun(replace(SMALL, algorithm=algorithm), data_for(algorithm, 6))
    stage.kl = 0.1
    batch = collate(stage.train, PAD)
    wide = torch.nn.functional.pad(batch.tokens_BT, (0, 9), value=7)
    found = [stage.loss(one) for one in (batch, replace(batch, tokens_BT=wide))]
    for one, other in zip(*(list(terms.values()) for terms, _ in found), strict=True):
        assert one.total.item() == pytest.approx(other.total.item(), rel=1e-5)
    for (total, count), (other_total, other_count) in zip(*(list(m.values()) for _, m in found), strict=True):
        assert float(total) == pytest.approx(float(other_total), rel=1e-5, abs=1e-5) and count == other_count


@pytest.mark.parametrize("algorithm", ["dpo", "orpo", "kto"])
def test_another_cut_into_micro_batches_gives_the_same_training(algorithm: str, tmp_path: Path) -> None:
    for micro_tokens in (36, 4000):
        config = replace(SMALL, algorithm=algorithm, micro_tokens=micro_tokens)
        stage = InMemory(config, data_for(algorithm, 9))
        stage.double = True
        train(stage, tmp_path / str(micro_tokens))
    for one, other in zip(lines(tmp_path / "36"), lines(tmp_path / "4000"), strict=True):
        assert one.keys() == other.keys()
        assert all(one[key] == pytest.approx(other[key], abs=1e-9) for key in one)


def test_every_response_is_read_once_and_halves_hold_the_same() -> None:
    stage = begun(replace(SMALL, batch_prompts=4), judged_prompts(4, 4))
    seen: list[int] = []
    stage.model.register_forward_hook(lambda module, args, out: seen.append(len(out)))  # tokens of responses
    (step, *_) = list(stage.steps(1))
    whole = [stage.loss(batch)[0]["preference"].total.item() for batch in step.micro_batches]
    responses = [response for batch in step.micro_batches for one in batch.judged for response in one.responses]
    assert len(responses) == 16 and sum(seen) == sum(map(len, responses))  # not 2 * 6 pairs * 4 prompts
    halves = [stage.loss(half)[0]["preference"].total.item() for b in step.micro_batches for half in b.halves()]
    assert sum(halves) == pytest.approx(sum(whole), rel=1e-5)


def test_the_kl_of_kto_is_the_mean_log_ratio_of_other_prompts_responses_and_never_negative() -> None:
    stage = begun(replace(SMALL, algorithm="kto", batch_prompts=30), rated_responses(12))
    (step,) = list(stage.steps(1))
    stage.before_step(step)
    assert stage.kl == pytest.approx(0.0, abs=1e-5)
    with torch.no_grad():
        stage.model.output_weight.mul_(0.5)
    stage.before_step(step)
    rows = [one.prompt + one.stranger for one in stage.train]
    assert all(one.stranger and one.stranger in [o.responses[0] for o in stage.train] for one in stage.train)
    total = 0.0
    now, reference = (Engine(model).score(rows) for model in (stage.model, small_policy()))
    for one, a, b in zip(stage.train, now, reference, strict=True):
        total += sum(a[len(one.prompt) - 1 :]) - sum(b[len(one.prompt) - 1 :])
    assert stage.kl == pytest.approx(max(0.0, total / 12), abs=1e-4) and total != 0
    with torch.no_grad():
        stage.model.output_weight.zero_().sub_(1e-3)
    stage.before_step(step)
    assert stage.kl >= 0.0


# ---------------------------------------------------------------- the reference


def test_the_reference_is_computed_once_and_only_for_the_same_weights_and_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, judged, passes = small_policy(), judged_prompts(5, 2), []
    model.register_forward_hook(lambda *_: passes.append(1))

    def values(model: Decoder, judged: list[Judged]) -> list[tuple[float, ...]]:
        return [one.reference for one in with_reference(model, judged, micro_tokens=64, folder=tmp_path)]

    first = values(model, judged)
    count = len(passes)
    assert values(model, judged) == first and len(passes) == count > 0 and (tmp_path / FILE).exists()
    expected = [sum(logp[len(one.prompt) - 1 :]) for one in judged for logp in Engine(small_policy()).score(one.rows())]
    assert [value for one in first for value in one] == pytest.approx(expected, abs=1e-4)
    other = [replace(judged[0], responses=[[9, END], judged[0].responses[1]]), *judged[1:]]
    assert values(model, other)[0] != first[0] and len(passes) > count
    count = len(passes)
    values(model, judged)  # the file now belongs to the other rows
    assert len(passes) > count
    with torch.no_grad():
        model.output_weight[0, 0] += 0.5
    count, moved = len(passes), values(model, judged)
    assert moved != first and len(passes) > count
    (tmp_path / FILE).write_bytes(b"broken")
    assert values(model, judged) == moved


def test_a_reference_that_is_not_the_policy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Decoder, judged: list[Judged], **_: Any) -> list[Judged]:
        return [replace(one, reference=(-1.0,) * len(one.responses)) for one in judged]

    monkeypatch.setattr(preference, "with_reference", wrong)
    with pytest.raises(TrainingError, match="policy and reference differ by"):
        train(InMemory(SMALL, judged_prompts(4, 2)), tmp_path)


@pytest.mark.parametrize("algorithm", ["dpo", "orpo", "kto"])
def test_a_killed_run_goes_on_bit_for_bit(algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SMALL, algorithm=algorithm, save_every=2, validate_every=3)

    def stage() -> InMemory:
        return InMemory(config, data_for(algorithm, 12), data_for(algorithm, 3, seed=5))

    train(stage(), tmp_path / "straight")
    whole = Preference.steps

    def killed_at_3(self: Preference, first: int) -> Iterator[Step[PreferenceBatch]]:
        for number, step in enumerate(whole(self, first), first):
            if number == 3:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(Preference, "steps", killed_at_3)
    with pytest.raises(KeyboardInterrupt):
        train(stage(), tmp_path / "killed")
    monkeypatch.setattr(Preference, "steps", whole)
    train(stage(), tmp_path / "killed")
    assert lines(tmp_path / "killed") == lines(tmp_path / "straight")
    assert any("valid/rewards/margins" in line for line in lines(tmp_path / "killed"))


# ---------------------------------------------------------------- from files


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned policy with its tokenizer."""
    folder = tmp_path_factory.mktemp("school")
    texts = ["what is it? yes no maybe it is so user assistant " * 20]
    tokenizer = Tokenizer.train(texts, 290)
    torch.manual_seed(0)
    spec = replace(SPEC, vocab_size=tokenizer.vocab_size, context_length=64)
    save_checkpoint(folder / "sft" / "checkpoint", Decoder(spec), tokenizer)
    return folder


def ranking(question: str, answers: tuple[str, ...], ranks: tuple[float, ...], **more: Any) -> Ranking:
    prompt = Conversation((Message("user", question),))
    return Ranking(prompt, tuple(Message("assistant", answer) for answer in answers), ranks, origin="rule", **more)


EDGES = [
    ranking("what is it?", ("yes", "no", "maybe"), (1, 2, 3)),
    ranking("is it so?", ("yes", ""), (1, 2)),  # an empty response: kept
    ranking("what is so?", ("yes", "no"), (1, 1)),  # all ties
    ranking("no?", ("it is so", "it is so"), (1, 2)),  # equal texts
    ranking("yes?", ("yes", "yes", "no"), (1, 2, 3)),  # one pair of equal texts, two that differ
    ranking("so?", ("yes " * 60, "no"), (1, 2)),  # beyond the context
]


def run_on(school: Path, folder: Path, config: PreferenceConfig = SMALL) -> dict[str, Any]:
    inputs = {"policy": school / "sft", "rankings": folder / "rankings"}
    return preference.run(config, work_in(folder / "preference", inputs))


def test_every_odd_row_has_its_stated_behaviour_and_is_counted(school: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "rankings" / "train.jsonl", EDGES)
    write_records(tmp_path / "rankings" / "valid.jsonl", EDGES[:1])
    report = run_on(school, tmp_path)
    assert report["judged"]["train"] == {
        "kept": 3, "empty_responses": 1, "all_ties": 1, "equal_texts": 1, "too_long": 1, "pairs_of_equal_texts": 2,
    }  # fmt: skip
    assert report["judged"]["valid"] == {"kept": 1, "empty_responses": 0}
    assert report["line"].startswith("dpo: ") and "held-out pairs" in report["line"]
    saved = load_checkpoint(tmp_path / "preference" / "checkpoint")
    assert saved.info["stage"] == "preference" and saved.info["parent"].endswith("sft/checkpoint")
    assert saved.info["learned_from"] == [
        {"kind": "rankings", "count": 3, "source": "rankings", "origins": {"rule": 3}}
    ]
    assert (tmp_path / "preference" / FILE).exists()
    samples = (tmp_path / "preference" / "samples.jsonl").read_text().splitlines()
    assert json.loads(samples[0])["chosen"] == "yes"


def test_a_ranking_counts_as_good_and_bad_responses_for_kto(school: Path, tmp_path: Path) -> None:
    more = [ranking("it?", ("yes", "no", "so"), (1, 2, 3), acceptable=(False, False, True))]
    write_records(tmp_path / "rankings" / "train.jsonl", [*EDGES, *more])
    report = run_on(school, tmp_path, replace(SMALL, algorithm="kto"))
    # 3 (the middle one is neither), 2, 0 of the ties, 2, 3 (less the middle one), 2 of which one is too long, 3 as labelled
    assert report["judged"]["train"]["kept"] == 2 + 2 + 0 + 2 + 2 + 1 + 3
    assert report["judged"]["train"]["unlabelled"] == 1 + 2 + 1 and report["judged"]["train"]["too_long"] == 1


def test_kto_learns_from_thumbs_of_a_file_of_ones_own(school: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"what is {n}?", "completion": "yes" if n % 2 else "no", "label": bool(n % 2)} for n in range(12)
    ]
    (tmp_path / "thumbs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(SMALL, algorithm="kto", data=str(tmp_path / "thumbs.jsonl"), valid_share=0.3)
    report = preference.run(config, work_in(tmp_path / "preference", {"policy": school / "sft"}))
    assert report["judged"]["train"]["kept"] + report["judged"]["valid"]["kept"] == 12
    assert 0 < report["judged"]["valid"]["kept"] < 8
    ratings = [Rating(Conversation((Message("user", f"q {n}"),)), Message("assistant", "so"), n) for n in range(1, 8)]
    write_records(tmp_path / "scale.jsonl", ratings)  # a scale of 1 to 7
    config = replace(config, data=str(tmp_path / "scale.jsonl"), good_from=4.0, valid_share=0.0)
    stage = Preference(config)
    stage.start(work_in(tmp_path / "scale", {"policy": school / "sft"}))
    assert [bool(one.best) for one in stage.train] == [False] * 3 + [True] * 4


def test_nothing_to_learn_from_is_an_error_that_says_why(school: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "rankings" / "train.jsonl", [EDGES[2]] * 3)
    for algorithm, why in (("dpo", "3 all ties"), ("kto", "6 unlabelled")):
        with pytest.raises(DataError, match=why) as caught:
            run_on(school, tmp_path, replace(SMALL, algorithm=algorithm))
        assert caught.value.hint
    with pytest.raises(RunError, match="no rankings section stands before it"):
        preference.run(SMALL, work_in(tmp_path / "none", {"policy": school / "sft"}))


def test_settings_that_make_no_sense_are_refused_when_the_recipe_is_read() -> None:
    with pytest.raises(ConfigError, match="label_smoothing = 0.6"):
        PreferenceConfig(label_smoothing=0.6)
    assert PreferenceConfig(algorithm="simpo").objective().margin == 1.0
    assert PreferenceConfig(algorithm="simpo", margin=0.0, beta=2.5).objective() == replace(
        PRESETS["simpo"], margin=0.0, beta=2.5
    )


def test_adapters_learn_beside_weights_that_stay_the_reference(school: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "rankings" / "train.jsonl", EDGES)
    run_on(school, tmp_path, replace(SMALL, lora_rank=2, lr=0.03))
    base = load_checkpoint(school / "sft" / "checkpoint").model
    saved = load_checkpoint(tmp_path / "preference" / "checkpoint").model
    load_adapters(tmp_path / "preference" / "adapter", base)
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(saved.logits(saved(tokens)), base.logits(base(tokens)), rtol=0, atol=1e-5)


# ---------------------------------------------------------------- several ranks


def two_rank_jobs(folder: Path) -> None:
    """Trains three methods in float64, in folders of their names."""
    for algorithm in ("dpo", "orpo", "kto"):
        config = replace(SMALL, algorithm=algorithm, validate_every=2, micro_tokens=36)
        stage = InMemory(config, data_for(algorithm, 9), data_for(algorithm, 4, seed=5))
        stage.double = True
        train(stage, folder / algorithm)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_have_the_numbers_and_weights_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "pick_device", lambda: torch.device("cpu"))
    two_rank_jobs(tmp_path / "one")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    env = {**os.environ, **address, "PYTHONPATH": str(Path(lyceum.__file__).parents[1])}
    command = [sys.executable, __file__, str(tmp_path / "two")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [subprocess.Popen(command, env={**env, "RANK": str(rank)}, **pipes) for rank in range(2)]
    said = [process.communicate(timeout=500)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)
    for algorithm in ("dpo", "orpo", "kto"):
        one, two = tmp_path / "one" / algorithm, tmp_path / "two" / algorithm
        for a, b in zip(lines(one), lines(two), strict=True):
            assert a.keys() == b.keys() and all(a[key] == pytest.approx(b[key], abs=1e-9) for key in a)
        kept = [FILE] if PRESETS[algorithm].uses_reference else []
        for file in ("checkpoint/model.safetensors", *kept):
            mine, theirs = load_file(one / file), load_file(two / file)
            assert mine.keys() == theirs.keys()
            assert all(torch.allclose(mine[name], theirs[name], rtol=0, atol=1e-9) for name in mine)


# ---------------------------------------------------------------- learning


WORDS = list(range(2, 14))
BETA = 0.5


def true_reward(prompt_word: int, seed: int) -> torch.Tensor:
    """What each of the twelve words is worth after a prompt; another order for each prompt and seed."""
    return 1.5 * torch.cos(torch.arange(12) * 1.7 + prompt_word + 3 * seed).double()


def word_logprobs(model: Decoder, prompt_word: int) -> torch.Tensor:
    """The policy over the twelve words after a prompt."""
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([[MARK, prompt_word]]))[0, -1])
    return torch.log_softmax(logits.double()[WORDS], 0)


def one_word_data(seed: int, sign: float) -> list[Judged]:
    """All pairs of words after each of eight prompts, with the label of Bradley and Terry under sign * reward."""
    found = []
    for word in WORDS[:8]:
        reward = sign * true_reward(word, seed)
        pairs = tuple((i, j, float(torch.sigmoid(reward[i] - reward[j]))) for i in range(12) for j in range(i + 1, 12))
        best = int(reward.argmax())
        found.append(Judged([MARK, word], [[answer] for answer in WORDS], pairs, (best,)))
    return found


def distance(model: Decoder, seed: int) -> float:
    """Mean KL in nats from the best policy, pi_ref exp(r / beta) / Z, to the model."""
    total = 0.0
    for word in WORDS[:8]:
        best = torch.log_softmax(word_logprobs(small_policy(seed), word) + true_reward(word, seed) / BETA, 0)
        total += float((best.exp() * (best - word_logprobs(model, word))).sum())
    return total / 8


def learned_distance(folder: Path, seed: int, sign: float) -> float:
    config = replace(SMALL, beta=BETA, epochs=75, batch_prompts=4, lr=5e-3, decay=1.0, log_every=50, micro_tokens=8192)
    stage = InMemory(config, one_word_data(seed, sign), seed=seed)  # a reference, a reward and an order of its own
    train(stage, folder, seed)
    return distance(stage.model, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_dpo_finds_the_known_optimum_and_with_flipped_labels_it_does_not(seed: int, tmp_path: Path) -> None:
    before = distance(small_policy(seed), seed)
    assert learned_distance(tmp_path / "true", seed, 1.0) < 0.05 * before
    assert learned_distance(tmp_path / "flipped", seed, -1.0) > 2 * before


def sampled_pairs(seed: int, *, flipped: bool) -> list[Judged]:
    """Pairs of the reference's own replies, the better one by the true scorer: how often it says 5."""
    prompts = [[MARK, word] for word in WORDS]
    params = [SamplingParams(6, temperature=1.0, stop_ids=(END,), seed=97 * seed + number) for number in range(12 * 16)]
    outputs = Engine(small_policy()).generate([prompt for prompt in prompts for _ in range(16)], params)
    found = []
    for number in range(0, len(outputs), 2):
        replies = sorted((outputs[number].ids, outputs[number + 1].ids), key=lambda ids: -ids.count(5))
        if replies[0].count(5) != replies[1].count(5):
            ranked = replies[::-1] if flipped else replies
            found.append(Judged(prompts[number // 16], ranked, ((0, 1, 1.0),), (0,)))
    return found


def win_rate(model: Decoder, seed: int) -> float:
    """How often a sampled reply of the model beats one of the reference by the true scorer; ties count half."""
    prompts = [[MARK, word] for word in WORDS for _ in range(20)]
    params = [SamplingParams(6, stop_ids=(END,), seed=10_000 * seed + number) for number in range(len(prompts))]
    counts = [[o.ids.count(5) for o in Engine(m).generate(prompts, params)] for m in (model, small_policy())]
    return sum((a > b) + 0.5 * (a == b) for a, b in zip(*counts, strict=True)) / len(prompts)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", PRESETS)
@pytest.mark.parametrize("seed", range(5))
def test_tuned_replies_win_by_the_true_scorer_and_lose_with_flipped_labels(
    algorithm: str, seed: int, tmp_path: Path
) -> None:
    rates = {}
    for flipped in (False, True):
        data = sampled_pairs(seed, flipped=flipped)
        if not PRESETS[algorithm].is_paired:
            data = [
                Judged(one.prompt, [ids], best=(0,) if good else ())
                for one in data
                for ids, good in zip(one.responses, (True, False), strict=True)
            ]
        config = replace(
            SMALL, algorithm=algorithm, epochs=8, batch_prompts=16, lr=2e-3, log_every=50, micro_tokens=4096
        )
        stage = InMemory(config, data)
        train(stage, tmp_path / str(flipped), seed)
        rates[flipped] = win_rate(stage.model, seed)
    assert rates[False] > 0.6 and rates[True] < 0.4


if __name__ == "__main__":
    torch.set_num_threads(1)
    loop.pick_device = lambda: torch.device("cpu")
    dist.start()
    two_rank_jobs(Path(sys.argv[1]))
    dist.stop()
