from __future__ import annotations

import gzip
import json
import random
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lyceum.corpus import sources
from lyceum.corpus.cut import cut, cut_stream
from lyceum.corpus.packages import Survey
from lyceum.corpus.sources import UNREADABLE, package_sources, read_folder, read_place
from lyceum.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "guide.md").write_bytes("\ufeffA guide\r\nwith two lines\r\n".encode())
    (tmp_path / "shop.py").write_text("print('hi')\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "row one"}\n{"text": "x = 1", "meta": {"part": "code"}}\n')
    with gzip.open(tmp_path / "more.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "row two"}) + "\n")
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\0\1")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    for hidden in (".git", "__pycache__"):
        (tmp_path / hidden).mkdir()
        (tmp_path / hidden / "x.py").write_text("no = 1")
    return tmp_path


def test_a_folder_gives_its_text_and_code_in_the_order_of_paths(folder: Path) -> None:
    drops: Counter[str] = Counter()
    documents = list(read_folder(folder, drops))
    assert [(d.meta["path"], d.meta["part"], d.text) for d in documents] == [
        ("more.jsonl.gz", "docs", "row two"),
        ("rows.jsonl", "docs", "row one"),
        ("rows.jsonl", "code", "x = 1"),
        ("shop.py", "code", "print('hi')\n"),
        ("docs/guide.md", "docs", "A guide\nwith two lines\n"),
    ]
    assert drops == {UNREADABLE: 2, "empty file": 1}


def test_a_broken_row_in_a_folder_is_an_error_with_its_line(folder: Path) -> None:
    (folder / "rows.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(DataError) as caught:
        list(read_folder(folder, Counter()))
    assert (caught.value.file, caught.value.line) == (folder / "rows.jsonl", 2)


def test_a_missing_folder_is_an_error_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder") as caught:
        list(read_folder(tmp_path / "none", Counter()))
    assert caught.value.hint


def texts(place: Path | str, column: str = "", drops: Counter[str] | None = None) -> list[str]:
    return [d.text for d in read_place(str(place), Counter() if drops is None else drops, column)]


# -------------------------------------------------------------------------------- tables and rows


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_the_column_of_text_is_found_by_name_or_given_and_an_error_lists_the_columns(tmp_path: Path, kind: str) -> None:
    rows = [{"stars": "5", "content": "good tea", "summary": "good"}, {"stars": "1", "content": "bad", "summary": "no"}]
    path = tmp_path / f"reviews.{kind}"
    write_rows(path, rows)
    assert texts(path) == texts(path, "content") == ["good tea", "bad"]
    assert texts(path, "summary") == ["good", "no"]
    with pytest.raises(DataError, match=r"no column 'words'; there are: stars, content, summary(.|\n)*hint: .*columns"):
        texts(path, "words")
    write_rows(path, [{"stars": "5", "summary": "good"}])
    with pytest.raises(DataError, match=r"whose name says that it is the text; there are: stars, summary"):
        texts(path)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        path.write_text("\n".join(",".join(row) for row in [list(rows[0]), *(list(row.values()) for row in rows)]))
    else:
        pa: Any = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), path)


def test_rows_without_text_are_counted_and_other_values_are_errors(tmp_path: Path) -> None:
    path, drops = tmp_path / "rows.jsonl", Counter[str]()
    write_rows(path, [{"text": "one"}, {"text": None}, {"text": " \n"}, {"text": "two"}])
    assert texts(path, drops=drops) == ["one", "two"] and drops == {"empty text": 2}
    write_rows(path, [{"text": "one"}, {"text": ["two"]}])
    with pytest.raises(DataError, match=r"line 2: 'text' is list, expected text(.|\n)*hint"):
        texts(path)
    path.write_text("[1, 2]\n")
    with pytest.raises(DataError, match=r"line 1: a row is list(.|\n)*hint"):
        texts(path)


def test_a_row_keeps_its_id_and_facts(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"text": "one", "id": 7, "meta": {"url": "x"}}])
    (document,) = read_place(str(tmp_path), Counter())
    assert document.id == "7"
    assert document.meta == {"source": str(tmp_path), "path": "rows.jsonl", "url": "x", "part": "docs"}


