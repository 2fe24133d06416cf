"""Adapters against the equation worked by hand, against PEFT in both directions, and merged against adapted."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging

from lyceum.errors import CheckpointError, ConfigError
from lyceum.model.checkpoint import load_checkpoint, save_checkpoint
from lyceum.model.lora import LoraLinear, adapt, load_adapters, merge, save_adapters
from lyceum.train.optim import Learner, OptimizerSettings

NAMES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
TOKENS = torch.randint(96, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _no_progress_bars():
    logging.disable_progress_bar()


def logits(model):
    return model.logits(model(TOKENS))


def shaken(model):
    """Random numbers in place of the zeros of B."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0.0, 0.2, generator=generator)
    return model


def test_the_equation_by_hand():
    # W x + b = (1*3 + 2*4 + 10, 0*3 + 1*4 + 20) = (21, 24);  A x = 2*3 - 1*4 = 2;  scale 6/1;  B A x * 6 = (12, -36)
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        linear.bias.copy_(torch.tensor([10.0, 20.0]))
        adapted = LoraLinear(linear, rank=1, alpha=6.0)
        x = torch.tensor([3.0, 4.0])
        assert adapted(x).tolist() == [21.0, 24.0]  # B = 0: nothing has changed yet
        adapted.lora_A.weight.copy_(torch.tensor([[2.0, -1.0]]))
        adapted.lora_B.weight.copy_(torch.tensor([[1.0], [-3.0]]))
        assert adapted(x).tolist() == [33.0, -12.0]
        # W + 6 B A = [[1 + 12, 2 - 6], [0 - 36, 1 + 18]]
        assert adapted.merged().weight.tolist() == [[13.0, -4.0], [-36.0, 19.0]]
        assert adapted.merged()(x).tolist() == [33.0, -12.0]


@pytest.mark.usefixtures("both_forms")
@pytest.mark.parametrize("words", [{}, {"qk_norm": False, "biases": ("q_proj", "k_proj", "v_proj"), "tied": False}])
def test_adapted_begins_as_the_base_and_merged_is_as_adapted(tiny_spec, random_decoder, words):
    model = random_decoder(tiny_spec(**words))
    before, names = logits(model), [name for name, _ in model.named_parameters()]
    adapt(model, 4, 8.0)
    assert torch.allclose(logits(model), before, rtol=0, atol=1e-5)
    adapted = logits(shaken(model))
    assert (adapted - before).abs().max() > 0.1
    merge(model)
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-5 * float(adapted.detach().abs().max()))
    assert [name for name, _ in model.named_parameters()] == names
    assert all(weight.requires_grad for weight in model.parameters())


def test_training_moves_the_adapters_and_nothing_else(tiny_spec, random_decoder):
    model = random_decoder(tiny_spec())
    adapt(model, 4, 8.0, generator=torch.Generator().manual_seed(3))
    before = copy.deepcopy(model.state_dict())
    learner = Learner(model, OptimizerSettings(lr=0.01))
    assert learner.named.keys() == {name for name in before if ".lora_" in name} and len(learner.named) == 2 * 2 * 7
    for _ in range(2):  # A has no gradient before B has moved
        learner.gradient.zero_()
        learner.accumulate_in(learner.gradient)
        logits(model).square().mean().backward()
        learner.update(1.0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (".lora_" not in name), name


def test_a_is_drawn_by_hes_rule_from_the_generator(tiny_spec, random_decoder):
    drawn = []
    for seed in (3, 3, 4):
        model = random_decoder(tiny_spec())
        adapt(model, 8, 8.0, generator=torch.Generator().manual_seed(seed))
        drawn.append(model.model.layers[1].mlp.down_proj.lora_A.weight)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    bound = 128**-0.5  # sqrt(6 / (1 + 5) / inputs)
    assert 0.95 * bound < drawn[0].abs().max() <= bound and abs(drawn[0].std() - bound / 3**0.5) < 0.1 * bound


def test_targets_choose_the_layers(tiny_spec, random_decoder):
    model = random_decoder(tiny_spec(tied=False))
    adapt(model, 2, 4.0, ["q_proj", "model.layers.1.mlp.up_proj"])
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    assert adapted == {f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)} | {"model.layers.1.mlp.up_proj"}
    with pytest.raises(ConfigError, match="has adapters already"):
        adapt(model, 2, 4.0)
    for changes in ({"rank": 0}, {"alpha": 0.0}, {"targets": ["c_attn"]}):
        with pytest.raises(ConfigError, match="adapters of rank|no linear layer c_attn"):
            adapt(random_decoder(tiny_spec()), **{"rank": 2, "alpha": 4.0, **changes})


