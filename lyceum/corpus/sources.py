"""Named sources as a stream of documents: a folder, a file, the sources of installed packages.

What: every reader yields `Document`s with `meta.part` ("code" or "docs"), `meta.source` and `meta.path` (relative).
Why: the steps after it need not know where text comes from. A file that is binary or not UTF-8 is counted, not fatal:
one bad file must not end an hour of work. A broken line in a JSONL file, however, is an error: there a person meant
data.

    drops = Counter()
    for document in read_folder("docs/", drops): ...

Not here: the web, archives other than .jsonl.gz, and what a document is worth (`lyceum.corpus.clean`).
"""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lyceum.corpus.packages import Survey, read_source
from lyceum.corpus.records import Document, read_documents
from lyceum.errors import DataError

TEXT = frozenset(".txt .md .rst".split())
CODE = frozenset(".py .pyi .c .h .cc .cpp .hpp .java .js .ts .go .rs .sh .rb .sql".split())
ROWS = (".jsonl", ".jsonl.gz", ".json")
SKIPPED = frozenset("__pycache__ node_modules site-packages dist-packages venv build dist".split())
UNREADABLE = "binary or not UTF-8"


def read_folder(folder: str | Path, drops: Counter[str]) -> Iterator[Document]:
    """Documents of all files below a folder that we can read, in the order of their paths; other types are left alone.

    Args:
        drops: reason -> number; unreadable and empty files are added here.

    Raises: DataError if there is no such folder, or a line of a JSONL file is broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        hint = "give a folder, relative to where the command is started"
        raise DataError("no such folder", file=folder, hint=hint)
    for at, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in SKIPPED and not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield from read_file(Path(at) / name, drops, source=str(folder), root=folder)


def read_file(path: Path, drops: Counter[str], *, source: str = "", root: Path | None = None) -> Iterator[Document]:
    """Documents of one file by its suffix: text and code are one document, .jsonl and .parquet one for each row.

    Raises: DataError for a broken row, or for .parquet where pyarrow is not installed.
    """
    suffix = path.suffix.lower()
    relative = path.relative_to(root).as_posix() if root else path.name
    meta = {"source": source or path.name, "path": relative}
    if suffix in TEXT | CODE:
        text = read_source(path)
        if text is None or not text.strip():
            drops[UNREADABLE if text is None else "empty file"] += 1
            return
        yield Document(text, meta={**meta, "part": "code" if suffix in CODE else "docs"})
        return
    if path.name.lower().endswith(ROWS):
        rows = read_documents(path)
    elif suffix == ".parquet":
        rows = _read_parquet(path)
    else:
        return
    for document in rows:
        part = "code" if document.meta.get("part") == "code" else "docs"
        yield replace(document, meta={**meta, **document.meta, "part": part})


def _read_parquet(path: Path) -> Iterator[Document]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        hint = "pip install pyarrow, or convert the file to .jsonl"
        raise DataError("reading .parquet needs pyarrow, which is not installed", file=path, hint=hint) from None
    table = parquet.ParquetFile(path)
    if "text" not in table.schema_arrow.names:
        columns = ", ".join(table.schema_arrow.names)
        raise DataError(f"no column 'text' among: {columns}", file=path, hint="rename the column that holds the text")
    for batch in table.iter_batches(columns=["text"]):
        for text in batch.column(0).to_pylist():
            if text:
                yield Document(text)


def package_sources(survey: Survey) -> Iterator[Document]:
    """The source files of the surveyed packages, one document each; `meta.path` is "json/decoder.py"."""
    for package, module, text in survey.sources():
        tail = "/__init__.py" if module.is_package else ".py"
        path = module.name.replace(".", "/") + tail
        yield Document(text, meta={"part": "code", "source": package, "path": path, "module": module.name})
