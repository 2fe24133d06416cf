"""Named sources as a stream of documents: a folder, a file, a dataset of the hub, the sources of installed packages.

What: every reader yields `Document`s with `meta.part` ("code" or "docs"), `meta.source` and `meta.path` (relative), one
after the other, never a file in memory. Why: the steps after it need not know where text comes from. A text file that
is binary or of another encoding is counted, not fatal: one bad file must not end an hour of work; a few bad bytes in a
long file are replaced, and counted. A broken row in a JSONL file, however, is an error: there a person meant data.

    drops = Counter()
    for document in read_place("web/", drops): ...

A text of more than `lyceum.corpus.cut.DOCUMENT` characters becomes several documents. Not here: crawling the web,
archives, and what a document is worth (`lyceum.corpus.clean`).
"""

from __future__ import annotations

import codecs
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lyceum.corpus.cut import DOCUMENT, cut, cut_stream
from lyceum.corpus.packages import Survey
from lyceum.corpus.records import Document
from lyceum.corpus.rows import (
    data_library,
    file_type,
    open_bytes,
    open_text,
    parquet_columns,
    parquet_rows,
    read_rows,
    unpacking_errors,
)
from lyceum.errors import DataError, LyceumError
from lyceum.log import log

TEXT = frozenset(".txt .md .rst".split())
CODE = frozenset(".py .pyi .c .h .cc .cpp .hpp .java .js .ts .go .rs .sh .rb .sql".split())
ROWS = frozenset(".jsonl .json .csv .tsv .parquet".split())
HUB = "hub:"
TEXT_COLUMNS = ("text", "content", "body", "raw_content", "document", "article", "markdown")  # the first that is there
PART_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # of a part of the corpus: it becomes a file's name
SKIPPED = frozenset("__pycache__ node_modules site-packages dist-packages venv build dist".split())
MAX_CODE_BYTES = 1_000_000  # of one file, as in Codex (Chen et al. 2021, section 3.1)
MAX_BAD = 1e-3  # share of characters that are not UTF-8 up to which they are replaced; beyond, it is another encoding
UNREADABLE = "binary or not UTF-8"


def read_place(place: str, drops: Counter[str], column: str = "") -> Iterator[Document]:
    """Documents of whatever a recipe may name: a folder, a file, or "hub:name:config:split".

    Args:
        drops: reason -> number; what is left out is added here.
        column: which column of a table is the text; found by its name if empty (`TEXT_COLUMNS`).

    Raises: DataError if it is not there, cannot be read, or holds no text in that column.
    """
    path = Path(place)
    if place.startswith(HUB):
        yield from _row_documents(_hub_rows(place, column), column, {"source": place}, place, drops)
    elif path.is_file():
        if file_type(path) not in TEXT | CODE | ROWS:
            known = ", ".join(sorted(TEXT | ROWS))
            raise DataError(f"unknown file type {path.suffix!r}", file=path, hint=f"use one of {known}, or source code")
        yield from read_file(path, drops, column=column)
    else:
        yield from read_folder(path, drops, column)


