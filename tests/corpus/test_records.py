from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lyceum.corpus.records import (
    Conversation,
    Document,
    Message,
    Ranking,
    Rating,
    ToolCall,
    read_conversations,
    read_documents,
    read_rankings,
    read_ratings,
    write_records,
)
from lyceum.errors import DataError

USER, ASSISTANT = Message("user", "2 + 2?"), Message("assistant", "4")


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chats(path: Path, *rows: Any) -> list[list[tuple[str, str]]]:
    return [[(m.role, m.content) for m in c.messages] for c in read_conversations(lines(path, *rows))]


# ------------------------------------------------------------------------------------------------ the records


@given(st.text(), st.dictionaries(st.text(max_size=5), st.integers(), max_size=2))
@settings(max_examples=50)
def test_any_text_survives_the_round_trip_through_json(text: str, meta: dict[str, Any]) -> None:
    document = Document(text, meta=meta)
    assert Document.from_json(json.loads(json.dumps(document.to_json()))) == document


def test_records_survive_the_round_trip_through_a_file(tmp_path: Path) -> None:
    call = ToolCall("call_7", "lookup", '{"name": "len"}')
    prompt = Conversation((Message("system", "Be brief."), USER), ({"type": "function"},), {"source": "ours"})
    turns = (
        USER,
        Message("assistant", "", (call,)),
        Message("tool", "4", tool_call_id="call_7", weight=0.5),
        ASSISTANT,
    )
    groups: list[tuple[Any, list[Any]]] = [
        (read_documents, [Document("a\u2028b\nc"), Document("lone \ud800 surrogate", meta={"part": "docs"})]),
        (read_conversations, [Conversation(turns, meta={"a": 1})]),
        (
            read_rankings,
            [Ranking(prompt, (ASSISTANT, USER, ASSISTANT), (1, 2.5, 2.5), (0.8, 0.1, 0.1), (True, False, False))],
        ),
        (read_ratings, [Rating(prompt, ASSISTANT, 0.5, "short", "model", {"b": 2})]),
    ]
    for read, records in groups:
        assert write_records(tmp_path / "records.jsonl", iter(records)) == len(records)
        assert list(read(tmp_path / "records.jsonl")) == records


def test_the_id_is_the_hash_of_the_text_and_nothing_else() -> None:
    # printf abc | b2sum -l 128
    assert Document("abc").id == "cf4ab791c62b8d2b2109c90275287816"
    assert Document("abc", meta={"part": "code"}).id == Document("abc").id != Document("abd").id
    assert Document("abc", id="mine").id == "mine"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Message("wizard", "x"),
        lambda: Message("user", 3),  # type: ignore[arg-type]
        lambda: Conversation(()),
        lambda: Ranking(Conversation((USER,)), (ASSISTANT,), (1,)),
        lambda: Ranking(Conversation((USER,)), (ASSISTANT, ASSISTANT), (1,)),
        lambda: Ranking(Conversation((USER,)), (ASSISTANT, ASSISTANT), (1, 2), probabilities=(1.0,)),
    ],
)
def test_records_that_make_no_sense_cannot_be_made(make: Any) -> None:
    with pytest.raises(ValueError):
        make()


# ------------------------------------------------------------------------------------------------ formats


def test_every_chat_format_gives_the_same_conversation(tmp_path: Path) -> None:
    expected = [("user", "2 + 2?"), ("assistant", "4")]
    rows: list[Any] = [
        {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]},
                {"role": "assistant", "content": "4"},
            ]
        },
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"instruction": "2 + 2?", "input": "", "output": "4"},
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": [{"role": "user", "content": "2 + 2?"}], "response": "4"},
    ]
    assert chats(tmp_path / "chats.jsonl", *rows) == [expected] * len(rows)


