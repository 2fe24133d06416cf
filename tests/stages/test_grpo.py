"""GRPO and its kin: groups, what is left out, adapters and shared trunks, resume; and that every preset learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from on_policy_toy import (
    GRPO_ON_TABLE,
    GroupToy,
    count_word,
    lines,
    share_of_the_optimum,
    small_policy,
    text_rows,
    train,
    weights,
    work_in,
)

from lyceum.corpus.records import Conversation, Message, write_records
from lyceum.errors import RunError, TrainingError
from lyceum.model.branches import Branches
from lyceum.model.checkpoint import load_checkpoint, save_checkpoint
from lyceum.model.lora import LoraLinear
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.stages import grpo
from lyceum.stages.grpo import WITHOUT_CRITIC, GRPOConfig
from lyceum.stages.onpolicy import OnPolicy
from lyceum.tokens.tokenizer import Tokenizer
from lyceum.train import workers

SMALL = GRPOConfig(
    iterations=3, prompts_per_iteration=4, group_size=3, max_response_tokens=6, lr=4e-3, warmup=0.0, engine_batch=12,
    save_every=1,
)  # fmt: skip


def begun(config: GRPOConfig = SMALL, **given: Any) -> GroupToy:
    stage = GroupToy(config, **given)
    stage.start(work_in(Path("unused")))
    return stage


# ---------------------------------------------------------------- groups


def test_replies_of_a_group_answer_one_prompt_and_differ() -> None:
    rollout, _ = begun().collect()
    assert rollout.group_B.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    for group in range(4):
        rows = rollout.tokens_BT[rollout.group_B == group].tolist()
        assert len({tuple(row[:2]) for row in rows}) == 1 and len({tuple(row[2:]) for row in rows}) > 1
    assert len({tuple(row[:2]) for row in rollout.tokens_BT.tolist()}) == 4


def test_advantages_are_those_of_the_groups_scores() -> None:
    for name in ("grpo", "dr_grpo"):
        stage = begun(replace(SMALL, algorithm=name))
        rollout, _ = stage.collect()
        for group in range(4):
            score = rollout.score_B[rollout.group_B == group]
            scale = score.std() + 1e-4 if name == "grpo" else 1.0
            expected = (score - score.mean()) / scale
            got = rollout.advantage_BT[rollout.group_B == group]
            mask = rollout.mask_BT[rollout.group_B == group]
            torch.testing.assert_close(got, expected[:, None] * mask, atol=1e-5, rtol=1e-4)


def by_word(prompts: Any, responses: Any, meta: Any) -> list[float | None]:
    """The same for every reply to an even word: groups that teach nothing."""
    counted = count_word(prompts, responses, meta)
    return [score if m["word"] % 2 else 0.3 for score, m in zip(counted, meta, strict=True)]


def test_groups_without_variance_are_counted_and_dropped_where_asked() -> None:
    found = {}
    for how in ("keep", "drop"):
        stage = begun(replace(SMALL, flat_groups=how, prompts_per_iteration=12), reward=by_word)
        rollout, length_P = stage.collect()
        flat = {g for g in range(12) if rollout.score_B[rollout.group_B == g].unique().numel() == 1}
        assert len(flat) >= 6 and stage.figures["rollout/flat_groups"] == len(flat)
        is_flat = torch.isin(rollout.group_B, torch.tensor(sorted(flat)))
        assert (rollout.advantage_BT[is_flat] == 0).all()
        found[how] = int((length_P > 0).sum())
        assert found[how] == (36 if how == "keep" else 36 - int(is_flat.sum()))
    assert found["drop"] >= 3


def test_an_iteration_whose_groups_are_all_flat_changes_nothing_and_goes_on(tmp_path: Path) -> None:
    for how in ("keep", "drop"):
        stage = GroupToy(replace(SMALL, flat_groups=how, kl_beta=0.0), lambda p, r, m: [1.0] * len(r))
        train(stage, tmp_path / how)
        assert all(line["rollout/flat_groups"] == 4 and line["grad_norm/policy"] == 0 for line in lines(tmp_path / how))
        for one, two in zip(stage.policy.parameters(), stage.model.parameters(), strict=True):
            assert torch.equal(one, two)


def test_a_reply_that_cannot_be_scored_leaves_its_group_to_the_others(tmp_path: Path) -> None:
    def reward(prompts: Any, responses: Any, meta: Any) -> list[float | None]:
        return [None if i % 3 == 0 else float(i) for i in range(len(responses))]

    stage = begun(replace(SMALL, algorithm="rloo"), reward=reward)
    stage.kl.beta = 0.0
    rollout, length_P = stage.collect()
    assert stage.figures["rollout/unscorable"] == 4 and len(rollout.score_B) == 8 and int((length_P > 0).sum()) == 8
    for group in range(4):  # scores i and i + 1: each has the other as its baseline
        of_group = rollout.advantage_BT[rollout.group_B == group]
        assert of_group[0].max() == 0 and of_group[0].min() == -1 and of_group[1].max() == 1


def test_one_reply_alone_in_its_group_teaches_nothing() -> None:
    def reward(prompts: Any, responses: Any, meta: Any) -> list[float | None]:
        return [float(i) if i % 3 == 0 else None for i in range(len(responses))]

    rollout, _ = begun(reward=reward).collect()
    assert len(rollout.score_B) == 4 and (rollout.advantage_BT == 0).all()


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_first_pass_is_the_sampling_policy_and_the_reference_for_every_preset(name: str, tmp_path: Path) -> None:
    train(GroupToy(replace(SMALL, algorithm=name, iterations=2)), tmp_path)
    first, second = lines(tmp_path)
    for line in (first, second):  # one update an iteration: the policy that learns is the one that sampled
        assert line["val/ratio"] == pytest.approx(1, abs=1e-5) and line["policy/clipfrac"] == 0
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5) and abs(second["objective/kl"]) > 1e-6
    assert ("loss/kl" in first) == (name in ("grpo", "dr_grpo", "reinforce++_baseline"))
    assert "loss/value" not in first and "val/var_explained" not in first


@pytest.mark.parametrize("name", ["grpo", "reinforce++_baseline", "rloo"])
def test_shared_prompts_and_the_pass_that_is_left_out_change_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, algorithm=name, group_size=6, kl_beta=0.5)
    results = []
    for way in ("plain", "fast"):
        with monkeypatch.context() as patch:
            if way == "plain":
                patch.setattr(Branches, "of", staticmethod(lambda *given: None))
                patch.setattr(OnPolicy, "is_single", property(lambda stage: False))
            stage = GroupToy(config, model=small_policy().double())
            train(stage, tmp_path / way)
            results.append((weights(stage), lines(tmp_path / way)))
    (plain, plain_lines), (fast, fast_lines) = results
    for one, other in zip(plain, fast, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    for one, other in zip(plain_lines, fast_lines, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_a_prompts_replies_stand_together_and_it_is_read_once() -> None:
    stage, seen = begun(replace(SMALL, group_size=6, micro_tokens=100)), []
    rollout, alive = stage.collect()
    stage.policy.register_forward_hook(lambda module, given, out: seen.append(given[0].numel()))
    parts = stage.episodes(rollout, alive.nonzero().flatten(), 0)
    for part in parts:
        assert sorted(part.group_B.tolist()) == sorted(g for g in set(part.group_B.tolist()) for _ in range(6))
        stage.loss(part)
    rows = sum(part.tokens_BT.numel() for part in parts)
    assert sum(seen) == rows - 4 * 5 * 2  # of each of the four prompts of two tokens, five copies less


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_another_cut_into_micro_batches_gives_the_same_run(name: str, tmp_path: Path) -> None:
    config = replace(SMALL, algorithm=name, ptx_coef=0.2, ptx_rows=0.5, iterations=2)
    for micro_tokens in (20, 4096):
        stage = GroupToy(replace(config, micro_tokens=micro_tokens), text=text_rows, model=small_policy().double())
        train(stage, tmp_path / str(micro_tokens))
    for one, two in zip(lines(tmp_path / "20"), lines(tmp_path / "4096"), strict=True):
        assert one == pytest.approx(two, abs=1e-9)


def test_terms_go_back_apart_only_on_the_lines_that_tell_their_norms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "num_workers", lambda tokens: 1)  # on more threads a micro-batch is several passes
    results = {}
    for every in (1, 10):
        stage, passes = GroupToy(replace(SMALL, iterations=12, norms_every=every)), []
        begin = stage.begin

        def watched(policy: Any, *given: Any, begin: Any = begin, passes: list[int] = passes, **named: Any) -> None:
            begin(policy, *given, **named)
            hook = lambda grad: passes.append(1)  # noqa: E731
            policy.register_forward_hook(
                lambda m, a, out: out.register_hook(hook) and None if out.requires_grad else None
            )

        stage.begin = watched  # type: ignore[method-assign]
        train(stage, tmp_path / str(every))
        told = [number for number, line in enumerate(lines(tmp_path / str(every)), 1) if "grad_norm/kl" in line]
        results[every] = (len(passes), told, weights(stage))
    assert results[1][:2] == (24, list(range(1, 13))) and results[10][:2] == (15, [1, 10, 12])
    for one, other in zip(results[1][2], results[10][2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize("settings", [{"lora_rank": 4, "lora_alpha": 8.0}, {"train_layers": 1}])
def test_adapters_and_a_shared_trunk_learn_beside_a_reference_that_stays(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    spec = ModelSpec(14, 2, 32, 2, 2, 16, 64, 32, tied=False)
    model = Decoder(spec, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.output_weight.mul_(8)
        model.model.embed_tokens.weight.mul_(10)
    stage = GroupToy(replace(SMALL, iterations=30, lr=2e-2, group_size=6, **settings), model=model)
    train(stage, tmp_path)
    first, *_, last = lines(tmp_path)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert last["objective/scores"] > first["objective/scores"] + 0.1 and last["objective/kl"] > 0.02
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(stage.reference(tokens), model(tokens))
    own = {id(weight) for weight in stage.policy.parameters()}
    held = sum(weight.numel() for weight in stage.reference.parameters() if id(weight) not in own)
    assert held < 0.6 * sum(weight.numel() for weight in model.parameters())


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_killed_and_resumed_run_equals_the_straight_run_bit_for_bit(name: str, tmp_path: Path) -> None:
    config = replace(SMALL, algorithm=name, iterations=5, kl_target=0.5, kl_horizon=50.0, ema=0.9, flat_groups="drop")
    calls = 0

    def failing(prompts: Any, responses: Any, meta: Any) -> list[float | None]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        found = count_word(prompts, responses, meta)
        return [None, *found[1:]]

    def sparing(prompts: Any, responses: Any, meta: Any) -> list[float | None]:
        return [None, *count_word(prompts, responses, meta)[1:]]

    straight = GroupToy(config, sparing)
    train(straight, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        train(GroupToy(config, failing), tmp_path / "killed")
    resumed = GroupToy(config, failing)
    report = train(resumed, tmp_path / "killed")
    assert lines(tmp_path / "killed") == lines(tmp_path / "straight")
    assert resumed.state_dict() == straight.state_dict()
    assert report["left_out"] == {"unscorable": 5, "empty": 0}
    for one, two in zip(weights(resumed), weights(straight), strict=True):
        assert torch.equal(one, two)


# ---------------------------------------------------------------- from files


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that a run with verified answers has: sft and lessons, no reward, no pretrain."""
    folder = tmp_path_factory.mktemp("school")
    tokenizer = Tokenizer.train(["what is 2 + 3? 5 6 7 yes no it is so " * 20], 280)
    spec = ModelSpec(tokenizer.vocab_size, 1, 32, 2, 2, 16, 64, 48, tied=False)
    save_checkpoint(folder / "sft" / "checkpoint", Decoder(spec, torch.Generator().manual_seed(0)), tokenizer)
    sums = [Conversation((Message("user", f"{a} + {b}?"),)) for a in (1, 2) for b in (3, 4)]
    chats = [Conversation((Message("user", "is it so?"),))]
    write_records(folder / "lessons" / "prompts.jsonl", [*sums, *chats])
    return folder


