from __future__ import annotations

import gzip
import importlib
import json
from collections import Counter
from pathlib import Path

import pytest

from lyceum.corpus.packages import Survey
from lyceum.corpus.sources import UNREADABLE, package_sources, read_folder
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


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path) -> None:
    try:
        importlib.import_module("pyarrow")
    except ImportError:
        (tmp_path / "table.parquet").write_bytes(b"PAR1")
        with pytest.raises(DataError, match="pyarrow"):
            list(read_folder(tmp_path, Counter()))
    else:
        pytest.skip("pyarrow is installed here")


def test_package_sources_are_documents_with_relative_paths() -> None:
    documents = {d.meta["path"]: d for d in package_sources(Survey(("json",)))}
    assert {"json/__init__.py", "json/decoder.py", "json/encoder.py"} <= set(documents)
    assert "def dumps(" in documents["json/__init__.py"].text
    assert documents["json/decoder.py"].meta["module"] == "json.decoder"
