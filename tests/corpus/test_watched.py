"""Watched replies as they are written and read, and what is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from lyceum.corpus.records import Conversation, Message, write_records
from lyceum.corpus.watched import Watched, read_watched
from lyceum.errors import DataError

ASKED = Conversation((Message("user", "2 + 2?"),))
WATCHED = Watched(ASKED, ((0.0, 0.4, "Vier"), (0.4, 0.9, " é.")), ((1.1, 1.0), (1.3, -1.0)), {"annotator": "ann"})


def test_a_watched_reply_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert write_records(tmp_path / "presses.jsonl", [WATCHED, WATCHED]) == 2
    assert list(read_watched(tmp_path / "presses.jsonl")) == [WATCHED, WATCHED]
    assert WATCHED.text == "Vier é."


@pytest.mark.parametrize(
    "row",
    [
        '{"prompt": {"messages": [{"role": "user", "content": "a"}]}, "shown": [], "presses": []}',
        '{"prompt": {"messages": [{"role": "user", "content": "a"}]}, "shown": [[1, 0, "a"]], "presses": []}',
        '{"prompt": {"messages": [{"role": "user", "content": "a"}]}, "shown": [[0, 1, "a"]], "presses": [[1]]}',
        '{"prompt": {"messages": [{"role": "user", "content": "a"}]}, "shown": [[0, 1, "a"]], "presses": [[1, NaN]]}',
        '{"prompt": {"messages": []}, "shown": [[0, 1, "a"]], "presses": [[1, 1]]}',
        '{"shown": [[0, 1, "a"]], "presses": [[1, 1]]}',
        '"text"',
    ],
)
def test_a_row_that_is_none_is_an_error_that_names_file_and_line(row: str, tmp_path: Path) -> None:
    (tmp_path / "presses.jsonl").write_text(row + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"presses\.jsonl line 1: .*"):
        list(read_watched(tmp_path / "presses.jsonl"))