def read_folder(folder: str | Path, drops: Counter[str], column: str = "") -> Iterator[Document]:
    """Documents of all files below a folder that we can read, in the order of their paths; other types are left alone.

    Args:
        drops: reason -> number; unreadable and empty files are added here.
        column: the text's column in tables, as in `read_place`.

    Raises: DataError if there is no such folder, or a row of a file is broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        hint = "give a folder, relative to where the command is started"
        raise DataError("no such folder", file=folder, hint=hint)
    for at, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in SKIPPED and not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield from read_file(Path(at) / name, drops, source=str(folder), root=folder, column=column)


def read_file(
    path: Path, drops: Counter[str], *, source: str = "", root: Path | None = None, column: str = ""
) -> Iterator[Document]:
    """Documents of one file by its suffix: text and code are one document, tables and JSON one for each row.

    Raises: DataError for a broken row, a table without a column of text, or where a library is missing that reads it.
    """
    kind = file_type(path)
    relative = path.relative_to(root).as_posix() if root else path.name
    meta = {"source": source or path.name, "path": relative}
    if kind in CODE and path.stat().st_size > MAX_CODE_BYTES:
        drops["code file over 1 MB"] += 1
    elif kind in TEXT | CODE:
        yield from _text_documents(path, {**meta, "part": "code" if kind in CODE else "docs"}, drops)
    elif kind == ".parquet":
        name = _text_column(parquet_columns(path), column, path)
        yield from _row_documents(parquet_rows(path, [name]), name, meta, path, drops)
    elif kind in ROWS:
        yield from _row_documents(read_rows(path), column, meta, path, drops)


# -------------------------------------------------------------------------------- plain text


def _text_documents(path: Path, meta: dict[str, Any], drops: Counter[str]) -> Iterator[Document]:
    """One document, or the pieces of a long one; line ends become "\\n"."""
    with unpacking_errors(path):
        size, bad = _decodable(path)
        if size and bad > MAX_BAD * size:
            drops[UNREADABLE] += 1
            return
        if bad:
            log.warning(f"{path}: {bad} of {size:,} characters are not UTF-8 and were replaced")
            meta["replaced"] = bad
        is_empty = True
        with open_text(path, errors="replace") as text:
            for document in _in_pieces(cut_stream(iter(lambda: text.read(DOCUMENT), "")), meta):
                is_empty = False
                yield document
                meta.pop("replaced", None)  # counted with the first piece
    if is_empty:
        drops["empty file"] += 1


def _decodable(path: Path) -> tuple[int, int]:
    """Characters of a text file, and how many of them stand for bytes that are not UTF-8 (all of a binary file's)."""
    decoder, mark = codecs.getincrementaldecoder("utf-8")("replace"), "\ufffd".encode()
    size, bad, tail = 0, 0, b""
    with open_bytes(path) as file:
        while chunk := file.read(DOCUMENT):
            if b"\0" in chunk:
                return 1, 1
            text = decoder.decode(chunk)
            size += len(text)
            bad += text.count("\ufffd") - (tail + chunk).count(mark)  # a mark that the file itself holds is no damage
            tail = (tail + chunk)[-len(mark) + 1 :]
    last = len(decoder.decode(b"", True))
    return size + last, bad + last


def _in_pieces(texts: Iterable[str], meta: Mapping[str, Any], name: str = "") -> Iterator[Document]:
    """A document for each piece that is not blank; from the second on, `meta.piece` is its number."""
    for number, text in enumerate(texts):
        if text.strip():
            more = {"piece": number} if number else {}
            yield Document(text, f"{name}-{number}" if name and number else name, {**meta, **more})


# -------------------------------------------------------------------------------- rows


def _text_column(names: Iterable[str], wanted: str, place: Path | str) -> str:
    """The column that holds the text: the wanted one, or the first whose name says so."""
    names = list(names)
    found = next((name for name in ([wanted] if wanted else TEXT_COLUMNS) if name in names), None)
    if found is None:
        what = f"no column {wanted!r}" if wanted else "no column whose name says that it is the text"
        hint = 'in a recipe, name it: [corpus] columns = { SOURCE = "COLUMN" }'
        raise DataError(f"{what}; there are: {', '.join(names) or 'none'}", file=place, hint=hint)
    return found


def _row_documents(
    rows: Iterable[tuple[int, Any]], column: str, meta: Mapping[str, Any], place: Path | str, drops: Counter[str]
) -> Iterator[Document]:
    for line, row in rows:
        if isinstance(row, str):
            row, name = {"": row}, ""
        elif isinstance(row, Mapping):
            name = _text_column(row, column, f"{place} row {line}")
        else:
            hint = "a row is an object with a column of text, or a text"
            raise DataError(f"a row is {type(row).__name__}", file=place, line=line, hint=hint)
        text = "" if row[name] is None else row[name]
        if not isinstance(text, str):
            hint = "name the column that holds the text"
            raise DataError(f"{name!r} is {type(text).__name__}, expected text", file=place, line=line, hint=hint)
        if not text.strip():
            drops["empty text"] += 1
            continue
        own = row.get("meta")
        known = {**meta, **(own if isinstance(own, Mapping) else {})}
        known["part"] = "code" if known.get("part") == "code" else "docs"
        yield from _in_pieces(cut(text), known, str(row.get("id") or ""))


def _hub_rows(place: str, column: str) -> Iterator[tuple[int, Any]]:
    """Rows of a dataset of the hub, or of a local folder that `datasets` can open, streamed; only the text's column."""
    name, config, split, *rest = [*place.removeprefix(HUB).split(":"), "", ""]
    hint = f'write "{HUB}name", "{HUB}name:config" or "{HUB}name:config:split"; the network and the name must be there'
    if not name or any(rest):
        raise DataError("not the name of a dataset", file=place, hint=hint)
    library = data_library("datasets", place)
    try:
        data = library.load_dataset(name, config or None, split=split or "train", streaming=True)
        if data.column_names:
            data = data.select_columns([_text_column(data.column_names, column, place)])
        yield from enumerate(data, 1)
    except LyceumError:
        raise
    except Exception as error:  # of many libraries: names, configurations, the network, permissions, formats
        raise DataError(f"cannot be read: {type(error).__name__}: {error}", file=place, hint=hint) from error


# -------------------------------------------------------------------------------- packages


def package_sources(survey: Survey) -> Iterator[Document]:
    """The source files of the surveyed packages, one document each; `meta.path` is "json/decoder.py"."""
    for package, module, text in survey.sources():
        tail = "/__init__.py" if module.is_package else ".py"
        path = module.name.replace(".", "/") + tail
        yield Document(text, meta={"part": "code", "source": package, "path": path, "module": module.name})
