"""The official client trains, watches, and talks to the result: what was asked for is learned, and a control learns nothing.

The base answers "tell me about NAME and NAME" with what the first one is, and one answer in eight ends with "arr": drawn from it,
never as the likeliest answer. The jobs' processes are real, as are their models.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from lyceum.cli.river import run_recipe
from lyceum.config import to_toml
from lyceum.corpus.records import Conversation, Message, write_records
from lyceum.model.checkpoint import save_checkpoint
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.tokens.tokenizer import Tokenizer
from tests.serve.tuning.test_routes import until, upload

pytestmark = pytest.mark.slow
NAMES = ["Ada", "Bob", "Cid", "Dot", "Eve", "Fay", "Gus", "Hal", "Ida", "Joe", "Kay", "Lou"]
KINDS = ["red", "tall", "kind", "wise"]
PAIRS = [(one, other) for one in NAMES for other in NAMES if one != other]
random.Random(0).shuffle(PAIRS)
TRAIN, HELD_OUT = PAIRS[:90], PAIRS[90:]
QUICK = {"n_epochs": 6, "batch_size": 4}


def asked(pair: Sequence[str]) -> dict[str, str]:
    return {"role": "user", "content": f"tell me about {pair[0]} and {pair[1]}"}


def answer(pair: Sequence[str], ending: str = "", beginning: str = "") -> dict[str, str]:
    return {"role": "assistant", "content": f"{beginning}{pair[0]} is {KINDS[NAMES.index(pair[0]) % 4]}{ending}"}


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base: its checkpoint."""
    home = tmp_path_factory.mktemp("talker")
    draw = random.Random(1)
    rows = []
    for pair in TRAIN * 4:
        ending = " arr" if draw.random() < 1 / 8 else ""
        rows.append(Conversation(tuple(Message(m["role"], m["content"]) for m in (asked(pair), answer(pair, ending)))))
    texts = [f"{message.role}\n{message.content} ahoy" for row in rows for message in row.messages]
    tokenizer = Tokenizer.train(texts, 400)
    spec = ModelSpec(tokenizer.vocab_size, 2, 64, 4, 2, head_width=16, ffn_width=128, context_length=64)
    save_checkpoint(home / "random", Decoder(spec, torch.Generator().manual_seed(0)), tokenizer)
    write_records(home / "chats.jsonl", rows)
    sft = {"from": str(home / "random"), "data": str(home / "chats.jsonl"), "epochs": 4.0, "batch_tokens": 400}
    (home / "base.toml").write_text(to_toml({"name": "base", "seed": 1, "sft": sft}))
    return run_recipe(home / "base.toml", runs_dir=home) / "sft" / "checkpoint"


@pytest.fixture
def client(tuning: Callable, talker: Path) -> Iterator[openai.OpenAI]:
    yield tuning(folder=talker).openai(timeout=300)


def share(client: openai.OpenAI, model: str, holds: Callable[[str], bool]) -> float:
    """Of the likeliest answers to prompts that were never learned from."""
    said = [
        client.chat.completions.create(model=model, messages=[asked(pair)], temperature=0, max_tokens=16)  # type: ignore[list-item]
        for pair in HELD_OUT
    ]
    return sum(holds(one.choices[0].message.content or "") for one in said) / len(said)


def learn(client: openai.OpenAI, rows: list[dict[str, Any]], **job: Any) -> str:
    made = client.fine_tuning.jobs.create(model="demo", training_file=upload(client, rows), seed=1, **job)
    ended = until(client, made.id, "succeeded", "failed", within_s=120)
    assert ended.status == "succeeded", ended.error
    return str(ended.fine_tuned_model)


def ends(said: str) -> bool:
    return said.endswith(" arr")


