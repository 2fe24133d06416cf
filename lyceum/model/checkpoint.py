"""A checkpoint is a Hugging Face folder: write one, read one.

    config.json              the shape; Qwen3ForCausalLM, or Qwen3ForSequenceClassification with one label
    model.safetensors        the weights, under Hugging Face's names; a tied output layer is not written twice
    tokenizer.json, tokenizer_config.json     where a tokenizer was given
    generation_config.json   which tokens end a reply and which one pads
    lyceum.json              ours: parent checkpoint, stage, recipe, data fingerprints, results, reward centre

Why: what we train, other tools open as it is, and what others trained we go on from. Only safetensors and JSON are
read, so a checkpoint from a stranger is safe to open. A folder is written beside its place and renamed, so that a
reader never meets half of one.

What it is not: it maps no foreign families (GPT-2, biases, sliding windows), reads no sharded weights, and keeps no
optimizer state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lyceum.errors import CheckpointError, ConfigError, DataError
from lyceum.model.heads import ScoreModel
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import fresh_folder, write_json

FAMILIES = {"qwen3": "Qwen3", "llama": "Llama"}  # model_type -> class prefix; Llama is Qwen3 without QK-norm
KINDS = {"ForCausalLM": Decoder, "ForSequenceClassification": ScoreModel}
SPEC_KEYS = {  # ModelSpec's name -> config.json's
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "width": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "ffn_width": "intermediate_size",
    "context_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
TRAIN_AGAIN = "run the stage that wrote this checkpoint again, or copy the folder again from where it came."


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint folder holds; `tokenizer` is None and `info` empty where the folder has none."""

    model: Decoder | ScoreModel
    spec: ModelSpec
    tokenizer: Any
    info: dict[str, Any]


# -- save --------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path | str, model: Decoder | ScoreModel, tokenizer: Any = None, info: Mapping[str, Any] | None = None
) -> None:
    """Write `model` as a Hugging Face folder, replacing `folder` in one step.

    `tokenizer` needs `save(folder)` and the ids `pad_id`, `turn_end_id` and `end_id`; `info` becomes lyceum.json.
    Raises ResourceError when the disk is full.
    """
    with fresh_folder(folder) as fresh:
        tensors = {_hub_name(name): tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, fresh / "model.safetensors", metadata={"format": "pt"})
        write_json(fresh / "config.json", _config(model, tokenizer))
        if tokenizer is not None:
            tokenizer.save(fresh)
            stops = {"eos_token_id": [tokenizer.turn_end_id, tokenizer.end_id], "pad_token_id": tokenizer.pad_id}
            write_json(fresh / "generation_config.json", stops)
        write_json(fresh / "lyceum.json", dict(info or {}))


def _hub_name(name: str) -> str:
    return name.removeprefix("decoder.")


