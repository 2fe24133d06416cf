"""The closed loop, through HTTP: people rank the answers of a served model, it is improved, and they like the new one better.

The simulated people have one taste: **the shorter answer is the better one**, and of two as long as each other they say "tie".
The model is schooled here, in about a minute. Control: the same answers with verdicts by a coin teach nothing.

    LYCEUM_RUN=runs/demo pytest -s -m slow tests/test_closed_loop.py      # the same with a copy of a run that you have
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nh3", reason="needs the extra lyceum[serve]")

from lyceum.corpus.records import read_conversations
from lyceum.evals.metrics import mean_interval
from lyceum.serve.store import Store

pytestmark = pytest.mark.slow
NUM_RANKED, NUM_ASKED, PEOPLE = 400, 200, 8
RUN = os.environ.get("LYCEUM_RUN", "")
RECIPE = Path(__file__).parent.parent / "recipes" / "smoke.toml"
PARAMETERS = {"max_tokens": 64, "temperature": 1.3}  # at 1 a model that knows its lesson says the same twice
SETTINGS = (f"lessons.practice={3 * (NUM_RANKED + NUM_ASKED)}", "lessons.held_out=12", "corpus.objects=60")


def lyceum(*words: str | Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lyceum", *map(str, words)]
    return subprocess.run(command, check=True, text=True, capture_output=True, timeout=600, **settings)


@contextmanager
def served(*words: str | Path) -> Iterator[int]:
    """The port of a server process."""
    command = [sys.executable, "-m", "lyceum", "serve", *map(str, words), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"at http://127\.0\.0\.1:(\d+)", line)
        assert found is not None, line
        yield int(found[1])
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130, -signal.SIGINT)
        process.stdout.close()


def asked(port: int, method: str, path: str, body: Any = None) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        sent = None if body is None else json.dumps(body).encode()
        connection.request(method, path, sent, {"content-type": "application/json"} if sent else {})
        answer = connection.getresponse()
        content = answer.read().decode()
        assert answer.status == 200, content
        return json.loads(content) if "json" in (answer.headers["content-type"] or "") else content
    finally:
        connection.close()


def taste(left: str, right: str) -> str:
    """What the simulated people say of two answers."""
    return "tie" if len(left) == len(right) else "left" if len(left) < len(right) else "right"


def judge(port: int, question: str) -> str:
    """One person asks the page something, reads both answers to the end, and says which is better."""
    chat = asked(port, "POST", "/api/conversations", {})["id"]
    turn = {"parent": None, "content": question, "models": ["tutor", "tutor"], "parameters": PARAMETERS}
    shown = asked(port, "POST", f"/api/conversations/{chat}/turns", turn)["messages"][1:]
    texts = []
    for message in shown:
        events = asked(port, "GET", f"/api/messages/{message['id']}/events")
        last = [line for line in events.split("\n\n") if line.startswith("data: {")][-1]
        texts.append(json.loads(last[6:])["message"]["content"])
    ids = {message["parameters"]["side"]: message["id"] for message in shown}
    verdict = taste(*texts)
    asked(port, "POST", "/api/comparisons", {**ids, "verdict": verdict, "consent": True})
    return verdict


def answer(port: int, model: str, question: str, seed: int) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 64, "seed": seed}
    return asked(port, "POST", "/v1/chat/completions", body)["choices"][0]["message"]["content"]


def preferred(port: int, new: str, questions: Sequence[str]) -> tuple[float, float, float]:
    """The share of questions on which the taste is for `new` and not for the old model (a tie is half), with its interval."""

    def one(number: int) -> float:
        texts = [answer(port, model, questions[number], number) for model in (new, "old")]
        return {"left": 1.0, "tie": 0.5, "right": 0.0}[taste(*texts)]

    return mean_interval(at_once(one, range(len(questions))))


def at_once(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(PEOPLE) as pool:
        return list(pool.map(work, items))


def fingerprint(port: int, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
    return asked(port, "POST", "/v1/chat/completions", body)["system_fingerprint"]


def wait_for_another(port: int, model: str, before: str) -> None:
    for _ in range(300):
        if fingerprint(port, model) != before:
            return
        time.sleep(0.1)
    raise AssertionError(f"{model} was never replaced")


def by_a_coin(store: Path) -> int:
    """Everybody judges again what they judged, half of it, by lot, the other way round; returns how many judgements there are."""
    opened = Store.open(store)
    try:
        judged = list(opened.judgements.everybodys())
        random.Random(0).shuffle(judged)
        for number, one in enumerate(judged):
            left, right = (said.message for said in one.answers)
            verdict = taste(*(said.said.content for said in one.answers))
            first = right if verdict == "right" else left
            best = first if number % 2 else left if first == right else right
            opened.judgements.compare(one.owner, [left, right], best, consent=True)
        return len(judged)
    finally:
        opened.close()


def test_a_model_becomes_what_people_prefer_and_a_coin_teaches_nothing(tmp_path: Path) -> None:
    run, control = tmp_path / "tutor", tmp_path / "control"
    if RUN:
        shutil.copytree(RUN, run)
    else:
        words = [word for setting in (*SETTINGS, 'name="tutor"') for word in ("--set", setting)]
        lyceum("run", RECIPE, "--until", "sft", "--runs", tmp_path, *words)
    shutil.copytree(run, control)
    found = {one.messages[-1].content: None for one in read_conversations(run / "lessons" / "prompts.jsonl")}
    questions = list(found)
    assert len(questions) >= NUM_RANKED + NUM_ASKED, len(questions)
    random.Random(1).shuffle(questions)
    ranked, fresh = questions[:NUM_RANKED], questions[NUM_RANKED : NUM_RANKED + NUM_ASKED]
    policy = run / ("ppo" if (run / "ppo").is_dir() else "sft")
    with served(run, "--model", f"control={control}", "--model", f"old={policy}") as port:
        before = {name: fingerprint(port, name) for name in ("tutor", "control")}
        verdicts = at_once(lambda question: judge(port, question), ranked)
        assert verdicts.count("tie") < NUM_RANKED / 2, "the model's own answers must differ in what people judge by"
        print(lyceum("improve", run).stdout)
        wait_for_another(port, "tutor", before["tutor"])
        shutil.copy(run / "store.sqlite", control / "store.sqlite")
        shutil.copy(run / "store.sqlite-wal", control / "store.sqlite-wal")
        assert by_a_coin(control / "store.sqlite") == NUM_RANKED
        lyceum("improve", control, "--offer", "always")
        wait_for_another(port, "control", before["control"])
        likes = {name: preferred(port, name, fresh) for name in ("tutor", "control")}
    print({verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))})
    print({name: [round(value, 3) for value in values] for name, values in likes.items()})
    closed = json.loads((run / "improve" / "1" / "improve.json").read_text())
    coin = json.loads((control / "improve" / "1" / "improve.json").read_text())
    assert closed["is_better"] and closed["is_offered"] and closed["implicit_interval"][0] > 0.5
    assert likes["tutor"][1] > 0.5, likes
    assert likes["control"][1] <= 0.5, likes
    assert not coin["is_better"], coin["why"]
