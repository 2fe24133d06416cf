"""Files in the store, on either database: whole or not at all, listed by page, gone when they are gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from lyceum.errors import NotFound
from lyceum.serve.files.kept import Files, plain_name
from lyceum.serve.limits import Limits
from lyceum.serve.refusals import Refusal
from lyceum.serve.store import Store


@pytest.fixture
def files(store: Store, tmp_path: Path) -> Files:
    return Files(store.database, tmp_path / "files", Limits(files=4))


def test_a_draft_that_is_not_added_leaves_nothing(files: Files) -> None:
    with pytest.raises(RuntimeError), files.draft() as draft:
        draft.write(b"half")
        raise RuntimeError("the client left")
    assert list(files.folder.iterdir()) == [] and files.listed("ann") == ([], False)


def test_a_file_that_the_store_refuses_leaves_no_bytes(files: Files) -> None:
    for number in range(4):
        files.write("ann", ["x"], filename=str(number), purpose="user_data")
    with pytest.raises(Refusal, match="4 files, of 4"):
        files.write("ann", ["x"], filename="5", purpose="user_data")
    assert len(list(files.folder.iterdir())) == 4
    files.write("bob", ["x"], filename="b", purpose="user_data")
    assert files.forget("ann") == 4 and len(list(files.folder.iterdir())) == 1


def test_pages_follow_each_other_in_both_orders(files: Files) -> None:
    ids = [files.write("ann", ["é\ud800"], filename="f", purpose="batch").id for _ in range(4)]
    assert files.path("ann", ids[0]).read_bytes() == "é?\n".encode()
    page, has_more = files.listed("ann", order="asc", limit=3)
    assert [file.id for file in page] == ids[:3] and has_more
    page, has_more = files.listed("ann", order="asc", limit=3, after=ids[2])
    assert [file.id for file in page] == ids[3:] and not has_more
    assert files.listed("ann", after=ids[1])[0][0].id == ids[0] and files.listed("ann", purpose="evals") == ([], False)
    files.delete("ann", ids[0])
    for ask in (files.about, files.path, files.delete):
        with pytest.raises(NotFound):
            ask("ann", ids[0])
        with pytest.raises(NotFound):
            ask("bob", ids[1])


def test_a_name_is_a_name_and_no_path() -> None:
    assert plain_name("../../etc/passwd") == "passwd" and plain_name("C:\\a\\b.jsonl") == "b.jsonl"
    assert plain_name("a\0\nb") == "ab" and plain_name("/") == "file" and len(plain_name("x" * 999)) == 255
