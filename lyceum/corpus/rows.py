"""Rows of files: JSON lines, JSON arrays and plain text, each row with the line it stands on.

What: the bottom of every reader. Why: an error about data must name the file and the line. Not here: what a row means
(`lyceum.corpus.records`).
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lyceum.errors import DataError


def read_rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yields (line number, value) of a .jsonl, .jsonl.gz or .json file; a .txt or .md file is one string.

    Raises: DataError naming the file and the line, for a missing file, bytes that are not UTF-8, or broken JSON.
    """
    path = Path(path)
    suffixes = path.suffixes[-2:]
    if not path.is_file():
        raise DataError("no such file", file=path, hint="check the path; folders are read by lyceum.corpus.sources")
    try:
        if suffixes[-1:] in ([".txt"], [".md"]):
            yield 1, path.read_text(encoding="utf-8")
        elif suffixes[-1:] == [".json"]:
            yield from _array_rows(path)
        elif suffixes[-1:] == [".jsonl"] or suffixes == [".jsonl", ".gz"]:
            yield from _line_rows(path)
        else:
            raise DataError(
                f"unknown file type {path.suffix!r}", file=path, hint="use .jsonl, .jsonl.gz, .json or .txt"
            )
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text: {error}", file=path, hint="convert the file to UTF-8") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"not a whole gzip file: {error}", file=path, hint="fetch or write the file again") from None


def _line_rows(path: Path) -> Iterator[tuple[int, Any]]:
    opened = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
    with opened as lines:  # as bytes: only "\n" ends a line, U+2028 inside a string does not
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
    text = path.read_text(encoding="utf-8-sig")
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
