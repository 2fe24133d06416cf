"""`lyceum models`: which models there are, which comes from which, and what each learned from.

    lyceum models                       of all runs in runs/
    lyceum models runs/demo             of one run: a tree, the oldest first
    lyceum models runs/demo runs/other  of several, with the models elsewhere that they come from
    lyceum models runs/demo --all       with what was saved along the way, and the members of ensembles
    lyceum models runs/demo --json      one JSON value: every checkpoint with all that it says

It is read from the checkpoints themselves (`lyceum.model.lineage`), whether a recipe made them or feedback did. What it is not:
the sections of a run and how far each has come, which is `lyceum runs`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lyceum.errors import UsageError
from lyceum.log import aligned
from lyceum.model.lineage import NOTE, Model, read_models


def models(paths: Sequence[str], *, is_all: bool = False, as_json: bool = False) -> None:
    """Print the models below folders, by default those in runs/.

    Raises:
        UsageError: a folder is not there, or no model is in any of them.
    """
    places = [Path(path) for path in paths] or [Path("runs")]
    for place in places:
        if not place.is_dir():
            raise UsageError(f"there is no folder {place}", hint="give a run's folder, or the one that holds the runs")
    found = read_models(places)
    if not found:
        raise UsageError(
            f"there is no model in {', '.join(map(str, places))}",
            hint=f"a model's folder has a {NOTE}; make one: lyceum run demo",
        )
    named = names(found, places)
    if as_json:
        rows = [{**model.to_json(), "name": named[folder]} for folder, model in found.items()]
        print(json.dumps(rows, ensure_ascii=False))
    else:
        print("\n".join(tree_lines(found if is_all else shown(found), named)))


def names(found: Mapping[Path, Model], places: Sequence[Path]) -> dict[Path, str]:
    """Folder -> what it is called here: its path from the one run, from the folder of runs, or whole where it is elsewhere."""
    roots = [place.resolve() for place in places]
    called = {}
    for folder in found:
        root = next((root for root in roots if folder.is_relative_to(root)), None)
        inside = folder.relative_to(root).as_posix() if root is not None else folder.as_posix()
        inside = inside.removesuffix("/checkpoint")
        called[folder] = f"{root.name}/{inside}" if root is not None and len(roots) > 1 else inside
        if inside in (".", "checkpoint"):  # the folder itself was asked for
            called[folder] = found[folder].name
    return called


def shown(found: Mapping[Path, Model]) -> dict[Path, Model]:
    """Without what was saved along the way, unless another model comes from it."""
    parents = {model.parent for model in found.values() if not model.is_aside}
    return {folder: model for folder, model in found.items() if not model.is_aside or folder in parents}


def tree_lines(found: Mapping[Path, Model], named: Mapping[Path, str]) -> list[str]:
    """The models as a tree, each below the one that it started from; of one parent the older first."""
    rows = [["model", "stage", "size", "learned from", "result"]]
    for above, model in _walk(found, None, ""):
        size = f"{model.num_parameters / 1e6:.2f}M" if model.num_parameters else "-"
        stage = model.stage or "made elsewhere"
        if model.lost_parent:
            stage += f", of {model.lost_parent} (not there)"
        rows.append([above + named[model.folder], stage, size, said(model) or "-", model.result])
    return aligned(rows, [False, False, True, False, False])


def _walk(found: Mapping[Path, Model], parent: Path | None, above: str) -> Iterator[tuple[str, Model]]:
    """(what is drawn before its name, model) of those below `parent`, the older first; a circle of parents is left out."""
    if parent is None:
        below = [model for model in found.values() if model.parent not in found]
    else:
        below = [model for model in found.values() if model.parent == parent]
    below.sort(key=lambda model: (_age(model), model.name))
    for number, model in enumerate(below, start=1):
        is_last = number == len(below)
        yield ("" if parent is None else above + ("└ " if is_last else "├ ")), model
        deeper = "" if parent is None else above + ("  " if is_last else "│ ")
        yield from _walk(found, model.folder, deeper)


def _age(model: Model) -> float:
    note = model.folder / NOTE
    return note.stat().st_mtime if note.is_file() else 0.0


def said(model: Model) -> str:
    """What a model learned from, in words."""
    parts = []
    for one in model.learned_from:
        origins = [f"{count:,} {origin}" for origin, count in one.get("origins", {}).items()]
        what = (
            f"{one['count']:,} {one['kind']} of {one['source']}" if one["source"] else f"{one['count']:,} {one['kind']}"
        )
        part = f"/{one['part']}" if one.get("part") else ""
        tokens = f", {one['tokens']:,} tokens" if one.get("tokens") else ""
        parts.append(what + part + (f" ({', '.join(origins)})" if origins else "") + tokens)
    return "; ".join(parts)
