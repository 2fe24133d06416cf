"""Who runs the jobs: a thread that makes processes agree with what the store says, and writes down what they do.

    foreman = Foreman(jobs, files, folder, Crew()); foreman.start(); ...; foreman.close()

About twice a second it looks. A job that is running has a process, or had one: its metrics become events, the models that it
saves become checkpoints, its end becomes the job's. A process whose job is no more running is ended. Where there is room the
oldest job that waits begins. Nothing but the store and the jobs' folders is remembered, so a server that was killed finds its
jobs again, and a process that was killed goes on from its last saved step, unless it was killed `MAX_KILLED` times without
getting any further.

When the server ends in order its jobs' processes end too, and wait for its next start; when it is killed they go on. One
foreman at a time has a folder: a second server of the same store takes requests, and leaves the work to the first.

What it is not: the training (`lyceum run` does it), or the API (`lyceum.serve.tuning.routes`).
"""

from __future__ import annotations

import csv
import fcntl
import io
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any, TypeVar

from sqlalchemy.exc import OperationalError

from lyceum import device
from lyceum.errors import LyceumError
from lyceum.log import log, read_metrics
from lyceum.model.hub import read_json
from lyceum.run import PARTIAL, PREVIOUS
from lyceum.serve.files.kept import Files
from lyceum.serve.refusals import Refusal
from lyceum.serve.tuning import process as real_process
from lyceum.serve.tuning.kept import Job, Jobs

J = TypeVar("J", Job, str)
LOOK_EVERY_S = 0.5
MAX_KILLED = 3
MAKING_S = 3600.0  # making a job's folder takes less
LOCK = "foreman.lock"
ENDED_BADLY = ("failed", "cancelled")
NAMES = {  # of a metrics line -> as OpenAI's events and checkpoints have them, and a few beyond
    "loss": "train_loss",
    "token_accuracy": "train_mean_token_accuracy",
    "valid/loss": "valid_loss",
    "valid/loss/preference": "valid_loss",
    "valid/accuracy": "valid_mean_token_accuracy",
    "objective/scores": "train_mean_reward",
    "objective/kl": "kl",
    "rewards/accuracies": "reward_accuracy",
    "rewards/margins": "reward_margin",
}
COLUMNS = ("step", *dict.fromkeys(NAMES.values()))


