"""What a folder says of what its model can do, and embeddings where it is a model for them."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from lyceum.engine.engine import Engine
from lyceum.errors import CheckpointError
from lyceum.model.checkpoint import save_checkpoint
from lyceum.model.heads import ScoreModel
from lyceum.model.lineage import learned
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import write_json
from lyceum.serve.models import Pooling, load, read_pooling
from lyceum.tokens.tokenizer import Tokenizer


@pytest.fixture
def run(tmp_path: Path, decoder: Decoder, tokenizer: Tokenizer) -> Callable[..., Path]:
    """Write checkpoints of a run: section -> what its lyceum.json says. Returns the run's folder."""

    def write(**sections: dict[str, Any]) -> Path:
        for name, info in sections.items():
            save_checkpoint(tmp_path / name / "checkpoint", decoder, tokenizer, info)
        return tmp_path

    return write


def test_a_checkpoint_becomes_a_model(run: Callable, tokenizer: Tokenizer) -> None:
    folder = run(sft={"stage": "sft"}) / "sft" / "checkpoint"
    served = load("tutor", folder, max_batch=2)
    assert served.name == "tutor" and served.chat is not None and served.pooling is None and not served.can_insert
    assert served.context_length == 1024 and served.engine.max_batch == 2
    assert not served.engine.swift and load("tutor", folder, max_batch=2, swift=True).engine.swift
    shown = served.to_json()
    assert shown["id"] == "tutor" and shown["object"] == "model" and shown["created"] > 1.7e9
    before = served.fingerprint
    (folder / "model.safetensors").touch()
    assert load("tutor", folder, max_batch=2).fingerprint != before


def test_a_model_tells_its_line_and_no_folder(run: Callable) -> None:
    documents, people = (
        learned("documents", 9, "corpus", part="docs"),
        learned("rankings", 3, "people.jsonl", origins={"human": 3}),
    )
    folder = run(
        pretrain={"stage": "pretrain", "parent": None, "learned_from": [documents]},
        better={"stage": "preference", "parent": "pretrain/checkpoint", "learned_from": [people, {"kind": "lies"}]},
    )  # fmt: skip
    served = load("tutor", folder / "better" / "checkpoint", max_batch=1)
    line = [
        {"model": "pretrain", "stage": "pretrain", "data": [documents]},
        {"model": "better", "stage": "preference", "data": [people]},
    ]
    shown = served.to_json()
    assert shown["parent"] == "pretrain" and shown["learned_from"] == line and str(folder) not in json.dumps(shown)
    alone = load("base", folder / "pretrain" / "checkpoint", max_batch=1).to_json()
    assert alone["parent"] is None and alone["learned_from"] == line[:1]


def test_the_official_client_takes_the_line_beside_its_own_fields(start: Callable, decoder: Decoder) -> None:
    line = [
        {"model": "base", "stage": "", "data": []},
        {"model": "sft", "stage": "sft", "data": [learned("ratings", 2, "x")]},
    ]
    server = start(m=decoder, lineage=line)
    model = server.openai().models.retrieve("m")
    assert model.id == "m" and model.object == "model" and model.owned_by == "lyceum"
    assert model.parent == "base" and model.learned_from == line  # type: ignore[attr-defined]
    assert [one.id for one in server.openai().models.list()] == ["m"]


def test_insert_is_inherited_from_the_stage_that_learned_it(run: Callable) -> None:
    learned, not_learned = {"infill_rate": 0.5}, {"infill_rate": 0.0}
    folder = run(
        pretrain={"stage": "pretrain", "settings": learned},
        sft={"stage": "sft", "parent": "pretrain/checkpoint", "settings": {}},
        ppo={"stage": "ppo", "parent": "sft/checkpoint", "settings": {}},
        other={"stage": "pretrain", "settings": not_learned},
        lost={"stage": "sft", "parent": "gone/checkpoint", "settings": {}},
        foreign={},
    )
    found = {name: load(name, folder / name / "checkpoint", max_batch=1).can_insert for name in (
        "pretrain", "sft", "ppo", "other", "lost", "foreign")}  # fmt: skip
    assert found == {"pretrain": True, "sft": True, "ppo": True, "other": False, "lost": False, "foreign": True}


def test_what_gives_no_text_is_refused(run: Callable, tmp_path: Path, tokenizer: Tokenizer) -> None:
    spec = ModelSpec(tokenizer.vocab_size, 1, 32, 2, 1, head_width=16, ffn_width=64, context_length=32)
    save_checkpoint(tmp_path / "score", ScoreModel(Decoder(spec)), tokenizer)
    with pytest.raises(CheckpointError, match="scores"):
        load("r", tmp_path / "score", max_batch=1)
    save_checkpoint(tmp_path / "mute", Decoder(spec))
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load("r", tmp_path / "mute", max_batch=1)


