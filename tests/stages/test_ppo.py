"""PPO: known answers, refusals, resume, ranks; and on toys with a known optimum that it learns while controls do not.

Run as a script, `python test_ppo.py FOLDER` under torchrun's environment, it is one rank of a small run.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lyceum
from lyceum import dist
from lyceum.batches.pack import TokenBatch
from lyceum.batches.pairs import Prompts
from lyceum.batches.shards import write_shards
from lyceum.config import Recipe
from lyceum.corpus.records import Conversation, Document, Message, write_records
from lyceum.engine.sequence import Output
from lyceum.errors import CheckpointError, DataError, RunError, TrainingError, UsageError
from lyceum.log import read_metrics
from lyceum.model.checkpoint import load_checkpoint, save_checkpoint
from lyceum.model.heads import ScoreModel
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import StageFolder, Work
from lyceum.stages import ppo, rollouts
from lyceum.stages.reward import RewardModel
from lyceum.stages.rollouts import Rollout
from lyceum.tokens.tokenizer import Tokenizer
from lyceum.train.loop import TIMINGS, run_stage
from lyceum.train.losses import next_token_loss

SPEC = ModelSpec(14, 1, 32, 2, 2, 16, 64, 32, tied=False)
NUM_WORDS, MARK, STOP = 12, 12, 0  # tokens 0 ... 11 are words; a prompt is the mark and a word
SMALL = ppo.PPOConfig(
    iterations=2, prompts_per_iteration=12, epochs=2, minibatches=2, max_response_tokens=6, lr=2e-3, critic_lr=3e-3,
    warmup=0.0, engine_batch=12, save_every=1,
)  # fmt: skip

Score = Callable[..., list[float | None]]


def small_policy(seed: int = 0) -> Decoder:
    model = Decoder(SPEC, torch.Generator().manual_seed(seed))
    with torch.no_grad():  # a reference that prefers something
        model.output_weight.mul_(8)
        model.model.embed_tokens.weight.mul_(10)
    return model


def text_rows(start: int, count: int) -> TokenBatch:
    """Rows of a language: the next word is 3 w + 1 mod 12, nine times in ten."""
    rows = []
    for k in range(start, start + count):
        rng = np.random.default_rng([77, k])
        row = [int(rng.integers(NUM_WORDS))]
        while len(row) < 17:
            row.append((3 * row[-1] + 1) % NUM_WORDS if rng.random() < 0.9 else int(rng.integers(NUM_WORDS)))
        rows.append(row)
    weights = torch.ones(count, 17)
    weights[:, 0] = 0
    return TokenBatch(torch.tensor(rows), weights, torch.full((count,), 17))


def count_word(prompts: Sequence[Any], responses: Sequence[Sequence[int]], meta: Sequence[Any]) -> list[float | None]:
    return [sum(token == 5 for token in response) / 4 for response in responses]


class Toy(ppo.PPO):
    """PPO in memory: a small policy, twelve prompts, a function as reward."""

    def __init__(
        self, config: ppo.PPOConfig, reward: Score = count_word, *, model: Decoder | None = None, text: Any = None,
        stop_ids: tuple[int, ...] = (STOP,), num_prompts: int = NUM_WORDS,
    ) -> None:  # fmt: skip
        super().__init__(config, reward)
        self.model, self.given_text, self.stops = model or small_policy(), text, stop_ids
        self.num_prompts = num_prompts

    def start(self, work: Work) -> None:
        words = range(self.num_prompts)
        prompts = Prompts([[MARK, word] for word in words], [{"word": word} for word in words])
        model = copy.deepcopy(self.model)
        self.begin(model, prompts, seed=work.seed, text=self.given_text, stop_ids=self.stops, pad_id=13)

    def save(self, folder: Path, snapshot: str = "") -> None:
        return None


def work_in(folder: Path, seed: int = 0, inputs: dict[str, Path] | None = None) -> Work:
    return Work(StageFolder(folder), inputs or {}, seed, Recipe("test", seed, {}, (), folder / "recipe.toml"))


def train(stage: ppo.PPO, folder: Path, seed: int = 0) -> dict[str, Any]:
    return run_stage(stage, work_in(folder, seed))


def begun(config: ppo.PPOConfig = SMALL, **given: Any) -> Toy:
    stage = Toy(config, **given)
    stage.start(work_in(Path("unused")))
    return stage


def lines(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_metrics(folder / "metrics.jsonl")]


def weights(stage: ppo.PPO) -> list[torch.Tensor]:
    return [p.detach().clone() for trained in stage.trained.values() for p in trained.module.parameters()]


# ---------------------------------------------------------------- rollouts


def replies(*made: tuple[list[int], str]) -> Rollout:
    """Episodes whose prompt is [9, 9], with the given replies and finishes, scores 1, 2, 3, ..."""
    outputs = [Output(i, ids, finish, [-1.0] * len(ids)) for i, (ids, finish) in enumerate(made)]  # type: ignore[arg-type]
    scores = [float(i + 1) for i in range(len(made))]
    return rollouts.make_rollout([[9, 9]] * len(made), outputs, scores, range(len(made)), 13, torch.device("cpu"))


def test_score_stands_on_the_end_token_on_the_last_token_without_one_and_on_an_end_that_comes_first() -> None:
    rollout = replies(([4, 5, STOP], "stop"), ([4, 5, 6, 7], "length"), ([STOP], "stop"))
    assert rollout.tokens_BT.tolist() == [[9, 9, 4, 5, 0, 13], [9, 9, 4, 5, 6, 7], [9, 9, 0, 13, 13, 13]]
    assert rollout.ended_B.tolist() == [True, False, True]
    rollouts.estimate(rollout, beta=0.0, gamma=0.5, lam=1.0)
    # with V = 0, gamma 1/2 and lambda 1 the return is the score, halved once for every token that still follows
    expected = [[0, 0, 0.25, 0.5, 1, 0], [0, 0, 0.25, 0.5, 1, 2], [0, 0, 3, 0, 0, 0]]
    torch.testing.assert_close(rollout.return_BT, torch.tensor(expected, dtype=torch.float32))


def test_missing_end_replaces_or_subtracts() -> None:
    scores = {}
    for how in ("replace", "subtract", "keep"):
        config = replace(SMALL, missing_end=how, missing_end_score=-3.0 if how == "replace" else 3.0)
        stage = begun(config, reward=lambda p, responses, m: [2.0] * len(responses))
        rollout, _ = stage.collect()
        assert 0 < rollout.ended_B.sum() < len(rollout.ended_B)
        scores[how] = {bool(e): s for e, s in zip(rollout.ended_B.tolist(), rollout.score_B.tolist(), strict=True)}
    assert scores == {
        "replace": {True: 2.0, False: -3.0}, "subtract": {True: 2.0, False: -1.0}, "keep": {True: 2.0, False: 2.0}
    }  # fmt: skip


def test_value_of_a_token_is_the_critics_output_before_it() -> None:
    mask = torch.tensor([[False, False, True, True]])
    assert ppo.shifted_values(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), mask, 0.5).tolist() == [[0, 0, 1.5, 2.5]]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_sampled_logprobs_are_those_of_the_training_graph_at_any_temperature(temperature: float) -> None:
    stage = begun(replace(SMALL, temperature=temperature, prompts_per_iteration=24))
    rollout, _ = stage.collect()  # raises if they differ by more than 1e-4
    gap = (rollout.sampled_BT - rollout.logp_old_BT).abs().max()
    assert rollout.sampled_BT.abs().max() > 0.5 and gap < 1e-5
    for row, mask, logp in zip(rollout.tokens_BT, rollout.mask_BT, rollout.logp_old_BT, strict=True):
        logits = stage.policy.logits(stage.policy(row[None]))[0]  # by hand, one row at a time, pads and all
        expected = torch.log_softmax(logits[:-1] / temperature, -1).gather(1, row[1:, None])[:, 0]
        torch.testing.assert_close(logp[1:][mask[1:]], expected[mask[1:]].detach(), atol=1e-5, rtol=1e-5)


def test_replies_do_not_depend_on_the_engines_batch() -> None:
    one, many = (begun(replace(SMALL, engine_batch=size)).collect()[0] for size in (1, 12))
    assert torch.equal(one.tokens_BT, many.tokens_BT)


def test_every_prompt_comes_once_before_any_comes_twice() -> None:
    seen: list[int] = []

    def reward(prompts: Any, responses: Any, meta: Any) -> list[float | None]:
        seen.extend(m["word"] for m in meta)
        return [float(p[1] == m["word"]) - 1 for p, m in zip(prompts, meta, strict=True)]

    stage = begun(replace(SMALL, prompts_per_iteration=4, iterations=6), reward=reward)
    for _ in stage.steps(0):
        pass
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12)) and seen[:12] != seen[12:]


# ---------------------------------------------------------------- losses and metrics


def test_first_pass_has_ratio_one_and_no_kl(tmp_path: Path) -> None:
    train(Toy(SMALL), tmp_path)
    first, *_, last = lines(tmp_path)
    assert first["val/ratio"] == pytest.approx(1, abs=1e-5) and first["val/ratio_var"] < 1e-9
    assert first["policy/approxkl"] < 1e-9 and first["policy/clipfrac"] == 0 and first["val/clipfrac"] == 0
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert last["policy/approxkl"] > 1e-6 and abs(last["objective/kl"]) > 1e-4


def test_all_metrics_of_the_field_are_logged_under_their_names(tmp_path: Path) -> None:
    train(Toy(replace(SMALL, ptx_coef=0.1), text=text_rows), tmp_path)
    names = """objective/kl objective/kl_per_token objective/kl_coef objective/entropy objective/scores
        objective/scores_std objective/non_score_reward objective/rlhf_reward policy/approxkl policy/clipfrac
        policy/entropy val/ratio val/ratio_var val/clipfrac val/var_explained loss/policy loss/value ptx/loss
        tokens/response_length tokens/end_rate grad_norm/policy grad_norm/value grad_norm/ptx rollout/unscorable"""
    for line in lines(tmp_path):
        assert set(names.split()) <= set(line)
        assert line["objective/rlhf_reward"] == pytest.approx(
            line["objective/scores"] + line["objective/non_score_reward"]
        )
        assert 0 < line["policy/entropy"] < np.log(14) and line["grad_norm/ptx"] > 0


def widened(part: Rollout, columns: int) -> Rollout:
    def pad(value: torch.Tensor) -> torch.Tensor:
        fill = 13 if value.dtype == torch.long else 0
        return F.pad(value, (0, columns), value=fill) if value.dim() == 2 else value

    return Rollout(**{name: pad(value) for name, value in vars(part).items()})


def test_padding_changes_no_loss_no_metric_and_no_estimate() -> None:
    stage = begun()
    rollout, _ = stage.collect()
    wide = widened(rollout, 7)
    for name in ("logp_old_BT", "logp_ref_BT", "value_old_BT", "advantage_BT", "return_BT", "entropy_BT"):
        setattr(wide, name, torch.zeros(wide.tokens_BT.shape))
    stage.fill_in(wide)
    kl_BT = rollouts.estimate(wide, 0.05, 1.0, 0.95)
    assert rollouts.figures(wide, kl_BT, 0.05, 0) == pytest.approx(stage.figures, abs=1e-5)
    stage.is_proven = True
    with torch.no_grad():  # away from ratio 1
        stage.policy.output_weight.mul_(1.5)
        stage.critic.score.weight.add_(0.5)
        (terms, metrics), (wide_terms, wide_metrics) = stage.loss(rollout), stage.loss(wide)
    assert stage.counts(wide) == stage.counts(rollout)
    for name in terms:
        assert float(wide_terms[name].total) == pytest.approx(float(terms[name].total), rel=1e-4)
    for name, (total, count) in metrics.items():
        assert float(wide_metrics[name][0]) == pytest.approx(float(total), rel=1e-4) and wide_metrics[name][1] == count
        assert float(total) > 0, f"{name} would not notice"


def test_another_cut_into_micro_batches_gives_the_same_run(tmp_path: Path) -> None:
    config = replace(SMALL, ptx_coef=0.2, ptx_rows=0.5)
    for micro_tokens in (20, 4096):
        train(Toy(replace(config, micro_tokens=micro_tokens), text=text_rows), tmp_path / str(micro_tokens))
    few, many = lines(tmp_path / "20"), lines(tmp_path / "4096")
    for one, two in zip(few, many, strict=True):
        assert one == pytest.approx(two, abs=2e-4)


def test_ptx_adds_gamma_times_the_language_modelling_gradient() -> None:
    stage = begun(replace(SMALL, ptx_coef=0.7, ptx_rows=0.5), text=text_rows)
    step = next(stage.steps(0))
    text = [m for m in step.micro_batches if isinstance(m, TokenBatch)]
    assert sum(len(m.tokens_BT) for m in text) == 3  # half a row for each of six episodes

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(loss, list(stage.policy.parameters()), allow_unused=True)
        return torch.cat(
            [
                torch.zeros(p.numel()) if g is None else g.flatten()
                for p, g in zip(stage.policy.parameters(), found, strict=True)
            ]
        )

    def total(micro_batches: Sequence[Any]) -> torch.Tensor:
        counts: dict[str, float] = {}
        for m in micro_batches:
            for name, count in stage.counts(m).items():
                counts[name] = counts.get(name, 0) + count
        parts = [(n, term) for m in micro_batches for n, term in stage.loss(m)[0].items()]
        return torch.stack([term.weight * term.total / counts[n] for n, term in parts]).sum()

    rows = torch.cat([m.tokens_BT for m in text])
    logits = stage.policy.logits(stage.policy(rows[:, :-1]))
    modelling = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    alone = gradient(total([m for m in step.micro_batches if isinstance(m, Rollout)]))
    torch.testing.assert_close(
        gradient(total(step.micro_batches)), alone + 0.7 * gradient(modelling), atol=1e-5, rtol=1e-4
    )


def test_ptx_with_weight_zero_is_ppo_bit_for_bit(tmp_path: Path) -> None:
    stages = [Toy(SMALL), Toy(SMALL, text=text_rows)]
    for i, stage in enumerate(stages):
        train(stage, tmp_path / str(i))
    for one, two in zip(weights(stages[0]), weights(stages[1]), strict=True):
        assert torch.equal(one, two)


# ---------------------------------------------------------------- refusals


def test_sampler_that_is_not_the_policy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = begun()
    sample = rollouts.sample_replies
    monkeypatch.setattr(ppo, "sample_replies", lambda *a, temperature, **k: sample(*a, temperature=0.7, **k))
    with pytest.raises(TrainingError, match="sampler and the training graph disagree") as caught:
        stage.collect()
    assert "temperature" in caught.value.hint


def test_reference_that_is_not_the_policy_is_refused() -> None:
    stage = begun()
    with torch.no_grad():
        stage.reference.output_weight.mul_(1.1)
    with pytest.raises(TrainingError, match="KL to the reference is not 0"):
        stage.collect()


def test_randomness_in_the_update_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dropping(Toy):
        def start(self, work: Work) -> None:
            super().start(work)
            dropout = torch.nn.Dropout(0.1)
            self.policy.register_forward_hook(lambda m, a, out: dropout(out) if torch.is_grad_enabled() else out)

    with pytest.raises(TrainingError, match="first ratio is not 1"):
        train(Dropping(SMALL), tmp_path)


def test_unscorable_replies_are_dropped_and_counted(tmp_path: Path) -> None:
    def reward(prompts: Any, responses: Any, meta: Any) -> list[float | None]:
        return [None if m["word"] < 3 else 1.0 for m in meta]

    train(Toy(SMALL, reward), tmp_path)
    assert all(line["rollout/unscorable"] == 3 for line in lines(tmp_path))


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (lambda p, r, m: [None] * len(r), TrainingError, "0 of 12 replies could be scored"),
        (lambda p, r, m: [1.0], UsageError, "1 scores for 12 responses"),
        (lambda p, r, m: [float("nan")] * len(r), UsageError, "gave nan for response 0"),
    ],
)
def test_reward_that_is_no_reward_is_refused(
    reward: Score, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        train(Toy(SMALL, reward), tmp_path)


# ---------------------------------------------------------------- resume and ranks


def test_killed_and_resumed_run_equals_the_straight_run_bit_for_bit(tmp_path: Path) -> None:
    config = replace(SMALL, iterations=4, kl_target=0.5, kl_horizon=50.0, ema=0.9, ptx_coef=0.1, save_every=3)
    straight = Toy(config, text=text_rows)
    train(straight, tmp_path / "straight")
    calls = 0

    def failing(prompts: Any, responses: Any, meta: Any) -> list[float | None]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return count_word(prompts, responses, meta)

    with pytest.raises(KeyboardInterrupt):
        train(Toy(config, failing, text=text_rows), tmp_path / "killed")
    resumed = Toy(config, failing, text=text_rows)
    report = train(resumed, tmp_path / "killed")
    assert calls == 5  # only the last iteration was sampled again
    assert lines(tmp_path / "killed") == lines(tmp_path / "straight")
    assert len({line["objective/kl_coef"] for line in lines(tmp_path / "killed")}) > 2
    assert resumed.state_dict() == straight.state_dict() and "reward" in report["line"]
    for one, two in zip(weights(resumed), weights(straight), strict=True):
        assert torch.equal(one, two)


def two_rank_config() -> ppo.PPOConfig:
    return replace(SMALL, prompts_per_iteration=9, ptx_coef=0.2, ptx_rows=0.5, micro_tokens=40)


def test_two_ranks_train_as_one_does(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(lyceum.__file__).parents[1]), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    command = [sys.executable, __file__, str(tmp_path / "two")]
    with open(tmp_path / "said", "w") as said:
        ranks = [subprocess.Popen(command, env={**env, "RANK": rank}, stdout=said, stderr=said) for rank in "01"]
        try:
            codes = [process.wait(timeout=100) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
    assert codes == [0, 0], (tmp_path / "said").read_text()
    train(Toy(two_rank_config(), text=text_rows), tmp_path / "one")
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, abs=1e-3)


# ---------------------------------------------------------------- from files


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that a run has before PPO: sft, reward, lessons, pretrain."""
    folder = tmp_path_factory.mktemp("school")
    tokenizer = Tokenizer.train(["what is it? yes no maybe it is so " * 20], 280)
    spec = replace(SPEC, vocab_size=tokenizer.vocab_size, context_length=48)
    model = Decoder(spec, torch.Generator().manual_seed(0))
    save_checkpoint(folder / "sft" / "checkpoint", model, tokenizer)
    judge = ScoreModel(Decoder(spec, torch.Generator().manual_seed(1)))
    save_checkpoint(folder / "reward" / "checkpoint", judge, tokenizer, {"reward_centre": 0.25})
    prompts = [
        Conversation((Message("user", text),), meta={"n": i}) for i, text in enumerate(["what?", "is it?", "so"])
    ]
    write_records(folder / "lessons" / "prompts.jsonl", [*prompts, Conversation((Message("user", "what " * 99),))])
    documents = [Document("it is so. " * 30, meta={"part": "docs"}), Document("yes = no\n" * 30, meta={"part": "code"})]
    write_shards(documents, tokenizer, folder / "pretrain" / "shards", row_tokens=16)
    return folder


