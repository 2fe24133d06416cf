"""Families of models in Hugging Face folders: GPT-2, Llama, Qwen2, Qwen3; their shapes, their names, their files.

    config.json      <-> ModelSpec                  `read_spec`, `write_config`
    tensors          <-> the decoder's parameters   `from_hub`, `to_hub`
    safetensors       -> tensors                    `read_tensors`: one file, or shards with their index

Why: what others trained we go on from, and hand back in the form it came in. A family is data: what its ModelSpecs have
in common, which keys of its config.json say the rest, and which values of other keys the decoder cannot follow; these
are refused by name. A spec is written in the first family whose config.json, read again, gives the same spec.

Only GPT-2's tensors have other names and forms than the decoder's: its linear layers are stored transposed, query, key
and value in one. Stored fp16 and bf16 become fp32 when they are loaded, and what is saved again has the model's type.

Run it: `lyceum.model.checkpoint.load_checkpoint` and `save_checkpoint` do.
What it is not: a reader of pickles, of quantised weights, of mixtures of experts or of sliding windows. GPT-2's dropout
is not taken over: the decoder has none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lyceum.errors import CheckpointError, ConfigError
from lyceum.model.spec import ATTENTION_LINEARS, FFN_LINEARS, ModelSpec, RopeScaling

COPY_AGAIN = "run the stage that wrote this checkpoint again, or copy the folder again from where it came."
CAUSAL, SCORE = "ForCausalLM", "ForSequenceClassification"


@dataclass(frozen=True)
class Family:
    """What the folders of one model_type have in common.

    classes: kind -> the class in `architectures`. fixed: fields of ModelSpec that all of them share. keys: field of
    ModelSpec -> key of config.json. bias_keys: key of config.json -> linear layers it gives a bias. written: what else
    their config.json says. defaults: fields that a config.json may leave out.
    """

    classes: Mapping[str, str]
    fixed: Mapping[str, Any]
    keys: Mapping[str, str]
    bias_keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


LLAMA_KEYS = {
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
GPT2_KEYS = {
    "vocab_size": "vocab_size",
    "num_layers": "n_layer",
    "width": "n_embd",
    "num_heads": "n_head",
    "ffn_width": "n_inner",
    "context_length": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "tied": "tie_word_embeddings",
}
LLAMA_SAYS = {"hidden_act": "silu", "attention_dropout": 0.0}
QWEN_SAYS = {**LLAMA_SAYS, "use_sliding_window": False, "sliding_window": None}
ATTENTION_BIAS = {"attention_bias": ATTENTION_LINEARS}


def _classes(prefix: str) -> dict[str, str]:
    return {kind: prefix + kind for kind in (CAUSAL, SCORE)}


FAMILIES = {  # by model_type
    "qwen3": Family(
        _classes("Qwen3"), {"qk_norm": True}, LLAMA_KEYS, ATTENTION_BIAS, QWEN_SAYS, {"tied": False, "head_width": 128}
    ),
    "llama": Family(
        _classes("Llama"),
        {"qk_norm": False},
        LLAMA_KEYS,
        ATTENTION_BIAS | {"mlp_bias": FFN_LINEARS["swiglu"]},
        LLAMA_SAYS,
        {"tied": False},
    ),
    "qwen2": Family(
        _classes("Qwen2"),
        {"qk_norm": False, "biases": ATTENTION_LINEARS[:3]},
        LLAMA_KEYS,
        written=QWEN_SAYS,
        defaults={"tied": False},
    ),
    "gpt2": Family(
        {CAUSAL: "GPT2LMHeadModel", SCORE: "GPT2" + SCORE},
        {
            "qk_norm": False,
            "norm": "layer",
            "positions": "learned",
            "ffn": "gelu",
            "biases": ATTENTION_LINEARS + FFN_LINEARS["gelu"],
        },
        GPT2_KEYS,
        written={"activation_function": "gelu_new", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        defaults={"tied": True, "norm_eps": 1e-5},
    ),
}


# -- config.json -------------------------------------------------------------------------------------------------------


def family_of(spec: ModelSpec) -> str:
    """The model_type of the first family that can say `spec`.

    Raises CheckpointError when none can, such as GPT-2's norm with Llama's positions.
    """
    for model_type, family in FAMILIES.items():
        try:
            if _spec(_shape(spec, family), family) == spec:
                return model_type
        except ConfigError:
            continue
    raise CheckpointError(
        f"no family of Hugging Face models has this shape: {spec}", hint=f"known: {', '.join(FAMILIES)}."
    )


def write_config(spec: ModelSpec, kind: str) -> dict[str, Any]:
    """What config.json says about a model of this shape; `kind` is CAUSAL or SCORE."""
    model_type = family_of(spec)
    family = FAMILIES[model_type]
    config = {"architectures": [family.classes[kind]], "model_type": model_type, **_shape(spec, family)}
    if kind == SCORE:
        config |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    return {**config, **family.written, "use_cache": True}


def read_spec(config: Mapping[str, Any], path: Path) -> tuple[ModelSpec, str]:
    """The spec and the kind that a config.json describes; `path` is where it stands.

    Raises CheckpointError for a family that is not known, for what the decoder cannot do, and for a broken shape.
    """
    known = {name: (model_type, kind) for model_type in FAMILIES for kind, name in FAMILIES[model_type].classes.items()}
    name = (config.get("architectures") or ["nothing"])[0]
    if name not in known:
        raise CheckpointError(f"{path}: architecture {name} is not known", hint=f"known: {', '.join(sorted(known))}.")
    model_type, kind = known[name]
    for what, is_wanted in _unsupported(config, FAMILIES[model_type], kind).items():
        if is_wanted:
            raise CheckpointError(f"{path} asks for {what}", hint="this decoder has none; choose another checkpoint.")
    try:
        return _spec(config, FAMILIES[model_type]), kind
    except (TypeError, ValueError, KeyError, ConfigError) as error:
        raise CheckpointError(f"{path} describes no model: {error}", hint=COPY_AGAIN) from None


def _shape(spec: ModelSpec, family: Family) -> dict[str, Any]:
    """The spec in the family's words; the rotary base where transformers 5 looks, and where all others do."""
    shape = {theirs: getattr(spec, ours) for ours, theirs in family.keys.items()}
    shape |= {key: set(names) <= set(spec.biases) for key, names in family.bias_keys.items()}
    if "positions" in family.fixed:
        return shape
    scaling = None
    if spec.rope_scaling is not None:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        values = zip(names, asdict(spec.rope_scaling).values(), strict=True)
        scaling = {"rope_type": "linear" if spec.rope_scaling.low is None else "llama3"}
        scaling |= {name: value for name, value in values if value is not None}
    rope = {**(scaling or {"rope_type": "default"}), "rope_theta": spec.rope_theta}
    return {**shape, "rope_theta": spec.rope_theta, "rope_scaling": scaling, "rope_parameters": rope}


