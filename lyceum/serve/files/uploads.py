"""A multipart body, streamed to disk: nothing of the file is held in memory but the piece that has just come.

    async with received(request, files, limits) as upload: ...       # upload.fields, upload.filename, upload.draft

The library python-multipart cuts the body into parts; what is bounded, is bounded here: fields, their lengths, headers, one file
and no more. A file whose purpose asks for lines (`LINED`) is counted while it comes, so that a line that is too long is refused
at its limit and not at its end, wherever that may be. The whole body's bytes and its pace are the guard's affair
(`lyceum.serve.guard`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from lyceum.serve.files.kept import Draft, Files
from lyceum.serve.limits import Limits
from lyceum.serve.refusals import Refusal
from lyceum.serve.worker import Gone

LINED = ("fine-tune", "batch")  # purposes whose files are lines of JSON
MAX_FIELDS = 16
MAX_VALUE = 1024  # bytes of a field
MAX_HEADERS = 8 << 10  # bytes of a part's headers
WRITE_BYTES = 256 << 10  # are gathered for one write


class Upload:
    """A form with one file, as it comes. fields: its other fields; filename: as the client has it, None before the file began."""

    def __init__(self, draft: Draft, limits: Limits):
        self.draft, self.limits = draft, limits
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.line, self.line_bytes = 1, 0  # where the file is just now
        self.long_line = 0  # the first line that is too long
        self.waiting = bytearray()  # of the file, not written yet
        self.is_whole = False  # the last boundary has come
        self._name, self._is_file = "", False
        self._value, self._header = bytearray(), (bytearray(), bytearray())
        self._disposition, self._num_header_bytes = b"", 0

    @property
    def callbacks(self) -> dict[str, Any]:
        """What the parser calls."""
        names = ("part_begin", "part_data", "part_end", "header_field", "header_value", "header_end", "end")
        return {f"on_{name}": getattr(self, f"_{name}") for name in (*names, "headers_finished")}

    def _end(self) -> None:
        self.is_whole = True

    def refuse_long_line(self) -> None:
        """Raises Refusal where a line was too long, and lines are what this file is made of."""
        if self.long_line and self.fields.get("purpose") in LINED:
            raise Refusal(
                400,
                f"Line {self.long_line} of the file is longer than {self.limits.line_bytes} bytes.",
                param="file",
                code="invalid_file_format",
            )

    def _part_begin(self) -> None:
        self._disposition, self._num_header_bytes = b"", 0
        self._value.clear()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header[0].extend(data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header[1].extend(data[start:end])

    def _count_header(self, num_bytes: int) -> None:
        self._num_header_bytes += num_bytes
        if self._num_header_bytes > MAX_HEADERS:
            raise _no_form(f"the headers of a part are longer than {MAX_HEADERS} bytes")

    def _header_end(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])
        for part in self._header:
            part.clear()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise _no_form("a part has no name")
        self._name = options[b"name"].decode("utf-8", "replace")
        self._is_file = b"filename" in options
        if self._is_file and (self._name != "file" or self.filename is not None):
            raise Refusal(400, "Send one file, in the field 'file'.", param="file", code="invalid_value")
        if self._is_file:
            self.filename = options[b"filename"].decode("utf-8", "replace")
        elif self._name in self.fields or len(self.fields) == MAX_FIELDS:
            raise _no_form(f"a field comes twice, or there are more than {MAX_FIELDS}")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if not self._is_file:
            self._value.extend(data[start:end])
            if len(self._value) > MAX_VALUE:
                raise Refusal(400, f"{self._name[:80]!r} is longer than {MAX_VALUE} bytes.", param=self._name)
            return
        self._count_lines(data, start, end)
        self.waiting += data[start:end]

    def _count_lines(self, data: bytes, start: int, end: int) -> None:
        first = data.find(b"\n", start, end)
        self._lengthen((end if first < 0 else first) - start)
        if first >= 0:  # what lies between two ends in this piece is shorter than the piece, and so than the limit
            self.line += data.count(b"\n", first, end)
            self.line_bytes = 0
            self._lengthen(end - data.rfind(b"\n", first, end) - 1)

    def _lengthen(self, num_bytes: int) -> None:
        self.line_bytes += num_bytes
        if self.line_bytes > self.limits.line_bytes and not self.long_line:
            self.long_line = self.line

    def _part_end(self) -> None:
        if not self._is_file:
            self.fields[self._name] = self._value.decode("utf-8", "replace")


@asynccontextmanager
async def received(request: Request, files: Files, limits: Limits) -> AsyncIterator[Upload]:
    """The form that a request brings, its file as a draft; the draft goes at the end unless it was added to `files`.

    Raises Refusal for what is no such form, Gone where the client has left.
    """
    _, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if not boundary:
        raise _no_form("its type names no boundary")
    with files.draft() as draft:
        upload = Upload(draft, limits)
        try:
            parser = MultipartParser(boundary, upload.callbacks)  # type: ignore[arg-type]  # it asks for no other names
            async for piece in request.stream():
                parser.write(piece)
                upload.refuse_long_line()
                if len(upload.waiting) >= WRITE_BYTES:
                    await _write(upload)
            parser.finalize()
            if not upload.is_whole:
                raise _no_form("it ends before its last boundary")
        except FormParserError:
            raise _no_form("its parts cannot be told apart") from None
        except ClientDisconnect:
            raise Gone from None
        await _write(upload)
        upload.refuse_long_line()
        if upload.filename is None:
            raise Refusal(400, "Missing required parameter: 'file'.", param="file", code="missing_required_parameter")
        yield upload


async def _write(upload: Upload) -> None:
    content = bytes(upload.waiting)
    upload.waiting.clear()
    await asyncio.to_thread(upload.draft.write, content)


def _no_form(why: str) -> Refusal:
    return Refusal(400, f"We could not read the multipart form: {why}.", code="invalid_multipart")