def school_work(school: Path, folder: Path, **replaced: str) -> Work:
    roles = {"policy": "sft", "reward": "reward", "lessons": "lessons", "pretrain": "pretrain"} | replaced
    return work_in(folder, inputs={role: school / name for role, name in roles.items() if name})


FILES = replace(SMALL, max_response_tokens=8, prompts_per_iteration=4, ptx_coef=0.5, ptx_rows=1.0)


def test_stage_runs_from_files_and_shows_reference_and_policy_side_by_side(school: Path, tmp_path: Path) -> None:
    report = ppo.run(FILES, school_work(school, tmp_path))
    assert [row["prompt"] for row in report["samples"]] == ["what?", "is it?", "so"]
    assert all({"reply", "ended", "before"} <= set(row) for row in report["samples"])
    assert report["first_and_last_iteration"]["kl"][0] == pytest.approx(0, abs=1e-4)
    assert report["episodes"] == 8 and report["prompts"] == {"kept": 3, "too_long": 1}
    loaded = load_checkpoint(tmp_path / "checkpoint")
    assert isinstance(loaded.model, Decoder) and loaded.info["parent"] == "sft/checkpoint"


def test_rewards_and_first_values_are_the_reward_models_own_scores(school: Path, tmp_path: Path) -> None:
    stage = ppo.PPO(replace(FILES, missing_end="keep"))
    stage.start(school_work(school, tmp_path))
    rollout, _ = stage.collect()
    judge = RewardModel.load(school / "reward" / "checkpoint")
    for row, length, score, value in zip(
        rollout.tokens_BT, rollout.lengths_B.tolist(), rollout.score_B, rollout.value_old_BT, strict=True
    ):
        every = judge.model(row[None, :length])[0].detach() - 0.25
        assert float(score) == pytest.approx(float(every[-1]), abs=1e-5)  # at the last real token, less the centre
        assert float(value[length - 1]) == pytest.approx(float(every[-2]), abs=1e-5)  # the critic began as it


