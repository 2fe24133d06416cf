"""A checkpoint is a Hugging Face folder: write one, read one.

    config.json              the shape; Qwen3ForCausalLM, or Qwen3ForSequenceClassification with one label; a model
                             of another family (`lyceum.model.hub`) is written as one of that family again
    model.safetensors        the weights, under Hugging Face's names; a tied output layer is not written twice. Above
                             SHARD_BYTES several files, model-00001-of-00003.safetensors, and
                             model.safetensors.index.json, which says what is where
    tokenizer.json, tokenizer_config.json     where a tokenizer was given
    generation_config.json   which tokens end a reply and which one pads
    lyceum.json              ours: parent checkpoint, stage, recipe, data fingerprints, results, reward centre

Why: what we train, other tools open as it is, and what others trained we go on from. Only safetensors and JSON are
read, so a checkpoint from a stranger is safe to open. A folder is written beside its place and renamed, so that a
reader never meets half of one.

A model that is cut over ranks is put together on rank 0 layer by layer, and written file by file: rank 0 holds one layer
and one file of it at a time.

What it is not: it keeps no optimizer state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lyceum import dist
from lyceum.errors import CheckpointError, DataError
from lyceum.model import hub
from lyceum.model.heads import ScoreModel
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import fresh_folder, write_json

KINDS = {hub.CAUSAL: Decoder, hub.SCORE: ScoreModel}
SHARD_BYTES = 5 * 10**9  # of one file of weights, unless a single layer has more
LAYER = re.compile(r".*\blayers\.\d+\.")


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint folder holds; `tokenizer` is None and `info` empty where the folder has none."""

    model: Decoder | ScoreModel
    spec: ModelSpec
    tokenizer: Any
    info: dict[str, Any]