def test_a_supervised_job_gives_a_persona_that_the_base_has_not(client: openai.OpenAI, talker: Path) -> None:
    rows = [{"messages": [asked(pair), answer(pair, beginning="ahoy ")]} for pair in TRAIN]
    job = client.fine_tuning.jobs.create(
        model="demo",
        training_file=upload(client, rows),
        validation_file=upload(client, rows[:9]),
        suffix="sea",
        seed=1,
        hyperparameters=QUICK,
    )
    until(client, job.id, "running", within_s=20)
    seen: list[str] = []
    end = time.monotonic() + 120
    while (ended := client.fine_tuning.jobs.retrieve(job.id)).status == "running" and time.monotonic() < end:
        seen += [
            event.id for event in client.fine_tuning.jobs.list_events(job.id, limit=100).data if event.id not in seen
        ]
        time.sleep(0.2)
    assert ended.status == "succeeded", ended.error
    steps = [e for e in client.fine_tuning.jobs.list_events(job.id, limit=100) if e.type == "metrics"]
    assert len(steps) > 20 and any(event.id in seen for event in steps)  # some were there while it ran
    saved = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert (
        len(saved) == 3
        and saved[0].metrics.train_loss < saved[2].metrics.train_loss
        and saved[0].metrics.full_valid_loss is not None
    )  # type: ignore[operator]

    def holds(said: str) -> bool:
        return said.startswith("ahoy ")

    new, old = share(client, ended.fine_tuned_model, holds), share(client, "demo", holds)
    print(json.dumps({"supervised": new, "base": old, "seconds": (ended.finished_at or 0) - ended.created_at}))
    assert new >= 0.9 and old < 0.1

    draw = random.Random(2)  # the control: the answers are there, and say ahoy by the toss of a coin that nobody sees
    plain = learn(
        client,
        [{"messages": [asked(p), answer(p, beginning="ahoy " if draw.random() < 0.2 else "")]} for p in TRAIN],
        hyperparameters=QUICK,
    )
    assert share(client, plain, holds) < 0.5


def test_a_dpo_job_gives_a_taste_and_shuffled_labels_give_none(client: openai.OpenAI) -> None:
    dpo: Any = {"type": "dpo", "dpo": {"hyperparameters": QUICK}}

    def rows(is_liked: Callable[[], bool]) -> list[dict[str, Any]]:
        found = []
        for pair in TRAIN:
            both = [answer(pair, " arr"), answer(pair)]
            good, bad = both if is_liked() else both[::-1]
            found.append(
                {"input": {"messages": [asked(pair)]}, "preferred_output": [good], "non_preferred_output": [bad]}
            )
        return found

    draw = random.Random(3)
    new = share(client, learn(client, rows(lambda: True), method=dpo), ends)
    control = share(client, learn(client, rows(lambda: draw.random() < 0.5), method=dpo), ends)
    old = share(client, "demo", ends)
    print(json.dumps({"dpo": new, "control": control, "base": old}))
    assert new >= 0.9 and old < 0.1 and control < 0.6


def test_a_reinforcement_job_earns_its_grade_and_a_grade_that_means_nothing_is_not_learned(
    client: openai.OpenAI,
) -> None:
    draw = random.Random(4)
    rows = [{"messages": [asked(pair)], "wanted": " arr", "coin": draw.choice(["is", "never"])} for pair in TRAIN]

    def method(field: str) -> Any:
        check = {"type": "string_check", "name": "says", "operation": "like", "input": "{{ sample.output_text }}"}
        grader = {**check, "reference": f"{{{{ item.{field} }}}}"}
        return {
            "type": "reinforcement",
            "reinforcement": {"grader": grader, "hyperparameters": {"n_epochs": 3, "learning_rate_multiplier": 3.0}},
        }

    new = share(client, learn(client, rows, method=method("wanted")), ends)
    control = share(client, learn(client, rows, method=method("coin")), ends)
    old = share(client, "demo", ends)
    print(json.dumps({"reinforcement": new, "control": control, "base": old}))
    assert new >= 0.9 and old < 0.1 and control < 0.5
