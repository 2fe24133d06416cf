"""The keys of the service: made once, kept as their hash, found in constant time.

    key, secret = store.keys.make("laptop", scopes=("models", "inference"), days=90)     # the secret is shown once
    store.keys.find(presented)                                                             # the Key, or None

A secret is 256 random bits, kept as its SHA-256: what cannot be guessed needs no slow hash. What is presented is compared
with every key there is, each in constant time, so that the time tells neither which was nearly right nor how many there
are. A key opens the conversations of its owner; by default it is an owner of its own. A second key of the same owner
takes over when the first one ends, and nothing is lost.

What it is not: what a scope allows (the API decides), nor whether an ended key is refused (it is given, with its end).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, delete, insert, select

from lyceum.errors import NotFound, StoreError
from lyceum.serve.database import Database
from lyceum.serve.tables import KEYS
from lyceum.serve.tree import need_owner, new_id

PREFIX = "sk-lyceum-"


@dataclass(frozen=True)
class Key:
    """A key as it is kept, without its hash. created, expires: seconds since 1970; expires 0: never."""

    id: str
    name: str
    owner: str
    scopes: tuple[str, ...]
    created: float
    expires: float

    @property
    def has_ended(self) -> bool:
        """True after its end."""
        return 0 < self.expires <= time.time()


class Keys:
    """The keys in a database."""

    def __init__(self, database: Database):
        self.database = database

    def make(self, name: str, *, scopes: Sequence[str], days: float = 0.0, owner: str = "") -> tuple[Key, str]:
        """Make a key; returns it, and its secret, which nobody will see again.

        Args:
            name: for people.
            scopes: what it may do.
            days: how long it is good; 0 for ever.
            owner: whose conversations it opens; by default nobody else's.

        Raises:
            StoreError: no name, no scopes, or an end that has passed.
        """
        if not name.strip() or not scopes or days < 0:
            raise StoreError(f"a key needs a name, scopes and an end to come: {name!r}, {list(scopes)}, {days:g} days")
        now, secret, id = time.time(), PREFIX + secrets.token_urlsafe(32), new_id("key")
        row = {"id": id, "name": name, "owner": need_owner(owner or id), "scopes": list(scopes), "created": now}
        row |= {"expires": now + 86400 * days if days else 0.0, "hash": hash_of(secret)}
        with self.database.writing() as connection:
            return _key(connection.execute(insert(KEYS).values(row).returning(KEYS)).one()), secret

    def find(self, presented: str) -> Key | None:
        """The key whose secret this is; None if it is nobody's."""
        hashed, found = hash_of(presented), None
        with self.database.reading() as connection:
            for row in connection.execute(select(KEYS)):
                if hmac.compare_digest(row.hash, hashed):
                    found = _key(row)
        return found

    def all(self) -> list[Key]:
        """All keys, oldest first."""
        with self.database.reading() as connection:
            return [_key(row) for row in connection.execute(select(KEYS).order_by(KEYS.c.created))]

    def revoke(self, id: str) -> None:
        """End a key now; its owner's conversations stay. Raises NotFound."""
        with self.database.writing() as connection:
            if not connection.execute(delete(KEYS).where(KEYS.c.id == id)).rowcount:
                raise NotFound(f"there is no key {id!r}")


def hash_of(secret: str) -> str:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _key(row: Row[Any]) -> Key:
    return Key(row.id, row.name, row.owner, tuple(row.scopes), row.created, row.expires)
