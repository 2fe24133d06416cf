"""Who is let in: the keys of a store, as a running server asks them.

    porter = Porter(store.keys.all); caller = await porter.caller("Bearer sk-lyceum-...")

The list is read again when it is older than a second, on a thread, so that a key that was just made is known and one that
was just revoked is refused while the server runs, and no request waits for the store but the one that finds the list too old.
Where the store cannot be read, nobody is let in on an old list.

Without any key everybody may do everything. Once a key has been seen, one is asked for as long as the server runs.

What it is not: the keys themselves (`lyceum.serve.keys`), or what a route needs (`lyceum.serve.guard`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from lyceum.log import log
from lyceum.serve.keys import Key, hash_of, match
from lyceum.serve.limits import EVERYBODY, SCOPES, Caller
from lyceum.serve.refusals import Refusal

REREAD_S = 1.0
OWN = "api-key"  # the owner behind the one key that was given on the command line


class Porter:
    """Knows who presents a key.

    read: gives all keys; it may block. api_key: one key more, which may do everything. clock: seconds.
    """

    def __init__(
        self,
        read: Callable[[], Sequence[Key]] = lambda: (),
        *,
        api_key: str = "",
        clock: Callable[[], float] = time.monotonic,
    ):
        self._read, self._clock = read, clock
        self._given = [Key(OWN, OWN, OWN, hash_of(api_key), SCOPES)] if api_key else []
        self._reading = asyncio.Lock()
        self._asks = False
        self._take(read())

    @property
    def asks(self) -> bool:
        """Whether a key is asked for."""
        return self._asks

    async def caller(self, authorization: str | None) -> Caller:
        """Who presents this header; the owner of the key. Raises Refusal if nobody we know does."""
        if self._clock() - self._read_at > REREAD_S:
            async with self._reading:
                if self._clock() - self._read_at > REREAD_S:  # nobody else has meanwhile
                    await self._read_again()
        if not self._asks:
            return EVERYBODY
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Refusal(
                401,
                "You didn't provide an API key: send it as 'Authorization: Bearer YOUR_KEY'.",
                code="missing_api_key",
            )
        key = match(self._keys, token.strip())
        if key is None:
            raise Refusal(401, "Incorrect API key provided.", code="invalid_api_key")
        if key.has_ended:
            raise Refusal(401, "The API key provided has expired.", code="expired_api_key")
        return Caller(key.owner, frozenset(key.scopes))

    async def _read_again(self) -> None:
        try:
            self._take(await asyncio.to_thread(self._read))
        except Exception as error:
            log.warning(f"the keys cannot be read: {error}")
            raise Refusal(503, "The server cannot read its keys now.", code="overloaded", retry_after_s=5.0) from None

    def _take(self, keys: Sequence[Key]) -> None:
        self._keys = [*keys, *self._given]
        self._asks = self._asks or bool(self._keys)
        self._read_at = self._clock()