def test_prompts_without_an_answer_end_with_the_user(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": "2 + 2?"}, "2 + 2?", {"instruction": "2 + 2?"}]
    assert chats(tmp_path / "prompts.jsonl", *rows) == [[("user", "2 + 2?")]] * 3


def test_alpaca_keeps_input_system_and_history(tmp_path: Path) -> None:
    row = {"instruction": "Add", "input": "2 2", "output": "4", "system": "Be brief.", "history": [["Hi", "Hello"]]}
    expected = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Add\n\n2 2"),
        ("assistant", "4"),
    ]
    assert chats(tmp_path / "alpaca.jsonl", row) == [expected]


def test_sharegpt_function_calls_become_tool_turns(tmp_path: Path) -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Weather in Rome?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "Sunny."},
        ],
        "tools": '[{"name": "weather"}]',
    }
    (conversation,) = read_conversations(lines(tmp_path / "tools.jsonl", row))
    assert conversation.tools == ({"name": "weather"},)
    assert conversation.messages[1] == Message("assistant", "", (ToolCall("call_0", "weather", '{"city": "Rome"}'),))
    assert conversation.messages[2] == Message("tool", "sunny", tool_call_id="call_0")


def test_a_pair_keeps_its_annotator_and_its_margin(tmp_path: Path) -> None:
    pair = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "meta": {"source": "school"}}
    path = lines(tmp_path / "pairs.jsonl", {**pair, "annotator": "Ada", "margin": 0.5}, {**pair, "margin": None})
    known, unknown = read_rankings(path)
    assert known.meta == {"source": "school", "annotator": "Ada", "margin": 0.5} and unknown.meta == {
        "source": "school"
    }


def test_every_pair_format_gives_the_same_ranking(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "2 + 2?"}]
    good, bad = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
    rows: list[Any] = [
        {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"},
        {"chosen": [*chat, good], "rejected": [*chat, bad]},
        {"prompt": "2 + 2?", "chosen": [*chat, good], "rejected": [*chat, bad]},
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": "\n\nHuman: 2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": chat, "chosen": [good], "rejected": [bad]},
        {"question": "2 + 2?", "chosen": "4", "rejected": "5"},
        {
            "conversations": [{"from": "human", "value": "2 + 2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": "5",
        },
    ]
    expected = Ranking(Conversation((USER,)), (ASSISTANT, Message("assistant", "5")), (1.0, 2.0))
    assert list(read_rankings(lines(tmp_path / "pairs.jsonl", *rows))) == [expected] * len(rows)


def test_a_marker_of_the_side_that_is_speaking_is_part_of_the_text(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello"
    row = {"chosen": start + "\n\nAssistant: again", "rejected": start}
    (ranking,) = read_rankings(lines(tmp_path / "hh.jsonl", row))
    assert [response.content for response in ranking.responses] == ["Hello\n\nAssistant: again", "Hello"]


def test_message_trees_give_rankings_of_siblings_and_conversations_of_paths(tmp_path: Path) -> None:
    reply = {"text": "4", "role": "assistant", "rank": 1, "replies": [{"text": "Sure?", "role": "prompter"}]}
    other = {"text": "four", "role": "assistant", "rank": 0, "replies": []}
    gone = {"text": "5", "role": "assistant", "rank": 2, "deleted": True}
    tree = {"message_tree_id": "t", "prompt": {"text": "2 + 2?", "role": "prompter", "replies": [reply, other, gone]}}
    path = lines(tmp_path / "trees.jsonl", tree)
    (ranking,) = read_rankings(path)
    assert [(r.content, rank) for r, rank in zip(ranking.responses, ranking.ranks, strict=True)] == [
        ("4", 2.0),
        ("four", 1.0),
    ]
    assert [[m.content for m in c.messages] for c in read_conversations(path)] == [["2 + 2?", "four"]]


def test_kto_labels_become_ratings_of_one_and_zero(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"prompt": "2 + 2?", "completion": "4", "label": True},
        {"messages": [USER.to_json(), ASSISTANT.to_json()], "label": False},
    ]
    ratings = list(read_ratings(lines(tmp_path / "kto.jsonl", *rows)))
    assert [(r.prompt.messages, r.response, r.value) for r in ratings] == [
        ((USER,), ASSISTANT, 1.0),
        ((USER,), ASSISTANT, 0.0),
    ]


def test_text_files_arrays_and_gzip_are_read_like_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.json").write_text('\ufeff[\n {"text": "one\\ntwo\\n"}\n]')
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('\n{"text": "one\\ntwo\\n"}\n\n')
    for name in ("a.txt", "b.json", "c.jsonl.gz"):
        assert [document.text for document in read_documents(tmp_path / name)] == ["one\ntwo\n"]


def test_the_reader_says_once_which_format_it_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lyceum.corpus.records.log.info", said.append)
    chats(tmp_path / "mixed.jsonl", *[{"prompt": "a"}] * 3, {"instruction": "a", "output": "b"})
    assert said == ["mixed.jsonl: prompt only -> conversations", "mixed.jsonl: Alpaca -> conversations"]


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"text": "cut off', "broken JSON"),
        ('{"colour": "red"}', "no known format"),
        ("[1, 2]", "no known format"),
        ('{"text": 5}', "text is int"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "are no documents"),
        ('{"text": "\xff"}', "UTF-8"),
    ],
)
def test_a_bad_row_is_an_error_that_names_file_and_line(tmp_path: Path, row: str, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + row.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=says) as caught:
        list(read_documents(path))
    assert (caught.value.file, caught.value.line) == (path, 3)


def test_a_bad_element_of_an_array_is_an_error_that_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n{"text": "a"},\n\n{"colour": 1}\n]')
    with pytest.raises(DataError) as caught:
        list(read_documents(path))
    assert caught.value.line == 4
    path.write_text('[\n{"text": "a"}\n{"text": "b"}]')
    with pytest.raises(DataError, match="broken JSON") as caught:
        list(read_documents(path))
    assert caught.value.line == 3


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
        {"prompt": "a", "chosen": ["b"], "rejected": ["c"]},
        {"prompt": "a", "chosen": "b", "rejected": {"role": "user", "content": "c"}},
    ],
)
def test_pairs_that_share_no_prompt_or_hold_no_answer_are_errors(tmp_path: Path, row: Any) -> None:
    with pytest.raises(DataError, match="does not fit"):
        list(read_rankings(lines(tmp_path / "pairs.jsonl", row)))


