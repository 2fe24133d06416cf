"""Server and job killed with SIGKILL at random moments: the job goes on to its end, no step is told twice, no file is lost."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from lyceum.serve.tuning import process
from tests.serve.tuning.test_routes import CHAT, until, upload

pytestmark = pytest.mark.slow


class Killable:
    """`lyceum serve` on one store, started again and again."""

    def __init__(self, base: Path, home: Path):
        self.base, self.home = base, home
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> openai.OpenAI:
        command = [
            sys.executable,
            "-m",
            "lyceum",
            "serve",
            str(self.base),
            "--port",
            "0",
            "--store",
            str(self.home / "s.sqlite"),
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        found = re.search(r"http://[\d.:]+", self.process.stdout.readline())
        assert found is not None
        return openai.OpenAI(base_url=found.group() + "/v1", api_key="any", max_retries=0, timeout=60)

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None and self.process.stdout is not None
        self.process.send_signal(number)
        self.process.wait(timeout=30)
        self.process.stdout.close()
        self.process = None


@pytest.fixture
def killable(base: Path, tmp_path: Path) -> Iterator[Killable]:
    made = Killable(base, tmp_path)
    yield made
    if made.process is not None:
        made.kill()
    for folder in (tmp_path / "s.files" / "jobs").glob("ftjob*"):
        process.stop(folder, within_s=0.1)


def test_server_and_job_are_killed_at_random_moments_and_the_job_succeeds(killable: Killable) -> None:
    draw = random.Random(5)
    client = killable.start()
    train = upload(client, [CHAT] * 64)
    job = client.fine_tuning.jobs.create(
        model="demo", training_file=train, seed=3, hyperparameters={"n_epochs": 40, "batch_size": 2}
    )
    folder = killable.home / "s.files" / "jobs" / job.id
    until(client, job.id, "running", within_s=20)
    for number in range(4):
        time.sleep(draw.uniform(0.5, 3.5))
        if number % 2:
            killable.kill()
            was_alive = process.is_alive(folder)
            time.sleep(draw.uniform(0.0, 1.0))
            client = killable.start()
            ended = process.has_finished(folder, "sft")
            assert not was_alive or process.is_alive(folder) or ended  # it went on without the server
        elif process.is_alive(folder):
            os.killpg(int((folder / process.PID).read_text()), signal.SIGKILL)
    ended = until(client, job.id, "succeeded", "failed", within_s=150)
    assert ended.status == "succeeded", ended.error
    assert client.files.content(train).content == b"".join(json.dumps(row).encode() + b"\n" for row in [CHAT] * 64)
    told: list[Any] = list(client.fine_tuning.jobs.list_events(job.id, limit=100))
    steps = [event.data["step"] for event in reversed(told) if event.type == "metrics"]
    assert steps == sorted(set(steps)) and steps[-1] >= 0.9 * 40 * 32
    assert any("was killed" in event.message for event in told)
    hi: Any = [{"role": "user", "content": "hi"}]
    said = client.chat.completions.create(model=ended.fine_tuned_model, messages=hi, temperature=0, max_tokens=8)
    assert said.choices[0].message.content == "the reply"
    killable.kill(signal.SIGTERM)
    client = killable.start()
    said = client.chat.completions.create(model=ended.fine_tuned_model, messages=hi, temperature=0, max_tokens=8)
    assert said.choices[0].message.content == "the reply"


def test_a_process_stands_behind_the_server_within_its_limits_until_it_is_stopped(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ftjob-x"
    folder.mkdir()
    (folder / "job.toml").write_text('name = "ftjob-x"\n[sft]\ndata = "none.jsonl"\n')
    assert not process.is_alive(folder)
    child = process.start(folder, threads=1, memory=3 << 30)
    with pytest.raises(BlockingIOError):
        process.start(folder, threads=1, memory=3 << 30)
    end = time.monotonic() + 10
    while not (folder / process.PID).exists() and time.monotonic() < end:
        time.sleep(0.01)
    system = Path("/proc") / (folder / process.PID).read_text().strip()
    while b"lyceum" not in (system / "cmdline").read_bytes().split(b"\0")[:3] and time.monotonic() < end:
        time.sleep(0.01)
    limits = (system / "limits").read_text()
    assert re.search(rf"Max data size +{3 << 30} ", limits) and (system / "oom_score_adj").read_text().strip() == "500"
    assert os.getpriority(os.PRIO_PROCESS, int(system.name)) == 10 + os.getpriority(os.PRIO_PROCESS, 0)
    assert b"OMP_NUM_THREADS=1" in (system / "environ").read_bytes().split(b"\0")
    assert process.is_alive(folder)
    process.stop(folder)
    child.wait(timeout=10)
    assert not process.is_alive(folder) and not process.has_finished(folder, "sft")

    process.start(folder, threads=1, memory=3 << 30).wait(timeout=60)  # to its end, which is an error
    said = process.last_error(folder)
    assert said.startswith("[sft]") or "sft" in said, said
    assert "\nhint: " in said and not process.is_alive(folder)