def test_what_is_missing_or_does_not_fit_is_said(school: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="needs pretraining text"):
        ppo.run(FILES, school_work(school, tmp_path, pretrain=""))
    with pytest.raises(DataError, match="no prompt of at most"):
        ppo.run(replace(FILES, max_response_tokens=47), school_work(school, tmp_path))
    other = Tokenizer.train(["another language altogether " * 20], 280)
    judge = ScoreModel(Decoder(replace(SPEC, vocab_size=other.vocab_size)))
    save_checkpoint(school / "other" / "checkpoint", judge, other)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        ppo.run(FILES, school_work(school, tmp_path, reward="other"))


# ---------------------------------------------------------------- learning: a toy whose optimum is known


NUM_ASKED = 3


def word_table(seed: int) -> torch.Tensor:
    """A reward for every prompt and every reply of two tokens."""
    return torch.randn(NUM_ASKED, 14, 14, generator=torch.Generator().manual_seed(100 + seed))


def reply_logprobs(model: Decoder) -> torch.Tensor:
    """log pi(y1, y2 | prompt) of all prompts and replies, by enumeration."""
    found = []
    with torch.no_grad():
        for word in range(NUM_ASKED):
            rows = torch.tensor([[MARK, word, first] for first in range(14)])
            logp = torch.log_softmax(model.logits(model(rows)), -1)
            found.append(logp[:1, 1].T + logp[:, 2])
    return torch.stack(found)


