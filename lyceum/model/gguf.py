"""A checkpoint as one GGUF file: what llama.cpp opens, and with it Ollama, LM Studio and llama-cpp-python.

    lyceum export runs/demo --to gguf --type q8_0

The file holds the shape, the weights, the vocabulary with its merges, which tokens end a text or a turn, the chat template,
and where it came from (`lyceum.json` under the key of that name). Nothing in it is executed. The container and the
blocks of q8_0 are the `gguf` package's, an optional one; the mapping is ours:

- With QK-norm the architecture is llama.cpp's `qwen3`, without it `llama`. llama.cpp turns the rotary pairs (i, i + E/2)
  of `qwen3` as we do, but those of `llama` must stand side by side: the rows of q and k are so ordered.
- A tied output layer is not written twice: llama.cpp takes the embedding where there is none.
- Norms stay f32. A matrix whose rows are no multiple of 32 numbers cannot be cut into q8_0's blocks and stays f16.
- The vocabulary's ids are kept. Rows of the embedding without a token get a name, because llama.cpp wants one for each.
- llama.cpp's default beginning-of-text token for such vocabularies is id 11, an ordinary letter here: so the end-of-text
  token, after which every document of pretraining begins, is named, and none is added by itself.

What it is not: it writes no smaller types (llama.cpp's own `llama-quantize` makes them from f16), and reads no GGUF.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lyceum import __version__
from lyceum.errors import CheckpointError, LyceumError, UsageError, did_you_mean
from lyceum.model.checkpoint import Loaded, load_checkpoint
from lyceum.model.layers import paired
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import PARTIAL, disk_errors
from lyceum.tokens.chat import CHAT_TEMPLATE
from lyceum.tokens.tokenizer import PATTERN, Tokenizer

FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # llama.cpp's llama_ftype
NORMAL, CONTROL, UNUSED = 1, 3, 5  # llama.cpp's kinds of tokens
VALUE_TYPES = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}  # GGUF's, of Python's
NAMES = {  # of Hugging Face's classes -> of llama.cpp
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SHAPE_KEYS = {  # ModelSpec's name -> GGUF's keys, under the architecture's name
    "vocab_size": ("vocab_size",),
    "num_layers": ("block_count",),
    "width": ("embedding_length",),
    "num_heads": ("attention.head_count",),
    "num_kv_heads": ("attention.head_count_kv",),
    "head_width": ("attention.key_length", "attention.value_length", "rope.dimension_count"),
    "ffn_width": ("feed_forward_length",),
    "context_length": ("context_length",),
    "rope_theta": ("rope.freq_base",),
    "norm_eps": ("attention.layer_norm_rms_epsilon",),
    "tied": (),
    "qk_norm": (),
}


@dataclass(frozen=True)
class Exported:
    """A written file: its name and size, how many tensors it has of each type, and which could not be q8_0."""

    path: Path
    num_bytes: int
    num_tensors: dict[str, int]
    kept_f16: tuple[str, ...]


def export_gguf(checkpoint: Path | str, path: Path | str = "", file_type: str = "f16") -> Exported:
    """Write the model of a checkpoint folder as a GGUF file, wholly or not at all.

    Args:
        checkpoint: the folder, with its tokenizer.
        path: the file; empty for one in this directory, named after the model and the type.
        file_type: of the matrices: f32 (exact), f16, or q8_0 (blocks of 32 numbers of 8 bits with an f16 scale).

    Raises:
        UsageError: the type is not known, or the path is a folder.
        CheckpointError: the folder cannot be read, or llama.cpp could not run what it holds as we do.
        LyceumError: the `gguf` package is missing.
    """
    try:
        import gguf
    except ImportError:
        raise LyceumError("writing GGUF needs the package gguf", hint="pip install gguf") from None
    if file_type not in FILE_TYPES:
        raise UsageError(f"there is no type {file_type!r} of GGUF file here", hint=did_you_mean(file_type, FILE_TYPES))
    checkpoint = Path(checkpoint)
    loaded = load_checkpoint(checkpoint)
    architecture = _architecture(loaded, checkpoint)
    values = _origin(loaded, checkpoint) | _shape(loaded.spec, architecture) | _vocabulary(loaded, checkpoint)
    values["general.file_type"] = FILE_TYPES[file_type]
    path = Path(path or re.sub(r"[^\w.-]+", "-", f"{values['general.name']}-{file_type}.gguf"))
    if path.is_dir():
        raise UsageError(f"{path} is a folder, expected the name of a file", hint=f"-o {path / 'model.gguf'}")

    partial = path.with_name(path.name + PARTIAL)
    num_tensors: Counter[str] = Counter()
    kept_f16 = []
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(gguf.GGUFWriter(partial, architecture)) as writer:
                for key, value in values.items():
                    writer.add_key_value(key, value, gguf.GGUFValueType[VALUE_TYPES[type(value)]])
                for name, weight in _tensors(loaded.model.state_dict(), loaded.spec, checkpoint, file_type):
                    kind = "f32" if weight.dim() == 1 else file_type
                    if kind == "q8_0" and weight.shape[-1] % 32:
                        kind = "f16"
                        kept_f16.append(name)
                    ggml_type = gguf.GGMLQuantizationType[kind.upper()]
                    writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), ggml_type), raw_dtype=ggml_type)
                    num_tensors[kind] += 1
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    return Exported(path, path.stat().st_size, dict(num_tensors), tuple(kept_f16))


def _architecture(loaded: Loaded, folder: Path) -> str:
    """llama.cpp's name for what the folder holds; an error where it could not run it, or not as we do."""
    if not isinstance(loaded.model, Decoder):
        raise CheckpointError(
            f"{folder} holds a reward model: it gives a number, and llama.cpp writes text",
            hint="export the checkpoint of pretrain, sft or ppo.",
        )
    for field in fields(loaded.spec):
        value = getattr(loaded.spec, field.name)
        if field.name not in SHAPE_KEYS and value != field.default:
            raise CheckpointError(
                f"{folder} has {field.name} = {value!r}, which cannot be written as GGUF here",
                hint="llama.cpp's own convert_hf_to_gguf.py knows the architectures of published models.",
            )
    return "qwen3" if loaded.spec.qk_norm else "llama"


