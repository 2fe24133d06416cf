"""The process of a job: the command line on the job's recipe, beside the server and behind it.

    started = start(folder, threads=1, memory=4 << 30); is_alive(folder); stop(folder)

It is a session of its own, so that what ends the server does not end it; it is niced, has so many threads, so much memory, and
is the first that the system takes where memory runs out. It holds a lock (`job.lock`) that the kernel takes back when it ends,
however it ends: so a server that was started again knows whether the process it has never seen is there, and no number of a
process that ended is mistaken for it.

What came of it is in its folder, and nowhere else: a finished section, or the last words of `log.txt`, or neither: it was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import lyceum
from lyceum.run import read_state
from lyceum.serve.tuning.recipes import RECIPE

LOCK, LOG, PID = "job.lock", "log.txt", "job.pid"
NICE = 10
OOM_SCORE = 500  # of a thousand: the system takes such a process before one at 0
LEAST_MEMORY = 2 << 30  # torch and an interpreter need most of it
STOP_S = 5.0
LAST_WORDS = 8 << 10  # bytes at the end of the log in which an error is looked for
# The process writes its own number before it becomes the command line: nobody can be killed between the two.
BEGIN = """echo $$ > "$0"; ulimit -d "$1"; { echo "$2" > /proc/self/oom_score_adj; } 2> /dev/null
shift 2; exec nice -n "$@" """


def start(folder: Path, *, threads: int, memory: int) -> subprocess.Popen[bytes]:
    """Start the process of a job. Raises BlockingIOError where it runs already.

    Args:
        folder: the job's, with its recipe; its name is the run's.
        threads: that it computes on.
        memory: bytes of it that are not files.
    """
    home = str(Path(lyceum.__file__).resolve().parent.parent)
    known = {name: value for name, value in os.environ.items() if not name.startswith("LYCEUM_")}
    path = os.pathsep.join([home, *filter(None, [known.get("PYTHONPATH", "")])])
    environment = {**known, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    limits = [str(max(memory, LEAST_MEMORY) >> 10), str(OOM_SCORE), str(NICE)]
    run = [sys.executable, "-m", "lyceum", "run", RECIPE, "--runs", ".."]
    with contextlib.ExitStack() as at_the_end:
        lock = at_the_end.enter_context(open(folder / LOCK, "ab"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / PID).unlink(missing_ok=True)
        log = at_the_end.enter_context(open(folder / LOG, "wb"))
        return subprocess.Popen(
            ["/bin/sh", "-c", BEGIN, PID, *limits, *run],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock.fileno(),),  # the lock is the child's too, and its alone once we close ours
        )


def is_alive(folder: Path) -> bool:
    """Whether the job's process is there."""
    try:
        with open(folder / LOCK, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def stop(folder: Path, *, within_s: float = STOP_S) -> None:
    """End the job's process, if it is there; after `within_s` seconds it is killed."""
    for number, wait_s in ((signal.SIGTERM, within_s), (signal.SIGKILL, within_s)):
        if not is_alive(folder):
            return
        with contextlib.suppress(OSError, ValueError):
            os.killpg(
                int((folder / PID).read_text(encoding="ascii")), number
            )  # a session's first process leads its group
        end = time.monotonic() + wait_s
        while is_alive(folder) and time.monotonic() < end:
            time.sleep(0.02)


def has_finished(folder: Path, section: str) -> bool:
    """Whether the job has come to its end."""
    state = read_state(folder / section)
    return state is not None and state.finished and (folder / section / "checkpoint" / "config.json").is_file()


def last_error(folder: Path) -> str:
    """The error that the job's process said at last; empty if it said none."""
    try:
        with open(folder / LOG, "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LAST_WORDS))
            said = log.read().decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(_from_error(said))


def _from_error(lines: list[str]) -> Iterator[str]:
    """The last line that begins with "error:", and the hint below it."""
    places = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if places:
        yield lines[places[-1]].removeprefix("error: ")
        yield from (line for line in lines[places[-1] + 1 :] if line.startswith("hint: "))