def share_of_the_optimum(folder: Path, seed: int, *, shuffled: bool = False, **changed: Any) -> tuple[float, float]:
    """Trains on `word_table`; returns (J - J_ref) / (J* - J_ref), and the total variation to the optimum.

    J = E[r] - beta KL(pi || pi_ref) is largest at pi* = pi_ref exp(r / beta) / Z, known here by enumeration.
    """
    table, beta, calls = word_table(seed), 0.5, iter(range(10**6))

    def reward(prompts: Any, responses: Any, meta: Any) -> list[float | None]:
        scores = [float(table[m["word"], a, b]) for m, (a, b) in zip(meta, responses, strict=True)]
        if shuffled:
            order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(next(calls)))
            scores = [scores[i] for i in order]
        return list(scores)

    config = ppo.PPOConfig(
        iterations=40, prompts_per_iteration=192, epochs=2, minibatches=2, max_response_tokens=2, kl_beta=beta,
        missing_end="keep", lr=4e-3, critic_lr=4e-3, warmup=0.0, decay=0.7, log_every=1000, save_every=0,
        engine_batch=192, micro_tokens=4096,
    )  # fmt: skip
    stage = Toy(replace(config, **changed), reward, model=small_policy(seed), stop_ids=(), num_prompts=NUM_ASKED)
    train(stage, folder, seed)
    reference, trained = reply_logprobs(stage.reference), reply_logprobs(stage.policy)
    best = torch.log_softmax((reference + table / beta).flatten(1), 1).view_as(reference)

    def objective(logp: torch.Tensor) -> float:
        return float((logp.exp() * (table - beta * (logp - reference))).sum((1, 2)).mean())

    start, end, top = (objective(logp) for logp in (reference, trained, best))
    return (end - start) / (top - start), float((trained.exp() - best.exp()).abs().sum((1, 2)).mean() / 2)