def modules(folder: Path, *kinds: str, **modes: bool) -> None:
    rows = [
        {"idx": n, "path": f"{n}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **modes})


def test_pooling_is_read_and_what_is_not_followed_is_refused(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) is None
    modules(
        tmp_path, "Transformer", "Pooling", "Normalize", pooling_mode_lasttoken=True, pooling_mode_mean_tokens=False
    )
    assert read_pooling(tmp_path) == Pooling("last", True)
    modules(tmp_path, "Transformer", "Pooling", pooling_mode_mean_tokens=True)
    assert read_pooling(tmp_path) == Pooling("mean", False)
    for kinds, modes in (
        (("Transformer", "Pooling"), {"pooling_mode_cls_token": True}),
        (("Transformer", "Pooling"), {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": True}),
        (("Transformer", "Pooling", "Dense"), {"pooling_mode_lasttoken": True}),
        (("Transformer",), {"pooling_mode_lasttoken": True}),
    ):
        modules(tmp_path, *kinds, **modes)
        with pytest.raises(CheckpointError):
            read_pooling(tmp_path)


@pytest.mark.parametrize(("at", "is_normalised"), [("last", True), ("mean", False)])
def test_embeddings_are_the_engines_vectors(
    start: Callable, decoder: Decoder, tokenizer: Tokenizer, at: Any, is_normalised: bool
) -> None:
    server = start(m=decoder, pooling=Pooling(at, is_normalised))
    texts = ["the library", "the reply to the question"]
    rows = [tokenizer.encode(text) + ([tokenizer.end_id] if at == "last" else []) for text in texts]
    wanted = Engine(decoder).encode(rows, at)
    wanted = wanted / wanted.norm(dim=-1, keepdim=True) if is_normalised else wanted
    found = server.openai().embeddings.create(model="m", input=texts)  # the client asks for base64 by itself
    assert [one.index for one in found.data] == [0, 1] and found.usage.prompt_tokens == sum(map(len, rows))
    for one, vector in zip(found.data, wanted.tolist(), strict=True):
        assert one.embedding == pytest.approx(vector, abs=1e-5)
    plain = server.post("/v1/embeddings", {"model": "m", "input": rows[0], "encoding_format": "float"}).json
    coded = server.post("/v1/embeddings", {"model": "m", "input": rows[0], "encoding_format": "base64"}).json
    (numbers,), (code,) = ([one["embedding"] for one in each["data"]] for each in (plain, coded))
    assert struct.unpack(f"<{len(numbers)}f", base64.b64decode(code)) == tuple(numbers)
    short = server.openai().embeddings.create(model="m", input=texts[0], dimensions=8).data[0].embedding
    assert len(short) == 8 and sum(x * x for x in short) == pytest.approx(1)
    assert short == pytest.approx((wanted[0, :8] / wanted[0, :8].norm()).tolist(), abs=1e-5)
    assert server.idle()


def test_where_a_model_gives_no_embeddings_it_says_so(start: Callable, decoder: Decoder) -> None:
    with pytest.raises(openai.BadRequestError, match="no embeddings"):
        start(m=decoder).openai().embeddings.create(model="m", input="x")
    server = start(m=decoder, pooling=Pooling("last", True))
    for wrong in (
        {"input": ""},
        {"input": []},
        {"input": ["x"] * 2049},
        {"input": "x", "dimensions": 33},
        {"input": [10**6]},
    ):
        assert server.post("/v1/embeddings", {"model": "m", **wrong}).status == 400


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_tokens_go_and_come_back(start: Callable, decoder: Decoder, tokenizer: Tokenizer) -> None:
    server = start(m=decoder)
    text = "the naïve <|im_end|> — 我"
    found = server.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json
    assert found["tokens"] == tokenizer.encode(text) and found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 1024 and "token_strs" not in found
    assert server.post("/detokenize", {"model": "m", "tokens": found["tokens"]}).json == {"prompt": text}
    assert server.post("/detokenize", {"tokens": [tokenizer.end_id]}).json == {"prompt": "<|endoftext|>"}
    assert server.post("/detokenize", {"tokens": [10**6]}).status == 400
    assert server.post("/tokenize", {}).status == 400
    names = server.post("/tokenize", {"prompt": "我", "return_token_strs": True}).json["token_strs"]
    assert len(set(names)) == len(names) and all(name.startswith("bytes:") for name in names)


def test_a_conversation_is_cut_as_it_will_be_read(start: Callable, decoder: Decoder) -> None:
    server = start(m=decoder)
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi"}]
    count = server.post("/tokenize", {"messages": messages}).json["count"]
    used = server.post("/v1/chat/completions", {"model": "m", "messages": messages, "max_tokens": 1}).json["usage"]
    assert used["prompt_tokens"] == count
    assert server.post("/tokenize", {"messages": messages, "add_generation_prompt": False}).json["count"] < count


def test_the_vocabulary_is_described(start: Callable, decoder: Decoder) -> None:
    found = start(m=decoder).ask("GET", "/tokenizer_info").json
    assert (
        found["eos_token"] == "<|im_end|>" and "<|im_start|>" in found["chat_template"] and found["bos_token"] is None
    )
    assert start(m=decoder).ask("GET", "/tokenizer_info?model=x").status == 404


# -- the list ----------------------------------------------------------------------------------------------------------


def test_models_are_listed_and_found(start: Callable, chain: Callable) -> None:
    server = start(**{"a": chain("ab"), "ft:org/b::1": chain("cd")})
    client = server.openai()
    assert [model.id for model in client.models.list()] == ["a", "ft:org/b::1"]
    assert client.models.retrieve("ft:org/b::1").id == "ft:org/b::1"
    ask: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
    said = [client.chat.completions.create(model=name, **ask) for name in ("a", "ft:org/b::1")]
    assert [one.choices[0].message.content for one in said] == ["ab", "cd"]
    assert [one.model for one in said] == ["a", "ft:org/b::1"]


def test_the_servers_numbers(start: Callable, chain: Callable) -> None:
    server = start(m=chain("ab"))
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    server.post("/v1/chat/completions", {**body, "stream": True})
    server.ask("GET", "/" + "x" * 50)
    assert server.ask("GET", "/ready").json == {"status": "ready"}
    text = server.ask("GET", "/metrics").text
    assert 'lyceum_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert 'lyceum_generated_tokens_total{model="m"}' in text and 'lyceum_first_token_seconds_count{model="m"}' in text
    assert 'lyceum_sequences{model="m"} 0.0' in text and "xxxxx" not in text
