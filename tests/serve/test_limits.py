"""Keys and quotas are tested over HTTP in test_guard.py; here is what their file says when it is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from lyceum.errors import DataError, UsageError
from lyceum.serve.limits import EVERYBODY, Key, Keys
from lyceum.serve.refusals import Refusal


@pytest.mark.parametrize("text", ["", "[]", '{"keys": [1]}', '{"keys": [{"name": "a"}]}', '{"keys": [{"scopes": []}]}'])
def test_a_broken_file_of_keys_is_an_error_and_never_no_keys(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys.json").write_text(text)
    with pytest.raises(DataError, match="keys.json"):
        Keys.read(tmp_path / "keys.json")
    with pytest.raises(DataError):
        Keys.read(tmp_path / "none.json")


def test_a_key_has_a_name_and_scopes_that_exist() -> None:
    for wrong in ({"name": ""}, {"name": "a", "scopes": ("all",)}):
        with pytest.raises(UsageError):
            Key(hash="", **wrong)  # type: ignore[arg-type]


def test_without_keys_everybody_may_do_everything() -> None:
    assert Keys().caller(None) is EVERYBODY and not Keys().caller("Bearer x").need("metrics")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic x", "x"])
def test_with_keys_nobody_comes_without_one(header: str | None) -> None:
    with pytest.raises(Refusal) as refused:
        Keys([Key("a", "0" * 64)]).caller(header)
    assert refused.value.status == 401 and refused.value.code == "missing_api_key"
    assert refused.value.headers["www-authenticate"] == "Bearer"