def test_policy_moves_towards_the_known_optimum(tmp_path: Path) -> None:
    share, _ = share_of_the_optimum(tmp_path, 0, iterations=12, lr=6e-3, critic_lr=6e-3)
    assert share > 0.35


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_policy_reaches_the_known_optimum_and_shuffled_rewards_teach_nothing(tmp_path: Path, seed: int) -> None:
    share, variation = share_of_the_optimum(tmp_path / "true", seed)
    print(f"seed {seed}: share {share:.3f}, total variation {variation:.3f}")
    assert share > 0.65 and variation < 0.4
    control, far = share_of_the_optimum(tmp_path / "control", seed, shuffled=True)
    print(f"seed {seed}: control {control:.3f}, total variation {far:.3f}")
    assert control < 0.15 and far > 0.5


def final_kl(folder: Path, seed: int, beta: float, target: float) -> float:
    """KL(pi || pi_ref) in nats per reply, by enumeration, after training on `word_table`."""
    table = word_table(seed)

    def reward(prompts: Any, responses: Any, meta: Any) -> list[float | None]:
        return [float(table[m["word"], a, b]) for m, (a, b) in zip(meta, responses, strict=True)]

    config = ppo.PPOConfig(
        iterations=40, prompts_per_iteration=96, epochs=2, minibatches=2, max_response_tokens=2, kl_beta=beta,
        kl_target=target, kl_horizon=120, missing_end="keep", lr=4e-3, critic_lr=4e-3, warmup=0.0, log_every=1000,
        save_every=0, engine_batch=96, micro_tokens=4096,
    )  # fmt: skip
    stage = Toy(config, reward, model=small_policy(seed), stop_ids=(), num_prompts=NUM_ASKED)
    train(stage, folder, seed)
    reference, trained = reply_logprobs(stage.reference), reply_logprobs(stage.policy)
    return float((trained.exp() * (trained - reference)).sum((1, 2)).mean())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_adaptive_coefficient_steers_the_kl_to_its_target_from_both_sides(tmp_path: Path, seed: int) -> None:
    found = {
        (beta, target): final_kl(tmp_path / f"{beta}-{target}", seed, beta, target)
        for beta in (0.1, 5.0)
        for target in (0.0, 0.6)
    }
    print(f"seed {seed}: {found}")
    assert found[0.1, 0.0] > 1.2 and found[5.0, 0.0] < 0.2  # the controls, whose coefficient stays where it was
    assert all(0.2 < found[beta, 0.6] < 1.2 for beta in (0.1, 5.0))  # it swings around the target


