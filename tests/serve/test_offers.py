"""Models replaced while people are answered: no request is dropped, each answer is one model's, the old one's memory is freed."""

from __future__ import annotations

import json
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lyceum.engine.engine import Engine
from lyceum.errors import CheckpointError
from lyceum.model.checkpoint import save_checkpoint
from lyceum.model.transformer import Decoder
from lyceum.run import OFFER, Offer, write_json
from lyceum.serve.limits import Limits
from lyceum.serve.models import Served, load, serve
from lyceum.serve.offers import Offers
from lyceum.serve.service import Service
from lyceum.tokens.tokenizer import Tokenizer

READ = partial(load, max_batch=4)

OLD, NEW = "abcdefghijklmnopqrstuvwxyz0123456789", "ZYXWVUTSRQPONMLKJIHGFEDCBA9876543210"
ASK = {"model": "demo", "messages": [{"role": "user", "content": "hello"}], "stream": True}


def of(model: nn.Module, tokenizer: Tokenizer, name: str = "demo", fingerprint: str = "") -> Served:
    engine = Engine(model, max_batch=8, token_bytes=tokenizer.token_bytes)
    return serve(name, engine, tokenizer, fingerprint=fingerprint)


def said(events: list[Any]) -> str:
    return "".join(one["choices"][0]["delta"].get("content") or "" for one in events[:-1])


# -- while answers are under way --------------------------------------------------------------------------------------


def test_an_answer_ends_with_the_model_that_began_it_and_the_next_begins_with_the_new_one(
    start: Any, chain: Any, tokenizer: Tokenizer, read_events: Any
) -> None:
    old, new = chain(OLD), chain(NEW[:3])
    server = start(limits=Limits(), max_batch=8, demo=old)
    old.pause_s = 0.01
    with server.open_stream("/v1/chat/completions", ASK) as stream:
        text = b""
        while OLD[3].encode() not in text.partition(b"role")[2]:
            text += stream.recv(4096)
        server.service.replace(of(new, tokenizer))
        whole = server.post("/v1/chat/completions", ASK | {"stream": False}).json["choices"][0]["message"]["content"]
        assert whole == NEW[:3] and len(server.service.worker.seats) == 2  # it did not wait for the old one's end
        while b"[DONE]" not in text:
            text += stream.recv(4096)
    body = text.decode().partition("\r\n\r\n")[2]
    found = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    assert said([*found, "[DONE]"]) == OLD


def test_the_old_models_memory_is_freed_after_its_last_answer(start: Any, chain: Any, tokenizer: Tokenizer) -> None:
    old = chain(OLD)
    server = start(limits=Limits(), max_batch=8, demo=old)
    assert server.post("/v1/chat/completions", ASK | {"stream": False}).status == 200
    left = weakref.ref(old)
    del old
    server.service.replace(of(chain(NEW), tokenizer))
    end = time.monotonic() + 5
    while left() is not None and time.monotonic() < end:
        time.sleep(0.01)
    assert left() is None and len(server.service.worker.seats) == 1


