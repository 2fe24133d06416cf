"""The models that a server has: a checkpoint folder, its engine, and what it can do.

    served = load("demo", "runs/demo/ppo/checkpoint", max_batch=16)

What a model can do is read from its folder, never guessed from its name: it chats where its vocabulary marks turns, inserts
where it was pretrained with holes (`infill_rate` in lyceum.json, its ancestors' too; of a model made elsewhere, where its
vocabulary has the three marks), gives embeddings where the folder has the files of sentence-transformers (modules.json
and the pooling it names: the last token, after an end token, or the mean), and comes from the models that `lyceum.model.lineage`
finds.

What it is not: the choice of a run's stage (`lyceum.cli.chat`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lyceum import device
from lyceum.engine.engine import Engine
from lyceum.errors import CheckpointError, DataError
from lyceum.model.checkpoint import load_checkpoint
from lyceum.model.hub import read_json
from lyceum.model.lineage import Model, ancestors, history, read_model
from lyceum.model.transformer import Decoder
from lyceum.serve.worker import Seat
from lyceum.tokens.chat import ChatFormat
from lyceum.tokens.tokenizer import ABSENT, Tokenizer

POOLING: dict[str, Literal["last", "mean"]] = {"pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean"}


@dataclass(frozen=True)
class Pooling:
    """How a model's hidden vectors become an embedding."""

    at: Literal["last", "mean"]
    is_normalised: bool


@dataclass(frozen=True)
class Served:
    """A model and what stands around it. created: seconds since 1970. fingerprint: of its weights and shape. lineage: what
    `lyceum.model.lineage.history` says of it; empty for a model that was only ever in memory. folder: its checkpoint's,
    where it has one."""

    name: str
    seat: Seat
    tokenizer: Tokenizer
    chat: ChatFormat | None
    can_insert: bool
    pooling: Pooling | None
    created: int
    fingerprint: str
    longest_token: int
    lineage: list[dict[str, Any]]
    folder: Path | None = None

    @property
    def engine(self) -> Engine:
        """The engine, as it is now; only the worker's thread may run it."""
        return self.seat.engine

    @property
    def context_length(self) -> int:
        """Tokens of a prompt and its reply together."""
        return self.seat.engine.context_length

    def to_json(self) -> dict[str, Any]:
        """The model as `/v1/models` shows it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "lyceum",
            "max_model_len": self.context_length,
            "parent": self.lineage[-2]["model"] if len(self.lineage) > 1 else None,
            "learned_from": self.lineage,
        }


def serve(
    name: str,
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    can_insert: bool = False,
    pooling: Pooling | None = None,
    created: int = 0,
    fingerprint: str = "",
    lineage: Sequence[dict[str, Any]] = (),
    folder: Path | None = None,
) -> Served:
    """A model in memory, to be served under a name. The engine needs the tokenizer's `token_bytes`."""
    try:
        chat = ChatFormat(tokenizer)
    except DataError:  # its vocabulary marks no turns: it continues text, and a request to chat is told so
        chat = None
    longest = max(map(len, tokenizer.token_bytes))
    more = pooling, created, fingerprint, longest, list(lineage), folder
    return Served(name, Seat(engine), tokenizer, chat, can_insert, *more)


def load(name: str, folder: Path | str, *, max_batch: int, swift: bool = False) -> Served:
    """Read a checkpoint folder; `max_batch` and `swift` are the engine's.

    Raises CheckpointError where it does not give text, or has no tokenizer.
    """
    folder = Path(folder)
    loaded = load_checkpoint(folder)
    if not isinstance(loaded.model, Decoder):
        raise CheckpointError(f"{folder} gives scores, not text", hint="serve another stage: --stage sft, or ppo")
    if loaded.tokenizer is None:
        raise CheckpointError(f"{folder} has no tokenizer", hint="add its tokenizer.json")
    model, origin = loaded.model.eval().to(device.pick_device()), read_model(folder)
    return serve(
        name,
        Engine(model, max_batch=max_batch, token_bytes=loaded.tokenizer.token_bytes, swift=swift),
        loaded.tokenizer,
        can_insert=can_insert(origin, loaded.tokenizer),
        pooling=read_pooling(folder),
        created=int((folder / "config.json").stat().st_mtime),
        fingerprint=_fingerprint(folder),
        lineage=history(origin),
        folder=folder,
    )


def can_insert(model: Model, tokenizer: Tokenizer) -> bool:
    """Whether a model was trained to fill holes: it itself, or one that it comes from."""
    if ABSENT in (tokenizer.fim_prefix_id, tokenizer.fim_middle_id, tokenizer.fim_suffix_id):
        return False
    if not model.stage:
        return True  # made elsewhere: marks in a vocabulary are there to be used
    rates = [one.settings.get("infill_rate") for one in (model, *ancestors(model))]
    return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)


def read_pooling(folder: Path) -> Pooling | None:
    """What sentence-transformers' files in a folder say; None where there are none.

    Raises CheckpointError for a pooling or a module that is not followed here.
    """
    if not (folder / "modules.json").is_file():
        return None
    modules = _read_list(folder / "modules.json")
    kinds = {str(module.get("type", "")).split(".")[-1]: str(module.get("path", "")) for module in modules}
    if unknown := set(kinds) - {"Transformer", "Pooling", "Normalize"} or {"Pooling"} - set(kinds):
        raise CheckpointError(
            f"{folder / 'modules.json'}: {', '.join(sorted(unknown))} is unknown here, or missing",
            hint="an embedding model is a Transformer, a Pooling and perhaps a Normalize",
        )
    if ".." in Path(kinds["Pooling"]).parts or Path(kinds["Pooling"]).is_absolute():
        raise CheckpointError(f"{folder / 'modules.json'} leads out of its folder", hint="copy the folder again")
    config = read_json(folder / kinds["Pooling"] / "config.json")
    modes = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    if len(modes) != 1 or modes[0] not in POOLING:
        raise CheckpointError(
            f"{folder / kinds['Pooling']}: {modes or 'no pooling'} is not followed",
            hint=f"followed: {', '.join(POOLING)}",
        )
    return Pooling(POOLING[modes[0]], "Normalize" in kinds)


def _read_list(path: Path) -> Sequence[dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}", hint="copy the folder again") from None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise CheckpointError(f"{path} is no list of modules", hint="copy the folder again")
    return found


def _fingerprint(folder: Path) -> str:
    """Of the shape and the sizes and times of the weights: it changes when they do, without reading gigabytes."""
    digest = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=5)
    for file in sorted(folder.glob("*.safetensors")):
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()
