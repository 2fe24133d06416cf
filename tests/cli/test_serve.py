"""`lyceum serve`: what it serves and under which names; and a process of its own, asked by the official client."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from lyceum.cli import serve
from lyceum.cli.main import main, make_parser
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams
from lyceum.errors import RunError, UsageError
from lyceum.model.checkpoint import load_checkpoint, save_checkpoint
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.serve import server
from lyceum.serve.database import Database
from lyceum.serve.keys import Keys, match
from lyceum.tokens.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of random weights."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    tokenizer = Tokenizer.train(["user\nassistant\nsystem\ntool\n the reply is in the library " * 50], 320)
    spec = ModelSpec(tokenizer.vocab_size, 2, 32, 4, 2, head_width=8, ffn_width=64, context_length=256)
    decoder = Decoder(spec, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight in decoder.parameters():
            weight *= 5 if weight.dim() > 1 else 1
    save_checkpoint(folder, decoder, tokenizer)
    return folder


def asked(*words: str) -> argparse.Namespace:
    return make_parser().parse_args(["serve", *words])


def test_models_have_the_names_they_are_given_or_their_folders(checkpoint: Path, monkeypatch: Any) -> None:
    found: dict[str, Any] = {}
    monkeypatch.setattr(server, "serve", lambda folders, config: found.update(folders=folders, config=config))
    serve.serve(asked(str(checkpoint), "--model", f"a/b={checkpoint}", "--port", "0", "--max-tokens", "9", "--compile"))
    assert found["folders"] == {"demo": checkpoint, "a/b": checkpoint} and next(iter(found["folders"])) == "demo"
    assert found["config"].host == "127.0.0.1" and found["config"].limits.max_tokens == 9
    assert found["config"].swift
    for words in ([], ["--model", "x"], ["--model", "=y"], [str(checkpoint), "--model", f"demo={checkpoint}"]):
        with pytest.raises(UsageError):
            serve.serve(asked(*words))
    with pytest.raises(RunError):
        serve.serve(asked("nowhere"))


def test_keys_are_made_listed_renamed_and_revoked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    place = str(tmp_path)

    def said(*words: str) -> str:
        assert main(["keys", words[0], place, *words[1:]]) == 0
        return str(capsys.readouterr().out).strip()

    secret = said("new", "ann", "--scope", "models", "--days", "2")
    database = Database.open(place, must_exist=True)
    keys = Keys(database)
    key = match(keys.all(), secret)
    assert key is not None and key.name == "ann" and key.scopes == ("models",) and key.expires > 0
    second = said("new", "bob", "--owner", key.owner)
    other = match(keys.all(), second)
    assert other is not None and other.owner == key.id and other.scopes == ("models", "inference") and not other.expires
    lines = said("list").splitlines()
    assert [line.split()[:2] for line in lines] == [[key.id, "ann"], [other.id, "bob"]] and secret not in str(lines)
    assert "phone" in said("rename", other.id, "phone") and "ended" in said("revoke", other.id)
    assert [one.has_ended for one in keys.all()] == [False, True]
    said("forget", other.id)
    assert said("forget", key.id).endswith("nobody is asked for one") and said("list").startswith("no keys")
    database.close()
    assert main(["keys", "new", str(tmp_path / "nowhere"), "ann"]) == 2
    assert main(["keys", "list", str(tmp_path / "nowhere.sqlite")]) == 1
    assert main(["keys", "new", place, "ann", "--scope", "everything"]) == 1
    assert not (tmp_path / "nowhere").exists() and not (tmp_path / "nowhere.sqlite").exists()


def test_a_public_address_without_a_key_is_refused(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["serve", str(checkpoint), "--host", "0.0.0.0"]) == 2
    assert "there is no key" in capsys.readouterr().err


# -- a process ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def address(checkpoint: Path) -> Iterator[str]:
    """Where a server process listens; it is ended by SIGINT, as Ctrl-C does, and must leave cleanly."""
    command = [sys.executable, "-m", "lyceum", "serve", str(checkpoint), "--port", "0", "--model", f"two={checkpoint}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"serving demo, two at (http://127\.0\.0\.1:\d+)", line)
    assert found is not None, line
    yield found[1]
    process.send_signal(signal.SIGINT)
    assert process.wait(30) in (0, 130, -signal.SIGINT)
    process.stdout.close()


@pytest.mark.slow
def test_the_official_client_talks_to_a_process(address: str, checkpoint: Path) -> None:
    """Everything goes through: the list, chat, streams, completions, logprobs, errors; the replies are the engine's own."""
    loaded = load_checkpoint(checkpoint)
    engine = Engine(loaded.model, token_bytes=loaded.tokenizer.token_bytes)
    row = loaded.tokenizer.encode("the reply")
    params = SamplingParams(12, temperature=0.0, stop_ids=loaded.tokenizer.stop_ids)
    (output,) = engine.generate([row], params)
    with openai.OpenAI(base_url=address + "/v1", api_key="any") as client:
        assert [model.id for model in client.models.list()] == ["demo", "two"]
        for name in ("demo", "two"):
            found = client.completions.create(model=name, prompt="the reply", max_tokens=12, temperature=0)
            assert found.choices[0].text == loaded.tokenizer.decode(output.ids)
        scores = (
            client.completions.create(model="demo", prompt=row, max_tokens=1, echo=True, logprobs=1).choices[0].logprobs
        )
        assert scores.token_logprobs[1:-1] == pytest.approx(engine.score([row])[0], abs=1e-4)
        ask: dict[str, Any] = {
            "model": "demo",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 20,
            "seed": 1,
        }
        whole = client.chat.completions.create(**ask)
        pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(stream=True, **ask)]
        assert "".join(pieces) == whole.choices[0].message.content and len(pieces) > 3
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**{**ask, "temperature": 9})
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("three")
        first = client.responses.create(model="demo", input="hi", max_output_tokens=5)
        more = client.responses.create(model="two", input="more", previous_response_id=first.id, max_output_tokens=5)
        assert client.responses.retrieve(more.id).usage.input_tokens > first.usage.total_tokens
        line = json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": ask}) + "\n"
        others = line.replace('"custom_id": "1"', '"custom_id": "%d"')
        for text in (line, "".join(others % number for number in range(500))):
            file = client.files.create(file=("lines.jsonl", text.encode()), purpose="batch").id
            batch = client.batches.create(input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h")
            if text == line:
                while batch.status != "completed":
                    batch = client.batches.retrieve(batch.id)
                body = json.loads(client.files.content(batch.output_file_id).text)["response"]["body"]
                assert body["choices"][0]["message"]["content"] == whole.choices[0].message.content
        client.responses.create(model="demo", input="hi", background=True)  # and under way, the server leaves
