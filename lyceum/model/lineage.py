"""Where models come from: every checkpoint says its parent and what it learned from; this reads them as a tree.

    models = read_models([Path("runs/demo")])       # folder -> Model, ancestors from elsewhere among them
    chain = [model, *ancestors(model)]              # back to the one that began with random weights
    history(model)                                  # the same for other programs, oldest first, without a path

Nothing is kept here, and nothing is stored twice: parent, stage, recipe, section, seed, settings, `learned_from` and results
stand in a checkpoint's lyceum.json, its size in the headers of its weights, its section's sentence in the report.json
beside it. Checkpoints are found by their lyceum.json, wherever they lie, so one that was made after its recipe, from what people
said about its answers, is a child like any other.

A parent's name is that of a folder in the same run ("sft/checkpoint"), or a whole path (`lyceum.run.Work.name_of`). What is not
there any more ends a line, and is named as lost; what cannot be read counts as made elsewhere. A section that was made anew keeps
its folder's name: until what flows from it is made anew too, that names it as its parent.

What it is not: a judge of models, or a reader of weights. It imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

NOTE = "lyceum.json"
LEARNED = ("documents", "conversations", "rankings", "ratings", "prompts", "scores")  # what a stage can learn from
SHAPED = ("preference", "ppo", "tamer", "grpo")  # stages whose policy has learned what is liked
MAX_ABOVE = (
    4  # folders above a checkpoint where its parent is looked for: its section, its run, and where runs lie in runs
)
MAX_HEADER = 100 << 20  # bytes; a safetensors header that says more is none


@dataclass(frozen=True)
class Model:
    """One checkpoint folder and what it says of itself.

    info: its lyceum.json; empty where it was made elsewhere, or that cannot be read. parent: the folder of the model that it
    started from, if it started from one that is there.
    """

    folder: Path
    info: Mapping[str, Any] = field(default_factory=dict)
    parent: Path | None = None

    @property
    def name(self) -> str:
        """Its section; with the folder's own name where that is no plain "checkpoint"."""
        own, section = self.folder.name, self.folder.parent.name
        return section if own == "checkpoint" else f"{section}/{own}" if self.info.get("section") == section else own

    @property
    def stage(self) -> str:
        """What made it, such as "sft"; empty where it was made elsewhere."""
        return str(self.info.get("stage") or "")

    @property
    def settings(self) -> Mapping[str, Any]:
        """Those of the stage that made it."""
        found = self.info.get("settings")
        return found if isinstance(found, dict) else {}

    @property
    def lost_parent(self) -> str:
        """The name of a parent that is not where it was; empty if it is, or there never was one."""
        return str(self.info["parent"]) if self.info.get("parent") and self.parent is None else ""

    @property
    def learned_from(self) -> list[dict[str, Any]]:
        """What its stage learned from: kind (of LEARNED), count, source and, where they are known, origins; what is no such
        thing is left out, since a checkpoint may be a stranger's."""
        return [known for one in _list(self.info.get("learned_from")) if (known := _known(one))]

    @property
    def is_aside(self) -> bool:
        """True of what was saved along the way (a snapshot, the best so far) and of a member of an ensemble."""
        parts = (self.folder.parent.name, self.folder.name)
        return parts[1].startswith("snapshot-") or parts[1] == "best" or any(p.startswith("member-") for p in parts)

    @cached_property
    def num_parameters(self) -> int:
        """How many numbers its weights are, as their headers say; a tied output layer is stored, and counts, once."""
        return sum(_count(file) for file in sorted(self.folder.glob("*.safetensors")))

    @cached_property
    def result(self) -> str:
        """The sentence of its section's report, if that lies beside it; else its validations, as lyceum.json has them."""
        line = _read(self.folder.parent / "report.json").get("line") if not self.is_aside else None
        found = self.info.get("results")
        numbers = found.items() if isinstance(found, dict) else ()
        shown = [f"{k.removeprefix('valid/')} {v:.4g}" for k, v in numbers if isinstance(v, (int, float))]
        return str(line) if line else ", ".join(shown)

    def to_json(self) -> dict[str, Any]:
        """Everything that is known of it, its settings too."""
        known = {key: value for key, value in self.info.items() if key not in ("parent", "learned_from")}
        return {
            "name": self.name,
            "folder": str(self.folder),
            "parent": None if self.parent is None else str(self.parent),
            "lost_parent": self.lost_parent or None,
            "parameters": self.num_parameters,
            "learned_from": self.learned_from,
            **known,
        }


def learned(kind: str, count: int, source: str, **more: Any) -> dict[str, Any]:
    """One entry of a lyceum.json's `learned_from`: `count` of `kind` (of LEARNED) from `source`, a section or a file by its
    name; `more` as far as it says anything (origins: who made how many; tokens, part)."""
    assert kind in LEARNED
    return {"kind": kind, "count": count, "source": source, **{key: value for key, value in more.items() if value}}


# -------------------------------------------------------------------------------- reading


def read_model(folder: Path) -> Model:
    """The model in a checkpoint's folder; never raises for what is missing or broken."""
    folder = folder.resolve()
    info = _read(folder / NOTE)
    return Model(folder, info, _find(folder, str(info["parent"])) if info.get("parent") else None)


def ancestors(model: Model) -> Iterator[Model]:
    """The models it comes from, its parent first; ends where a parent is not there, or has been met before."""
    met = {model.folder}
    while model.parent is not None and model.parent not in met:
        met.add(model.parent)
        model = read_model(model.parent)
        yield model


def read_models(places: Iterable[Path]) -> dict[Path, Model]:
    """Folder -> model of every checkpoint below `places`, and of all that those come from, wherever they are.

    What a changed recipe has replaced (``old/``), and what is being written, is left out.
    """
    found: dict[Path, Model] = {}
    for place in places:
        for note in sorted(place.resolve().rglob(NOTE)):
            above = note.parent.relative_to(place.resolve()).parts
            if "old" not in above and not any(part.endswith((".partial", ".previous")) for part in above):
                model = read_model(note.parent)
                found |= {one.folder: one for one in (model, *ancestors(model))}
    return found


def history(model: Model) -> list[dict[str, Any]]:
    """The model and all that it comes from, oldest first: name, stage and, in `data`, what each learned from; no path, so that
    anybody may see it."""
    chain = [model, *ancestors(model)]
    return [{"model": one.name, "stage": one.stage, "data": one.learned_from} for one in reversed(chain)]


def _find(folder: Path, name: str) -> Path | None:
    """The folder that a parent's name means: a whole path, or one below a folder above this one, the nearest first."""
    places = [Path(name)] if Path(name).is_absolute() else [above / name for above in folder.parents[:MAX_ABOVE]]
    found = (place.resolve() for place in places if (place / "config.json").is_file())
    return next((place for place in found if place != folder), None)


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _known(one: Any) -> dict[str, Any] | None:
    """An entry of `learned_from` with the types that `learned` gives it; None for anything else."""
    if not isinstance(one, dict) or one.get("kind") not in LEARNED or type(one.get("count")) is not int:
        return None
    origins = one.get("origins")
    counts = {str(k): n for k, n in origins.items() if type(n) is int} if isinstance(origins, dict) else {}
    more = {"part": str(one.get("part") or ""), "tokens": one["tokens"] if type(one.get("tokens")) is int else 0}
    return learned(one["kind"], one["count"], str(one.get("source") or ""), **more, origins=counts)


def _count(file: Path) -> int:
    """Numbers in one safetensors file: 8 bytes say how long its header is, which gives every tensor's shape; 0 if it is none."""
    try:
        with open(file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size)) if size <= MAX_HEADER else {}
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return 0