FILES = replace(
    SMALL, iterations=1, prompts_per_iteration=5, max_response_tokens=8, rewards={"arithmetic": 1.0, "mine.py:f": 0.5}
)


def test_stage_runs_from_files_with_verified_rewards_and_saves_merged_adapters(school: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(prompts, responses, meta):\n    return [len(t) for t in responses]\n")
    work = work_in(tmp_path, inputs={role: school / name for role, name in (("policy", "sft"), ("lessons", "lessons"))})
    report = grpo.run(replace(FILES, lora_rank=2), work)
    assert report["left_out"]["unscorable"] == 3  # the prompt that is no sum, in a group of three
    (line,) = lines(tmp_path)
    assert {"reward/arithmetic", "reward/mine.py:f"} <= set(line) and line["rollout/unscorable"] == 3
    mean = line["reward/arithmetic"] + 0.5 * line["reward/mine.py:f"]
    assert line["reward/mine.py:f"] > 0 and abs(mean) > 0
    saved = load_checkpoint(tmp_path / "checkpoint").model
    assert not any(isinstance(module, LoraLinear) for module in saved.modules())
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


def test_a_reward_model_that_no_section_made_is_asked_for(school: Path, tmp_path: Path) -> None:
    work = work_in(tmp_path, inputs={"policy": school / "sft", "lessons": school / "lessons"})
    with pytest.raises(RunError, match="no reward section comes before") as caught:
        grpo.run(SMALL, work)
    assert "exact_answer" in caught.value.hint


def test_a_function_that_always_fails_ends_the_run_with_a_word(school: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(prompts, responses, meta):\n    raise OSError('no network')\n")
    work = work_in(tmp_path, inputs={"policy": school / "sft", "lessons": school / "lessons"})
    with pytest.raises(TrainingError, match="0 of 15 replies could be scored"):
        grpo.run(replace(FILES, rewards={"mine.py:f": 1.0}), work)


# ---------------------------------------------------------------- learning: a toy whose optimum is known


def test_grpo_moves_towards_the_known_optimum(tmp_path: Path) -> None:
    share, _ = share_of_the_optimum(tmp_path, 0, GRPO_ON_TABLE, iterations=24)
    assert share > 0.3


# A KL in the loss does not see where a token leads (test_algorithms.py), so those presets stop short of the optimum
LEAST_SHARE = {"grpo": 0.5, "dr_grpo": 0.5, "rloo": 0.65, "reinforce++": 0.65, "reinforce++_baseline": 0.3}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT_CRITIC)
@pytest.mark.parametrize("seed", range(5))
def test_every_preset_reaches_for_the_known_optimum_and_shuffled_rewards_teach_nothing(
    tmp_path: Path, seed: int, name: str
) -> None:
    config = replace(GRPO_ON_TABLE, algorithm=name)
    share, variation = share_of_the_optimum(tmp_path / "true", seed, config)
    control, _ = share_of_the_optimum(tmp_path / "control", seed, config, shuffled=True)
    print(f"{name} seed {seed}: share {share:.3f}, total variation {variation:.3f}; control {control:.3f}")
    assert share > LEAST_SHARE[name] and control < 0.15
