"""The run folder: what a run has made, what it was made from, and who may write there.

    runs/<name>/
      recipe.toml      every value, as resolved            manifest.json   code, machine, threads, packages, seeds
      run.lock         one process at a time               old/            what a changed recipe replaced
      offer.json       the checkpoint that is to be served in place of the run's own, once `lyceum improve` has made one
      <section>/       a StageFolder; its state.json: from what it was made, whether it is finished, how long it took

Every file is written under a temporary name and renamed, so a reader sees the old file or the new one, never half of
one, and a run killed at any moment can go on. A full disk is a ResourceError that names the file.

This module knows no section by name and no order: that is `cli/river.py`. It is not a database: all of it is text.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lyceum import device
from lyceum.config import Recipe
from lyceum.errors import ResourceError, RunError

PARTIAL, PREVIOUS = ".partial", ".previous"  # a file or folder being written; the one it is about to replace
HEARTBEAT_S = 5.0  # how often a running section's seconds are written down, so that a killed one still counts them

# -------------------------------------------------------------------------------- writing


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, however the library below words it, into a ResourceError that names `path`."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error):
            raise ResourceError(
                f"the disk is full: could not write {path}",
                hint="free some space and start the same command again: the run goes on where it was",
            ) from error
        raise


@contextmanager
def line_writer(path: Path | str) -> Iterator[Callable[[str], object]]:
    """Gives a function that writes one line; `path` is replaced at the end of the block: wholly or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + PARTIAL)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "w", encoding="utf-8", newline="\n") as file:
                yield lambda line: file.write(line + "\n")
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_lines(path: Path | str, lines: Iterable[str]) -> None:
    """Write `lines`, each ended with a newline, as the new content of `path`: wholly or not at all."""
    with line_writer(path) as write:
        for line in lines:
            write(line)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` (a newline is added at its end if missing) as the new content of `path`: wholly or not at all."""
    write_lines(path, [text.removesuffix("\n")])


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, as `plain` words it."""
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False))


def plain(value: Any) -> Any:
    """A value as JSON can hold it: one-element tensors become numbers, paths text, and NaN and infinity null."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    number = value.item() if hasattr(value, "item") else float(value)
    return number if math.isfinite(number) else None


def checkpoint_in(folder: Path) -> Path:
    """The checkpoint that an input stands for: a section's, or the folder itself where it is one, from elsewhere."""
    return folder if (folder / "config.json").is_file() else folder / "checkpoint"


@contextmanager
def fresh_folder(path: Path | str) -> Iterator[Path]:
    """A new folder beside `path` to fill; when the block ends well it takes the place of `path`, else it is removed.

    Raises:
        ResourceError: the disk is full.
    """
    path = Path(path)
    partial, previous = path.with_name(path.name + PARTIAL), path.with_name(path.name + PREVIOUS)
    with disk_errors(path):
        _mend(path)
        try:
            partial.mkdir(parents=True)
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if path.exists():
            os.replace(path, previous)
        os.replace(partial, path)  # killed between these two lines: mend() brings the previous one back
        shutil.rmtree(previous, ignore_errors=True)


def mend(folder: Path) -> None:
    """Clear up after a killed writer in `folder`: half-written things go, a folder being replaced comes back."""
    for child in list(folder.iterdir()) if folder.is_dir() else ():
        for ending in (PARTIAL, PREVIOUS):
            if child.name.endswith(ending):
                _mend(child.with_name(child.name.removesuffix(ending)))


def _mend(path: Path) -> None:
    partial, previous = path.with_name(path.name + PARTIAL), path.with_name(path.name + PREVIOUS)
    if previous.exists() and not path.exists():
        os.replace(previous, path)
    for left in (partial, previous):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


# -------------------------------------------------------------------------------- one section


@dataclass(frozen=True)
class StageFolder:
    """One section's folder and the names of what lies in it."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """The Hugging Face folder."""
        return self.path / "checkpoint"

    @property
    def trainer(self) -> Path:
        """Optimizer, random numbers and stream state: what a resume needs."""
        return self.path / "trainer"

    @property
    def metrics(self) -> Path:
        """One line of JSON for each logged step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Fixed prompts, answered along the way."""
        return self.path / "samples.jsonl"

    @property
    def report(self) -> Path:
        """The section's results."""
        return self.path / "report.json"

    @property
    def state(self) -> Path:
        """From what the section was made, whether it is finished, and how long it took."""
        return self.path / "state.json"


@dataclass(frozen=True)
class Work:
    """What every section's entry function receives beside its own settings.

    Args:
        folder: where to write.
        inputs: role -> folder of the earlier section that plays it (its checkpoint is in ``/checkpoint``).
        seed: the section's own seed, derived from the recipe's and the section's name.
        recipe: the whole recipe, for `model` and the record.
    """

    folder: StageFolder
    inputs: Mapping[str, Path]
    seed: int
    recipe: Recipe

    def name_of(self, checkpoint: Path) -> str:
        """How `lyceum.json` names a checkpoint that this section started from, so that `lyceum.model.lineage` finds it again:
        ``section/checkpoint`` in its own run; one from elsewhere by its whole path."""
        run = checkpoint.resolve().parent.parent
        is_own = run in self.folder.path.resolve().parents
        return f"{checkpoint.parent.name}/{checkpoint.name}" if is_own else str(checkpoint.resolve())


@dataclass(frozen=True)
class State:
    """A section's state.json: `key` says from what it was made; `wall_s` adds up over resumed runs."""

    key: str
    kind: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    finished: bool = False
    wall_s: float = 0.0
    peak_memory_gb: float = 0.0


def read_state(folder: Path) -> State | None:
    """The state of the section in `folder`; None if it was never begun (or by something else)."""
    try:
        return State(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


# -------------------------------------------------------------------------------- the whole run


def read_manifest(path: Path) -> Mapping[str, Any]:
    """The manifest.json of the run in `path`; empty if there is none that can be read."""
    try:
        found = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Run:
    """One run's folder, held by this process alone while the block lasts."""

    def __init__(self, path: Path, lock: Any = None) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def open(cls, recipe: Recipe, runs_dir: Path | str = "runs") -> Self:
        """Open (or make) the folder of `recipe` under `runs_dir` and lock it.

        The lock is the kernel's: it goes when the process goes, however it ends.

        Raises:
            RunError: another process holds the folder.
        """
        path = Path(runs_dir) / recipe.name
        with disk_errors(path / "run.lock"):
            path.mkdir(parents=True, exist_ok=True)
            lock = open(path / "run.lock", "a+", encoding="utf-8")  # held open as long as the run
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                lock.close()
                raise RunError(
                    f"{path} is in use by another process (pid {holder})",
                    hint="wait for it, stop it, or give this run a name of its own: --set name=other",
                ) from None
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
        mend(path)
        return cls(path, lock)

    def close(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def folder(self, section: str) -> StageFolder:
        """The folder of a section, made or not."""
        return StageFolder(self.path / section)

    def is_finished(self, section: str, key: str) -> bool:
        """True if the section was made from exactly this `key` and came to its end."""
        state = read_state(self.path / section)
        return state is not None and state.finished and state.key == key

    def begin(self, section: str, wanted: State) -> tuple[StageFolder, bool]:
        """Make the section's folder ready for work.

        A folder with the same key is gone on with; any other is moved to ``old/<section>-<n>`` first.

        Returns:
            The folder, and True if there is earlier work of the same key in it.
        """
        folder = self.folder(section)
        state = read_state(folder.path)
        resumes = state is not None and state.key == wanted.key
        if not resumes and folder.path.is_dir() and any(folder.path.iterdir()):
            self._retire(folder.path)
        with disk_errors(folder.state):
            folder.path.mkdir(parents=True, exist_ok=True)
        mend(folder.path)
        if not resumes:
            write_state(folder, wanted)
        return folder, resumes

    def _retire(self, path: Path) -> None:
        old = self.path / "old"
        old.mkdir(exist_ok=True)
        taken = [int(tail) for p in old.iterdir() if (tail := p.name.removeprefix(path.name + "-")).isdigit()]
        os.replace(path, old / f"{path.name}-{max(taken, default=0) + 1}")


def write_state(folder: StageFolder, state: State) -> None:
    """Write the section's state.json."""
    write_json(folder.state, vars(state))


@contextmanager
def timed(folder: StageFolder, begun: State) -> Iterator[None]:
    """Keep a working section's seconds and memory in its state.json every few seconds, and mark it finished at the end.

    A killed section has lost at most HEARTBEAT_S seconds of its account.
    """
    earlier = read_state(folder.path)
    before_s = earlier.wall_s if earlier is not None else 0.0
    before_gb = earlier.peak_memory_gb if earlier is not None else 0.0
    start = time.monotonic()

    def write(finished: bool) -> None:
        spent = {
            "wall_s": round(before_s + time.monotonic() - start, 2),
            "peak_memory_gb": round(max(before_gb, device.peak_memory_gb()), 3),
        }
        write_state(folder, State(**{**vars(begun), **spent, "finished": finished}))

    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT_S):
            try:
                write(finished=False)
            except (OSError, ResourceError):
                pass  # the account is not worth a run; a disk that is really full stops the section itself

    clock = threading.Thread(target=beat, name="section clock", daemon=True)
    clock.start()
    try:
        yield
    except BaseException:
        over.set()
        clock.join()
        try:
            write(finished=False)
        except (OSError, ResourceError):
            pass
        raise
    over.set()
    clock.join()
    write(finished=True)


# -------------------------------------------------------------------------------- what is served in place of its own

OFFER = "offer.json"


@dataclass(frozen=True)
class Offer:
    """A checkpoint that a run gives in place of its own: those who serve it take it up, and `lyceum chat` talks to it.

    checkpoint: its folder, within the run's. section, key: the section of the run that all of it goes back to, and that
    section's key then; with another key the run has been made anew since, and the offer is passed over. made: when.
    """

    checkpoint: str
    section: str
    key: str
    made: str


def read_offer(path: Path) -> Offer | None:
    """The offer of the run in `path`; None if there is none that can be read."""
    try:
        return Offer(**json.loads((path / OFFER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def offered(path: Path) -> tuple[Path | None, str]:
    """The checkpoint that the run in `path` offers in place of its own, or None and why what it offers is passed over."""
    offer = read_offer(path)
    if offer is None:
        return None, f"{path / OFFER} cannot be read" if (path / OFFER).exists() else ""
    if read_manifest(path).get("keys", {}).get(offer.section, offer.key) != offer.key:
        return None, f"{offer.checkpoint} was improved from what {offer.section} was before the recipe changed"
    if not (path / offer.checkpoint / "config.json").is_file():
        return None, f"{offer.checkpoint}, which it offers, is not there"
    return path / offer.checkpoint, ""


# -------------------------------------------------------------------------------- what the code was


PACKAGES = ("torch", "numpy", "tokenizers", "safetensors")  # those that decide a run's numbers


def package_versions() -> dict[str, str]:
    """The installed versions of PACKAGES."""
    from importlib import metadata  # here, as it takes longer to import than all of --help

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def code_version() -> str | None:
    """The commit of the checkout that the code runs from, with -dirty if it has changes; None when installed."""
    import subprocess

    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
