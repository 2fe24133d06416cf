"""Rows of files: JSON lines, JSON arrays, CSV, parquet and plain text, each row with the line it stands on.

What: the bottom of every reader. JSON lines and CSV are read line by line, parquet by row group, all but parquet also
from .gz and .zst; a JSON array and a plain text are read whole. Why: an error about data must name the file and the
line. Not here: what a row means (`lyceum.corpus.records`), nor files too large for the memory that hold one text
(`lyceum.corpus.sources`).
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lyceum.errors import DataError

PACKED = (".gz", ".zst")
PARQUET_ROWS = 256  # turned into Python's objects at once


def file_type(path: Path) -> str:
    """The suffix that says what is in a file, in lower case: ".jsonl" for rows.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in PACKED), "")


def read_rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yields (line number, value) of a .jsonl, .json, .csv, .tsv or .parquet file; a .txt or .md file is one string.

    Rows of tables are dictionaries, column -> value; a row of a .parquet file has its number in place of a line.

    Raises: DataError naming the file and the line, for a missing file, bytes that are not UTF-8, broken JSON or CSV.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError("no such file", file=path, hint="check the path; folders are read by lyceum.corpus.sources")
    kind = file_type(path)
    with unpacking_errors(path):
        if kind in (".txt", ".md"):
            with open_text(path, encoding="utf-8") as text:
                yield 1, text.read()
        elif kind == ".json":
            yield from _array_rows(path)
        elif kind == ".jsonl":
            yield from _line_rows(path)
        elif kind in (".csv", ".tsv"):
            yield from _table_rows(path, "\t" if kind == ".tsv" else ",")
        elif kind == ".parquet":
            yield from parquet_rows(path)
        else:
            hint = "use .jsonl, .json, .csv, .tsv, .txt (also with .gz or .zst) or .parquet"
            raise DataError(f"unknown file type {path.suffix!r}", file=path, hint=hint)


def open_bytes(path: Path) -> IO[bytes]:
    """A file for reading as bytes, unpacked if its name ends in .gz or .zst."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".zst":
        return io.BufferedReader(data_library("pyarrow", path).input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def open_text(path: Path, encoding: str = "utf-8-sig", errors: str = "strict", newline: str | None = None) -> IO[str]:
    """`open_bytes` as text; a byte-order mark is left out, and line ends become "\\n" unless `newline` says otherwise."""
    return io.TextIOWrapper(open_bytes(path), encoding, errors, newline)


@contextmanager
def unpacking_errors(path: Path) -> Iterator[None]:
    """Turns what is wrong with a file's bytes into a DataError that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text: {error}", file=path, hint="convert the file to UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"not a whole gzip file: {error}", file=path, hint="fetch or write the file again") from None
    except OSError as error:
        if path.suffix.lower() != ".zst" or error.errno is not None:
            raise
        raise DataError(f"not a whole zstd file: {error}", file=path, hint="fetch or write the file again") from None


def data_library(name: str, needed_by: Path | str) -> Any:
    """An optional library of the extra `data`. Raises: DataError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        hint = "pip install 'lyceum[data]'"
        raise DataError(f"reading it needs {package}, which is not installed", file=needed_by, hint=hint) from None


def parquet_columns(path: Path) -> list[str]:
    """The names of a parquet file's columns. Raises: DataError if it is none."""
    return list(_parquet(path).schema_arrow.names)


def parquet_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Any]]:
    """Yields (row number from 1, {column: value}), one row group after the other; only these columns are read."""
    table = _parquet(path)
    number = 0
    with _parquet_errors(path):
        for group in range(table.num_row_groups):
            for batch in table.iter_batches(PARQUET_ROWS, row_groups=[group], columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row


def _parquet(path: Path) -> Any:
    library = data_library("pyarrow.parquet", path)
    with _parquet_errors(path):
        return library.ParquetFile(path)


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # pyarrow's own errors are kinds of these
        raise DataError(f"not a parquet file: {error}", file=path, hint="fetch or write the file again") from None


def _table_rows(path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(sys.maxsize)  # the library's own limit is shorter than many documents
    with open_text(path, newline="") as lines:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            names = next(rows, [])
            for row in rows:
                if len(row) not in (0, len(names)):
                    hint = "the first line must name the columns, and a field with a comma or a line end needs quotes"
                    what = f"{len(row)} fields under {len(names)} columns"
                    raise DataError(what, file=path, line=rows.line_num, hint=hint)
                if row:
                    yield rows.line_num, dict(zip(names, row, strict=True))
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 text: {error}", file=path, line=rows.line_num + 1) from None
        except csv.Error as error:
            hint = "a quote inside a quoted field is written twice"
            raise DataError(f"broken CSV: {error}", file=path, line=rows.line_num, hint=hint) from None


def _line_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with open_bytes(path) as lines:  # as bytes: only "\n" ends a line, U+2028 inside a string does not
        for number, line in enumerate(lines, 1):
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                try:
                    yield number, json.loads(line.decode("utf-8-sig"))
                except UnicodeDecodeError as error:
                    raise DataError(f"not UTF-8 text: {error}", file=path, line=number) from None
                except json.JSONDecodeError as error:
                    hint = "each line must be one whole JSON value; a file cut off in the middle ends like this"
                    raise DataError(f"broken JSON: {error.msg}", file=path, line=number, hint=hint) from None


def _array_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON array one by one, so that each knows its line; a single object is one row."""
    with open_text(path) as file:
        text = file.read()
    decode, space = json.JSONDecoder().raw_decode, re.compile(r"[\s]*")

    def skip(position: int) -> int:
        found = space.match(text, position)
        assert found is not None
        return found.end()

    at, line, counted = skip(0), 1, 0
    is_array = text.startswith("[", at)
    at = skip(at + 1) if is_array else at
    try:
        while not text.startswith("]", at) or not is_array:
            line, counted = line + text.count("\n", counted, at), at
            value, at = decode(text, at)
            yield line, value
            at = skip(at)
            if not is_array:
                break
            if text.startswith(",", at):
                at = skip(at + 1)
            elif not text.startswith("]", at):
                raise json.JSONDecodeError("expected ',' or ']'", text, at)
    except json.JSONDecodeError as error:
        hint = "the file must hold one JSON array of rows"
        raise DataError(f"broken JSON: {error.msg}", file=path, line=error.lineno, hint=hint) from None


def json_line(row: Any) -> str:
    """One JSON value on one line: readable characters, except where a lone surrogate must be escaped."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        line = json.dumps(row)
    return line