def _spec(config: Mapping[str, Any], family: Family) -> ModelSpec:
    values = {ours: config[theirs] for ours, theirs in family.keys.items() if config.get(theirs) is not None}
    values = {**family.defaults, **values, **family.fixed}
    biases = set(values.pop("biases", ()))
    biases.update(name for key, names in family.bias_keys.items() if config.get(key) for name in names)
    values["biases"] = tuple(biases)
    if "width" in values and "num_heads" in values:
        values.setdefault("head_width", values["width"] // values["num_heads"])
        values.setdefault("num_kv_heads", values["num_heads"])
    if values.get("ffn") == "gelu" and "width" in values:
        values.setdefault("ffn_width", 4 * values["width"])
    if "positions" not in family.fixed:
        rope = _rope(config)
        values["rope_theta"] = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
        values["rope_scaling"] = _scaling(rope, config)
    return ModelSpec(**values)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rope_type(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def _scaling(rope: Mapping[str, Any], config: Mapping[str, Any]) -> RopeScaling | None:
    if _rope_type(rope) == "default":
        return None
    if _rope_type(rope) == "linear":
        return RopeScaling(rope["factor"])
    original = rope.get("original_max_position_embeddings", config.get("max_position_embeddings"))
    return RopeScaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], original)


def _unsupported(config: Mapping[str, Any], family: Family, kind: str) -> dict[str, bool]:
    """What a config.json may ask for that the decoder has not -> whether it does."""
    rope = _rope(config)
    unsupported = {
        "quantised weights": config.get("quantization_config") is not None,
        "more than one label": kind == SCORE and len(config.get("id2label", "12")) != 1,
    }
    if "positions" in family.fixed:
        activation = config.get("activation_function", "gelu_new")
        return unsupported | {
            f"the activation {activation}": activation not in ("gelu_new", "gelu_pytorch_tanh"),
            "attention scores that are not scaled": not config.get("scale_attn_weights", True),
            "attention scores scaled by layer": config.get("scale_attn_by_inverse_layer_idx", False),
            "attention to another text": config.get("add_cross_attention", False),
        }
    factor = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    rope_type = _rope_type(rope)
    return unsupported | {
        f"the activation {config.get('hidden_act')}": config.get("hidden_act", "silu") != "silu",
        f"scaled rotary positions of the type {rope_type}": rope_type not in ("default", "linear", "llama3"),
        "rotary positions on a part of each head": factor != 1.0,
        "a sliding window": "use_sliding_window" in family.written and _has_window(config),
    }


