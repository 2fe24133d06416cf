"""The machine: threads and how they wait, memory, the device, how busy it is.

`prepare` runs before torch is imported, since torch's OpenMP library reads its environment once, when it is loaded:

- OMP_WAIT_POLICY=PASSIVE: threads that wait for the next parallel region sleep instead of spinning. With the default,
  one more busy process on a two-core machine makes every step 5 to 25 times slower, because a spinning thread holds the
  core that the working one needs. KMP_BLOCKTIME says the same to Intel's and LLVM's OpenMP, which some builds use.
- OMP_NUM_THREADS: one thread for each physical core this process may use. A value that is already set is kept: torchrun
  sets it, and a resumed run is given the number it was started with, since sums depend on it bit for bit.
- glibc keeps the memory that tensors give back. Otherwise each step of a small model returns its activations to the system
  and faults the same pages in again: thousands of faults, 2 to 5 % of a step at width 128.

Nothing here imports torch at module level. It is not a scheduler: it never changes its mind while a run is going.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
COMPILERS = ("c++", "g++", "clang++")
MEASURE_S = 0.2  # what matmul_flops takes
RECORDED = ("OMP_NUM_THREADS", *WAITING, "MKL_NUM_THREADS", "MALLOC_ARENA_MAX")

_prepared: dict[str, Any] = {}


def prepare(role: str = "train", threads: int | None = None) -> None:
    """Set the threads and how they wait, before torch is imported; `facts` tells what was set.

    Args:
        role: what the process is for; recorded.
        threads: the number to use if the environment does not say; by default one a core.
    """
    wanted = threads or num_cores()
    os.environ.setdefault("OMP_NUM_THREADS", str(wanted))
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)
    late = "torch" in sys.modules  # then the environment comes too late for the waiting, but not for the number
    if late and os.environ["OMP_NUM_THREADS"].isdigit():
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    _prepared.update(role=role, before_torch=not late, keeps_memory=_keep_freed_memory())


def _keep_freed_memory() -> bool:
    """Ask glibc never to trim its heap and to serve large blocks from it; False where the C library is another."""
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD in malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, 2**31 - 1))


def facts() -> dict[str, Any]:
    """What the numbers of a run depend on: processor, cores, memory, system, Python, threads and their settings."""
    found = {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": num_cores(),
        "logical_cores": len(_allowed()),
        "memory_gb": _memory_gb(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "environment": {name: os.environ[name] for name in RECORDED if name in os.environ},
        **_prepared,
    }
    if "torch" in sys.modules:
        import torch

        found["threads"] = torch.get_num_threads()
        found["device"] = str(pick_device())
    return found


def num_threads() -> int:
    """The number of threads that torch has, or will have."""
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(text) if text.isdigit() else num_cores()


def side_by_side(go: Callable[[int], T], count: int) -> list[T]:
    """`[go(0), go(1), ...]`, `count` of them at once, each on a thread of its own with its share of torch's threads.

    The first is on this thread. Python's lock is no hindrance, because torch lets go of it inside every operator. Waits
    for all of them even where one fails.
    """
    import torch

    if count == 1:
        return [go(0)]
    threads = torch.get_num_threads()

    def work(number: int) -> T:
        torch.set_num_threads(max(1, threads // count))
        return go(number)

    others = [_pool(count - 1).submit(work, number) for number in range(1, count)]
    try:
        return [work(0), *(other.result() for other in others)]
    finally:
        wait(others)
        torch.set_num_threads(threads)


@lru_cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "worker")  # kept: a new thread would ask for new scratch memory each time


def num_cores() -> int:
    """Physical cores that this process may use: hyperthreads count once, and a container's quota bounds it."""
    topology = Path("/sys/devices/system/cpu")
    cores = set()
    for cpu in _allowed():
        try:
            place = topology / f"cpu{cpu}" / "topology"
            cores.add(((place / "physical_package_id").read_text(), (place / "core_id").read_text()))
        except OSError:
            cores.add((str(cpu), ""))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        limit = max(1, int(quota) // int(period)) if quota != "max" else len(cores)
    except (OSError, ValueError):
        limit = len(cores)
    return max(1, min(len(cores), limit))


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which torch's compiler calls on a CPU."""
    return any(map(shutil.which, COMPILERS))


def pick_device() -> torch.device:
    """The device to compute on: this rank's GPU if there is one, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def matmul_flops(shapes: Iterable[tuple[int, int]], rows: int, *, dtype: torch.dtype | None = None) -> float:
    """The most floating point operations a second that products of `rows` rows with such matrices reach here.

    It takes about MEASURE_S in all, draws from a generator of its own, and is of the moment: beside other busy
    processes it is low, as everything is.

    Args:
        shapes: the two sides of each matrix. A long side is cut: by then nothing is gained.
        rows: of what it is multiplied with; cut likewise.
        dtype: of the numbers; by default float32.
    """
    import torch

    where, best = pick_device(), 0.0
    draw, longest = torch.Generator(where).manual_seed(0), 8192 if where.type == "cuda" else 2048
    shapes = list(shapes)
    for shape in shapes:
        height, inner, columns = (min(side, longest) for side in (rows, *shape))
        left = torch.randn(height, inner, generator=draw, device=where, dtype=dtype)
        right = torch.randn(inner, columns, generator=draw, device=where, dtype=dtype)
        left @ right  # not counted: it chooses the kernel
        start, end = 0.0, time.perf_counter() + MEASURE_S / len(shapes)
        while start < end:
            finish_queue(where)
            start = time.perf_counter()
            left @ right
            finish_queue(where)
            best = max(best, 2.0 * height * inner * columns / (time.perf_counter() - start))
    return best


def finish_queue(where: torch.device) -> None:
    """Wait until a GPU has done what it was asked."""
    if where.type == "cuda":
        import torch

        torch.cuda.synchronize(where)


def peak_memory_gb() -> float:
    """The most memory this process has held since it started, in GB (10^9 bytes), as the system counts resident pages.

    It never falls: in a process that runs several sections it is the peak so far, not of the last section alone.
    """
    try:  # Linux: getrusage would begin with the peak of the process that started this one
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    except (OSError, ValueError):
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9  # bytes there, kibibytes elsewhere


def memory_bytes() -> int:
    """The memory that processes here may take together, in bytes: the machine's, or the container's where that is less.

    0 where the system does not tell.
    """
    found = [int(_memory_gb() * 1e9)]
    for place in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(int(Path(place).read_text()))
        except (OSError, ValueError):  # no such limit; "max" is none either
            pass
    return min((size for size in found if size > 0), default=0)


def busy_share(seconds: float = 0.5) -> float:
    """The share of all cores, 0 to 1, that somebody else uses while this process sleeps for `seconds`.

    A benchmark refuses to measure when this is not near 0. Where the system does not tell, the load average stands in.
    """
    try:
        before = _core_times()
        time.sleep(seconds)
        after = _core_times()
    except (OSError, ValueError):
        return min(1.0, os.getloadavg()[0] / max(1, len(_allowed())))
    spent = [b - a for a, b in zip(before, after, strict=True)]
    idle = spent[3] + spent[4]  # idle, and waiting for the disk
    return 1.0 - idle / sum(spent) if sum(spent) > 0 else 0.0


def _core_times() -> list[int]:
    """Ticks of all cores together: user, nice, system, idle, iowait, irq, softirq, steal."""
    first = Path("/proc/stat").read_text().splitlines()[0]
    return [int(number) for number in first.split()[1:9]]


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _memory_gb() -> float:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return 0.0
