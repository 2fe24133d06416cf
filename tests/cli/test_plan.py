"""The plan: its numbers are those of the stages, its arithmetic is by hand, and what cannot fit is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lyceum import dist
from lyceum.cli import main, plan, river
from lyceum.config import load_recipe
from lyceum.errors import ConfigError, ResourceError
from lyceum.model.spec import ModelSpec
from lyceum.train.machine import MachineConfig
from lyceum.train.memory import added, total

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"


def planned(name: str = "demo", *overrides: str, run: Path | None = None) -> dict[str, plan.Need]:
    recipe = load_recipe(RECIPES / f"{name}.toml", overrides)
    return {need.name: need for need in plan.needs(recipe, river.plan(recipe), run)}


def test_the_demos_plan_by_hand() -> None:
    found = planned()
    assert list(found) == ["pretrain", "sft", "reward", "ppo"]
    # 4 layers of width 128 and ffn 384: 4 * (4 * 128^2 + 3 * 128 * 384) = 851,968 in matrices, 2,048 * 128 = 262,144 in
    # the embedding, 4 * (2 * 128 + 2 * 32) + 128 = 1,408 in norms
    assert found["pretrain"].spec.num_parameters()["total"] == 851_968 + 262_144 + 1_408 == 1_115_520
    # 600,000 tokens are 292 steps of 16 rows of 128; a token costs 6 * 1,114,112 and 6 * 4 * 128 * 128 for attention
    assert (found["pretrain"].steps, found["pretrain"].tokens) == (292, 598_016)
    assert found["pretrain"].flops == 598_016 * (6 * 1_114_112 + 393_216)
    # 12 iterations, 2 epochs of 4 minibatches; 32 episodes of 48 tokens a minibatch, and 8 rows of text of 128
    assert (found["ppo"].steps, found["ppo"].tokens) == (96, 2 * 12 * 128 * 48 + 96 * 8 * 128)
    assert found["sft"].tokens is None and found["sft"].memory == found["pretrain"].memory
    assert found["ppo"].memory["weights"] == 4 * found["pretrain"].memory["weights"]
    assert found["ppo"].memory["cache"] > 0 and total(found["reward"].gpu_memory) < total(found["reward"].memory)


def test_without_a_critic_and_with_rewards_by_rule_less_is_held(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    text = (RECIPES / "demo.toml").read_text().split("[rankings]")[0]
    path.write_text(
        text + "[grpo]\nrewards = { arithmetic = 1.0 }\n[grpo.judged]\nrewards = { model = 0.5, format = 1 }\n"
    )
    with pytest.raises(ConfigError, match=r"\[grpo.judged\] in .* needs an earlier section of kind reward"):
        river.plan(load_recipe(path))
    path.write_text(text + "[grpo]\nrewards = { arithmetic = 1.0 }\n")
    recipe = load_recipe(path)
    found = {need.name: need for need in plan.needs(recipe, river.plan(recipe))}
    # 80 iterations of 8 prompts with 8 replies each, one update an iteration
    assert (found["grpo"].steps, found["grpo"].tokens) == (80, 80 * 8 * 8 * 48)
    assert found["grpo"].memory["weights"] == 2 * found["pretrain"].memory["weights"]  # the policy and the reference


def test_adapters_upper_layers_and_a_shared_critic_take_less() -> None:
    whole = planned()["ppo"].memory
    shared = planned("demo", "ppo.critic=shared")["ppo"].memory
    assert whole["weights"] - shared["weights"] == 4 * 1_115_520  # the critic's
    assert planned()["ppo"].flops > planned("demo", "ppo.critic=shared")["ppo"].flops
    lora = planned("demo", "ppo.critic=shared", "ppo.lora_rank=4", "ppo.matrix_lr=0.01")["ppo"].memory
    # of each of 4 layers 4 * (2 * (128 + 128) + 2 * (128 + 128) + 3 * (128 + 384)) numbers; no reference of its own
    adapters = 4 * 4 * (2 * 256 + 2 * 256 + 3 * 512)
    assert lora["weights"] == 4 * (2 * 1_115_520 + adapters) and lora["gradients"] < 0.1 * shared["gradients"]
    upper = planned("demo", "ppo.critic=shared", "ppo.train_layers=1")["ppo"].memory
    layer = 851_968 // 4 + 1_408 // 4
    assert 4 * (2 * 1_115_520 + layer) <= upper["weights"] < 4 * (2 * 1_115_520 + layer + 128)
    for name, key in (("demo", "sft"), ("smoke-preference", "preference")):
        less, more = planned(name, f"{key}.lora_rank=4")[key].memory, planned(name)[key].memory
        assert less["optimizer"] < more["optimizer"] and less["gradients"] < 0.25 * more["gradients"]


def test_finished_lessons_say_how_long_fine_tuning_is(tmp_path: Path) -> None:
    (tmp_path / "lessons").mkdir()
    (tmp_path / "lessons" / "train.jsonl").write_text("{}\n" * 1000)
    found = planned("demo", "sft.epochs=3", run=tmp_path)["sft"]
    assert found.tokens == 3 * 1000 * 48 and found.steps == round(3 * 1000 * 48 / 2048)  # a quarter of 192 each


def test_a_plan_of_preferences_by_hand() -> None:
    found = planned("smoke-preference")
    # 48 of 60 prompts are learned from, 4 responses each, a quarter of 192 tokens; kto counts responses, 16 a step
    assert (found["preference"].tokens, found["preference"].steps) == (48 * 4 * 48, 3)
    assert (found["thumbs"].tokens, found["thumbs"].steps) == (48 * 4 * 48, 12)
    forward = 48 * 4 * 48 * found["preference"].spec.flops_per_token(48) / 3
    # learning is three forwards, the reference one; kto reads a stranger's response beside each, also by the reference
    assert found["preference"].flops == pytest.approx(4 * forward)
    assert found["thumbs"].flops == pytest.approx(6 * forward)
    assert planned("smoke-preference", "preference.data='pairs.jsonl'")["preference"].tokens is None


def test_what_the_dial_derives_is_planned_and_shown() -> None:
    found = planned("demo", "pretrain.tokens=0", "pretrain.batch_tokens=0", "pretrain.weight_decay=-1")["pretrain"]
    assert found.tokens == pytest.approx(20 * 1_115_520, rel=1e-3) and found.steps == found.tokens // 2048
    assert any(note.startswith("1. tokens = 22,310,400: 20 for each") for note in found.notes)
    preset = planned("demo", "model.preset='qwen3-0.6b'", "model.width=0", "model.context_length=512")["ppo"]
    assert preset.spec.num_layers == 28 and preset.spec.context_length == 512


def need_of(layers: int, width: int) -> plan.Need:
    spec = ModelSpec(50_000, layers, width, width // 128, width // 128, 128, 4 * width, 2048)
    memory = added({"weights": 20 * 10**9, "activations": 4 * 10**9})
    return plan.Need("pretrain", "pretrain", spec, memory, memory, flops=1e18)


def test_the_split_by_hand() -> None:
    # 24 GB on cards of which nine tenths can be used. Whole: 4 bytes of two layers and the embedding,
    # 4 * (2 * (4 * 1024^2 + 12 * 1024^2) + 50,000 * 1024) = 339 MB.
    need = need_of(10, 1024)
    card = plan.GPUS[0]
    assert plan.split(need, replace(card, memory=30e9)) == (1, "one GPU, or data parallel")
    assert plan.split(need, replace(card, memory=25e9)) == (2, "FSDP over 2")  # 10 + 4 + 0.34 of 22.5
    assert plan.split(need, replace(card, memory=10e9)) == (8, "FSDP over 8")  # 2.5 + 4.34 of 9; over 4: 9.34
    assert plan.split(need, replace(card, memory=4e9)) == (8, "TP over 8")  # 2.5 + 0.54 of 3.6
    assert plan.split(need, replace(card, memory=2.4e9)) == (16, "FSDP over 2, TP over 8")  # 1.25 + 0.54 of 2.16
    assert plan.split(need, replace(card, memory=0.5e9))[0] == 0


def test_seconds_on_a_gpu_by_hand() -> None:
    h100 = plan.GPUS[2]  # 989 TFLOP/s: 40 % of it at width 1,024, 20 % at 512
    assert plan.gpu_seconds(need_of(10, 1024), h100) == pytest.approx(1e18 / (0.4 * 989e12))
    assert plan.gpu_seconds(need_of(10, 512), h100) == pytest.approx(1e18 / (0.2 * 989e12))
    assert plan.gpu_seconds(replace(need_of(10, 512), flops=None), h100) is None


def test_the_page_shows_every_section_machine_and_the_cost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plan.device, "matmul_flops", lambda shapes, rows: 100e9)
    assert main.main(["plan", str(RECIPES / "demo.toml"), "--price", "2", "--runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("  ")[0]: line for line in lines if "  " in line}
    assert {"pretrain", "sft", "reward", "ppo", "this machine", *(gpu.name for gpu in plan.GPUS)} <= set(rows)
    assert "1.12M" in rows["pretrain"] and "598,016" in rows["pretrain"]
    assert "1:54" in rows["this machine"]  # 598,016 tokens of 7.078 MFLOP at 37 GFLOP/s
    assert any(line.startswith("2. width = 128") for line in lines) and any(line.startswith("?: not") for line in lines)
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_trains_nothing_is_told(tmp_path: Path) -> None:
    recipe = tmp_path / "dry.toml"
    recipe.write_text("[corpus]\n")
    with pytest.raises(ConfigError, match="no section of .* trains") as caught:
        plan.plan(recipe)
    assert "pretrain" in caught.value.hint


def test_what_cannot_fit_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", str(RECIPES / "smoke.toml"), "--runs", str(tmp_path), "--set", "model.depth=480"]
    words += ["--set", "model.width=8192"]
    assert main.main(words) == 1
    shown = capsys.readouterr().err
    assert (
        "error: pretrain needs about" in shown
        and ("of which optimizer" in shown or "of which gradients" in shown)  # with many threads these are the most
        and "hint: lower model.depth" in shown
    )
    assert not (tmp_path / "smoke" / "corpus").exists()
    monkeypatch.setattr(plan, "memory_there", lambda: (600e6, 340e6, "this machine"))
    plan.check_memory(list(planned("smoke").values()))
    with pytest.raises(ResourceError, match="pretrain needs about .* activations .* this machine has 600 MB") as caught:
        plan.check_memory(list(planned("smoke", "pretrain.micro_tokens=65536", "pretrain.batch_tokens=65536").values()))
    assert "lower pretrain.micro_tokens" in caught.value.hint


def test_what_fits_only_when_it_is_sharded_or_recomputed_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # 24 GB a GPU would need; over 4 of them 20 / 4 + 4, and 339 MB of what stands whole
    need, sharded = need_of(10, 1024), MachineConfig(shard=True)
    monkeypatch.setattr(plan, "memory_there", lambda: (10e9, 0.0, "a GPU"))
    with pytest.raises(ResourceError, match="a GPU has 10.0 GB"):
        plan.check_memory([need], sharded)  # one rank has nothing to shard
    monkeypatch.setattr(dist, "world_size", lambda: 4)
    plan.check_memory([need], sharded)
    with pytest.raises(ResourceError, match="pretrain needs about 24.0 GB"):
        plan.check_memory([need], MachineConfig())
    # on a CPU 1 GB of Python and torch more, and 20 GB of weights where rank 0 puts them together
    monkeypatch.setattr(plan, "memory_there", lambda: (10e9, 1e9, "this machine"))
    with pytest.raises(ResourceError, match="pretrain needs about 30.3 GB"):
        plan.check_memory([need], sharded)
    kept, again = planned(), planned("demo", "machine.recompute=true")
    # of 16 rows of 128 tokens: 3 of 4 layers' activations for the inputs of 4; width 128, 4 heads of 32, ffn 384
    layer = 4 * 128 + 3 * 128 + 3 * 128 + 4 * 384
    fewer = kept["pretrain"].memory["activations"] - again["pretrain"].memory["activations"]
    assert fewer == pytest.approx(1.15 * 4 * 2048 * (3 * layer - 4 * 128), rel=1e-6)
    assert all(again[name].memory["activations"] < kept[name].memory["activations"] for name in kept)


def test_a_finished_section_is_not_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(plan, "check_memory", lambda found, parallel: asked.append([need.name for need in found]))
    recipe = load_recipe(RECIPES / "smoke.toml")
    steps = river.plan(recipe)

    class Half:
        path = tmp_path

        def is_finished(self, name: str, key: str) -> bool:
            return name in ("pretrain", "sft")

    river._check_memory(Half(), recipe, steps, steps)  # type: ignore[arg-type]
    assert asked == [["reward", "ppo"]]
