"""Rows of tables and packed files; JSON and plain text are tested where records are read from them."""

from __future__ import annotations

import gzip
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from lyceum.corpus.rows import file_type, parquet_columns, parquet_rows, read_rows
from lyceum.errors import DataError

pa: Any = pytest.importorskip("pyarrow")
pq: Any = pytest.importorskip("pyarrow.parquet")


def rows_of(path: Path, content: str | bytes) -> list[tuple[int, Any]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_rows(path))


def test_the_type_is_the_suffix_without_the_packing() -> None:
    names = ["a.jsonl", "a.JSONL.GZ", "a.b.csv.zst", "a.gz", "a"]
    assert [file_type(Path(name)) for name in names] == [".jsonl", ".jsonl", ".csv", "", ""]


def test_csv_by_hand(tmp_path: Path) -> None:
    content = '\ufefftext,stars\r\n"two\r\nlines, and a ""quote""",5\r\n\r\nplain,1\r\n'
    expected = [
        (3, {"text": 'two\r\nlines, and a "quote"', "stars": "5"}),
        (5, {"text": "plain", "stars": "1"}),
    ]
    assert rows_of(tmp_path / "a.csv", content) == expected
    assert rows_of(tmp_path / "a.csv.gz", gzip.compress(content.encode())) == expected
    assert rows_of(tmp_path / "a.tsv", "text\tstars\na, b\t2\n") == [(2, {"text": "a, b", "stars": "2"})]
    assert rows_of(tmp_path / "empty.csv", "") == []


def test_a_field_of_csv_may_be_long(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "a.csv", "text\n" + "x" * 300_000 + "\n")[0][1] == {"text": "x" * 300_000}


@pytest.mark.parametrize(
    ("content", "line", "complaint"),
    [
        (b"a,b\n1,2\n1,2,3\n", 3, "3 fields under 2 columns"),
        (b'a,b\n"1"x,2\n', 2, "broken CSV"),
        (b'a,b\n1,"2\n', 2, "broken CSV"),
        (b"a,b\n1,caf\xe9\n", 1, "not UTF-8"),  # bytes are decoded ahead of the lines: the first it may be
    ],
)
def test_broken_csv_names_the_line(tmp_path: Path, content: bytes, line: int, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        rows_of(tmp_path / "a.csv", content)
    assert (caught.value.file, caught.value.line) == (tmp_path / "a.csv", line)


def test_zstd_is_read_like_the_plain_file_and_half_a_file_is_an_error(tmp_path: Path) -> None:
    draw = random.Random(0)
    lines = "".join(f'{{"text": "{draw.random()}"}}\n' for _ in range(5000)).encode()
    (tmp_path / "plain.jsonl").write_bytes(lines)
    packed = pa.compress(lines, codec="zstd", asbytes=True)
    assert rows_of(tmp_path / "a.jsonl.zst", packed) == list(read_rows(tmp_path / "plain.jsonl"))
    twice = [row for _, row in rows_of(tmp_path / "twice.jsonl.zst", packed * 2)]  # frames one after the other
    assert twice == [row for _, row in read_rows(tmp_path / "plain.jsonl")] * 2
    with pytest.raises(DataError, match="not a whole zstd file"):
        rows_of(tmp_path / "half.jsonl.zst", packed[: len(packed) // 2])
    with pytest.raises(DataError, match="not a whole zstd file"):
        rows_of(tmp_path / "none.jsonl.zst", b"no zstd at all")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    draw = random.Random(0)
    texts = [draw.randbytes(2048).hex() for _ in range(4096)]  # 16 MB that cannot be packed well, in 16 groups
    pq.write_table(pa.table({"n": range(4096), "text": texts}), tmp_path / "t.parquet", row_group_size=256)
    return tmp_path / "t.parquet"


def test_parquet_is_read_by_row_group_and_only_the_wanted_column(table: Path) -> None:
    assert parquet_columns(table) == ["n", "text"]
    rows = list(parquet_rows(table, ["n"]))
    assert rows == [(n + 1, {"n": n}) for n in range(4096)]
    assert [row["n"] for _, row in read_rows(table)] == list(range(4096))
    before, most = pa.total_allocated_bytes(), 0
    for _ in parquet_rows(table, ["text"]):
        most = max(most, pa.total_allocated_bytes() - before)
    assert 0 < most < 6e6  # of 16 MB


def test_what_is_no_parquet_or_cut_short_is_an_error(table: Path) -> None:
    whole = table.read_bytes()
    for content in (b"", b"PAR1", whole[: len(whole) // 2], whole[:1000] + b"\xff" * 1000 + whole[2000:]):
        table.write_bytes(content)
        with pytest.raises(DataError, match="not a parquet file") as caught:
            list(read_rows(table))
        assert caught.value.hint


@pytest.mark.parametrize(("name", "library"), [("a.parquet", "pyarrow.parquet"), ("a.jsonl.zst", "pyarrow")])
def test_a_missing_library_is_an_error_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DataError, match=r"needs pyarrow(.|\n)*hint: pip install 'lyceum\[data\]'"):
        rows_of(tmp_path / name, b"PAR1")