# ---------------------------------------------------------------- learning: the pretraining mix


def language_loss(model: Decoder) -> float:
    batch = text_rows(10**6, 128)
    with torch.no_grad():
        total, count, _ = next_token_loss(model, batch.tokens_BT, batch.weights_BT)
    return float(total) / count


def pretrained(seed: int) -> Decoder:
    model = Decoder(replace(SPEC, tied=True), torch.Generator().manual_seed(seed))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(150):
        batch = text_rows(10**5 * seed + 16 * step, 16)
        total, count, _ = next_token_loss(model, batch.tokens_BT, batch.weights_BT)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_pretraining_mix_keeps_the_language_at_the_same_reward(tmp_path: Path, seed: int) -> None:
    model = pretrained(seed)
    config = ppo.PPOConfig(
        iterations=40, prompts_per_iteration=96, epochs=2, minibatches=2, max_response_tokens=4, kl_beta=0.0,
        missing_end="keep", lr=2e-3, critic_lr=3e-3, warmup=0.0, decay=0.5, log_every=1000, save_every=0,
        engine_batch=96, micro_tokens=4096,
    )  # fmt: skip
    before, reward, after = language_loss(model), {}, {}
    for coef in (0.0, 0.2):
        stage = Toy(replace(config, ptx_coef=coef), model=model, text=text_rows if coef else None, stop_ids=())
        train(stage, tmp_path / str(coef), seed)
        reward[coef], after[coef] = stage.figures["objective/scores"], language_loss(stage.policy)
    print(f"seed {seed}: loss {before:.2f}, then {after}; reward {reward}")
    assert reward[0.0] > 0.9 and reward[0.2] > reward[0.0] - 0.1
    assert after[0.0] - before > 0.5  # the control forgets
    assert after[0.2] - before < 0.5 * (after[0.0] - before)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.start()
    train(Toy(two_rank_config(), text=text_rows), Path(sys.argv[1]))
    dist.stop()
    json.dump({}, sys.stdout)