@dataclass(frozen=True)
class Crew:
    """What jobs may take. side_by_side: jobs at once; threads: of each, 0 for half of the cores; memory: bytes of each, 0 for
    half of the machine's."""

    side_by_side: int = 1
    threads: int = 0
    memory: int = 0

    @property
    def num_threads(self) -> int:
        """Threads of one job."""
        return self.threads or max(1, device.num_cores() // 2)

    @property
    def num_bytes(self) -> int:
        """Memory of one job."""
        return self.memory or device.memory_bytes() // 2


class Foreman:
    """The thread.

    folder: of all jobs; each has its own in it, by its id. changed: told when there are other models. process: what starts and
    ends processes.
    """

    def __init__(
        self,
        jobs: Jobs,
        files: Files,
        folder: Path,
        crew: Crew | None = None,
        *,
        changed: Callable[[], None] = lambda: None,
        process: ModuleType | Any = real_process,
        every_s: float = LOOK_EVERY_S,
    ):
        self.jobs, self.files, self.folder, self.crew = jobs, files, folder, crew or Crew()
        self.process, self.every_s, self._changed = process, every_s, changed
        self._watched: set[str] = set()  # ids whose process may be there
        self._begun: dict[str, int] = {}  # id -> the step at which its process began
        self._seen: dict[str, tuple[int, int]] = {}  # id -> the metrics' file as it was last read
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._lock: IO[bytes] | None = None
        self._wake, self._is_over = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Look no more; processes end, and their jobs wait for the next start."""
        self._is_over = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._lock is None:
            return
        for job in self.jobs.under_way():
            if job.status == "running":
                self._end(job.id)
                said = "The server stops; the job goes on when it is started again"
                self.jobs.move(job, [{"message": said}], status="queued")
        self._lock.close()
        self._lock = None

    def wake(self, id: str) -> None:
        """Look at once, at this job too. From any thread."""
        self._watched.add(id)
        self._wake.set()

    def _run(self) -> None:
        while not self._is_over:
            self._wake.clear()
            try:
                if self._is_ours():
                    self.turn()
            except Exception as error:  # the database may be away, and come back
                log.warning(f"jobs could not be looked after: {type(error).__name__}: {error}")
            self._wake.wait(self.every_s)

    def _is_ours(self) -> bool:
        """Whether the folder is this foreman's; when it becomes so, processes that an earlier one left are looked for."""
        if self._lock is None:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = open(self.folder / LOCK, "ab")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                return False
            self._lock = lock
            self._watched |= {path.name for path in self.folder.iterdir() if path.is_dir() and self._was_left(path)}
        return True

    def _was_left(self, folder: Path) -> bool:
        """Whether a process was begun in a job's folder, or its making was given up: not one that is being made just now."""
        return (folder / self.process.LOCK).exists() or folder.stat().st_mtime < time.time() - MAKING_S

    def turn(self) -> None:
        """Look once."""
        under_way = [job for job in self.jobs.under_way() if (self.folder / job.id).is_dir()]  # others' are elsewhere
        running = {job.id for job in under_way if job.status == "running"}
        for id in [*self._watched - running]:
            self._try(self._let_go, id)
        for job in under_way:
            if job.status == "running":
                self._try(self._follow, job)
        room = self.crew.side_by_side - sum(job.status == "running" for job in self.jobs.under_way())
        waiting = [job for job in under_way if job.status == "queued"]
        for job in waiting[: max(0, room)]:
            self._try(self._begin, job)

    def _try(self, work: Callable[[J], None], job: J) -> None:
        try:
            work(job)
        except OperationalError:
            raise
        except Exception as error:  # one job's broken folder does not stop the others
            log.warning(f"{job if isinstance(job, str) else job.id}: {type(error).__name__}: {error}")

    # -- processes -----------------------------------------------------------------------------------------------------

    def _begin(self, job: Job) -> None:
        said = "Fine-tuning job started" if not job.started else "Fine-tuning job goes on"
        if not self.jobs.move(job, [{"message": said}], status="running", started=job.started or time.time()):
            return
        self._start(job)

    def _start(self, job: Job) -> None:
        self._watched.add(job.id)
        self._begun[job.id] = job.step
        try:
            crew = self.crew
            child = self.process.start(self.folder / job.id, threads=crew.num_threads, memory=crew.num_bytes)
            self._children[job.id] = child
        except BlockingIOError:  # it is there already; the next look finds it so
            pass
        except OSError as error:
            log.warning(f"{job.id} cannot be started: {error}")  # and it is found to have ended without a word

    def _end(self, id: str) -> None:
        self.process.stop(self.folder / id)
        self._reap(id)

    def _reap(self, id: str) -> None:
        child = self._children.pop(id, None)
        if child is not None:
            child.wait()

    def _let_go(self, id: str) -> None:
        """A job that is not running has no process; one that has ended badly, or was deleted, nothing to keep."""
        self._end(id)
        self._watched.discard(id)
        self._seen.pop(id, None)
        status = self.jobs.status(id)
        if status in ENDED_BADLY:
            tidy(self.folder / id, everything=True)
        elif not status and not (self.folder / id / self.process.LOCK).exists():
            shutil.rmtree(
                self.folder / id, ignore_errors=True
            )  # given up in the making; what ran may be another store's

    def forget(self, id: str) -> None:
        """End a job that was deleted, and delete its folder. From a thread."""
        self.process.stop(self.folder / id)
        shutil.rmtree(self.folder / id, ignore_errors=True)
        self.wake(id)

    # -- what a job does -----------------------------------------------------------------------------------------------

    def _follow(self, job: Job) -> None:
        """Write down what is new; and the end, if it has come."""
        folder = self.folder / job.id
        if job.id not in self._begun:
            self._begun[job.id] = job.step
        is_alive = self.process.is_alive(folder)  # first: what it did before it ended is read after it has
        section = folder / job.plan["section"]
        stamp = _stamp(section / "metrics.jsonl")
        lines = (
            read_metrics(section / "metrics.jsonl")
            if stamp and (stamp != self._seen.get(job.id) or not is_alive)
            else []
        )
        if stamp:
            self._seen[job.id] = stamp
        new = [line for line in lines if line["step"] > job.step]
        said = [_metrics_event(line, job) for line in new]
        step = new[-1]["step"] if new else job.step
        tokens = int(new[-1].get("tokens", job.tokens)) if new else job.tokens
        saved = self._snapshots(job, section, lines) if lines else []
        if is_alive:
            if new or saved:
                self.jobs.move(job, said, saved, step=step, tokens=tokens)
            return
        self._reap(job.id)
        values = {"step": step, "tokens": tokens}
        if self.process.has_finished(folder, job.plan["section"]):
            self._succeed(job, said, saved, values, lines)
        elif error := self.process.last_error(folder):
            self._fail(job, said, saved, values, "training_failed", _plain(error, folder))
        else:
            self._go_on(job, said, saved, values)

    def _go_on(self, job: Job, said: list[Any], saved: list[Any], values: dict[str, Any]) -> None:
        """Its process was killed: another one goes on, unless that was tried often enough."""
        killed = 0 if values["step"] > self._begun[job.id] else job.attempts + 1
        if killed >= MAX_KILLED:
            message = (
                f"The job's process was killed {killed} times without getting further: perhaps the memory ran out."
            )
            self._fail(job, said, saved, {**values, "attempts": killed}, "process_killed", message)
            return
        note = {"level": "warn", "message": "The job's process was killed; it goes on from the last saved step"}
        if self.jobs.move(job, [*said, note], saved, **values, attempts=killed):
            self._begun[job.id] = values["step"]
            self._start(self.jobs.about(job.owner, job.id))

    def _fail(
        self, job: Job, said: list[Any], saved: list[Any], values: dict[str, Any], code: str, message: str
    ) -> None:
        error = {"code": code, "message": message, "param": None}
        note = {"level": "error", "message": f"Fine-tuning job failed: {message}"}
        ended = {**values, "status": "failed", "error": error, "finished": time.time()}
        if self.jobs.move(job, [*said, note], saved, **ended):
            log.warning(f"{job.id} failed: {message}")
            self._begun.pop(job.id, None)
            self._let_go(job.id)

    def _succeed(
        self, job: Job, said: list[Any], saved: list[Any], values: dict[str, Any], lines: list[dict[str, Any]]
    ) -> None:
        step = int(values["step"])
        last = {"name": job.name, "folder": f"{job.plan['section']}/checkpoint", "step": step}
        saved = [*saved, {**last, "metrics": metrics_at(lines, step)}]
        notes = [*said, {"message": f"New fine-tuned model created: {job.name}"}]
        result_file = ""
        try:
            filename = f"{job.id}-results.csv"
            result_file = self.files.write(job.owner, _table(lines), filename=filename, purpose="fine-tune-results").id
        except (Refusal, LyceumError) as error:  # no room for it: the model matters more
            notes.append({"level": "warn", "message": f"There is no result file: {error}"})
        notes.append({"message": "The job has successfully completed"})
        ended = {**values, "status": "succeeded", "result_file": result_file, "finished": time.time()}
        if not self.jobs.move(job, notes, saved, **ended):  # it was cancelled in the last moment
            if result_file:
                self.files.delete(job.owner, result_file)
            return
        log.info(f"{job.id} has made {job.name}")
        self._begun.pop(job.id, None)
        tidy(self.folder / job.id)
        self._changed()

    def _snapshots(self, job: Job, section: Path, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found = []
        for folder in sorted(section.glob("snapshot-*")):
            is_whole = folder.suffix not in (PARTIAL, PREVIOUS)  # while it is written it has another name
            if is_whole and (folder / "config.json").is_file():
                step = int(read_json(folder / "lyceum.json").get("step") or 0)
                named = {
                    "name": f"{job.name}:ckpt-step-{step}",
                    "folder": f"{section.name}/{folder.name}",
                    "step": step,
                }
                found.append({**named, "metrics": metrics_at(lines, step)})
        return found


def metrics_at(lines: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """What was measured at a step, or last before it; each number as it last was."""
    found: dict[str, Any] = {"step": step}
    for line in lines:
        if line["step"] <= step:
            found |= _named(line)
    if "valid_loss" in found:  # validation is always on the whole file
        found["full_valid_loss"] = found["valid_loss"]
    if "valid_mean_token_accuracy" in found:
        found["full_valid_mean_token_accuracy"] = found["valid_mean_token_accuracy"]
    return found


def tidy(folder: Path, *, everything: bool = False) -> None:
    """Delete what a job that has ended needs no more: the examples and the trainer's state; everything: all but its log."""
    if everything:
        for child in folder.iterdir() if folder.is_dir() else ():
            if child.is_dir():
                shutil.rmtree(child, ignore_errors=True)
        return
    shutil.rmtree(folder / "data", ignore_errors=True)
    for trainer in folder.glob("*/trainer"):
        shutil.rmtree(trainer, ignore_errors=True)


def _metrics_event(line: Mapping[str, Any], job: Job) -> dict[str, Any]:
    data = _named(line)
    shown = {"train_loss": "training loss", "train_mean_reward": "mean reward", "valid_loss": "validation loss"}
    numbers = ", ".join(f"{text}={data[name]:.4f}" for name, text in shown.items() if name in data)
    message = f"Step {line['step']}/{max(job.plan['steps'], line['step'])}: {numbers}"
    return {"type": "metrics", "message": message, "data": {"step": line["step"], **data}}


def _table(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Metrics as lines of CSV."""
    for row in [dict(zip(COLUMNS, COLUMNS, strict=True)), *({"step": one["step"], **_named(one)} for one in lines)]:
        text = io.StringIO()
        csv.DictWriter(text, COLUMNS, lineterminator="").writerow(row)
        yield text.getvalue()


def _named(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: line[key] for key, name in NAMES.items() if line.get(key) is not None}


def _plain(error: str, folder: Path) -> str:
    """An error without the server's own paths."""
    for place in (folder.resolve(), folder.resolve().parent):
        error = error.replace(f"{place}/", "").replace(str(place), "the job")
    return error[:2000]


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size