# -- PEFT --------------------------------------------------------------------------------------------------------------


BY_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@BY_PEFT
@pytest.mark.parametrize("targets", [[], ["q_proj", "v_proj"], ["model.layers.1.mlp.up_proj"]])
def test_peft_opens_what_we_save(tmp_path, tiny_spec, random_decoder, targets):
    model = random_decoder(tiny_spec())
    save_checkpoint(tmp_path / "base", model)
    adapt(model, 4, 12.0, targets)
    save_adapters(tmp_path / "adapter", shaken(model), str(tmp_path / "base"))
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight" in names or "q_proj" in targets
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == (set(targets) or NAMES)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(TOKENS).logits, logits(model), rtol=1e-5, atol=1e-4)


@BY_PEFT
def test_we_open_what_peft_saves(tmp_path, tiny_spec, random_decoder):
    save_checkpoint(tmp_path / "base", random_decoder(tiny_spec(qk_norm=False)))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    wanted = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], lora_dropout=0.1)
    theirs = shaken(peft.get_peft_model(base, wanted)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_checkpoint(tmp_path / "base").model
    load_adapters(tmp_path / "adapter", ours)
    torch.testing.assert_close(logits(ours), theirs(TOKENS).logits, rtol=1e-5, atol=1e-4)
    merge(ours)
    torch.testing.assert_close(logits(ours), theirs(TOKENS).logits, rtol=1e-5, atol=1e-4)


def edit_config(**changes):
    def do(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))

    return do


def edit_weights(change):
    def do(folder):
        path = folder / "adapter_model.safetensors"
        held = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(held)
        path.unlink()
        save_file(held, path)

    return do


A = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
BREAKS = {
    "no folder": (lambda folder: (folder / "adapter_config.json").unlink(), r"adapter_config\.json is missing"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"model\.safetensors is missing"),
    "kind": (edit_config(peft_type="IA3"), "is of the type IA3"),
    "dora": (edit_config(use_dora=True), "asks for use_dora = true"),
    "patterns": (edit_config(rank_pattern={"q_proj": 2}), "asks for rank_pattern"),
    "no rank": (edit_config(r=None), "does not fit this model"),
    "other rank": (edit_config(r=2), r"lora_A\.weight is \[4, 64\], the model wants \[2, 64\]"),
    "half": (edit_weights(lambda held: held.pop(B)), f"lacks {B}"),
    "unknown": (edit_weights(lambda held: held.update({"base_model.model.x": torch.zeros(1)})), "has an unknown .*x"),
    "other layer": (
        edit_weights(lambda held: held.update({A.replace("0", "9"): held[A].clone()})),
        "does not fit this model",
    ),
    "nothing": (edit_weights(dict.clear), "does not fit this model"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_adapters_that_cannot_be_used_are_errors_that_name_the_file(tmp_path, tiny_spec, random_decoder, name):
    damage, message = BREAKS[name]
    model = random_decoder(tiny_spec())
    adapt(model, 4, 8.0)
    save_adapters(tmp_path, model)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_adapters(tmp_path, random_decoder(tiny_spec()))
    assert str(tmp_path) in str(caught.value) and caught.value.hint


def test_a_gpt2_takes_adapters_too(tmp_path, tiny_spec, random_decoder):
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    spec = tiny_spec(
        norm="layer", positions="learned", ffn="gelu", biases=every, qk_norm=False, num_kv_heads=4, rope_theta=10000.0
    )
    model = random_decoder(spec)
    base = copy.deepcopy(model)
    adapt(model, 4, 8.0)
    save_adapters(tmp_path / "adapter", shaken(model))
    load_adapters(tmp_path / "adapter", base)
    assert torch.equal(logits(base), logits(model))
    merge(model)
    save_checkpoint(tmp_path / "merged", model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(theirs(TOKENS).logits, logits(base), rtol=1e-5, atol=1e-4)
    assert asdict(load_checkpoint(tmp_path / "merged").spec) == asdict(spec)