def test_a_missing_file_and_an_unknown_type_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        list(read_documents(tmp_path / "none.jsonl"))
    (tmp_path / "a.xyz").touch()
    with pytest.raises(DataError, match="unknown file type"):
        list(read_documents(tmp_path / "a.xyz"))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {"text": "old"})

    def broken() -> Any:
        yield Document("new")
        raise RuntimeError("out of ideas")

    with pytest.raises(RuntimeError):
        write_records(path, broken())
    assert [document.text for document in read_documents(path)] == ["old"]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


# ------------------------------------------------------------------------------------------------ real files

REAL = [
    (read_conversations, "sft-demo/alpaca_en_demo.json", 999),
    (read_conversations, "sft-demo/glaive_toolcall_en_demo.json", 300),
    (read_conversations, "oasst/en_100_tree.jsonl", 400),
    (read_conversations, "oasst/prompt_lottery_en_250_text.jsonl", 250),
    (read_conversations, "dolly-hh/dolly_hhrlhf_train_small.jsonl", 1000),
    (read_rankings, "pref-demo/dpo_en_demo.json", 300),
    (read_rankings, "pref-demo/dpo_zh_500.jsonl", 500),
    (read_rankings, "hh-rlhf/test.jsonl.gz", 2312),
    (read_rankings, "oasst/en_100_tree.jsonl", 212),
    (read_ratings, "pref-demo/kto_en_demo.json", 300),
    (read_documents, "dedup-demo/demo-dataset-deduplication.jsonl", 14),
]


@pytest.mark.parametrize(("read", "name", "count"), REAL)
def test_files_that_people_have_are_read_whole(shared: Path, read: Any, name: str, count: int) -> None:
    if not (shared / name).exists():
        pytest.skip(f"no {name} here")
    records = list(read(shared / name))
    assert len(records) == count
    assert [type(record).from_json(record.to_json()) for record in records] == records