def _tensors(weights: dict[str, Tensor], spec: ModelSpec, folder: Path, file_type: str) -> Iterator[tuple[str, Tensor]]:
    """Every weight under llama.cpp's name, the rows of q and k in its order."""
    for name, weight in weights.items():
        largest = float(weight.abs().max())
        if not largest <= torch.finfo(torch.float32 if file_type == "f32" else torch.float16).max:  # NaN neither
            raise CheckpointError(
                f"{folder}: the largest number in {name} is {largest:g}, too large for {file_type}",
                hint="a trained weight is a finite, small number: choose another checkpoint, or --type f32.",
            )
        if not spec.qk_norm and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = paired(weight, spec.head_width)
        stem, before = name.removesuffix(".weight"), ""
        if stem.startswith("model.layers."):
            _, _, number, stem = stem.split(".", 3)
            before = f"blk.{number}."
        yield f"{before}{NAMES[stem]}.weight", weight.contiguous()


def _origin(loaded: Loaded, folder: Path) -> dict[str, Any]:
    """What it is called and where it came from."""
    info = loaded.info
    name = " ".join(str(info[key]) for key in ("recipe", "section") if key in info)
    return {
        "general.type": "model",
        "general.name": name or folder.resolve().name,
        "general.description": f"exported by Lyceum {__version__}",
        "general.quantization_version": 2,
        "lyceum.json": json.dumps(info, ensure_ascii=False),
    }


def _shape(spec: ModelSpec, architecture: str) -> dict[str, Any]:
    return {f"{architecture}.{key}": getattr(spec, name) for name, keys in SHAPE_KEYS.items() for key in keys}


def _vocabulary(loaded: Loaded, folder: Path) -> dict[str, Any]:
    """The tokenizer as llama.cpp wants it: a name and a kind for each row of the embedding, merges, marked tokens."""
    tokenizer: Tokenizer | None = loaded.tokenizer
    if tokenizer is None:
        raise CheckpointError(
            f"{folder} has no tokenizer.json, and llama.cpp runs no model without its vocabulary",
            hint="copy tokenizer.json and tokenizer_config.json of the run's tokenizer section into the folder.",
        )
    table = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    steps = (table["pre_tokenizer"] or {}).get("pretokenizers", [])
    cuts = [(step.get("pattern"), step.get("add_prefix_space", False)) for step in steps]
    is_qwen2 = cuts == [({"Regex": PATTERN}, False), (None, False)] and table["normalizer"] is None
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in table["model"]["merges"]]
    if not is_qwen2 or not merges or table["model"].get("ignore_merges"):
        raise CheckpointError(
            f"{folder / 'tokenizer.json'} cuts text up in another way than Lyceum's vocabularies do",
            hint="llama.cpp's own convert_hf_to_gguf.py knows the vocabularies of published models.",
        )
    words = {number: word for word, number in table["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in table["added_tokens"]}
    ids = range(loaded.spec.vocab_size)
    marked = {
        "bos": tokenizer.end_id,
        "eos": tokenizer.turn_end_id,
        "eot": tokenizer.turn_end_id,
        "padding": tokenizer.pad_id,
        "fim_pre": tokenizer.fim_prefix_id,
        "fim_suf": tokenizer.fim_suffix_id,
        "fim_mid": tokenizer.fim_middle_id,
    }
    return {
        "tokenizer.ggml.model": "gpt2",  # byte-level BPE
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [special.get(n) or words.get(n) or f"<|unused_{n}|>" for n in ids],
        "tokenizer.ggml.token_type": [CONTROL if n in special else NORMAL if n in words else UNUSED for n in ids],
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{name}_token_id": number for name, number in marked.items()},
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
