"""Files as they are kept: a row in the store for each, and its bytes in a folder under the row's id.

    files = Files(store.database, "runs/demo/store.files")
    with files.draft() as draft: draft.write(b"...")                 # then
    file = files.add("alice", draft.path, filename="chats.jsonl", purpose="fine-tune")
    files.path("alice", file.id)                                     # where its bytes are, for its owner alone

Names on disk are ids of ours; nothing of a client's name becomes a path. The bytes are in place and flushed before the row is
committed, and the row goes before the bytes do: whatever is killed when, a file that is listed is whole. What has expired is
not there any more, and is swept away now and then, as are drafts whose writer is gone.

All calls block: a server makes them from a worker thread. What it is not: the upload (`lyceum.serve.files.uploads`), or what
is expected in a file (`lyceum.serve.files.checks`).
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from sqlalchemy import Row, delete, func, insert, select

from lyceum.errors import NotFound
from lyceum.run import PARTIAL, disk_errors
from lyceum.serve.database import Database
from lyceum.serve.files.tables import FILES
from lyceum.serve.limits import Limits
from lyceum.serve.refusals import Refusal
from lyceum.serve.tree import need_owner

MAX_FILENAME = 255  # characters
DRAFT_S = 3600.0  # a draft that nobody has written to for so long has lost its writer


@dataclass(frozen=True)
class File:
    """A file as its owner sees it. created, expires: seconds since 1970; expires 0: never. details: what was found in it, for a
    person; found: the same for programs."""

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    details: str
    found: dict[str, Any]
    created: float
    expires: float

    def to_json(self) -> dict[str, Any]:
        """The file as the API shows it."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": int(self.created),
            "expires_at": int(self.expires) if self.expires else None,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": self.details or None,
        }


@dataclass
class Draft:
    """A file that is being written. path: where."""

    path: Path
    _file: IO[bytes] = field(repr=False)
    num_bytes: int = 0

    def write(self, content: bytes) -> None:
        """More of it. Raises ResourceError where the disk is full."""
        with disk_errors(self.path):
            self._file.write(content)
        self.num_bytes += len(content)

    def flush(self) -> None:
        """All that was written can be read at `path`."""
        with disk_errors(self.path):
            self._file.flush()


