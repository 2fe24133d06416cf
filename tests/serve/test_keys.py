"""Keys: only their hash is kept; a lost or ended one leaves the owner's conversations to the next."""

from __future__ import annotations

import hmac
import time
from typing import Any

import pytest
from sqlalchemy import select

from lyceum.errors import NotFound, StoreError
from lyceum.serve import keys as keys_module
from lyceum.serve.keys import match
from lyceum.serve.store import Store
from lyceum.serve.tables import KEYS


def test_a_key_is_found_by_its_secret_which_is_not_kept(store: Store) -> None:
    key, secret = store.keys.make("laptop", scopes=("models", "inference"))
    other, _ = store.keys.make("phone", scopes=("models",), days=1)
    assert match(store.keys.all(), secret) == key and store.keys.all() == [key, other]
    assert key.owner == key.id != other.owner and key.scopes == ("models", "inference")
    for wrong in ("", secret[:-1], secret + "x", "sk-lyceum-\udcff"):
        assert match(store.keys.all(), wrong) is None
    with store.database.reading() as connection:
        rows = connection.execute(select(KEYS)).all()
    assert secret not in repr(rows) and secret.removeprefix("sk-lyceum-") not in repr(rows)
    assert len(secret) >= 40


def test_a_presented_key_is_compared_with_every_key_in_constant_time(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = [store.keys.make(f"key {number}", scopes=("models",))[1] for number in range(5)]
    compared: list[Any] = []
    real = hmac.compare_digest

    def compare(left: str, right: str) -> bool:
        compared.append((left, right))
        return real(left, right)

    monkeypatch.setattr(keys_module.hmac, "compare_digest", compare)
    for secret in (secrets[0], secrets[4], "wrong"):
        compared.clear()
        match(store.keys.all(), secret)
        assert len(compared) == 5


def test_a_key_ends_and_a_new_one_of_the_same_owner_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    key, secret = store.keys.make("laptop", scopes=("inference",), days=1)
    chat = store.new(key.owner)
    assert not key.has_ended
    later = time.time() + 2 * 86400
    monkeypatch.setattr(keys_module.time, "time", lambda: later)
    found = match(store.keys.all(), secret)
    assert found is not None and found.has_ended
    monkeypatch.undo()
    store.keys.revoke(key.id)
    revoked = match(store.keys.all(), secret)
    assert revoked is not None and revoked.has_ended  # it stays on the list, so that the store is not open to everybody
    assert store.keys.revoke(key.id) == revoked
    second, _ = store.keys.make("laptop again", scopes=("inference",), owner=key.owner)
    assert store.latest(second.owner) == [chat]


def test_keys_are_renamed_and_forgotten(store: Store) -> None:
    key, secret = store.keys.make("laptop")
    assert store.keys.rename(key.id, " phone ").name == "phone" and store.keys.all()[0].name == "phone"
    store.keys.forget(key.id)
    assert store.keys.all() == []
    for deed in (store.keys.forget, store.keys.revoke, lambda id: store.keys.rename(id, "x")):
        with pytest.raises(NotFound):
            deed(key.id)


@pytest.mark.parametrize("wrong", [{"name": " "}, {"scopes": ()}, {"scopes": ("everything",)}, {"days": -1}])
def test_a_key_without_name_scopes_or_future_is_refused(store: Store, wrong: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="a key needs|no scope"):
        store.keys.make(**{"name": "laptop", "scopes": ("models",), **wrong})
