"""Oracles: rows written out by hand from the encoded documents."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lyceum.batches.shards import Shards, write_shards
from lyceum.corpus.records import Document
from lyceum.errors import DataError
from lyceum.tokens.tokenizer import Tokenizer

TEXTS = ["what does len return?", "it returns the number of items.", "", "items — Füße\n\n"]


def documents(part: str = "docs", repeat: int = 1) -> list[Document]:
    return [Document(text, meta={"part": part}) for text in TEXTS * repeat]


def stream(tokenizer: Tokenizer, repeat: int = 1) -> list[int]:
    return [number for text in TEXTS * repeat for number in [*tokenizer.encode(text), tokenizer.end_id]]


def test_rows_are_the_documents_joined_by_the_end_token_and_share_one_token(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    report = write_shards(documents(repeat=5), tokenizer, tmp_path / "shards", row_tokens=7)
    shards = Shards(tmp_path / "shards", tokenizer.fingerprint)
    expected = stream(tokenizer, repeat=5)
    count = (len(expected) - 1) // 7
    assert shards.parts == {"docs": count} and shards.row_tokens == 7
    rows = [shards.row("docs", index).tolist() for index in range(count)]
    assert rows == [expected[7 * index : 7 * index + 8] for index in range(count)]
    assert all(one[-1] == following[0] for one, following in pairwise(rows))
    targets = [number for row in rows for number in row[1:]]
    assert targets == expected[1 : 1 + 7 * count]  # each once
    assert report["parts"]["docs"]["documents"] == 20
    assert report["parts"]["docs"]["tokens"] == len(expected)
    assert report["parts"]["docs"]["rows"] == count
    bytes_per_token = 5 * sum(len(text.encode()) for text in TEXTS) / len(expected)
    assert report["parts"]["docs"]["bytes_per_token"] == pytest.approx(bytes_per_token, abs=0.001)


def test_parts_have_files_of_their_own_in_two_bytes_a_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    mixed = [document for pair in zip(documents("docs"), documents("code"), strict=True) for document in pair]
    write_shards([*mixed, Document(TEXTS[0] * 3)], tokenizer, tmp_path / "shards", row_tokens=4)
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [
        "code.bin", "docs.bin", "shards.json", "text.bin",
    ]  # fmt: skip
    written = np.fromfile(tmp_path / "shards" / "code.bin", "<u2")
    assert written.tolist() == stream(tokenizer)
    shards = Shards(tmp_path / "shards", tokenizer.fingerprint)
    assert shards.row("code", 1).tolist() == shards.row("docs", 1).tolist()


def test_writing_again_replaces_the_old_shards(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_shards(documents("old", 2), tokenizer, tmp_path / "shards", row_tokens=4)
    write_shards(documents("new", 2), tokenizer, tmp_path / "shards", row_tokens=4)
    assert set(Shards(tmp_path / "shards", tokenizer.fingerprint).parts) == {"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_failure_while_writing_leaves_the_old_shards(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_shards(documents("old", 2), tokenizer, tmp_path / "shards", row_tokens=4)
    with pytest.raises(DataError, match="cannot be a file's name"):
        write_shards(
            [*documents(), Document("x", meta={"part": "../up"})], tokenizer, tmp_path / "shards", row_tokens=4
        )
    assert set(Shards(tmp_path / "shards", tokenizer.fingerprint).parts) == {"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_shards_of_another_vocabulary_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_shards(documents(repeat=2), tokenizer, tmp_path / "shards", row_tokens=4)
    other = Tokenizer.train(["some other text, some other text"], 280)
    with pytest.raises(DataError, match=r"shards\.json: written with the vocabulary(.|\n)*hint: the ids would mean"):
        Shards(tmp_path / "shards", other.fingerprint)


def test_part_with_less_than_one_row_is_an_error_with_a_hint(tokenizer: Tokenizer, tmp_path: Path) -> None:
    num_tokens = len(stream(tokenizer))
    with pytest.raises(
        DataError, match=rf"'docs' has {num_tokens} tokens, and one row needs {num_tokens + 1}(.|\n)*hint"
    ):
        write_shards(documents(), tokenizer, tmp_path / "shards", row_tokens=num_tokens)
    write_shards(documents(), tokenizer, tmp_path / "shards", row_tokens=num_tokens - 1)
    assert Shards(tmp_path / "shards", tokenizer.fingerprint).parts == {"docs": 1}


def test_no_documents_is_an_error_with_a_hint(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no documents(.|\n)*hint: "):
        write_shards([], tokenizer, tmp_path / "shards", row_tokens=4)
    assert list(tmp_path.iterdir()) == []


def test_row_beyond_the_last_is_our_own_mistake(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_shards(documents(repeat=2), tokenizer, tmp_path / "shards", row_tokens=4)
    shards = Shards(tmp_path / "shards", tokenizer.fingerprint)
    for index in (-1, shards.parts["docs"]):
        with pytest.raises(IndexError):
            shards.row("docs", index)


def test_damage_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    with pytest.raises(DataError, match=r"shards\.json: there are no token shards(.|\n)*hint: "):
        Shards(folder, tokenizer.fingerprint)
    write_shards(documents(repeat=2), tokenizer, folder, row_tokens=4)
    whole = (folder / "docs.bin").read_bytes()
    (folder / "docs.bin").write_bytes(whole[:-1])
    with pytest.raises(DataError, match=rf"docs\.bin: {len(whole) - 1} bytes, expected {len(whole)}(.|\n)*hint: "):
        Shards(folder, tokenizer.fingerprint)
    header = json.loads((folder / "shards.json").read_text())
    for content, complaint in [
        ("{", "broken JSON"), ("[]", "not the header of token shards"),
        (json.dumps({**header, "magic": "?"}), "not the header"), (json.dumps({**header, "version": 9}), "version 9"),
    ]:  # fmt: skip
        (folder / "shards.json").write_text(content)
        with pytest.raises(DataError, match=complaint):
            Shards(folder, tokenizer.fingerprint)


def test_large_vocabulary_takes_four_bytes_a_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    class Large(Tokenizer):
        def __init__(self) -> None:  # ids shifted beyond what two bytes hold
            self.vocab_size, self.end_id, self.fingerprint = 100_000, 99_999, "large"

        def encode_batch(self, texts: list[str]) -> list[list[int]]:  # type: ignore[override]
            return [[number + 90_000 for number in ids] for ids in tokenizer.encode_batch(texts)]

    write_shards(documents(repeat=2), Large(), tmp_path / "shards", row_tokens=4)
    row = Shards(tmp_path / "shards", "large").row("docs", 0).tolist()
    assert row == [number + 90_000 for number in tokenizer.encode(TEXTS[0])[:5]]