class Files:
    """The files of a store. limits: how many, and how much of them, an owner may have."""

    def __init__(self, database: Database, folder: Path | str, limits: Limits | None = None):
        self.database, self.folder, self.limits = database, Path(folder), limits or Limits()

    @contextmanager
    def draft(self) -> Iterator[Draft]:
        """A new file to write; what `add` has not taken when the block ends is deleted. Flushed to the disk at the end."""
        path = self.folder / f"file-{secrets.token_hex(12)}{PARTIAL}"
        with disk_errors(path):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = open(path, "xb")
        try:
            yield Draft(path, file)
        finally:
            file.close()
            path.unlink(missing_ok=True)

    def add(
        self,
        owner: str,
        draft: Draft,
        *,
        filename: str,
        purpose: str,
        expires: float = 0.0,
        details: str = "",
        found: dict[str, Any] | None = None,
    ) -> File:
        """Keep a draft as somebody's file. Raises Refusal where the owner's share is used up, ResourceError for a full disk."""
        draft.flush()
        with disk_errors(draft.path):
            os.fsync(draft._file.fileno())
        id, now = draft.path.name.removesuffix(PARTIAL), time.time()
        row: dict[str, Any] = {
            "id": id,
            "owner": need_owner(owner),
            "filename": plain_name(filename),
            "purpose": purpose,
            "bytes": draft.num_bytes,
            "details": details,
            "found": found or {},
            "created": now,
            "expires": expires,
        }
        final = self.folder / id
        try:
            with self.database.writing() as connection:
                self._check_share(connection, owner, draft.num_bytes)
                connection.execute(insert(FILES).values(row))
                os.replace(draft.path, final)
                _flush_folder(self.folder)
        except BaseException:
            final.unlink(missing_ok=True)
            raise
        return File(**row)

    def write(self, owner: str, lines: Iterable[str], *, filename: str, purpose: str, expires: float = 0.0) -> File:
        """Make a file of somebody's from lines of text."""
        with self.draft() as draft:
            for line in lines:
                draft.write(line.encode("utf-8", "replace") + b"\n")
            return self.add(owner, draft, filename=filename, purpose=purpose, expires=expires)

    def about(self, owner: str, id: str) -> File:
        """A file. Raises NotFound for what is not there, has expired, or is another's."""
        with self.database.reading() as connection:
            row = connection.execute(select(FILES).where(FILES.c.id == id, FILES.c.owner == owner)).first()
        if row is None or 0 < row.expires <= time.time():
            raise NotFound(f"There is no file {id[:80]!r}.")
        return _file(row)

    def path(self, owner: str, id: str) -> Path:
        """Where a file's bytes are. Raises NotFound."""
        return self.folder / self.about(owner, id).id

    def listed(
        self,
        owner: str,
        *,
        purpose: str | None = None,
        order: Literal["asc", "desc"] = "desc",
        limit: int = 10_000,
        after: str | None = None,
    ) -> tuple[list[File], bool]:
        """A page of somebody's files, and whether more follow; `after`: the id that the page before ended with."""
        table, now = FILES.c, time.time()
        query = select(FILES).where(table.owner == owner, (table.expires == 0) | (table.expires > now))
        if purpose is not None:
            query = query.where(table.purpose == purpose)
        with self.database.reading() as connection:
            if after is not None:
                known = select(table.number).where(table.id == after, table.owner == owner)
                number = connection.execute(known).scalar_one_or_none()
                if number is None:
                    raise NotFound(f"There is no file {after[:80]!r}.")
                query = query.where(table.number > number if order == "asc" else table.number < number)
            query = query.order_by(table.number if order == "asc" else table.number.desc()).limit(limit + 1)
            rows = connection.execute(query).all()
        return [_file(row) for row in rows[:limit]], len(rows) > limit

    def delete(self, owner: str, id: str) -> None:
        """Delete a file. Raises NotFound."""
        self.about(owner, id)
        self._drop(FILES.c.id == id, FILES.c.owner == owner)

    def forget(self, owner: str) -> int:
        """Delete all of somebody's files; returns how many."""
        return self._drop(FILES.c.owner == owner)

    def sweep(self) -> int:
        """Delete what has expired, and drafts whose writer is gone; returns how many files."""
        num_swept = self._drop(FILES.c.expires > 0, FILES.c.expires <= time.time())
        for left in self.folder.glob(f"*{PARTIAL}"):
            try:
                if left.stat().st_mtime < time.time() - DRAFT_S:
                    left.unlink()
            except FileNotFoundError:  # its writer was there after all
                continue
        return num_swept

    def check_share(self, owner: str, num_bytes: int) -> None:
        """Raises Refusal where an owner has no room for another file of so many bytes."""
        with self.database.reading() as connection:
            self._check_share(connection, owner, num_bytes)

    def _check_share(self, connection: Any, owner: str, num_bytes: int) -> None:
        counted = select(func.count(), func.coalesce(func.sum(FILES.c.bytes), 0)).where(FILES.c.owner == owner)
        num, held = connection.execute(counted).one()
        if num >= self.limits.files:
            raise Refusal(
                400, f"You have {num} files, of {self.limits.files}: delete some.", code="file_quota_exceeded"
            )
        if held + num_bytes > self.limits.files_bytes:
            raise Refusal(
                400,
                f"Your files would have {held + num_bytes} bytes together, of {self.limits.files_bytes}: delete some.",
                code="file_quota_exceeded",
            )

    def _drop(self, *conditions: Any) -> int:
        with self.database.writing() as connection:
            ids = connection.execute(delete(FILES).where(*conditions).returning(FILES.c.id)).scalars().all()
        for id in ids:  # after the commit: killed here, bytes are left that nobody can see
            (self.folder / id).unlink(missing_ok=True)
        return len(ids)


def plain_name(filename: str) -> str:
    """A client's name of a file: its last part, without what is not printed."""
    last = filename.replace("\\", "/").rpartition("/")[2]
    return "".join(letter for letter in last if letter.isprintable())[:MAX_FILENAME] or "file"


def _file(row: Row[Any]) -> File:
    return File(**{name: value for name, value in row._mapping.items() if name != "number"})


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
