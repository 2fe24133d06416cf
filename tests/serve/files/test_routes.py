"""Files over the wire, as the official client sends them: kept, listed, read, deleted, each its owner's; what is wrong is refused
early and in bounded memory."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from lyceum.serve.limits import Limits

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ahoy"}]}
LINE = json.dumps(CHAT).encode() + b"\n"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def send(server: Any, *parts: bytes, length: int | None = None, boundary: str = "xx", wait: bool = True) -> str:
    """A form over a raw connection, and what is answered."""
    body = b"".join(parts)
    head = f"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary={boundary}\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body)
        return connection.makefile("rb").read(4096).decode() if not wait else read_answer(connection)


def read_answer(connection: socket.socket) -> str:
    answer = connection.recv(65536).decode()
    head, _, body = answer.partition("\r\n\r\n")
    wanted = int(next(line for line in head.splitlines() if line.lower().startswith("content-length")).split(":")[1])
    while len(body.encode()) < wanted:
        body += connection.recv(65536).decode()
    return head.splitlines()[0] + "\n" + body


def field(name: str, value: str) -> bytes:
    return f'--xx\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()


def part(content: bytes, filename: str = "a.jsonl") -> bytes:
    head = f'--xx\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\n\r\n'
    return head.encode() + content + b"\r\n"


END = b"--xx--\r\n"


def test_the_official_client_uploads_lists_reads_and_deletes(desk: Callable) -> None:
    client = desk().openai()
    sent = LINE * 30
    file = client.files.create(file=("../../etc/chats.jsonl", sent), purpose="fine-tune")
    assert file.bytes == len(sent) and file.purpose == "fine-tune" and file.filename == "chats.jsonl"
    assert file.status == "processed" and file.expires_at is None and abs(file.created_at - time.time()) < 5
    assert file.status_details is not None and "30 supervised examples" in file.status_details
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).content == sent
    assert client.files.wait_for_processing(file.id) == file
    assert client.files.delete(file.id).deleted
    for ask in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            ask(file.id)
    assert client.files.list().data == []


def test_a_list_has_pages_an_order_and_purposes(desk: Callable) -> None:
    client = desk().openai()
    ids = [client.files.create(file=(f"{number}", b"x"), purpose="user_data").id for number in range(5)]
    tuned = client.files.create(file=("t", LINE), purpose="fine-tune").id
    assert [file.id for file in client.files.list()] == [tuned, *reversed(ids)]
    assert [file.id for file in client.files.list(purpose="user_data", order="asc")] == ids
    page = client.files.list(limit=2, purpose="user_data")
    assert [file.id for file in page.data] == [ids[4], ids[3]] and page.has_more
    assert [file.id for file in page] == [*reversed(ids)]  # all pages, one after the other
    for wrong in ({"limit": 0}, {"order": "up"}, {"after": "file-none"}):
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)):
            client.files.list(**wrong)  # type: ignore[arg-type]


def test_a_file_is_its_owners_alone(desk: Callable, known: Callable) -> None:
    server = desk(porter=known("alice", "bob"))
    alice, bob = server.openai("a" * 40), server.openai("b" * 40)
    file = alice.files.create(file=("a", b"secret"), purpose="user_data")
    for ask in (bob.files.retrieve, bob.files.content, bob.files.delete):
        with pytest.raises(openai.NotFoundError) as theirs:
            ask(file.id)
        with pytest.raises(openai.NotFoundError) as nobodys:
            ask("file-" + "0" * 24)
        assert theirs.value.message.replace(file.id, "ID") == nobodys.value.message.replace("file-" + "0" * 24, "ID")
    assert bob.files.list().data == [] and [one.id for one in alice.files.list()] == [file.id]
    with pytest.raises(openai.NotFoundError):
        bob.files.list(after=file.id)
    with pytest.raises(openai.AuthenticationError):
        server.openai("c" * 40).files.list()


def test_files_expire_and_their_bytes_go_with_them(desk: Callable, monkeypatch: Any) -> None:
    server = desk()
    client = server.openai()
    batch = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}
    kept = client.files.create(file=("a", b"x"), purpose="user_data")
    short = client.files.create(
        file=("a", b"x"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    lines = client.files.create(file=("a", json.dumps(batch).encode()), purpose="batch")
    assert abs((short.expires_at or 0) - time.time() - 3600) < 5 and kept.expires_at is None
    assert abs((lines.expires_at or 0) - time.time() - 30 * 86400) < 5
    for seconds in (10, 30 * 86400 + 1):
        with pytest.raises(openai.BadRequestError, match="expires_after"):
            client.files.create(
                file=("a", b"x"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": seconds}
            )
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3601)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(short.id)
    assert [file.id for file in client.files.list()] == [lines.id, kept.id]
    assert server.files.sweep() == 1
    assert sorted(path.name for path in server.files.folder.iterdir()) == sorted([kept.id, lines.id])


def test_an_owner_has_a_share_of_the_disk(desk: Callable, known: Callable) -> None:
    server = desk(limits=Limits(files=2, files_bytes=1000), porter=known("alice", "bob"))
    alice = server.openai("a" * 40)
    with pytest.raises(openai.BadRequestError, match="of 1000") as found:
        alice.files.create(file=("a", b"x" * 1001), purpose="user_data")
    assert found.value.code == "file_quota_exceeded"
    first = alice.files.create(file=("a", b"x" * 200), purpose="user_data")
    alice.files.create(file=("a", b"x" * 200), purpose="user_data")
    with pytest.raises(openai.BadRequestError, match="2 files, of 2"):
        alice.files.create(file=("a", b"x"), purpose="user_data")
    server.openai("b" * 40).files.create(file=("a", b"x"), purpose="user_data")  # another's share is another's
    alice.files.delete(first.id)
    alice.files.create(file=("a", b"x"), purpose="user_data")


def test_a_wrong_purpose_is_named(desk: Callable) -> None:
    client = desk().openai()
    for purpose, said in (("vision", "not supported"), ("assistants", "not supported"), ("fun", "expected one of")):
        with pytest.raises(openai.BadRequestError, match=said) as found:
            client.files.create(file=("a", LINE), purpose=purpose)  # type: ignore[arg-type]
        assert found.value.param == "purpose"
    with pytest.raises(openai.BadRequestError, match="The file is empty"):
        client.files.create(file=("a", b""), purpose="fine-tune")
    assert client.files.list().data == []


@pytest.mark.slow
def test_ten_thousand_rows_with_one_that_is_broken(desk: Callable) -> None:
    server = desk()
    rows = [LINE] * 10_000
    rows[7776] = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "asistant", "content": "x"}]}\n'
    begun = time.monotonic()
    with pytest.raises(openai.BadRequestError, match="Line 7777 ") as found:
        server.openai().files.create(file=("a", b"".join(rows)), purpose="fine-tune")
    assert time.monotonic() - begun < 20 and found.value.code == "invalid_file_format"
    assert list(server.files.folder.iterdir()) == [] and server.files.listed("everybody") == ([], False)


def test_a_form_that_ends_before_its_last_boundary_is_no_file(desk: Callable) -> None:
    server = desk()
    whole = field("purpose", "user_data"), part(b"one line\n")
    assert send(server, *whole, END).startswith("HTTP/1.1 200")
    for cut in (b"", b"--x"):
        assert "before its last boundary" in send(server, *whole, cut)
    assert len(list(server.openai().files.list())) == 1


@pytest.mark.parametrize("most", [512 << 20, 2 << 30])
def test_a_line_of_a_gigabyte_is_refused_early_in_bounded_memory(desk: Callable, most: int) -> None:
    server = desk(limits=Limits(upload_bytes=most, files_bytes=4 << 30))
    head = field("purpose", "fine-tune") + b'--xx\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    before, begun, num_sent = resident_bytes(), time.monotonic(), 0
    request = b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=xx\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(request + f"Content-Length: {(1 << 30) + len(head)}\r\n\r\n".encode() + head)
        try:
            while num_sent < 1 << 30:
                num_sent += connection.send(b"x" * (1 << 20))
        except (ConnectionResetError, BrokenPipeError):
            pass  # it was refused while it was sent
        answer = connection.recv(65536).decode()
    if most < 1 << 30:
        assert "413" in answer.splitlines()[0] and "request_too_large" in answer
    else:
        assert "400" in answer.splitlines()[0] and "Line 1 of the file is longer than" in answer
    assert num_sent < 64 << 20 and time.monotonic() - begun < 10 and resident_bytes() - before < 64 << 20
    assert not server.files.folder.exists() or list(server.files.folder.iterdir()) == []


@pytest.mark.slow
def test_the_official_client_is_told_so(desk: Callable, tmp_path: Path) -> None:
    server = desk(limits=Limits(upload_bytes=2 << 30, files_bytes=4 << 30))
    with open(tmp_path / "long.jsonl", "wb") as file:
        file.truncate(256 << 20)  # zeros that take no room
    begun = time.monotonic()
    with pytest.raises(openai.BadRequestError, match="Line 1 of the file is longer than"):
        server.openai().files.create(file=tmp_path / "long.jsonl", purpose="fine-tune")
    assert time.monotonic() - begun < 10


def test_a_large_file_of_short_lines_is_kept_in_bounded_memory(desk: Callable) -> None:
    server = desk()
    sent = b"".join([field("purpose", "user_data"), part(b"line\n" * (8 << 20)), END])
    before = resident_bytes()
    assert "200" in send(server, sent).splitlines()[0]
    assert resident_bytes() - before < 24 << 20
    (file,), _ = server.files.listed("everybody")
    assert file.bytes == 5 * (8 << 20) == server.files.path("everybody", file.id).stat().st_size


def test_the_file_may_come_before_its_purpose(desk: Callable) -> None:
    server = desk(limits=Limits(line_bytes=100))
    assert "200" in send(server, part(LINE), field("purpose", "fine-tune"), END)
    assert "200" in send(server, part(b"x" * 500), field("purpose", "user_data"), END)
    assert "Line 2 of the file is longer" in send(server, part(LINE + b"x" * 500), field("purpose", "batch"), END)


def test_forms_that_are_none_are_refused(desk: Callable) -> None:
    server = desk()
    purpose = field("purpose", "user_data")
    for parts, said in (
        ((purpose, END), "'file'"),
        ((part(b"x"), END), "'purpose'"),
        ((purpose, purpose, part(b"x"), END), "twice"),
        ((purpose, part(b"x"), part(b"y"), END), "one file"),
        ((purpose, field("colour", "red"), part(b"x"), END), "colour"),
        ((field("purpose", "p" * 2000), part(b"x"), END), "longer than 1024"),
        ((purpose, part(b"x", "n" * 9000), END), "multipart form"),
        ((purpose, b"--xx\r\nX: y\r\n\r\nz\r\n", END), "no name"),
        ((b"no form at all",), "multipart"),
    ):
        answer = send(server, *parts)
        assert "400" in answer.splitlines()[0] and said in answer, answer
    assert server.ask("POST", "/v1/files", {"purpose": "user_data"}).status == 415
    assert "413" in send(server, purpose, length=600 << 20)
    assert server.files.listed("everybody") == ([], False) and list(server.files.folder.glob("*")) == []


def test_who_sends_too_slowly_or_leaves_is_forgotten(desk: Callable) -> None:
    server = desk(limits=Limits(body_s=0.3))
    assert "408" in send(server, field("purpose", "user_data"), length=1000)
    server = desk()
    head = b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=xx\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    connection.sendall(head + b"Content-Length: 100000\r\n\r\n" + field("purpose", "user_data") + part(b"x" * 50_000))
    end = time.monotonic() + 5
    while not list(server.files.folder.glob("*")) and time.monotonic() < end:
        time.sleep(0.01)
    assert list(server.files.folder.glob("*"))
    connection.close()
    while list(server.files.folder.glob("*")) and time.monotonic() < end:
        time.sleep(0.01)
    assert list(server.files.folder.glob("*")) == []