def _config(model: Decoder | ScoreModel, tokenizer: Any) -> dict[str, Any]:
    """config.json, with the rotary base where transformers 5 looks (rope_parameters) and where all others do."""
    spec = model.spec if isinstance(model, Decoder) else model.decoder.spec
    model_type = "qwen3" if spec.qk_norm else "llama"
    kind = next(kind for kind, cls in KINDS.items() if isinstance(model, cls))
    config: dict[str, Any] = {
        "architectures": [FAMILIES[model_type] + kind],
        "model_type": model_type,
        **{theirs: getattr(spec, ours) for ours, theirs in SPEC_KEYS.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "rope_theta": spec.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": None if tokenizer is None else tokenizer.turn_end_id,
        "pad_token_id": None if tokenizer is None else tokenizer.pad_id,
        "use_cache": True,
    }
    if isinstance(model, ScoreModel):
        config |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    return config


# -- load --------------------------------------------------------------------------------------------------------------


def load_checkpoint(folder: Path | str) -> Loaded:
    """Read a checkpoint folder, ours or one that transformers saved, in fp32 on the CPU.

    Raises CheckpointError, naming the file, when something is missing, broken, does not fit, or is not known here.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {folder}", hint="check the path, or run its stage first.")
    config = _read_json(folder / "config.json")
    spec, model_class = _read_spec(config, folder / "config.json")
    with torch.device("meta"):
        decoder = Decoder(spec)
        model = ScoreModel(decoder) if model_class is ScoreModel else decoder
    model.to_empty(device="cpu")
    _fill(model, folder / "model.safetensors")
    tokenizer = _read_tokenizer(folder, spec) if (folder / "tokenizer.json").exists() else None
    info = _read_json(folder / "lyceum.json") if (folder / "lyceum.json").exists() else {}
    return Loaded(model, spec, tokenizer, info)


def _read_tokenizer(folder: Path, spec: ModelSpec) -> Any:
    from lyceum.tokens.tokenizer import Tokenizer  # here, because a model without text needs none

    try:
        tokenizer = Tokenizer.load(folder)
    except DataError as error:
        raise CheckpointError(error.message, hint=error.hint or TRAIN_AGAIN) from None
    if tokenizer.vocab_size > spec.vocab_size:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'} has {tokenizer.vocab_size} tokens, the model {spec.vocab_size}",
            hint="the folder mixes two checkpoints; " + TRAIN_AGAIN,
        )
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", hint="is this a Hugging Face folder? " + TRAIN_AGAIN) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}", hint=TRAIN_AGAIN) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object", hint=TRAIN_AGAIN)
    return content


def _read_spec(config: Mapping[str, Any], path: Path) -> tuple[ModelSpec, type[Decoder] | type[ScoreModel]]:
    """Return the spec and the class that a config.json describes."""
    name = (config.get("architectures") or ["nothing"])[0]
    known = {family + kind: (kind, model_type) for model_type, family in FAMILIES.items() for kind in KINDS}
    if name not in known:
        raise CheckpointError(f"{path}: architecture {name} is not known", hint=f"known: {', '.join(sorted(known))}.")
    kind, model_type = known[name]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    unsupported = {
        "biases": config.get("attention_bias") or config.get("mlp_bias"),
        "a sliding window": config.get("use_sliding_window"),
        f"the activation {config.get('hidden_act')}": config.get("hidden_act", "silu") != "silu",
        "scaled rotary positions": rope.get("rope_type", rope.get("type", "default")) != "default",
        "more than one label": kind == "ForSequenceClassification" and len(config.get("id2label", "12")) != 1,
    }
    for what, is_wanted in unsupported.items():
        if is_wanted:
            raise CheckpointError(f"{path} asks for {what}", hint="this decoder has none; choose another checkpoint.")
    values = {ours: config[theirs] for ours, theirs in SPEC_KEYS.items() if config.get(theirs) is not None}
    values["rope_theta"] = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    values["qk_norm"] = model_type == "qwen3"
    values.setdefault("tied", False)  # Hugging Face leaves out what equals its default
    values.setdefault("num_kv_heads", values.get("num_heads"))
    if "width" in values and "num_heads" in values:
        values.setdefault("head_width", 128 if model_type == "qwen3" else values["width"] // values["num_heads"])
    try:
        return ModelSpec(**values), KINDS[kind]
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"{path} describes no model: {error}", hint=TRAIN_AGAIN) from None


def _fill(model: nn.Module, path: Path) -> None:
    """Copy the weights of a safetensors file into `model`; every name and every shape must be there."""
    try:
        found = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", hint=TRAIN_AGAIN) from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is broken: {error}", hint=TRAIN_AGAIN) from None
    wanted: dict[str, Tensor] = {_hub_name(name): tensor for name, tensor in model.state_dict().items()}
    if "lm_head.weight" not in wanted:
        found.pop("lm_head.weight", None)  # a tied output layer that was written all the same
    for complaint, names in (("lacks", wanted.keys() - found.keys()), ("has an unknown", found.keys() - wanted.keys())):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"{path} {complaint} {min(names)}{others}", hint="config.json beside it describes another model."
            )
    with torch.no_grad():
        for name, tensor in wanted.items():
            if found[name].shape != tensor.shape:
                shapes = f"{list(found[name].shape)}, but config.json beside it says {list(tensor.shape)}"
                raise CheckpointError(f"{path}: {name} is {shapes}", hint=TRAIN_AGAIN)
            tensor.copy_(found[name])