def test_a_dataset_of_the_hub_is_streamed(tmp_path: Path) -> None:
    """A local folder stands for one: `datasets` opens both in the same way."""
    pytest.importorskip("datasets")
    rows = [{"stars": "5", "content": "good tea"}, {"stars": "1", "content": "bad"}]
    for kind in ("parquet", "jsonl"):
        folder = tmp_path / kind
        folder.mkdir()
        write_rows(folder / f"train.{kind}", rows)
        write_rows(folder / f"test.{kind}", rows[:1])
        assert texts(f"hub:{folder}") == ["good tea", "bad"]
        assert texts(f"hub:{folder}:default:test", "stars") == ["5"]
        with pytest.raises(DataError, match=r"there are: stars, content"):
            texts(f"hub:{folder}", "words")
        with pytest.raises(DataError, match=r"nosuch(.|\n)*hint: write \"hub:name\""):
            texts(f"hub:{folder}:default:nosuch")
        with pytest.raises(DataError, match=r"nosuch(.|\n)*hint: write \"hub:name\""):
            texts(f"hub:{folder}:nosuch")
    for wrong in ("hub:", "hub:a:b:c:d"):
        with pytest.raises(DataError, match="not the name of a dataset"):
            texts(wrong)


def test_without_datasets_the_hub_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"hub:x: reading it needs datasets(.|\n)*hint: pip install 'lyceum\[data\]'"):
        texts("hub:x")


# -------------------------------------------------------------------------------- text that is not what it seems


def test_a_few_bad_bytes_in_a_long_text_are_replaced_and_counted(tmp_path: Path) -> None:
    path, drops = tmp_path / "a.txt", Counter[str]()
    path.write_bytes(b"tea \xff\xfe and \xef\xbf\xbd and caf\xc3\xa9\n" + b"good tea\n" * 1000 + b"end \xc3")
    (document,) = read_place(str(path), drops)
    assert document.text == "tea \ufffd\ufffd and \ufffd and café\n" + "good tea\n" * 1000 + "end \ufffd"
    assert document.meta["replaced"] == 3 and not drops  # the second mark stands in the file itself


@pytest.mark.parametrize(
    "content", [bytes(range(256)) * 40, "naïve café".encode("latin-1"), "words".encode("utf-16"), b"text\0" * 100]
)
def test_binary_bytes_and_other_encodings_are_dropped_and_counted(tmp_path: Path, content: bytes) -> None:
    drops = Counter[str]()
    (tmp_path / "a.txt").write_bytes(content)
    assert texts(tmp_path, drops=drops) == [] and drops == {UNREADABLE: 1}


def test_binary_bytes_in_rows_are_an_error_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n\x80\x81\n')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        texts(tmp_path)


def test_a_long_text_becomes_several_documents_of_whole_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "DOCUMENT", 64)
    monkeypatch.setattr(sources, "cut", partial(cut, most=64))
    monkeypatch.setattr(sources, "cut_stream", partial(cut_stream, most=64))
    text = "".join(f"word{n} and more,\r\n" for n in range(40))
    (tmp_path / "a.txt").write_bytes(text.encode())
    write_rows(tmp_path / "b.jsonl", [{"text": text, "id": "b"}])
    with gzip.open(tmp_path / "c.txt.gz", "wb") as file:
        file.write(text.encode())
    documents = {name: [] for name in ("a.txt", "b.jsonl", "c.txt.gz")}
    for document in read_place(str(tmp_path), Counter()):
        documents[document.meta["path"]].append(document)
    for name, found in documents.items():
        assert "".join(d.text for d in found) == (text if name == "b.jsonl" else text.replace("\r\n", "\n"))
        assert [d.meta.get("piece", 0) for d in found] == list(range(len(found))) and len(found) > 9
        assert all(len(d.text) <= 64 and d.text[-1].isalnum() for d in found[:-1])
    assert [d.id for d in documents["b.jsonl"]][:3] == ["b", "b-1", "b-2"]


def test_a_long_code_file_is_no_source_code(tmp_path: Path) -> None:
    drops = Counter[str]()
    (tmp_path / "a.py").write_text("x = 1\n" * 200_000)
    assert texts(tmp_path, drops=drops) == [] and drops == {"code file over 1 MB": 1}


def test_a_named_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"unknown file type '.png'(.|\n)*hint: use one of .*\.parquet"):
        texts(tmp_path / "a.png")
    assert texts(tmp_path) == []  # in a folder it is left alone
    with pytest.raises(DataError, match="no such folder"):
        texts(tmp_path / "none")


def test_a_gzip_that_is_cut_short_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(5000).hex().encode())[:-100])
    with pytest.raises(DataError, match="not a whole gzip file"):
        texts(tmp_path)


# -------------------------------------------------------------------------------- packages


def test_package_sources_are_documents_with_relative_paths() -> None:
    documents = {d.meta["path"]: d for d in package_sources(Survey(("json",)))}
    assert {"json/__init__.py", "json/decoder.py", "json/encoder.py"} <= set(documents)
    assert "def dumps(" in documents["json/__init__.py"].text
    assert documents["json/decoder.py"].meta["module"] == "json.decoder"
