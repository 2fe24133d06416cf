"""Folders of other families, made by transformers from random weights: opened, generated from, trained, saved again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams
from lyceum.errors import CheckpointError
from lyceum.model import hub
from lyceum.model.checkpoint import load_checkpoint, save_checkpoint
from lyceum.model.heads import ScoreModel

GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
LLAMA = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS = {
    "gpt2": ("GPT2", GPT2),
    "gpt2 wide, untied": ("GPT2", {**GPT2, "n_inner": 80, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3}),
    "llama": ("Llama", LLAMA),
    "llama of many heads, tied": ("Llama", {**LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama with all biases": ("Llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama, heads wider than the model": ("Llama", {**LLAMA, "head_dim": 32, "rms_norm_eps": 1e-2}),
    "llama 3.1": ("Llama", {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0, **LLAMA3}}),
    "llama stretched": (
        "Llama",
        {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "qwen2": ("Qwen2", {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2, window above the last layer": (
        "Qwen2",
        {**LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 32, "tie_word_embeddings": True}),
    "qwen3 with biases": ("Qwen3", {**LLAMA, "head_dim": 16, "attention_bias": True}),
}


@pytest.fixture(autouse=True)
def _no_progress_bars():
    logging.disable_progress_bar()


def theirs_of(family, settings, head="ForCausalLM", **more):
    """A model of transformers with every weight random and nothing dropped."""
    settings = {**settings, **more, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    head = "LMHeadModel" if (family, head) == ("GPT2", "ForCausalLM") else head
    model = getattr(transformers, family + head)(getattr(transformers, family + "Config")(**settings)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.empty_like(weight).normal_(0.0, 0.2, generator=generator))
    return model


@pytest.fixture(params=VARIANTS)
def theirs(request):
    return theirs_of(*VARIANTS[request.param])


@pytest.fixture
def tokens():
    return torch.randint(1, 96, (3, 40), generator=torch.Generator().manual_seed(1))


def logits(model, tokens):
    return model.logits(model(tokens))


@pytest.mark.usefixtures("both_forms")
def test_opened_folder_has_transformers_logits_and_gradients(tmp_path, theirs, tokens):
    theirs.save_pretrained(tmp_path)
    ours = load_checkpoint(tmp_path).model
    our_logits, their_logits = logits(ours, tokens), theirs(tokens).logits
    torch.testing.assert_close(our_logits, their_logits, rtol=0, atol=1e-4)
    for scores in (our_logits, their_logits):
        torch.nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    model_type = hub.family_of(ours.spec)
    ours_by_their_names = hub.to_hub({name: weight.grad for name, weight in ours.named_parameters()}, model_type)
    wanted = {name: weight.grad for name, weight in theirs.named_parameters()}
    assert ours_by_their_names.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(ours_by_their_names[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_cached_greedy_generation_is_that_of_transformers(tmp_path, theirs, tokens):
    theirs.save_pretrained(tmp_path)
    engine = Engine(load_checkpoint(tmp_path).model)
    prompts = [row[:length].tolist() for row, length in zip(tokens, (9, 5, 1), strict=True)]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=12, temperature=0.0))  # together, of unequal lengths
    for prompt, output in zip(prompts, outputs, strict=True):
        row = torch.tensor([prompt])
        wanted = theirs.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=12, do_sample=False)
        assert output.ids == wanted[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gpt2", "llama", "qwen3"])
def test_fifty_prompts_side_by_side_continue_as_those_of_transformers(tmp_path, variant):
    theirs = theirs_of(*VARIANTS[variant])
    theirs.save_pretrained(tmp_path)
    draw = torch.Generator().manual_seed(7)
    stem = torch.randint(1, 96, (20,), generator=draw).tolist()
    lengths = torch.randint(1, 30, (50,), generator=draw).tolist()
    tails = [torch.randint(1, 96, (length,), generator=draw).tolist() for length in lengths]
    prompts = [[*stem, *tail] if number % 3 == 0 else tail for number, tail in enumerate(tails)]
    engine = Engine(load_checkpoint(tmp_path).model, max_batch=16, step_tokens=24, checks=True)
    outputs = engine.generate(prompts, SamplingParams(max_tokens=14, temperature=0.0))
    assert sum(output.num_reused > 0 for output in outputs) > 10
    for prompt, output in zip(prompts, outputs, strict=True):
        row = torch.tensor([prompt])
        wanted = theirs.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=14, do_sample=False)
        assert output.ids == wanted[0, len(prompt) :].tolist()


def test_a_saved_folder_is_of_the_family_it_came_from_weight_for_weight(tmp_path, theirs, tokens):
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_checkpoint(tmp_path / "theirs")
    save_checkpoint(tmp_path / "ours", loaded.model)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(again) is type(theirs) and not any(report.values()), report
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(again.eval()(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-5)
    assert load_checkpoint(tmp_path / "ours").spec == loaded.spec
    names = load_file(tmp_path / "ours" / "model.safetensors").keys()
    assert names == load_file(tmp_path / "theirs" / "model.safetensors").keys()


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Qwen2"])
def test_a_sequence_classifier_opens_and_is_saved_again(tmp_path, tokens, family):
    settings = GPT2 if family == "GPT2" else LLAMA
    theirs = theirs_of(family, settings, "ForSequenceClassification", num_labels=1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_checkpoint(tmp_path / "theirs").model
    assert isinstance(ours, ScoreModel)
    save_checkpoint(tmp_path / "ours", ours)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours", pad_token_id=0).eval()
    for model in (theirs, again):
        torch.testing.assert_close(ours(tokens)[:, -1], model(tokens).logits[:, 0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama 3.1", "llama stretched"])
def test_scaling_of_rotary_positions_decides_these_logits(tmp_path, tokens, name):  # the control
    theirs_of(*VARIANTS[name]).save_pretrained(tmp_path)
    ours = load_checkpoint(tmp_path).model
    scaled = logits(ours, tokens)
    ours.spec = replace(ours.spec, rope_scaling=None)
    assert (logits(ours, tokens) - scaled).abs().max() > 1e-2


def test_scaling_is_read_where_older_transformers_wrote_it(tmp_path):
    theirs_of(*VARIANTS["llama 3.1"]).save_pretrained(tmp_path)
    spec = load_checkpoint(tmp_path).spec
    edit(tmp_path / "config.json", lambda config: config.pop("rope_parameters"))
    edit(
        tmp_path / "config.json",
        lambda config: config.update(rope_theta=5000.0, rope_scaling={"type": "llama3", **LLAMA3}),
    )
    assert load_checkpoint(tmp_path).spec == spec


# -- files -------------------------------------------------------------------------------------------------------------


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_the_fp32_it_stands_for(tmp_path, tokens, dtype):
    theirs_of(*VARIANTS["qwen2"]).to(dtype).save_pretrained(tmp_path)
    assert next(iter(load_file(tmp_path / "model.safetensors").values())).dtype == dtype
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = load_checkpoint(tmp_path).model
    assert all(weight.dtype == torch.float32 for weight in ours.parameters())
    torch.testing.assert_close(logits(ours, tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


@pytest.fixture(params=["gpt2", "llama"])
def sharded(request, tmp_path):
    theirs = theirs_of(*VARIANTS[request.param])
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    return theirs


def test_shards_are_read_together(tmp_path, sharded, tokens):
    torch.testing.assert_close(
        logits(load_checkpoint(tmp_path).model, tokens), sharded(tokens).logits, rtol=0, atol=1e-4
    )


def test_first_gpt2_files_without_prefix_and_with_masks_are_read(tmp_path, tokens):
    theirs = theirs_of("GPT2", GPT2)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor.clone() for name, tensor in load_file(path).items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(2)}
    path.unlink()
    save_file(tensors | masks, path, metadata={"format": "pt"})
    torch.testing.assert_close(
        logits(load_checkpoint(tmp_path).model, tokens), theirs(tokens).logits, rtol=0, atol=1e-4
    )


def no_shard(folder):
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def cut_shard(folder):
    path = sorted(folder.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:100])


def less_in_a_shard(folder):
    path = sorted(folder.glob("model-*.safetensors"))[1]
    held = {name: tensor.clone() for name, tensor in load_file(path).items()}
    held.pop(min(held))
    path.unlink()
    save_file(held or {"other": torch.zeros(1)}, path)


def outside(folder):
    edit(
        folder / "model.safetensors.index.json",
        lambda index: index["weight_map"].update(a="../model-00001.safetensors"),
    )


SHARDS = {
    "missing shard": (no_shard, r"model-00002-of-\d+\.safetensors is missing"),
    "broken shard": (cut_shard, r"model-00002-of-\d+\.safetensors is broken"),
    "missing in a shard": (
        less_in_a_shard,
        r"model-00002-of-\d+\.safetensors lacks \S+, which model\.safetensors\.index",
    ),
    "file elsewhere": (outside, r"index\.json does not map names of weights to files beside it"),
    "empty index": (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "does not map names"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_shards_that_do_not_fit_their_index_are_errors_that_name_the_file(tmp_path, sharded, name):
    damage, message = SHARDS[name]
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path)
    assert caught.value.hint


def change_gpt2(change):
    def do(folder):
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        (folder / "model.safetensors").unlink()
        save_file(tensors, folder / "model.safetensors")

    return do


def only_a_pickle(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def said(**changes):
    return lambda folder: edit(folder / "config.json", lambda config: config.update(changes))


C_ATTN = "transformer.h.0.attn.c_attn.weight"
GPT2_BREAKS = {
    "pickle": (only_a_pickle, r"model\.safetensors is missing, and pytorch_model\.bin is a pickle"),
    "tensor missing": (change_gpt2(lambda held: held.pop(C_ATTN)), rf"lacks {C_ATTN}"),
    "wrong shape": (
        change_gpt2(lambda held: held.update({C_ATTN: held[C_ATTN].t().contiguous()})),
        rf"{C_ATTN} is \[192, 64\], but config\.json beside it says \[64, 192\]",
    ),
    "width": (
        said(n_embd=66),
        r"wte\.weight is \[96, 64\], but config\.json beside it says \[96, 66\]|describes no model",
    ),
    "activation": (said(activation_function="relu"), "asks for the activation relu"),
    "scale": (said(scale_attn_by_inverse_layer_idx=True), "asks for attention scores scaled by layer"),
    "quantised": (said(quantization_config={"quant_method": "gptq"}), "asks for quantised weights"),
    "mixture": (said(architectures=["MixtralForCausalLM"]), "MixtralForCausalLM is not known"),
}


@pytest.mark.parametrize("name", GPT2_BREAKS)
def test_what_cannot_be_opened_is_refused_by_name(tmp_path, name):
    theirs_of("GPT2", GPT2).save_pretrained(tmp_path)
    damage, message = GPT2_BREAKS[name]
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rotary positions of the type yarn"),
        ({"rope_parameters": {"rope_type": "linear"}}, "describes no model: 'factor'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.0}}, "is no scaling of rotary positions"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotary positions on a part of each head"),
        (
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
            "window",
        ),
        ({"hidden_act": "gelu"}, "asks for the activation gelu"),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "Qwen2MoeForCausalLM is not known"),
    ],
)
def test_a_qwen2_that_asks_for_more_is_refused_by_name(tmp_path, changes, message):
    theirs_of("Qwen2", LLAMA).save_pretrained(tmp_path)
    said(**changes)(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path)
    assert caught.value.hint
    if "architectures" in changes:
        assert all(name in caught.value.hint for name in ("GPT2LMHeadModel", "Llama", "Qwen2", "Qwen3ForCausalLM"))


def test_a_shape_that_no_family_has_is_not_saved(tmp_path, tiny_spec, random_decoder):
    model = random_decoder(tiny_spec(positions="learned"))  # with Qwen3's norms
    with pytest.raises(CheckpointError, match="no family of Hugging Face models has this shape") as caught:
        save_checkpoint(tmp_path / "c", model)
    assert "gpt2" in caught.value.hint and not (tmp_path / "c").exists()
