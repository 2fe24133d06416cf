"""PPO: known answers, refusals, resume; and on toys with a known optimum that it learns while controls do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from on_policy_toy import (
    MARK,
    NUM_ASKED,
    SMALL,
    SPEC,
    STOP,
    Score,
    Toy,
    begun,
    count_word,
    language_loss,
    lines,
    pretrained,
    share_of_the_optimum,
    small_policy,
    text_rows,
    train,
    weights,
    widened,
    word_table,
    work_in,
)

from lyceum.batches.pack import TokenBatch
from lyceum.batches.pairs import Prompts
from lyceum.batches.shards import write_shards
from lyceum.corpus.records import Conversation, Document, Message, write_records
from lyceum.engine.sequence import Output
from lyceum.errors import CheckpointError, DataError, RunError, TrainingError, UsageError
from lyceum.model.checkpoint import load_checkpoint, save_checkpoint
from lyceum.model.ensemble import Ensemble, join_members
from lyceum.model.heads import ScoreModel
from lyceum.model.transformer import Decoder
from lyceum.run import Work
from lyceum.stages import onpolicy, ppo, rollouts
from lyceum.stages.algorithms import PRESETS
from lyceum.stages.onpolicy import COUNTED
from lyceum.stages.reward import RewardModel
from lyceum.stages.rollouts import Rollout
from lyceum.tokens.tokenizer import Tokenizer
from lyceum.train.policy import predicting

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
    rollouts.estimate(rollout, PRESETS["ppo"], beta=0.0, gamma=0.5, lam=1.0)
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
    score = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).flatten()[predicting(mask)]
    assert ppo.shifted_values(score, mask, 0.5).tolist() == [[0, 0, 1.5, 2.5]]


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


def test_padding_changes_no_loss_no_metric_and_no_estimate() -> None:
    stage = begun()
    rollout, _ = stage.collect()
    wide = widened(rollout, 7)
    for name in ("logp_old_BT", "logp_ref_BT", "value_old_BT", "advantage_BT", "return_BT", "entropy_BT"):
        setattr(wide, name, torch.zeros(wide.tokens_BT.shape))
    stage.fill_in(wide)
    stage.figures, first = {}, stage.figures
    kl_BT = rollouts.estimate(wide, stage.algorithm, 0.05, 1.0, 0.95)
    stage.note(wide, kl_BT, dict.fromkeys(COUNTED, 0.0))
    assert stage.figures == pytest.approx(first, abs=1e-5)
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


def test_kl_as_a_loss_is_a_term_beside_rewards_without_it(tmp_path: Path) -> None:
    train(Toy(replace(SMALL, kl="k2", kl_beta=0.3)), tmp_path)
    first, *_, last = lines(tmp_path)
    assert first["loss/kl"] == pytest.approx(0, abs=1e-9) and first["grad_norm/kl"] == pytest.approx(0, abs=1e-6)
    assert last["loss/kl"] > 0 and last["grad_norm/kl"] > 0
    stage = begun(replace(SMALL, kl="k2", kl_beta=5.0))
    with torch.no_grad():
        stage.policy.output_weight.mul_(1.2)
    stage.iteration = 1  # not the first: the policy may differ from the reference
    rollout, _ = stage.collect()
    assert stage.figures["objective/kl"] > 1e-3
    per_row = stage.critic(rollout.tokens_BT).abs().sum()  # a critic of zeros: returns are rewards to come
    assert per_row == 0
    to_come = rollout.return_BT[torch.arange(12), rollout.lengths_B - 1]
    torch.testing.assert_close(to_come, rollout.score_B)  # no KL was taken off


def gradients(stage: Toy, term: str, weights_of: torch.nn.Module) -> torch.Tensor:
    stage.is_proven = True
    rollout, _ = stage.collect()
    terms, _ = stage.loss(rollout)
    found = torch.autograd.grad(terms[term].total, list(weights_of.parameters()), allow_unused=True)
    return torch.cat([torch.zeros(1) if g is None else g.flatten() for g in found])


def test_a_shared_critic_is_a_head_on_the_policy_and_its_loss_moves_the_trunk(tmp_path: Path) -> None:
    own, shared = begun(SMALL), begun(replace(SMALL, critic="shared"))
    assert isinstance(shared.critic, torch.nn.Linear) and shared.critic.weight.shape == (1, 32)
    with torch.no_grad():  # away from zero, where the trunk's gradient is zero too
        shared.critic.weight.fill_(0.1)
    assert gradients(own, "value", own.policy).abs().max() == 0
    assert gradients(shared, "value", shared.policy).abs().max() > 0
    assert gradients(shared, "value", shared.critic).abs().max() > 0
    rollout, _ = shared.collect()
    with torch.no_grad():
        hidden = shared.policy(rollout.tokens_BT)
    t = int(rollout.lengths_B[0]) - 1
    expected = 0.1 * float(hidden[0, t - 1].sum())
    assert float(rollout.value_old_BT[0, t]) == pytest.approx(expected, rel=1e-4)
    train(Toy(replace(SMALL, critic="shared", vf_coef=0.1)), tmp_path)
    assert lines(tmp_path)[-1]["loss/value"] < lines(tmp_path)[0]["loss/value"]


def test_the_critic_can_learn_alone_at_first(tmp_path: Path) -> None:
    stage = Toy(replace(SMALL, critic_warmup=2, ptx_coef=0.1), text=text_rows)
    train(stage, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(stage.policy.parameters(), stage.model.parameters(), strict=True))
    assert stage.critic.score.weight.abs().max() > 0  # it began as zeros
    stage = Toy(replace(SMALL, critic_warmup=1))
    train(stage, tmp_path / "one")
    assert not torch.equal(stage.policy.output_weight, stage.model.output_weight)  # the control


def test_scores_are_clipped_where_asked() -> None:
    scores = [float(i - 6) for i in range(12)]
    stage = begun(replace(SMALL, score_clip=2.0, missing_end="keep"), reward=lambda p, r, m: list(scores))
    rollout, _ = stage.collect()
    assert rollout.score_B.tolist() == [min(max(score, -2.0), 2.0) for score in scores]


def five_is_good(prompts: Any, responses: Sequence[Sequence[int]], meta: Any) -> list[list[float]]:
    return [[float(token == 5) for token in response] for response in responses]


def test_dense_rewards_stand_on_their_tokens_beside_the_score_and_fade() -> None:
    stage = begun(replace(SMALL, dense_coef=0.5, dense_decay=0.1, gamma=0.0, kl_beta=0.0, missing_end="keep"))
    stage.dense = five_is_good
    for weight in (0.5, 0.05):  # with gamma 0 the return of a token is its own reward
        rollout, _ = stage.collect()
        expected = weight * ((rollout.tokens_BT == 5) & rollout.mask_BT)
        assert expected.sum() > 0
        fives = expected.sum() / 12
        expected[torch.arange(12), rollout.lengths_B - 1] += rollout.score_B
        torch.testing.assert_close(rollout.return_BT, expected)
        assert stage.figures["objective/dense_reward"] == pytest.approx(float(fives), rel=1e-5)
        stage.iteration += 1
    stage.dense = lambda p, r, m: [[1.0]] * len(r)
    with pytest.raises(UsageError, match="one finite number for each token"):
        stage.collect()


def test_a_dense_reward_alone_is_learned_from_and_without_it_nothing_is(tmp_path: Path) -> None:
    config = replace(SMALL, iterations=12, prompts_per_iteration=48, missing_end="keep", lr=4e-3)
    shares = {}
    for name, dense in (("dense", five_is_good), ("none", None)):
        stage = Toy(config, lambda p, r, m: [0.0] * len(r))
        stage.dense = dense
        train(stage, tmp_path / name)
        rollout, _ = stage.collect()
        shares[name] = float(((rollout.tokens_BT == 5) & rollout.mask_BT).sum() / rollout.mask_BT.sum())
    assert shares["dense"] > shares["none"] + 0.2


# ---------------------------------------------------------------- refusals


def test_biased_replies_are_refused_whoever_draws_them(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = begun()
    sample = rollouts.sample_replies
    monkeypatch.setattr(
        onpolicy, "sample_replies", lambda *a, **k: [replace(output, is_biased=True) for output in sample(*a, **k)]
    )
    with pytest.raises(TrainingError, match="drawn with top-k, top-p, greedily") as caught:
        stage.collect()
    assert "without filters" in caught.value.hint


def test_sampler_that_is_not_the_policy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = begun()
    sample = rollouts.sample_replies
    monkeypatch.setattr(onpolicy, "sample_replies", lambda *a, temperature, **k: sample(*a, temperature=0.7, **k))
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


def test_empty_replies_are_dropped_counted_and_never_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, seen = rollouts.sample_replies, []

    def some_empty(*given: Any, **named: Any) -> list[Output]:
        drawn = sample(*given, **named)
        return [replace(o, ids=[], logprobs=[]) if i < 2 else o for i, o in enumerate(drawn)]

    def reward(prompts: Any, responses: Any, meta: Any) -> list[float | None]:
        seen.extend(map(len, responses))
        return count_word(prompts, responses, meta)

    monkeypatch.setattr(onpolicy, "sample_replies", some_empty)
    report = train(Toy(SMALL, reward), tmp_path)
    assert all(line["rollout/empty"] == 2 and line["rollout/unscorable"] == 0 for line in lines(tmp_path))
    assert len(seen) == 20 and min(seen) > 0 and report["left_out"] == {"unscorable": 0, "empty": 4}


def test_a_reply_that_is_nothing_but_its_end_is_an_episode_like_any_other() -> None:
    stage = begun(replace(SMALL, prompts_per_iteration=96))
    rollout, _ = stage.collect()
    only_end = (rollout.mask_BT.sum(1) == 1) & rollout.ended_B
    assert only_end.any() and len(rollout.score_B) == 96
    last = rollout.lengths_B[only_end] - 1
    assert (rollout.tokens_BT[only_end, last] == STOP).all()
    assert (rollout.score_B[only_end] == 0).all()  # scored, not replaced: it did end


def test_prompts_that_leave_no_room_are_left_out_and_counted_never_cut() -> None:
    stage = Toy(SMALL)
    long, short = Prompts([[MARK] * 27], [{"word": 0}]), Prompts([[MARK, 1], [MARK] * 26], [{"word": 1}, {"word": 2}])
    both = Prompts(long.ids + short.ids, long.meta + short.meta, num_too_long=2)
    stage.begin(small_policy(), both, seed=0, stop_ids=(STOP,), pad_id=13)  # the context has 32 tokens, a reply 6
    assert stage.prompts == replace(short, num_too_long=3)
    with pytest.raises(DataError, match="no prompts to practise on: of 1 none has at most 26 tokens"):
        stage.begin(small_policy(), long, seed=0, stop_ids=(STOP,), pad_id=13)


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (lambda p, r, m: [None] * len(r), TrainingError, "0 of 12 replies could be scored"),
        (lambda p, r, m: [1.0], UsageError, "1 scores for 12 responses"),
        (lambda p, r, m: [float("nan")] * len(r), TrainingError, "0 of 12 replies could be scored"),
        (lambda p, r, m: [float("inf")] * len(r), UsageError, "gave inf for response 0"),
        (lambda p, r, m: ["good"] * len(r), UsageError, "gave 'good' for response 0"),
    ],
)
def test_reward_that_is_no_reward_is_refused(
    reward: Score, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        train(Toy(SMALL, reward), tmp_path)


# ---------------------------------------------------------------- resume


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
    assert isinstance(loaded.model, Decoder) and loaded.info["parent"] == str(school / "sft" / "checkpoint")
    assert loaded.info["learned_from"] == [
        {"kind": "prompts", "count": 3, "source": "lessons"},
        {"kind": "scores", "count": 8, "source": "reward"},
    ]


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


def test_an_ensemble_judges_as_one_model_does_and_the_critic_begins_as_its_first_member(
    school: Path, tmp_path: Path
) -> None:
    tokenizer = load_checkpoint(school / "reward" / "checkpoint").tokenizer
    other = ScoreModel(Decoder(replace(SPEC, vocab_size=tokenizer.vocab_size, context_length=48)))
    save_checkpoint(tmp_path / "other", other, tokenizer, {"reward_centre": -0.5})
    folder = school / "ensemble" / "checkpoint"
    join_members(folder, [school / "reward" / "checkpoint", tmp_path / "other"], Ensemble(2, "min", scale=0.5))
    stage = ppo.PPO(replace(FILES, missing_end="keep"))
    stage.start(school_work(school, tmp_path, reward="ensemble"))
    assert {"reward", "reward_2"} <= set(stage.frozen)
    rollout, _ = stage.collect()
    first = RewardModel.load(school / "reward" / "checkpoint")
    for row, length, score, value in zip(
        rollout.tokens_BT, rollout.lengths_B.tolist(), rollout.score_B, rollout.value_old_BT, strict=True
    ):
        each = [
            model(row[None, :length])[0].detach() - centre for model, centre in ((first.model, 0.25), (other, -0.5))
        ]
        assert float(score) == pytest.approx(2 * min(float(every[-1]) for every in each), abs=1e-5)
        assert float(value[length - 1]) == pytest.approx(float(each[0][-2]), abs=1e-5)


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


def kl_of_the_last_iterations(folder: Path, seed: int, beta: float, target: float) -> list[float]:
    """KL in nats per reply, over the last forty of 120 iterations on `word_table`."""
    table = word_table(seed)

    def reward(prompts: Any, responses: Any, meta: Any) -> list[float | None]:
        return [float(table[m["word"], a, b]) for m, (a, b) in zip(meta, responses, strict=True)]

    config = ppo.PPOConfig(
        iterations=120, prompts_per_iteration=96, epochs=2, minibatches=2, max_response_tokens=2, kl_beta=beta,
        kl_target=target, kl_horizon=400, missing_end="keep", lr=4e-3, critic_lr=4e-3, warmup=0.0, log_every=4,
        save_every=0, engine_batch=96, micro_tokens=4096,
    )  # fmt: skip
    stage = Toy(config, reward, model=small_policy(seed), stop_ids=(), num_prompts=NUM_ASKED)
    train(stage, folder, seed)
    return [line["objective/kl"] for line in lines(folder)[-40:]]


def mean_kl(folder: Path, seed: int, beta: float, target: float) -> float:
    return float(np.mean(kl_of_the_last_iterations(folder / f"{beta}-{target}", seed, beta, target)))


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", range(5))
def test_adaptive_coefficient_settles_the_kl_at_its_target_from_both_sides(tmp_path: Path, seed: int) -> None:
    found = {beta: mean_kl(tmp_path, seed, beta, 0.6) for beta in (0.1, 5.0)}
    print(f"seed {seed}: {found}")
    assert all(abs(kl - 0.6) < 0.12 for kl in found.values())  # within 20 %


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_coefficient_that_stays_settles_nothing(tmp_path: Path) -> None:  # the control of the test above
    assert mean_kl(tmp_path, 0, 0.1, 0.0) > 1.2 and mean_kl(tmp_path, 0, 5.0, 0.0) < 0.2


# ---------------------------------------------------------------- learning: the pretraining mix


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_pretraining_mix_keeps_the_language_at_the_same_reward(tmp_path: Path, seed: int) -> None:
    model = pretrained(seed)
    config = ppo.PPOConfig(
        iterations=70, prompts_per_iteration=96, epochs=2, minibatches=2, max_response_tokens=4, kl_beta=0.0,
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
