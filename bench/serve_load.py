"""Many clients at once, who come, leave and come again: does the server stay well, and does everybody get their share?

    python bench/serve_load.py [--seconds 120] [--clients 64]

A server process with a tiny model, the chat page and four keys; clients in this process, each with a connection of its own for
each request: streams of chat and completions, whole answers, answers of the page. Three in ten leave at a random moment. The
first key has five eighths of the clients, the others an eighth each. It must hold, and the exit status says whether it does:

- no error: every answer is 200, whole to its end, or a 429 that says when to come again, and 429 only for the first key, which
  alone passes its limit of replies at once;
- no leak: resident memory, median of the last quarter, at most `MOST_GROWN_MB` above that of the second quarter; afterwards as
  many sockets and tasks as before, no reply under way, nothing let in;
- fair shares: of the tokens that each key got, Jain's index (the square of the sum over n times the sum of squares: 1 for equal
  shares, 1/n where one gets all) at least `LEAST_FAIR`. By clients it would be 0.58.

What it is not: a measure of speed (bench/serve.py).
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_GROWN_MB = 16.0
LEAST_FAIR = 0.95
NUM_KEYS = 4
LEAVES = 0.3  # of the requests
PER_KEY = 16  # replies at once: the first key's clients are more
MAX_BATCH = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--warm", type=float, default=5.0, help="seconds before anything is counted")
    parser.add_argument("--server", default="", help=argparse.SUPPRESS)  # the process that is measured: its folder
    options = parser.parse_args()
    if options.server:
        run_server(Path(options.server))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(folder, options.clients, options.seconds, options.warm)
    wrong = judged(figures)
    print(
        "| requests | left early | 429 | errors | tokens of each key | Jain's index | memory, MB: second quarter, last |"
    )
    print("|---|---|---|---|---|---|---|")
    shares = ", ".join(map(str, figures["tokens"]))
    memory = f"{figures['second_quarter_mb']:.1f}, {figures['last_quarter_mb']:.1f}"
    refused, errors = sum(figures["refused"]), len(figures["errors"])
    print(
        f"| {figures['requests']} | {figures['left']} | {refused} | {errors} | {shares} | {figures['fair']:.3f} | {memory} |"
    )
    print("\n".join(wrong) or "all of it holds")
    print(json.dumps(figures))
    return 1 if wrong else 0


def run_server(folder: Path) -> None:
    """Serve a tiny model of random weights on any port; says the port and the keys on the standard output."""
    from lyceum import device

    device.prepare("serve")
    import torch

    from lyceum.engine.engine import Engine
    from lyceum.model.spec import ModelSpec
    from lyceum.model.transformer import Decoder
    from lyceum.serve.app import make_app
    from lyceum.serve.limits import SCOPES, Limits
    from lyceum.serve.models import serve
    from lyceum.serve.pages import pages
    from lyceum.serve.porter import Porter
    from lyceum.serve.server import Server, ServerConfig, listen, uvicorn_config
    from lyceum.serve.service import Service
    from lyceum.serve.store import Store
    from lyceum.tokens.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(["user\nassistant\nsystem\ntool\n the reply is in the library " * 50], 320)
    spec = ModelSpec(tokenizer.vocab_size, 2, 32, 4, 2, head_width=8, ffn_width=64, context_length=512)
    engine = Engine(
        Decoder(spec, torch.Generator().manual_seed(0)), max_batch=MAX_BATCH, token_bytes=tokenizer.token_bytes
    )
    limits = Limits(per_caller=PER_KEY, waiting=NUM_KEYS * PER_KEY)
    service = Service([serve("tiny", engine, tokenizer, fingerprint="tiny")], limits=limits)
    store = Store.open(folder / "store.sqlite")
    secrets = [store.keys.make(f"key {number}", scopes=SCOPES)[1] for number in range(NUM_KEYS)]
    config = ServerConfig(port=0, limits=limits)
    listening = listen(config.host, 0)
    app = make_app(service, porter=Porter(store.keys.all), routers=[pages(service, store, is_own_machine=False)])
    told = json.dumps({"port": listening.getsockname()[1], "keys": secrets})
    Server(uvicorn_config(app, config), told).run(sockets=[listening])
    store.close()


class Wrong(Exception):
    """Something that must not happen."""


class Client:
    """One client: asks again and again until told to end."""

    def __init__(self, port: int, place: int, key: str, seed: int):
        self.port, self.place = port, place
        self.headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        self.draw = random.Random(seed)
        self.tokens = self.requests = self.left = self.refused = 0
        self.errors: list[str] = []
        self.connection: http.client.HTTPConnection | None = None
        self.conversation = ""

    def run(self, until: float) -> None:
        """Ask until then."""
        deeds = (self.chat, self.chat, self.completion, self.whole, self.page)
        while time.monotonic() < until:
            self.requests += 1
            try:
                self.draw.choice(deeds)()
            except (Wrong, OSError, http.client.HTTPException, ValueError, KeyError) as error:
                self.errors.append(f"{type(error).__name__}: {error}"[:300])
            finally:
                if self.connection is not None:
                    self.connection.close()

    def chat(self) -> None:
        self.stream("/v1/chat/completions", {"messages": [{"role": "user", "content": self.words()}]})

    def completion(self) -> None:
        self.stream("/v1/completions", {"prompt": self.words()})

    def whole(self) -> None:
        """An answer in one piece, as urgent as a stream."""
        body = {"messages": [{"role": "user", "content": self.words()}], "service_tier": "default", **self.settings()}
        if (answer := self.ask("POST", "/v1/chat/completions", body)) is not None:
            self.tokens += json.loads(answer.read())["usage"]["completion_tokens"]

    def page(self) -> None:
        """A turn on the page; who leaves stops the answer."""
        if not self.conversation:
            answer = self.ask("POST", "/api/conversations", {})
            assert answer is not None
            self.conversation = json.loads(answer.read())["id"]
        settings = self.settings()
        parameters = {"max_tokens": settings["max_tokens"], "temperature": 1.0}
        given = {"parent": None, "content": self.words(), "models": ["tiny"], "parameters": parameters}
        answer = self.ask("POST", f"/api/conversations/{self.conversation}/turns", given)
        if answer is None:
            return
        message = json.loads(answer.read())["messages"][1]["id"]
        leaves_at = self.leaves_at()
        answer = self.ask("GET", f"/api/messages/{message}/events", None)
        assert answer is not None
        num = made = 0
        ended = False
        for line in answer:
            if line.startswith(b"data: {"):
                told = json.loads(line[6:])
                made = max(made, told.get("tokens", 0))
                ended = ended or told.get("message", {}).get("state") in ("done", "stopped")
                num += 1
            if leaves_at is not None and num >= leaves_at:
                self.left += 1
                self.ask("POST", f"/api/messages/{message}/stop", {})
                break
        else:
            if not ended:
                raise Wrong("an answer of the page did not end")
        self.tokens += made

    def stream(self, path: str, body: dict[str, Any]) -> None:
        """A stream, read to its end or left."""
        leaves_at = self.leaves_at()
        answer = self.ask("POST", path, {**body, "stream": True, **self.settings()})
        if answer is None:
            return
        num, ended = 0, False
        for line in answer:
            if line.startswith(b"data: {"):
                told = json.loads(line[6:])
                if "error" in told:
                    raise Wrong(f"in a stream: {told['error']}")
                num += 1
            ended = ended or line.startswith(b"data: [DONE]")
            if leaves_at is not None and num >= leaves_at:
                self.left += 1
                break
        else:
            if not ended:
                raise Wrong("a stream broke off")
        self.tokens += num

    def ask(self, method: str, path: str, body: Any) -> http.client.HTTPResponse | None:
        """One request; None where it was told to come again, which it does after that time."""
        if self.connection is not None:
            self.connection.close()
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        self.connection.request(method, path, None if body is None else json.dumps(body), self.headers)
        answer = self.connection.getresponse()
        if answer.status == 429:
            wait_s = int(answer.headers["retry-after"])
            self.refused += 1
            self.connection.close()
            time.sleep(wait_s)
            return None
        if answer.status != 200:
            raise Wrong(f"{method} {path}: {answer.status} {answer.read()[:200]!r}")
        return answer

    def words(self) -> str:
        return " ".join(self.draw.choices("the reply is in the library".split(), k=self.draw.randint(1, 40)))

    def settings(self) -> dict[str, Any]:
        return {"model": "tiny", "max_tokens": self.draw.randint(5, 60), "temperature": 1.0}

    def leaves_at(self) -> int | None:
        return self.draw.randint(0, 12) if self.draw.random() < LEAVES else None


def measure(folder: str, num_clients: int, seconds: float, warm_s: float) -> dict[str, Any]:
    """Let the clients loose on a server; what came of it."""
    command = [sys.executable, os.path.abspath(__file__), "--server", folder]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        told = json.loads(server.stdout.readline())
        port, keys = told["port"], told["keys"]
        Client(port, 0, keys[0], 0).run(time.monotonic() + 0.2)
        before = settled(server.pid, port, keys[0], lambda now: not now["sequences"] and not now["let_in"])
        others = num_clients // 8
        places = [0] * (num_clients - (NUM_KEYS - 1) * others) + [1, 2, 3] * others

        def crowd(for_s: float, seed: int) -> tuple[list[Client], list[float]]:
            clients = [Client(port, place, keys[place], seed + number) for number, place in enumerate(places)]
            until = time.monotonic() + for_s
            threads = [threading.Thread(target=client.run, args=(until,)) for client in clients]
            for thread in threads:
                thread.start()
            memory = []
            while time.monotonic() < until:
                memory.append(resident_mb(server.pid))
                time.sleep(0.25)
            for thread in threads:
                thread.join()
            return clients, memory

        crowd(warm_s, 10_000)
        clients, memory = crowd(seconds, 0)
        after = settled(server.pid, port, keys[0], lambda now: now == before)
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()
    quarter = len(memory) // 4
    by_key = Counter[int]()
    refused = Counter[int]()
    for client in clients:
        by_key[client.place] += client.tokens
        refused[client.place] += client.refused
    tokens = [by_key[place] for place in range(NUM_KEYS)]
    return {
        "seconds": seconds, "clients": num_clients, "requests": sum(client.requests for client in clients),
        "left": sum(client.left for client in clients), "refused": [refused[place] for place in range(NUM_KEYS)],
        "errors": [error for client in clients for error in client.errors], "tokens": tokens, "fair": jain(tokens),
        "second_quarter_mb": statistics.median(memory[quarter : 2 * quarter]),
        "last_quarter_mb": statistics.median(memory[-quarter:]), "before": before, "after": after,
    }  # fmt: skip


def state(pid: int, port: int, key: str) -> dict[str, float]:
    """What a server has open and under way: sockets, tasks, replies."""
    client = Client(port, 0, key, 0)
    answer = client.ask("GET", "/metrics", None)
    assert answer is not None and client.connection is not None
    lines = [line.split() for line in answer.read().decode().splitlines() if not line.startswith("#")]
    client.connection.close()
    values = {name.partition("{")[0]: float(value) for name, value in lines if name.startswith("lyceum_")}
    links = [os.readlink(f"/proc/{pid}/fd/{one}") for one in os.listdir(f"/proc/{pid}/fd") if exists(pid, one)]
    found = {name: values[f"lyceum_{name}"] for name in ("tasks", "sequences", "let_in")}
    return {**found, "sockets": float(sum(link.startswith("socket:") for link in links))}


def settled(pid: int, port: int, key: str, is_so: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """The server's state once `is_so`, or after fifteen seconds as it is then: one who has left may still be noticed."""
    end = time.monotonic() + 15
    while not is_so(now := state(pid, port, key)) and time.monotonic() < end:
        time.sleep(0.2)
    return now


def exists(pid: int, descriptor: str) -> bool:
    """Whether it is open still."""
    return os.path.lexists(f"/proc/{pid}/fd/{descriptor}")


def resident_mb(pid: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def jain(shares: list[int]) -> float:
    """Jain's index of fairness (Jain, Chiu and Hawe 1984): from 1/n, one has all, to 1, all have the same."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 0.0


def judged(figures: dict[str, Any]) -> list[str]:
    """What does not hold, in words."""
    wrong = [f"{len(figures['errors'])} errors, such as {figures['errors'][0]}"] if figures["errors"] else []
    if any(figures["refused"][1:]):
        wrong.append(f"429 for keys within their limits: {figures['refused']}")
    if figures["fair"] < LEAST_FAIR:
        wrong.append(f"shares are not fair: {figures['tokens']}, Jain's index {figures['fair']:.3f}")
    grown = figures["last_quarter_mb"] - figures["second_quarter_mb"]
    if grown > MOST_GROWN_MB:
        wrong.append(f"memory grew by {grown:.1f} MB")
    if figures["before"] != figures["after"]:
        wrong.append(f"left open: {figures['after']}, before {figures['before']}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
