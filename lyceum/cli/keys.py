"""``lyceum keys``: who may ask a server. Keys are kept in the store of the run that is served, each as its hash.

    lyceum keys new runs/demo ann --days 90        shows the key, once
    lyceum keys list runs/demo                     ids, names, owners, scopes, ends
    lyceum keys revoke runs/demo key_1f...         a running server refuses it a second later
    lyceum keys new runs/demo ann --owner key_1f...   takes over the chats of the key that was lost

It only opens the store and shows what comes of it: keys are `lyceum.serve.keys`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lyceum.cli.feedback import store_packages
from lyceum.errors import UsageError

if TYPE_CHECKING:
    from lyceum.serve.keys import Key, Keys


def new(place: str, name: str, *, scopes: Sequence[str], days: float, owner: str) -> str:
    """Make a key; returns the secret. Raises UsageError for a place that is none; StoreError."""
    if "://" not in place and not Path(place).exists() and not Path(place).suffix:
        raise UsageError(f"there is no run or store at {place}", hint="a run's folder, as it is served; or a file")
    with _opened(place, must_exist=False) as keys:
        _, secret = keys.make(name, owner=owner, days=days, **({"scopes": scopes} if scopes else {}))
    return secret


def change(place: str, deed: str, id: str, name: str = "") -> str:
    """Rename, revoke or forget a key; returns what was done, for a person. Raises NotFound, StoreError."""
    with _opened(place) as keys:
        if deed == "rename":
            return _line(keys.rename(id, name))
        if deed == "revoke":
            return _line(keys.revoke(id))
        keys.forget(id)
        return f"{id} is off the list" + ("" if keys.all() else "; no key is left, and nobody is asked for one")


def listed(place: str) -> str:
    """All keys of a store, a line each, oldest first. Raises StoreError."""
    with _opened(place) as keys:
        return "\n".join(_line(key) for key in keys.all()) or "no keys: the server asks nobody for one"


@contextmanager
def _opened(place: str, *, must_exist: bool = True) -> Iterator[Keys]:
    with store_packages():
        from lyceum.serve.database import Database
        from lyceum.serve.keys import Keys
    database = Database.open(place, must_exist=must_exist)
    try:
        yield Keys(database)
    finally:
        database.close()


def _line(key: Key) -> str:
    def day(seconds: float) -> str:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")

    end = "for ever" if not key.expires else f"{'ended' if key.has_ended else 'until'} {day(key.expires)}"
    owner = "" if key.owner == key.id else f"  owner {key.owner}"
    return f"{key.id}  {key.name}  {','.join(key.scopes)}  from {day(key.created)}, {end}{owner}"