def test_no_request_is_dropped_while_models_come_and_go(start: Any, chain: Any, tokenizer: Tokenizer) -> None:
    texts = [OLD, NEW, OLD[::-1], NEW[::-1]]
    server = start(limits=Limits(), max_batch=8, demo=chain(texts[0]))
    server.service.model("demo").engine.model.pause_s = 0.001
    is_over = threading.Event()
    found: list[str] = []

    def ask(_: int) -> None:
        while not is_over.is_set():
            answer = server.post("/v1/chat/completions", ASK | {"stream": False})
            assert answer.status == 200, answer.text
            found.append(answer.json["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask, number) for number in range(6)]
        for number in range(1, 13):
            model = chain(texts[number % 4])
            model.pause_s = 0.001
            server.service.replace(of(model, tokenizer))
            wait_for(lambda text=texts[number % 4]: found[-1:] == [text])  # type: ignore[misc]
        is_over.set()
        for one in asking:
            one.result(10)
    assert set(found) == set(texts)
    assert server.idle() and len(server.service.worker.seats) == 1


def test_a_request_that_was_let_in_before_is_answered_by_an_engine_that_has_left(
    start: Any, chain: Any, tokenizer: Tokenizer
) -> None:
    """The gap between finding a model and asking it: the seat comes back for that one reply, and leaves again."""
    from lyceum.engine.sampling import SamplingParams

    server = start(limits=Limits(), max_batch=8, demo=chain(OLD))
    service = server.service
    before = service.model("demo")
    service.replace(of(chain(NEW), tokenizer))
    end = time.monotonic() + 5
    while before.seat in service.worker.seats and time.monotonic() < end:
        time.sleep(0.005)
    assert before.seat not in service.worker.seats

    import asyncio

    async def ask() -> list[int]:
        assert before.chat is not None
        params = SamplingParams(5, temperature=0.0)
        from lyceum.corpus.records import Conversation, Message

        job = await service.open(before, [(before.chat.prompt(Conversation((Message("user", "hi"),))), params)])
        outputs = await job.outputs()
        job.close()
        return outputs[0].ids

    assert tokenizer.decode(asyncio.run(ask())) == OLD[:5]
    assert server.idle()
    while before.seat in service.worker.seats and time.monotonic() < end:
        time.sleep(0.005)
    assert before.seat not in service.worker.seats


# -- the file ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, decoder: Decoder, tokenizer: Tokenizer) -> Path:
    """A run with a model of its own and an improved one that nobody has offered yet."""
    for name, part in (("sft", 1.0), ("improve/1/preference", 0.5)):
        changed = Decoder(decoder.spec)
        changed.load_state_dict({key: value * part for key, value in decoder.state_dict().items()})
        save_checkpoint(tmp_path / name / "checkpoint", changed, tokenizer)
    write_json(tmp_path / "manifest.json", {"keys": {"sft": "k1"}})
    return tmp_path


def offer(run: Path, checkpoint: str = "improve/1/preference/checkpoint", key: str = "k1") -> None:
    write_json(run / OFFER, vars(Offer(checkpoint, "sft", key, "now")))


def own(run: Path) -> Path:
    return run / "sft" / "checkpoint"


def fake_service(served: Served) -> Any:
    """What offers need of a service: who was put in whose place."""
    models = {served.name: served}
    return SimpleNamespace(models=models, replace=lambda new: models.update({new.name: new}))


def test_what_is_offered_is_taken_up_withdrawn_and_read_once(run: Path, capsys: pytest.CaptureFixture) -> None:
    offers = Offers({"demo": (run, own(run))}, READ)
    service = fake_service(offers.first("demo"))
    first = service.models["demo"]
    offers.look(service)
    assert service.models["demo"] is first
    offer(run)
    offers.look(service)
    second = service.models["demo"]
    assert second is not first and second.fingerprint != first.fingerprint and second.name == "demo"
    offers.look(service)
    assert service.models["demo"] is second  # the same file is not read again
    (run / OFFER).unlink()
    offers.look(service)
    assert service.models["demo"].fingerprint == first.fingerprint
    assert "answers from now on" in capsys.readouterr().err


def test_a_folder_that_does_not_load_changes_nothing_and_is_said_once(run: Path, capsys: pytest.CaptureFixture) -> None:
    offers = Offers({"demo": (run, own(run))}, READ)
    service = fake_service(offers.first("demo"))
    first = service.models["demo"]
    weights = run / "improve/1/preference/checkpoint/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    offer(run)
    offers.look(service)
    offers.look(service)
    assert service.models["demo"] is first
    assert capsys.readouterr().err.count("cannot be loaded") == 1
    shutil.copy(own(run) / "model.safetensors", weights)  # mended, and offered anew
    offer(run)
    offers.look(service)
    assert service.models["demo"] is not first


def test_a_server_begins_with_what_is_offered_or_else_with_its_own(run: Path, capsys: pytest.CaptureFixture) -> None:
    offer(run)
    offers = Offers({"demo": (run, own(run))}, READ)
    assert (
        offers.first("demo").fingerprint != Offers({"demo": (run / "none", own(run))}, READ).first("demo").fingerprint
    )
    assert offers.served["demo"] == run / "improve/1/preference/checkpoint"
    (run / "improve/1/preference/checkpoint/model.safetensors").write_bytes(b"broken")
    offers = Offers({"demo": (run, own(run))}, READ)
    offers.first("demo")
    assert offers.served["demo"] == own(run) and "is served" in capsys.readouterr().err
    with pytest.raises(CheckpointError):
        Offers({"demo": (run, run / "nowhere")}, READ).first("demo")


def test_an_offer_of_a_run_that_was_made_anew_is_passed_over(run: Path, capsys: pytest.CaptureFixture) -> None:
    offer(run, key="k0")
    offers = Offers({"demo": (run, own(run))}, READ)
    offers.first("demo")
    assert offers.served["demo"] == own(run) and "before the recipe changed" in capsys.readouterr().err


def test_a_running_server_notices(run: Path, tokenizer: Tokenizer, decoder: Decoder) -> None:
    offers = Offers({"demo": (run, own(run))}, READ, every_s=0.01)
    service = Service([offers.first("demo")])
    service.start()
    offers.follow(service)
    try:
        before = service.model("demo").fingerprint
        offer(run)
        wait_for(lambda: service.model("demo").fingerprint != before)
        wait_for(lambda: len(service.worker.seats) == 1)
        weight = next(service.model("demo").engine.model.parameters())
        assert torch.equal(weight.cpu(), next(decoder.parameters()) * 0.5)
    finally:
        offers.close()
        service.stop()


def wait_for(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)