# -- save --------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path | str,
    model: Decoder | ScoreModel,
    tokenizer: Any = None,
    info: Mapping[str, Any] | None = None,
    *,
    gather: Callable[[Tensor], Tensor] | None = None,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> None:
    """Write `model` as a Hugging Face folder, replacing `folder` in one step; rank 0 does.

    `tokenizer` needs `save(folder)` and the ids `pad_id` and `stop_ids`; `info` becomes lyceum.json. `gather` puts one
    tensor of a sharded model together on rank 0: then every rank must call this. `change` makes of a layer's tensors,
    by their names, those that are written. Raises ResourceError when the disk is full.
    """
    place: AbstractContextManager[Path | None] = fresh_folder(folder) if dist.is_main() else nullcontext()
    with place as fresh:
        writer = None if fresh is None else _Writer(fresh)
        for part in _layers(model.state_dict()):
            tensors = {_hub_name(name): gather(tensor) if gather else tensor for name, tensor in part.items()}
            if writer is not None:
                tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
                tensors = change(tensors) if change else tensors
                assert not any(".lora_" in name for name in tensors), "merge adapters before their model is saved"
                writer.add(hub.to_hub(tensors, hub.family_of(_spec(model))))
        if fresh is None or writer is None:
            return
        writer.close()
        write_json(fresh / "config.json", _config(model, tokenizer))
        if tokenizer is not None:
            tokenizer.save(fresh)
            stops = {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
            write_json(fresh / "generation_config.json", stops)
        write_json(fresh / "lyceum.json", dict(info or {}))


def _layers(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors of one layer together, any others alone; in their order."""
    held: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = LAYER.match(name)
        if held and not (layer and next(iter(held)).startswith(layer[0])):
            yield held
            held = {}
        held[name] = tensor
    if held:
        yield held


class _Writer:
    """Weights as one file, or several with their index, in a folder that nobody reads yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held: dict[str, Tensor] = {}
        self.num_held = self.num_bytes = 0  # bytes that wait for their file, and of all
        self.files: list[list[str]] = []  # the names in each

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.held and self.num_held + size > SHARD_BYTES:
            self._write()
        self.held |= tensors
        self.num_held += size
        self.num_bytes += size

    def _write(self) -> None:
        save_file(self.held, self._file(len(self.files)), metadata={"format": "pt"})
        self.files.append(list(self.held))
        self.held, self.num_held = {}, 0

    def _file(self, number: int) -> Path:
        return self.folder / f"model-{number}.safetensors"

    def close(self) -> None:
        """Write the rest, and give the files the names that Hugging Face's readers look for."""
        self._write()
        count = len(self.files)
        if count == 1:
            self._file(0).rename(self.folder / "model.safetensors")
            return
        places: dict[str, str] = {}
        for number, names in enumerate(self.files):
            file = self._file(number).rename(self.folder / f"model-{number + 1:05}-of-{count:05}.safetensors")
            places |= dict.fromkeys(names, file.name)
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": places}
        write_json(self.folder / "model.safetensors.index.json", index)


def _hub_name(name: str) -> str:
    return name.removeprefix("decoder.")


def _config(model: Decoder | ScoreModel, tokenizer: Any) -> dict[str, Any]:
    config = hub.write_config(_spec(model), next(kind for kind, cls in KINDS.items() if isinstance(model, cls)))
    return config | {
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": None if tokenizer is None else tokenizer.stop_ids[0],
        "pad_token_id": None if tokenizer is None else tokenizer.pad_id,
    }


def _spec(model: Decoder | ScoreModel) -> ModelSpec:
    return model.spec if isinstance(model, Decoder) else model.decoder.spec


# -- load --------------------------------------------------------------------------------------------------------------


def load_checkpoint(folder: Path | str) -> Loaded:
    """Read a checkpoint folder, ours or one of the families of `lyceum.model.hub`, in fp32 on the CPU.

    Raises CheckpointError, naming the file, when something is missing, broken, does not fit, or is not known here.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {folder}", hint="check the path, or run its stage first.")
    config = hub.read_json(folder / "config.json")
    spec, kind = hub.read_spec(config, folder / "config.json")
    with torch.device("meta"):
        decoder = Decoder(spec)
        model = ScoreModel(decoder) if kind == hub.SCORE else decoder
    _fill(model, folder)
    tokenizer = _read_tokenizer(folder, spec) if (folder / "tokenizer.json").exists() else None
    info = hub.read_json(folder / "lyceum.json") if (folder / "lyceum.json").exists() else {}
    return Loaded(model, spec, tokenizer, info)


def _read_tokenizer(folder: Path, spec: ModelSpec) -> Any:
    from lyceum.tokens.tokenizer import Tokenizer  # here, because a model without text needs none

    try:
        tokenizer = Tokenizer.load(folder)
    except DataError as error:
        raise CheckpointError(error.message, hint=error.hint or hub.COPY_AGAIN) from None
    if tokenizer.vocab_size > spec.vocab_size:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'} has {tokenizer.vocab_size} tokens, the model {spec.vocab_size}",
            hint="the folder mixes two checkpoints; " + hub.COPY_AGAIN,
        )
    tokenizer.widen(spec.vocab_size)
    return tokenizer


def _fill(model: Decoder | ScoreModel, folder: Path) -> None:
    """Give `model`, made without memory, the weights of a folder; every name and every shape must be there."""
    model_type = hub.family_of(_spec(model))
    wanted = hub.to_hub({_hub_name(name): tensor for name, tensor in model.state_dict().items()}, model_type)
    tensors, path = hub.read_tensors(folder)
    found = hub.hub_names(tensors, model_type)
    if "lm_head.weight" not in wanted:
        found.pop("lm_head.weight", None)  # a tied output layer that was written all the same
    for complaint, names in (("lacks", wanted.keys() - found.keys()), ("has an unknown", found.keys() - wanted.keys())):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"{path} {complaint} {min(names)}{others}", hint="config.json beside it describes another model."
            )
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            shapes = f"{list(found[name].shape)}, but config.json beside it says {list(tensor.shape)}"
            raise CheckpointError(f"{path}: {name} is {shapes}", hint=hub.COPY_AGAIN)
    model.to_empty(device="cpu")
    ours = hub.from_hub(found, model_type)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(ours[_hub_name(name)])
