"""The machine: set up before torch is imported, and told truly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lyceum import device


def fresh(code: str, **environment: str) -> str:
    """What `code` prints in a new Python whose environment says nothing about threads."""
    kept = {name: value for name, value in os.environ.items() if name not in device.RECORDED}
    command = [sys.executable, "-W", "error", "-c", f"from lyceum import device\n{code}"]
    return subprocess.run(
        command, env={**kept, **environment}, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_floor_sets_threads_and_patient_waiting_before_torch_comes() -> None:
    code = """
import os
device.prepare("train", threads=1)
import torch
print(torch.get_num_threads(), os.environ["OMP_WAIT_POLICY"], device.facts()["before_torch"], device.num_threads())
"""
    assert fresh(code) == "1 PASSIVE True 1"


def test_what_the_environment_already_says_is_kept() -> None:
    code = """
import os
device.prepare("train", threads=1)
print(os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"])
"""
    assert fresh(code, OMP_NUM_THREADS="3", OMP_WAIT_POLICY="ACTIVE") == "3 ACTIVE"
    assert fresh(code) == "1 PASSIVE"


def test_after_torch_the_number_of_threads_still_holds() -> None:
    code = (
        "import torch\ndevice.prepare('train', threads=1)\n"
        "print(torch.get_num_threads(), device.facts()['before_torch'], device.facts()['threads'])"
    )
    assert fresh(code) == "1 False 1"


def test_there_is_a_thread_for_each_core_this_process_may_use() -> None:
    assert 1 <= device.num_cores() <= (os.cpu_count() or 1)
    if hasattr(os, "sched_setaffinity"):
        code = "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nprint(device.num_cores())"
        assert fresh(code) == "1"


def test_the_facts_can_be_written_down() -> None:
    facts = json.loads(json.dumps(device.facts()))
    assert facts["cores"] >= 1 and facts["memory_gb"] > 0.1 and facts["python"].startswith("3.")


def test_peak_memory_is_this_process_own_and_grows_by_what_is_held() -> None:
    grown = "before = device.peak_memory_gb()\nheld = b'x' * 300_000_000\nprint(device.peak_memory_gb() - before)"
    assert float(fresh(grown)) == pytest.approx(0.3, abs=0.05)


def test_the_busy_share_is_a_share() -> None:
    assert 0.0 <= device.busy_share(0.05) <= 1.0


def test_a_machine_that_does_not_tell_its_times_is_judged_by_its_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent() -> list[int]:
        raise OSError

    monkeypatch.setattr(device, "_core_times", silent)
    assert 0.0 <= device.busy_share(0.0) <= 1.0


def test_without_a_gpu_the_device_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.pick_device() == torch.device("cpu")


def test_the_limit_of_matrix_products_is_measured_in_little_time_and_draws_no_random_numbers() -> None:
    import time

    import torch

    before, start = torch.get_rng_state(), time.perf_counter()
    flops = device.matmul_flops([(64, 192), (100_000, 64)], 512)
    assert time.perf_counter() - start < 5.0  # 0.2 s on an idle machine
    assert torch.equal(torch.get_rng_state(), before)
    left, right = torch.randn(512, 64), torch.randn(64, 192)
    left @ right
    best = 0.0
    for _ in range(200):
        start = time.perf_counter()
        left @ right
        best = max(best, 2 * 512 * 64 * 192 / (time.perf_counter() - start))
    assert best / 5 < flops < best * 50  # the other shape may be faster, never slower


def test_the_memory_of_a_container_bounds_that_of_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = device.memory_bytes()
    assert 0 < whole <= 1e9 * device.facts()["memory_gb"] + 1
    monkeypatch.setattr(device, "Path", lambda place: tmp_path / Path(place).name)
    (tmp_path / "memory.max").write_text("123456789\n")
    assert device.memory_bytes() == 123456789
    (tmp_path / "memory.max").write_text("max\n")
    assert device.memory_bytes() == int(1e9 * device.facts()["memory_gb"])


@pytest.mark.slow
@pytest.mark.skipif(device.num_cores() < 2, reason="one core has no threads that wait for each other")
def test_a_thread_that_waits_leaves_its_core_to_others() -> None:
    """Processor time of 40 short products with pauses between them: a thread that spins takes the pauses too."""
    code = """
device.prepare("test", threads=2)
import time, torch
row, matrix = torch.randn(32, 256), torch.randn(256, 512)
row @ matrix
start = time.process_time()
for _ in range(40):
    row @ matrix
    time.sleep(0.01)
print(time.process_time() - start)
"""
    sleeping, spinning = float(fresh(code)), float(fresh(code, OMP_WAIT_POLICY="ACTIVE"))
    print(f"processor time: {sleeping:.3f} s, {spinning:.3f} s with threads that spin")
    assert 3 * sleeping < spinning
