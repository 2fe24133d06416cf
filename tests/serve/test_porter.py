"""Who is let in while the server runs: new keys, revoked ones, and a store that cannot be read."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lyceum.serve.keys import Key, Keys, hash_of
from lyceum.serve.limits import EVERYBODY, SCOPES, Caller
from lyceum.serve.porter import REREAD_S, Porter
from lyceum.serve.refusals import Refusal
from lyceum.serve.store import Store


def bearer(porter: Porter, secret: str) -> Caller:
    return asyncio.run(porter.caller(f"Bearer {secret}"))


def code(porter: Porter, header: str | None) -> str | None:
    with pytest.raises(Refusal) as refused:
        asyncio.run(porter.caller(header))
    assert refused.value.status == 401 and refused.value.headers["www-authenticate"] == "Bearer"
    return refused.value.code


def test_without_keys_everybody_may_do_everything() -> None:
    porter = Porter()
    assert not porter.asks and asyncio.run(porter.caller(None)) is EVERYBODY
    assert not EVERYBODY.need("metrics")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic x", "x"])
def test_with_keys_nobody_comes_without_one(header: str | None) -> None:
    assert code(Porter(lambda: [Key("a", "a", "a", hash_of("x" * 40))]), header) == "missing_api_key"


def test_a_caller_is_the_owner_of_the_key(store: Store) -> None:
    key, first = store.keys.make("laptop", scopes=("models",))
    _, second = store.keys.make("phone", owner=key.owner)
    porter = Porter(store.keys.all, api_key="x" * 40)
    assert bearer(porter, first) == Caller(key.owner, frozenset({"models"}))
    assert bearer(porter, second) == Caller(key.owner, frozenset({"models", "inference"}))
    assert bearer(porter, "x" * 40).scopes == set(SCOPES)
    assert code(porter, f"Bearer {first}x") == "invalid_api_key"


def test_a_running_server_knows_of_new_and_revoked_keys_within_a_second(tmp_path: Path) -> None:
    now = [0.0]
    store = Store.open(tmp_path / "store.sqlite")
    porter = Porter(store.keys.all, clock=lambda: now[0])
    assert asyncio.run(porter.caller(None)) is EVERYBODY
    key, secret = store.keys.make("laptop")
    assert asyncio.run(porter.caller(None)) is EVERYBODY  # the list is young
    now[0] += 1.01 * REREAD_S
    assert code(porter, None) == "missing_api_key" and bearer(porter, secret).id == key.owner
    store.keys.revoke(key.id)
    now[0] += 1.01 * REREAD_S
    assert code(porter, f"Bearer {secret}") == "expired_api_key"
    store.keys.forget(key.id)
    now[0] += 1.01 * REREAD_S
    assert code(porter, f"Bearer {secret}") == "invalid_api_key"  # a running server does not open again
    assert not Porter(store.keys.all).asks
    store.close()


def test_on_an_old_list_nobody_is_let_in() -> None:
    now, lists = [0.0], [[Key("a", "a", "a", hash_of("x" * 40))]]
    porter = Porter(lambda: lists.pop(), clock=lambda: now[0])
    assert bearer(porter, "x" * 40).id == "a"
    now[0] += 2 * REREAD_S
    with pytest.raises(Refusal) as refused:  # nothing to pop: the store is away
        bearer(porter, "x" * 40)
    assert refused.value.status == 503 and refused.value.retry_after_s > 0
    lists.append([Key("b", "b", "b", hash_of("x" * 40))])
    assert bearer(porter, "x" * 40).id == "b"


def test_the_list_is_read_once_however_many_ask(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    now, reads = [0.0], []
    store.keys.make("laptop")
    real = Keys.all
    monkeypatch.setattr(Keys, "all", lambda keys: reads.append(1) or real(keys))  # type: ignore[func-returns-value]
    porter = Porter(lambda: store.keys.all(), clock=lambda: now[0])
    now[0] += 2 * REREAD_S

    async def ask() -> None:
        await asyncio.gather(*(porter.caller("Bearer x") for _ in range(20)), return_exceptions=True)

    asyncio.run(ask())
    assert len(reads) == 2
