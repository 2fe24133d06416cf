"""A tokenised corpus on disk, memory mapped: pretraining rows are cut from one long stream of tokens a part.

A folder holds ``shards.json`` (what it is, and of which vocabulary) and a file of little-endian ids for each part of
the corpus (``docs.bin``, ``code.bin``): documents one after the other, each followed by the end-of-text token. Row i of
a part is its tokens ``i * row_tokens ... (i + 1) * row_tokens``, the last one included: neighbouring rows share one
token, which is the last target of one and the first input of the next, so every token is a target once.

    write_shards(read_documents("documents-train.jsonl"), tokenizer, "shards", row_tokens=128)
    row = Shards("shards", tokenizer.fingerprint).row("docs", 0)

Documents are cut where a row ends, and attention crosses from one into the next, plainly causal (as in GPT-2). Not
here: which row comes when (`lyceum.batches.stream`), and conversations, which stay whole (`lyceum.batches.pack`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lyceum.corpus.records import Document
from lyceum.corpus.sources import PART_NAME
from lyceum.errors import DataError
from lyceum.run import fresh_folder, write_json
from lyceum.tokens.tokenizer import Tokenizer

MAGIC, VERSION, HEADER = "lyceum token shards", 1, "shards.json"
_BATCH_CHARACTERS = 1 << 18  # of text encoded at once


@dataclass
class _Part:
    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0


def write_shards(
    documents: Iterable[Document], tokenizer: Tokenizer, folder: Path | str, row_tokens: int
) -> dict[str, Any]:
    """Encode documents into `folder`, one file for each ``meta["part"]`` (``text`` where there is none).

    Args:
        documents: read once, never all in memory.
        tokenizer: its vocabulary's fingerprint is written down.
        folder: replaced as a whole when everything is written.
        row_tokens: targets of one row.

    Returns:
        Report: for each part documents, tokens, rows and bytes per token; seconds.

    Raises:
        DataError: there are no documents, or a part has less than one row of tokens.
        ResourceError: the disk is full.
    """
    assert row_tokens > 0
    start = time.monotonic()
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 1 << 16 else np.dtype("<u4")
    parts: dict[str, _Part] = {}
    with fresh_folder(folder) as fresh:
        with ExitStack() as stack:
            files: dict[str, IO[bytes]] = {}
            for batch in _batches(documents):
                rows = tokenizer.encode_batch([document.text for document in batch])
                for document, ids in zip(batch, rows, strict=True):
                    name = _part_name(document)
                    if name not in files:
                        files[name] = stack.enter_context(open(fresh / f"{name}.bin", "wb"))
                    ids.append(tokenizer.end_id)
                    files[name].write(np.array(ids, dtype).tobytes())
                    part = parts.setdefault(name, _Part())
                    part.documents += 1
                    part.tokens += len(ids)
                    part.text_bytes += len(document.text.encode("utf-8", "replace"))
        _check_parts(parts, row_tokens)
        header = {
            "magic": MAGIC,
            "version": VERSION,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "dtype": dtype.str,
            "row_tokens": row_tokens,
            "parts": {name: asdict(part) for name, part in parts.items()},
        }
        write_json(fresh / HEADER, header)
    report = {
        name: {
            "documents": part.documents,
            "tokens": part.tokens,
            "rows": _num_rows(part.tokens, row_tokens),
            "bytes_per_token": round(part.text_bytes / part.tokens, 3),
        }
        for name, part in parts.items()
    }
    return {"parts": report, "row_tokens": row_tokens, "seconds": round(time.monotonic() - start, 2)}


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _part_name(document: Document) -> str:
    name = str(document.meta.get("part", "text"))
    if not PART_NAME.fullmatch(name):
        raise DataError(
            f"document {document.id} belongs to the part {name!r}, which cannot be a file's name",
            hint="name parts with letters, digits, '_', '.' and '-'",
        )
    return name


def _check_parts(parts: dict[str, _Part], row_tokens: int) -> None:
    if not parts:
        raise DataError(
            "there are no documents to make rows of", hint="see the corpus section's report for what was dropped"
        )
    for name, part in parts.items():
        if part.tokens <= row_tokens:
            raise DataError(
                f"the part {name!r} has {part.tokens} tokens, and one row needs {row_tokens + 1}",
                hint="give it more text, or shorten the rows (the context length)",
            )


def _num_rows(num_tokens: int, row_tokens: int) -> int:
    return (num_tokens - 1) // row_tokens


class Shards:
    """Token shards, open for reading; the files stay on disk and are read where they are looked at.

    Args:
        folder: what `write_shards` made.
        expected_fingerprint: of the vocabulary that will read the ids.

    Raises:
        DataError: no shards are there, they are of another vocabulary, or a file is cut short.
    """

    def __init__(self, folder: Path | str, expected_fingerprint: str) -> None:
        folder = Path(folder)
        header = _read_header(folder / HEADER)
        if header["fingerprint"] != expected_fingerprint:
            raise DataError(
                f"written with the vocabulary {header['fingerprint'][:12]}, and read with {expected_fingerprint[:12]}",
                file=folder / HEADER,
                hint="the ids would mean other words: write the shards again with this tokenizer",
            )
        dtype = np.dtype(header["dtype"])
        self.row_tokens = int(header["row_tokens"])
        self.parts: dict[str, int] = {}  # rows of each
        self.documents = {name: int(part["documents"]) for name, part in header["parts"].items()}
        self._tokens: dict[str, NDArray[Any]] = {}
        for name, part in header["parts"].items():
            path = folder / f"{name}.bin"
            found, expected = path.stat().st_size if path.is_file() else 0, part["tokens"] * dtype.itemsize
            if found != expected:
                raise DataError(f"{found} bytes, expected {expected}", file=path, hint="write the shards again")
            self._tokens[name] = np.memmap(path, dtype, "r")
            self.parts[name] = _num_rows(part["tokens"], self.row_tokens)

    def row(self, part: str, index: int) -> NDArray[Any]:
        """Row `index` of `part`: row_tokens + 1 ids, inputs and targets shifted by one."""
        if not 0 <= index < self.parts[part]:
            raise IndexError(f"row {index} of {part}, which has {self.parts[part]}")
        start = index * self.row_tokens
        return self._tokens[part][start : start + self.row_tokens + 1]


def _read_header(path: Path) -> dict[str, Any]:
    hint = "write the shards again"
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError("there are no token shards", file=path, hint="run the pretrain section first") from None
    except ValueError as error:
        raise DataError(f"broken JSON: {error}", file=path, hint=hint) from None
    if not isinstance(header, dict) or header.get("magic") != MAGIC:
        raise DataError("not the header of token shards", file=path, hint=hint)
    if header.get("version") != VERSION:
        raise DataError(f"format version {header.get('version')}, expected {VERSION}", file=path, hint=hint)
    return header
