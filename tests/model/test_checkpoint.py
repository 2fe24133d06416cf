"""Folders against transformers in both directions, and what a person reads when a folder is broken."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lyceum.errors import CheckpointError
from lyceum.model.checkpoint import load_checkpoint, save_checkpoint
from lyceum.model.heads import ScoreModel
from lyceum.tokens.tokenizer import Tokenizer


class FakeTokenizer:
    pad_id, stop_ids, vocab_size = 0, (3, 1), 96

    def save(self, folder):
        (folder / "tokenizer_config.json").write_text("{}")


@pytest.fixture
def tokens():
    return torch.randint(4, 96, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _no_progress_bars():
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_opens_our_folder_with_the_same_logits(tmp_path, tiny_spec, random_decoder, tokens, tied, qk_norm):
    from transformers import AutoModelForCausalLM

    decoder = random_decoder(tiny_spec(tied=tied, qk_norm=qk_norm))
    save_checkpoint(tmp_path / "c", decoder, FakeTokenizer(), {})
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "c", output_loading_info=True)
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    assert not any(report.values()), report
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(decoder.logits(decoder(tokens)), theirs(tokens).logits, rtol=0, atol=1e-4)
    assert theirs.generation_config.eos_token_id == [3, 1] and theirs.generation_config.pad_token_id == 0


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_we_open_a_folder_of_transformers_with_the_same_logits(tmp_path, tiny_spec, random_decoder, tied, qk_norm):
    from transformers import AutoModelForCausalLM

    save_checkpoint(tmp_path / "ours", random_decoder(tiny_spec(tied=tied, qk_norm=qk_norm)), FakeTokenizer(), {})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_checkpoint(tmp_path / "theirs")
    assert loaded.spec == tiny_spec(tied=tied, qk_norm=qk_norm)
    assert loaded.tokenizer is None and loaded.info == {}
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(loaded.model.logits(loaded.model(tokens)), theirs(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_reward_model_opens_as_sequence_classifier_with_the_same_raw_score(
    tmp_path, tiny_spec, random_decoder, tokens, qk_norm
):
    from transformers import AutoModelForSequenceClassification

    model = ScoreModel(random_decoder(tiny_spec(qk_norm=qk_norm)))
    save_checkpoint(tmp_path / "c", model, FakeTokenizer(), {"reward_centre": 0.5})
    theirs, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "c", output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.num_labels == 1
    lengths = torch.tensor([20, 13, 1])
    for row, length in zip(tokens, lengths, strict=True):
        row[length:] = FakeTokenizer.pad_id
    ours = model(tokens)[torch.arange(3), lengths - 1]
    torch.testing.assert_close(theirs(tokens).logits[:, 0], ours, rtol=0, atol=1e-4)


def test_we_open_a_sequence_classifier_of_transformers(tmp_path, tiny_spec, random_decoder, tokens):
    from transformers import AutoModelForSequenceClassification

    save_checkpoint(tmp_path / "ours", ScoreModel(random_decoder(tiny_spec())), FakeTokenizer(), {})
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_checkpoint(tmp_path / "theirs")
    assert isinstance(loaded.model, ScoreModel)
    torch.testing.assert_close(loaded.model(tokens)[:, -1], theirs(tokens).logits[:, 0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("with_score", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, tiny_spec, random_decoder, tied, with_score):
    model = random_decoder(tiny_spec(tied=tied))
    model = ScoreModel(model) if with_score else model
    info = {"stage": "reward", "parent": "runs/demo/sft/checkpoint", "reward_centre": -1.25}
    save_checkpoint(tmp_path / "c", model, None, info)
    loaded = load_checkpoint(tmp_path / "c")
    assert type(loaded.model) is type(model) and loaded.info == info
    assert loaded.spec == tiny_spec(tied=tied)
    saved, again = model.state_dict(), loaded.model.state_dict()
    assert list(saved) == list(again)
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    assert all(weight.requires_grad for weight in loaded.model.parameters())


def test_loading_draws_no_random_numbers(tmp_path, tiny_spec, random_decoder):
    save_checkpoint(tmp_path / "c", random_decoder(tiny_spec()))
    before = torch.get_rng_state()
    load_checkpoint(tmp_path / "c")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5000.0},
        {"rope_theta": 5000.0, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    ],
)
def test_rotary_base_is_read_where_any_version_of_transformers_wrote_it(tmp_path, tiny_spec, random_decoder, rope):
    save_checkpoint(tmp_path / "c", random_decoder(tiny_spec()))
    edit_config(tmp_path / "c", lambda config: [config.pop("rope_theta"), config.pop("rope_parameters")])
    edit_config(tmp_path / "c", lambda config: config.update(rope))
    assert load_checkpoint(tmp_path / "c").spec.rope_theta == 5000.0


def test_a_written_tied_output_layer_is_ignored(tmp_path, tiny_spec, random_decoder):
    save_checkpoint(tmp_path / "c", random_decoder(tiny_spec()))
    edit_weights(tmp_path / "c", lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert load_checkpoint(tmp_path / "c").model.lm_head is None


def test_a_new_save_replaces_the_folder_and_a_failed_one_leaves_it(tmp_path, tiny_spec, random_decoder):
    class Failing(FakeTokenizer):
        def save(self, folder):
            raise RuntimeError("killed here")

    save_checkpoint(tmp_path / "c", random_decoder(tiny_spec()), None, {"step": 1})
    (tmp_path / "c" / "left over").write_text("")
    save_checkpoint(tmp_path / "c", random_decoder(tiny_spec()), None, {"step": 2})
    with pytest.raises(RuntimeError, match="killed here"):
        save_checkpoint(tmp_path / "c", random_decoder(tiny_spec()), Failing(), {"step": 3})
    assert load_checkpoint(tmp_path / "c").info == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert not (tmp_path / "c" / "left over").exists()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a word, another word, and a third word"] * 8, 270)


def test_tokenizer_travels_with_the_model(tmp_path, tiny_spec, random_decoder, tokenizer):
    from transformers import AutoTokenizer

    save_checkpoint(tmp_path / "c", random_decoder(tiny_spec(vocab_size=tokenizer.vocab_size)), tokenizer, {})
    assert load_checkpoint(tmp_path / "c").tokenizer.fingerprint == tokenizer.fingerprint
    theirs = AutoTokenizer.from_pretrained(tmp_path / "c")
    assert theirs.encode("another word") == tokenizer.encode("another word")
    generation = json.loads((tmp_path / "c" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.turn_end_id, tokenizer.end_id]


def test_tokenizer_of_another_model_is_an_error_with_both_sizes(tmp_path, tiny_spec, random_decoder, tokenizer):
    save_checkpoint(tmp_path / "c", random_decoder(tiny_spec()), tokenizer, {})
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json has {tokenizer.vocab_size} tokens, the model 96"):
        load_checkpoint(tmp_path / "c")


def test_broken_tokenizer_is_a_checkpoint_error(tmp_path, tiny_spec, random_decoder, tokenizer):
    save_checkpoint(tmp_path / "c", random_decoder(tiny_spec(vocab_size=tokenizer.vocab_size)), tokenizer, {})
    (tmp_path / "c" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_checkpoint(tmp_path / "c")


# -- broken folders ----------------------------------------------------------------------------------------------------


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    (folder / "model.safetensors").unlink()  # load_file maps the file: do not write into what it still reads
    save_file(weights, folder / "model.safetensors")


def truncate(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def set_config(**changes):
    return lambda folder: edit_config(folder, lambda config: config.update(changes))


def without_config(key):
    return lambda folder: edit_config(folder, lambda config: config.pop(key))


def set_weight(name, *shape):
    return lambda folder: edit_weights(folder, lambda weights: weights.update({name: torch.zeros(shape)}))


def without_weight(name):
    return lambda folder: edit_weights(folder, lambda weights: weights.pop(name))


NORM = "model.norm.weight"
BREAKS = {
    "no folder": (shutil.rmtree, "there is no checkpoint folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
    "config cut off": (lambda folder: (folder / "config.json").write_text('{"a": '), r"config\.json is not JSON"),
    "config a list": (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json holds a list"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "weights cut off": (truncate, r"model\.safetensors is broken"),
    "weights empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), r"model\.safetensors is broken"),
    "lyceum cut off": (lambda folder: (folder / "lyceum.json").write_text("{"), r"lyceum\.json is not JSON"),
    "unknown class": (set_config(architectures=["GemmaForCausalLM"]), "architecture GemmaForCausalLM is not known"),
    "no class": (without_config("architectures"), "architecture nothing is not known"),
    "no width": (without_config("hidden_size"), r"config\.json describes no model.*width"),
    "misfit heads": (set_config(num_key_value_heads=3), r"config\.json describes no model.*3 key/value heads"),
    "biases": (set_config(attention_bias=True), r"model\.safetensors lacks model\.layers\.0\.self_attn\.k_proj\.bias"),
    "window": (
        set_config(use_sliding_window=True, sliding_window=8, max_window_layers=1),
        "asks for a sliding window",
    ),
    "activation": (set_config(hidden_act="gelu"), "asks for the activation gelu"),
    "scaled rotary": (set_config(rope_parameters={"rope_type": "yarn"}), "asks for scaled rotary positions"),
    "other shape": (set_weight(NORM, 32), r"model\.norm\.weight is \[32\], but config\.json beside it says \[64\]"),
    "weight missing": (without_weight(NORM), r"model\.safetensors lacks model\.norm\.weight"),
    "weight too many": (set_weight("model.bias", 3), r"model\.safetensors has an unknown model\.bias"),
    "one layer fewer": (set_config(num_hidden_layers=1), r"has an unknown model\.layers\.1\..* and 10 more"),
    "two labels": (
        set_config(architectures=["Qwen3ForSequenceClassification"], id2label={"0": "a", "1": "b"}),
        "asks for more than one label",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_folder_is_an_error_that_names_the_file_and_the_next_step(tmp_path, tiny_spec, random_decoder, name):
    damage, message = BREAKS[name]
    save_checkpoint(tmp_path / "c", random_decoder(tiny_spec()), None, {})
    damage(tmp_path / "c")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path / "c")
    assert str(tmp_path / "c") in str(caught.value) and caught.value.hint
