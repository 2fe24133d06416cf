"""The keys of the service: made once, kept as their hash, found in constant time.

    key, secret = keys.make("laptop", scopes=("models", "inference"), days=90)     # the secret is shown once
    match(keys.all(), presented)                                                    # the Key, or None

A secret is 256 random bits, kept as its SHA-256: what cannot be guessed needs no slow hash. What is presented is compared
with every key there is, each in constant time, so that the time tells neither which was nearly right nor how many there
are. A key opens the conversations of its owner; by default it is an owner of its own. A second key of the same owner
takes over when the first one ends, and nothing is lost.

A key that is revoked ends at once and stays on the list: a store that has had keys goes on asking for one, and is not open
to everybody because the last was taken back. Only `forget` takes a key off the list.

What it is not: who is let in by a running server (`lyceum.serve.porter`), or what a scope allows (`lyceum.serve.guard`).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Row, delete, insert, select, update

from lyceum.errors import NotFound, StoreError, did_you_mean
from lyceum.serve.database import Database
from lyceum.serve.limits import SCOPES
from lyceum.serve.tables import KEYS
from lyceum.serve.tree import need_owner, new_id

PREFIX = "sk-lyceum-"
USUAL = ("models", "inference")  # what a new key may do, unless told otherwise
MAX_NAME = 300  # characters


@dataclass(frozen=True)
class Key:
    """A key as it is kept. hash: of its secret; created, expires: seconds since 1970; expires 0: never."""

    id: str
    name: str
    owner: str
    hash: str = field(repr=False)
    scopes: tuple[str, ...] = USUAL
    created: float = 0.0
    expires: float = 0.0

    @property
    def has_ended(self) -> bool:
        """True after its end."""
        return 0 < self.expires <= time.time()


def hash_of(secret: str) -> str:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def match(keys: Iterable[Key], presented: str) -> Key | None:
    """The key whose secret this is, ended or not; None if it is nobody's. Every key is looked at, whatever is presented."""
    hashed, found = hash_of(presented), None
    for key in keys:
        if hmac.compare_digest(key.hash, hashed):
            found = key
    return found


class Keys:
    """The keys in a database."""

    def __init__(self, database: Database):
        self.database = database

    def make(self, name: str, *, scopes: Sequence[str] = USUAL, days: float = 0.0, owner: str = "") -> tuple[Key, str]:
        """Make a key; returns it, and its secret, which nobody will see again.

        Args:
            name: for people.
            scopes: what it may do; of `lyceum.serve.limits.SCOPES`.
            days: how long it is good; 0 for ever.
            owner: whose conversations it opens; by default nobody else's.

        Raises:
            StoreError: no name, no scopes or unknown ones, or an end that has passed.
        """
        if not scopes or days < 0:
            raise StoreError(f"a key needs scopes and an end to come: {list(scopes)}, {days:g} days")
        for scope in scopes:
            if scope not in SCOPES:
                raise StoreError(f"there is no scope {scope!r}", hint=did_you_mean(scope, SCOPES))
        now, secret, id = time.time(), PREFIX + secrets.token_urlsafe(32), new_id("key")
        row = {"id": id, "name": _name(name), "owner": need_owner(owner or id), "scopes": list(scopes), "created": now}
        row |= {"expires": now + 86400 * days if days else 0.0, "hash": hash_of(secret)}
        with self.database.writing() as connection:
            return _key(connection.execute(insert(KEYS).values(row).returning(KEYS)).one()), secret

    def all(self) -> list[Key]:
        """All keys, oldest first, those that have ended too."""
        with self.database.reading() as connection:
            return [_key(row) for row in connection.execute(select(KEYS).order_by(KEYS.c.created))]

    def rename(self, id: str, name: str) -> Key:
        """Call a key something else. Raises NotFound; StoreError for no name."""
        return self._change(id, name=_name(name))

    def revoke(self, id: str) -> Key:
        """End a key now, unless it has ended; it stays on the list, and its owner's conversations stay. Raises NotFound."""
        now = time.time()
        with self.database.writing() as connection:
            is_good = (KEYS.c.expires == 0) | (KEYS.c.expires > now)
            connection.execute(update(KEYS).where(KEYS.c.id == id, is_good).values(expires=now))
        return self._change(id)

    def forget(self, id: str) -> None:
        """Take a key off the list. A store without any key asks nobody for one. Raises NotFound."""
        with self.database.writing() as connection:
            if not connection.execute(delete(KEYS).where(KEYS.c.id == id)).rowcount:
                raise _unknown(id)

    def _change(self, id: str, **values: Any) -> Key:
        with self.database.writing() as connection:
            if values:
                connection.execute(update(KEYS).where(KEYS.c.id == id).values(**values))
            row = connection.execute(select(KEYS).where(KEYS.c.id == id)).first()
        if row is None:
            raise _unknown(id)
        return _key(row)


def _unknown(id: str) -> NotFound:
    return NotFound(f"there is no key {id!r}", hint="`lyceum keys list` shows the ids")


def _name(name: str) -> str:
    if not name.strip():
        raise StoreError("a key needs a name", hint="such as the person or the program that will use it")
    return name.strip()[:MAX_NAME]


def _key(row: Row[Any]) -> Key:
    return Key(row.id, row.name, row.owner, row.hash, tuple(row.scopes), row.created, row.expires)
