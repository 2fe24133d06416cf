"""Models that jobs have made, answered to their owners alone: known by name, loaded when they are first asked.

    shelf = Shelf(jobs, folder, read); service.shelf = shelf
    served = await shelf.find("ft:demo:lyceum:pirate:1a2b3c4d", caller)         # None for what is not there, or another's

So many of them stay in memory; then the one that was asked longest ago goes, once its last reply has ended. What is
known is read from the store: a model is there after a restart, and gone when its owner deletes it.

What it is not: the models that the server was started with (`lyceum.serve.service`).
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lyceum.errors import CheckpointError
from lyceum.log import log
from lyceum.model.hub import read_json
from lyceum.model.lineage import history, read_model
from lyceum.serve.limits import Caller
from lyceum.serve.models import Served
from lyceum.serve.refusals import Refusal
from lyceum.serve.tuning.kept import Jobs

MOST_LOADED = 4
PREFIX = "ft:"  # of their names


@dataclass(frozen=True)
class Tuned:
    """A model that is known. shown: as `/v1/models` shows it."""

    name: str
    owner: str
    folder: Path
    shown: dict[str, Any]


class Shelf:
    """The models of jobs.

    folder: of all jobs. read: opens a checkpoint folder as the model of a name. retire: told of a model that is to leave.
    """

    def __init__(
        self,
        jobs: Jobs,
        folder: Path,
        read: Callable[[str, Path], Served],
        *,
        retire: Callable[[Served], None],
        most_loaded: int = MOST_LOADED,
    ):
        self.jobs, self.folder, self.most_loaded = jobs, folder, most_loaded
        self._read, self._retire = read, retire
        self._known: dict[str, Tuned] = {}
        self._loaded: OrderedDict[str, Served] = OrderedDict()  # the one asked last at the end
        self._lock, self._loading = threading.Lock(), threading.Lock()

    def look(self) -> None:
        """Know what the store knows; called when it has changed. Blocks."""
        known = {}
        for owner, checkpoint in self.jobs.models():
            folder = self.folder / checkpoint.job / checkpoint.folder
            before = self._known.get(checkpoint.name)
            if before is not None:
                known[checkpoint.name] = before
            elif (folder / "config.json").is_file():
                known[checkpoint.name] = Tuned(
                    checkpoint.name, owner, folder, _shown(checkpoint.name, folder, checkpoint.created)
                )
            else:
                log.warning(f"{checkpoint.name} is not there any more: {folder} is gone")
        with self._lock:
            self._known = known
            gone = [self._loaded.pop(name) for name in [*self._loaded] if name not in known]
        for served in gone:
            self._retire(served)

    def visible(self, caller: Caller) -> list[Tuned]:
        """The models of somebody, the oldest first."""
        return [tuned for tuned in self._known.values() if tuned.owner == caller.id]

    def about(self, name: str, caller: Caller) -> Tuned | None:
        """A model of somebody's; None for what is not there, or another's."""
        tuned = self._known.get(name)
        return tuned if tuned is not None and tuned.owner == caller.id else None

    async def find(self, name: str, caller: Caller) -> Served | None:
        """A model of somebody's, loaded; None for what is not there, or another's. Raises Refusal where it cannot be read."""
        if name not in self._known and name.startswith(
            PREFIX
        ):  # a job may have made it this moment, or another server's job
            await asyncio.to_thread(self.look)
        tuned = self.about(name, caller)
        if tuned is None:
            return None
        with self._lock:
            served = self._loaded.get(name)
            if served is not None:
                self._loaded.move_to_end(name)
        return served if served is not None else await asyncio.to_thread(self._load, tuned)

    def _load(self, tuned: Tuned) -> Served:
        with self._loading:  # one at a time: two that ask for the same wait for one loading
            with self._lock:
                served = self._loaded.get(tuned.name)
            if served is None:
                try:
                    served = self._read(tuned.name, tuned.folder)
                except (CheckpointError, OSError) as error:
                    log.warning(f"{tuned.name} cannot be loaded: {error}")
                    raise Refusal(503, "The model cannot be loaded now.", code="model_not_ready") from None
            with self._lock:
                self._loaded[tuned.name] = served
                self._loaded.move_to_end(tuned.name)
                num_leaving = len(self._loaded) - self.most_loaded
                leaving = [self._loaded.popitem(last=False)[1] for _ in range(num_leaving)]
        for one in leaving:
            self._retire(one)
        return served


def _shown(name: str, folder: Path, created: float) -> dict[str, Any]:
    lineage = history(read_model(folder))
    return {
        "id": name,
        "object": "model",
        "created": int(created),
        "owned_by": "lyceum",
        "max_model_len": read_json(folder / "config.json").get("max_position_embeddings"),
        "parent": lineage[-2]["model"] if len(lineage) > 1 else None,
        "learned_from": lineage,
    }