def _has_window(config: Mapping[str, Any]) -> bool:
    """Whether a layer really sees less than the context; Qwen2's config names a window also where none is used."""
    if not config.get("use_sliding_window") or not config.get("sliding_window", 4096):
        return False
    if config.get("layer_types"):
        return "sliding_attention" in config["layer_types"]
    return config.get("max_window_layers", 28) < config.get("num_hidden_layers", 0)


# -- names and forms ---------------------------------------------------------------------------------------------------

GPT2_NAMES = {  # a part of GPT-2's name -> the same part of ours
    "transformer.wte.": "model.embed_tokens.",
    "transformer.wpe.": "model.embed_positions.",
    "transformer.h.": "model.layers.",
    "transformer.ln_f.": "model.norm.",
    ".ln_1.": ".input_layernorm.",
    ".ln_2.": ".post_attention_layernorm.",
    ".attn.c_attn.": ".self_attn.qkv_proj.",
    ".attn.c_proj.": ".self_attn.o_proj.",
    ".mlp.c_fc.": ".mlp.up_proj.",
    ".mlp.c_proj.": ".mlp.down_proj.",
}
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # masks and tables that old files hold


def to_hub(tensors: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """The decoder's tensors under the names and in the forms of the family."""
    if model_type != "gpt2":
        return dict(tensors)
    found = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            tensor = torch.cat([tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace(".q_proj.", ".qkv_proj.")
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        if name.endswith("_proj.weight"):
            tensor = tensor.t().contiguous()
        for theirs, ours in GPT2_NAMES.items():
            name = name.replace(ours, theirs)
        found[name] = tensor
    return found


def from_hub(tensors: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """The reverse of `to_hub`."""
    if model_type != "gpt2":
        return dict(tensors)
    found = {}
    for name, tensor in tensors.items():
        for theirs, ours in GPT2_NAMES.items():
            name = name.replace(theirs, ours)
        if name.endswith("_proj.weight"):
            tensor = tensor.t()
        if ".qkv_proj." in name:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace(".qkv_proj.", f".{part}_proj.")] = third
        else:
            found[name] = tensor
    return found


def hub_names(tensors: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """`tensors` of a file without what is no weight; GPT-2's first files leave out `transformer.`."""
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(BUFFERS)}
    if model_type == "gpt2" and not any(name.startswith("transformer.") for name in found):
        found = {n if n.startswith(("lm_head.", "score.")) else f"transformer.{n}": t for n, t in found.items()}
    return found


# -- files -------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError, naming it, when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", hint="is this a Hugging Face folder? " + COPY_AGAIN) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}", hint=COPY_AGAIN) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object", hint=COPY_AGAIN)
    return content


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """The tensors of a folder by their names there, and the file that names them: the weights or their index.

    Raises CheckpointError when a file is missing or broken, when the index does not fit it, or when there is only a
    pickle, which runs whatever code is in it when it is opened.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        pickles = sorted(path.name for end in ("bin", "pt", "pth") for path in folder.glob(f"*.{end}"))
        if pickles and not single.exists():
            raise CheckpointError(
                f"{single} is missing, and {pickles[0]} is a pickle, which can run code when it is opened",
                hint="only where you trust it: let transformers load the folder and save_pretrained it to a new one.",
            )
        return read_weights(single), single
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or any(Path(str(name)).name != name for name in places.values()):
        raise CheckpointError(f"{index} does not map names of weights to files beside it", hint=COPY_AGAIN)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        held = read_weights(folder / file)
        lacking = [name for name, place in places.items() if place == file and name not in held]
        if lacking:
            raise CheckpointError(
                f"{folder / file} lacks {lacking[0]}, which {index.name} places there", hint=COPY_AGAIN
            )
        tensors |= held
    return tensors, index


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file; CheckpointError, naming it, when it is missing or broken."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", hint=COPY_AGAIN) from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is broken: {error}", hint=COPY_AGAIN) from None
