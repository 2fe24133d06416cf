"""What a fine-tuning job costs those who are answered meanwhile: the time between streamed tokens, with a job beside and without.

    python bench/serve_training.py runs/demo [--streams 1 4] [--tokens 200] [--rounds 3]
    python bench/serve_training.py runs/demo --short        # seconds: does it run at all?

A server (`lyceum serve`, with its usual settings for jobs) streams chat completions of a real model, read off plain sockets by
this process. In turn: the job paused, the job running (its process has written a step since). What counts is the median, over all
tokens of a turn, of the time between two events of a stream; the ratio is that of the medians over the rounds. The aim is 2.

The job learns from conversations that are drawn here, and is cancelled at the end; its epochs are many enough not to end before.
The store is a temporary one. What it is not: a measure of the job's own speed (`lyceum runs` shows that).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import openai

from lyceum import device

AIM = 2.0
WAIT_S = 120.0  # for a job's first step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder or a checkpoint's: the model that answers and is the job's base")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=200, help="of each answer, at most")
    parser.add_argument("--answers", type=int, default=5, help="of each stream in a turn, one after the other")
    parser.add_argument("--rounds", type=int, default=3, help="turns with and without the job; the median counts")
    parser.add_argument("--busy", type=float, default=0.3, help="refuse to measure above this share of others' work")
    parser.add_argument("--short", action="store_true", help="few tokens, one round, on any machine")
    options = parser.parse_args()
    if options.short:
        options.tokens, options.answers, options.rounds, options.streams, options.busy = 30, 1, 1, [1], 2.0
    busy = device.busy_share()
    if busy > options.busy:
        print(f"the machine is busy: others use {busy:.0%} of it; measured is on a quiet one", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as home:
        rows = measure(options, Path(home))
    print(
        f"{'streams':>8} {'alone ms':>9} {'beside ms':>10} {'ratio':>6}   median time between tokens; the aim is {AIM:g}"
    )
    for row in rows:
        print(f"{row['streams']:>8} {row['alone_ms']:>9.2f} {row['beside_ms']:>10.2f} {row['ratio']:>6.2f}")
    print(json.dumps({"rows": rows, "rounds": options.rounds, "machine": device.facts()}))
    return 0


def measure(options: argparse.Namespace, home: Path) -> list[dict[str, float]]:
    """A row for each number of streams."""
    command = [
        sys.executable,
        "-m",
        "lyceum",
        "serve",
        options.run,
        "--port",
        "0",
        "--store",
        str(home / "store.sqlite"),
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        found = re.search(r"http://127\.0\.0\.1:(\d+)", server.stdout.readline())
        assert found is not None, "the server did not start"
        port = int(found.group(1))
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", timeout=120)
        model = client.models.list().data[0].id
        file = client.files.create(file=("chats.jsonl", conversations()), purpose="fine-tune")
        many: Any = {"n_epochs": 50, "batch_size": 4}
        job = client.fine_tuning.jobs.create(model=model, training_file=file.id, hyperparameters=many).id
        turns: dict[int, list[tuple[float, float]]] = {number: [] for number in options.streams}
        for _ in range(options.rounds):
            for number in options.streams:
                client.fine_tuning.jobs.pause(job)
                time.sleep(2)  # its process ends
                alone = between(port, model, number, options)
                client.fine_tuning.jobs.resume(job)
                wait_for_a_step(client, job)
                turns[number].append((alone, between(port, model, number, options)))
                assert client.fine_tuning.jobs.retrieve(job).status == "running", "the job ended before the measurement"
        client.fine_tuning.jobs.cancel(job)
        return [{"streams": number, **compared(found)} for number, found in turns.items()]
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()


def compared(turns: list[tuple[float, float]]) -> dict[str, float]:
    """Medians of turns (seconds alone, seconds beside a job), in milliseconds, and their ratio."""
    alone, beside = (1000 * statistics.median(turn[side] for turn in turns) for side in (0, 1))
    return {"alone_ms": round(alone, 3), "beside_ms": round(beside, 3), "ratio": round(beside / alone, 3)}


def conversations(num: int = 400) -> bytes:
    """Something to learn from."""
    draw = random.Random(0)
    words = ["list", "string", "file", "path", "number", "set", "queue", "time", "thread", "module"]
    rows = []
    for _ in range(num):
        one, other = draw.choice(words), draw.choice(words)
        asked = {"role": "user", "content": f"What does a {one} do with a {other}?"}
        said = {"role": "assistant", "content": f"Arr, a {one} keeps its {other}, and a {other} keeps the {one}."}
        rows.append(json.dumps({"messages": [asked, said]}))
    return "\n".join(rows).encode()


def wait_for_a_step(client: openai.OpenAI, job: str) -> None:
    """Until the job has written a step that it had not written before."""

    def newest() -> str:
        return next(
            (one.id for one in client.fine_tuning.jobs.list_events(job, limit=20).data if one.type == "metrics"), ""
        )

    before, end = newest(), time.monotonic() + WAIT_S
    while newest() == before:
        if time.monotonic() > end:
            raise SystemExit("the job has made no step; its events say why")
        time.sleep(0.2)


def between(port: int, model: str, num_streams: int, options: argparse.Namespace) -> float:
    """The median time between two events with text, in seconds, over streams side by side."""
    gaps: list[float] = []

    def one(seed: int) -> None:
        for number in range(options.answers):
            times = stream(port, model, options.tokens, 100 * seed + number)
            gaps.extend(later - earlier for earlier, later in zip(times, times[1:], strict=False))

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(num_streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statistics.median(gaps)


def stream(port: int, model: str, max_tokens: int, seed: int) -> list[float]:
    """When each event of one streamed answer came."""
    body = {
        "model": model, "stream": True, "seed": seed, "max_tokens": max_tokens, "min_tokens": max_tokens,
        "messages": [{"role": "user", "content": "What does len do?"}],
    }  # fmt: skip
    content = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close"
    )
    times = []
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(f"{head}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
        while piece := connection.recv(65536):
            times += [time.perf_counter()] * piece.count(b'"content":')
    return times


if __name__ == "__main__":
    raise SystemExit(main())
