"""Files of lines: what each method's examples are, and the line that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lyceum.corpus.records import Conversation, Ranking
from lyceum.serve.files.checks import check_examples, check_requests, read_examples, read_requests, shape_of
from lyceum.serve.limits import Limits
from lyceum.serve.refusals import Refusal

USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ahoy"}
CHAT = {"messages": [{"role": "developer", "content": "be a pirate"}, USER, BOT]}
PAIR = {
    "input": {"messages": [USER]},
    "preferred_output": [BOT],
    "non_preferred_output": [{"role": "assistant", "content": "hello"}],
}
TASK = {"messages": [USER], "answer": "ahoy", "hints": ["a", 1]}
CALLS = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
REQUEST = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m"}}


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: Any) -> Path:
        path = tmp_path / "rows"
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


def refused(path: Path, check: Callable[..., Any] = check_examples, **limits: int) -> str:
    with pytest.raises(Refusal) as found:
        check(path, Limits(**limits), None)
    assert found.value.status == 400 and found.value.param == "file"
    return found.value.message


def test_the_three_shapes_become_the_records_that_stages_read(file: Callable) -> None:
    with_weights = {"messages": [USER, {**BOT, "weight": 0}, USER, {**BOT, "weight": 1}]}
    ((_, kind, first), (_, _, second)) = read_examples(file(CHAT, with_weights), Limits())
    assert kind == "supervised" and isinstance(first, Conversation) and isinstance(second, Conversation)
    assert [message.role for message in first.messages] == ["system", "user", "assistant"]
    assert [message.weight for message in second.messages] == [None, 0.0, None, 1.0]

    ((_, kind, pair),) = read_examples(file(PAIR), Limits())
    assert kind == "dpo" and isinstance(pair, Ranking)
    assert [answer.content for answer in pair.responses] == ["ahoy", "hello"] and pair.ranks == (1.0, 2.0)

    ((_, kind, task),) = read_examples(file(TASK), Limits())
    assert kind == "reinforcement" and isinstance(task, Conversation)
    assert task.meta == {"item": {"answer": "ahoy", "hints": ["a", 1]}}
    assert [shape_of(row) for row in (CHAT, PAIR, TASK, {"text": "x"}, [], None)] == [
        "supervised", "dpo", "reinforcement", "", "", "",
    ]  # fmt: skip


def test_what_is_wrong_is_said_with_its_line_and_its_field(file: Callable) -> None:
    wrong: list[tuple[Any, str]] = [
        (b'{"messages": [', "it is no JSON"),
        (b"\xff\xfe", "it is no JSON"),
        ({"text": "x"}, "expected"),
        ([CHAT], "expected"),
        ({"messages": [USER]}, "it is for reinforcement, and those before it are for supervised"),
        ({"messages": [{"role": "pirate", "content": "x"}, BOT]}, "'messages[0].role'"),
        ({"messages": [{"role": "user"}, BOT]}, "'messages[0].content'"),
        ({"messages": [USER, {"role": "assistant", "content": 7}]}, "'messages[1].content'"),
        ({"messages": [USER, {**BOT, "weight": 2}]}, "'messages[1].weight'"),
        ({"messages": [{**USER, "weight": 1}, BOT]}, "'messages[0].weight'"),
        ({"messages": [USER, {**BOT, "weight": 0}]}, "nothing to learn"),
        ({**CHAT, "mesages": []}, "mesages"),
        (
            {"messages": [USER, {"role": "tool", "content": "1", "tool_call_id": "c"}, BOT]},
            "'messages[1].tool_call_id'",
        ),
    ]
    for row, said in wrong:
        message = refused(file(CHAT, CHAT, row))
        assert message.startswith("Line 3 of the file: ") and said in message, message
    for row, said in (
        ({**PAIR, "preferred_output": [USER]}, "preferred_output[0].role"),
        ({**PAIR, "preferred_output": []}, "preferred_output"),
        ({**PAIR, "non_preferred_output": [BOT]}, "the same"),
        ({"preferred_output": [BOT], "non_preferred_output": [BOT]}, "input"),
    ):
        assert said in refused(file(PAIR, row)) and "Line 2 " in refused(file(PAIR, row))


def test_an_empty_file_blank_lines_and_a_byte_order_mark(file: Callable) -> None:
    assert refused(file()) == refused(file(b"", b"   ")) == "The file is empty."
    assert check_examples(file(b"\xef\xbb\xbf" + json.dumps(CHAT).encode(), b"", CHAT), Limits(), None).lines == 2


def test_lengths_are_those_of_the_model_that_chats(file: Callable, chain: Callable, tokenizer: Any, chat: Any) -> None:
    from tests.serve.conftest import of_model

    served = of_model("m", chain("ab", context_length=30), tokenizer)
    long = {"messages": [USER, {"role": "assistant", "content": "ahoy " * 40}]}
    found = check_examples(file(CHAT, long), Limits(), served)
    ours = [len(chat.render(record).ids) for _, _, record in read_examples(file(CHAT, long), Limits())]
    assert (found.tokens, found.longest, found.too_long) == (sum(ours), max(ours), sum(n > 30 for n in ours))
    assert found.too_long >= 1 and "do not fit" in found.line
    ((_, _, pair),) = read_examples(file(PAIR), Limits())
    prompt = len(chat.prompt(pair.prompt))  # type: ignore[union-attr]
    rows = [prompt + len(chat.reply(answer)) for answer in pair.responses]  # type: ignore[union-attr]
    assert check_examples(file(PAIR), Limits(), served).tokens == sum(rows)


def test_a_line_has_its_bounds_of_bytes_values_and_depth(file: Callable) -> None:
    long = {"messages": [USER, {"role": "assistant", "content": "x" * 500}]}
    assert "Line 2 of the file: it is longer than 300 bytes" in refused(file(CHAT, long), line_bytes=300)
    many = {"messages": [USER] * 50 + [BOT]}
    assert "too many values" in refused(file(many), items=100)
    assert "it is no JSON" in refused(file(b"[" * 5000))


def test_a_batch_is_requests_with_ids_of_their_own_for_one_url(file: Callable) -> None:
    rows = [REQUEST, {**REQUEST, "custom_id": "b"}]
    assert [request.custom_id for _, request in read_requests(file(*rows), Limits())] == ["a", "b"]
    assert check_requests(file(*rows), Limits(), None).line == "2 requests"
    for row, said in (
        (REQUEST, "same custom_id"),
        ({**REQUEST, "custom_id": "b", "method": "GET"}, "method"),
        ({**REQUEST, "custom_id": "b", "url": "/v1/embeddings"}, "one url"),
        ({**REQUEST, "custom_id": "b", "url": "http://elsewhere/"}, "url"),
        ({**REQUEST, "custom_id": "b", "body": []}, "body"),
        ({"custom_id": "b"}, "method"),
    ):
        message = refused(file(REQUEST, row), check_requests)
        assert message.startswith("Line 2 ") and said in message, message
    assert refused(file(), check_requests) == "The file is empty."
