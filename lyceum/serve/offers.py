"""What runs offer, taken up: a better model in place of the one that is served, at the start and while the server runs.

    offers = Offers({"demo": (Path("runs/demo"), own_checkpoint)}, partial(load, max_batch=16))
    service = Service([offers.first("demo")]); offers.follow(service)

`lyceum improve` writes a run's offer as a file (`lyceum.run.Offer`); a thread here looks at it about once a second. What is
offered is loaded beside what is served; then it takes its name: who asks from then on is answered by it, an answer under
way ends with the model that began it, and the old one's memory is freed after the last. A folder that cannot be loaded
changes nothing, and the log says so. Without the file, or where it is passed over, the run's own model is served.

What it is not: whether the new one is better (`lyceum.evals.compare`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from lyceum.errors import CheckpointError
from lyceum.log import log
from lyceum.run import OFFER, offered
from lyceum.serve.models import Served
from lyceum.serve.service import Service

LOOK_EVERY_S = 1.0
Stamp = tuple[int, int, int]


class Offers:
    """The offers of runs.

    runs: name of a model -> its run's folder, and the run's own checkpoint.
    read: opens a checkpoint folder as the model of that name.
    """

    def __init__(
        self,
        runs: Mapping[str, tuple[Path, Path]],
        read: Callable[[str, Path], Served],
        *,
        every_s: float = LOOK_EVERY_S,
    ):
        self.runs, self.every_s, self._read = runs, every_s, read
        self.served: dict[str, Path] = {}  # name -> the checkpoint that answers
        self._seen: dict[str, Stamp | None] = {}  # name -> the file as it was when it was last read
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def first(self, name: str) -> Served:
        """The model to begin with: what the run offers, or its own where that cannot be loaded.

        Raises CheckpointError where neither can.
        """
        wanted = self._wanted(name)
        own = self.runs[name][1]
        if wanted != own:
            try:
                return self._load(name, wanted)
            except (CheckpointError, OSError) as error:
                log.warning(f"{name}: {wanted} is offered and cannot be loaded, {own} is served: {_first_line(error)}")
        return self._load(name, own)

    def follow(self, service: Service) -> None:
        """Begin to look, where there is a run to look at."""
        if self.runs:
            self._thread = threading.Thread(target=self._run, args=(service,), name="offers", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()

    def look(self, service: Service) -> None:
        """Take up what has been offered since the last time; what cannot be loaded is said once, and changes nothing."""
        for name, (run, _) in self.runs.items():
            if _stamp(run / OFFER) == self._seen.get(name):
                continue
            wanted = self._wanted(name)
            if wanted == self.served[name]:
                continue
            try:
                served = self._load(name, wanted)
            except Exception as error:  # whatever is wrong with the folder: people are being answered
                log.warning(
                    f"{name}: {wanted} is offered and cannot be loaded, {name} stays as it is: {_first_line(error)}"
                )
                continue
            service.replace(served)
            log.info(f"{name}: {wanted} answers from now on (fp_{served.fingerprint})")

    def _run(self, service: Service) -> None:
        while not self._is_over.wait(self.every_s):
            self.look(service)

    def _wanted(self, name: str) -> Path:
        """The checkpoint that is to be served, as the run says at this moment."""
        run, own = self.runs[name]
        self._seen[name] = _stamp(run / OFFER)  # before it is read: a later one is read again
        folder, why = offered(run)
        if why:
            log.warning(f"{name}: {why}; {own} is served")
        return folder or own

    def _load(self, name: str, folder: Path) -> Served:
        served = self._read(name, folder)
        self.served[name] = folder
        return served


def _stamp(path: Path) -> Stamp | None:
    """What changes when a file does; None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
