"""Text as it grows: ids in, the characters out that are certain, nothing of a stop string and never half a character.

    text = TextStream(tokenizer.token_bytes, stop_strings=("\\nUser:",))
    for ids in growing: print(text.feed(ids), end="")
    print(text.close())

What may still become a stop string is held back: the longest end of the text that begins one. Of the stop strings the
first counts, by the rule of `lyceum.engine.sequence.StopStrings`; what follows it is never shown. Everything is decided
on bytes, so nothing depends on where tokens are cut: all pieces together are the text before the first stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from lyceum.engine.sequence import StopStrings


class TextStream:
    """One reply as text. Bytes that are no UTF-8 become U+FFFD, as in `bytes.decode`.

    token_bytes: bytes of every token. stop_strings: what ends the text. hold_at: tokens from which on nothing is shown
    (a tool call); the caller, who has the whole reply then, shows what is text after all.
    stop: the stop string that has ended the text, or None.
    """

    def __init__(self, token_bytes: Sequence[bytes], *, stop_strings: Sequence[str] = (), hold_at: Sequence[int] = ()):
        self.stop: str | None = None
        self._token_bytes = token_bytes
        self._watch = StopStrings(stop_strings, token_bytes) if stop_strings else None
        encoded = [text.encode() for text in stop_strings]
        self._starts = {text[:length] for text in encoded for length in range(1, len(text))}
        self._hold_at = frozenset(hold_at)
        self._is_held = False
        self._num_shown = 0  # bytes given to the decoder
        self._pending = b""  # bytes after them
        self._num_settled = 0  # of those pending, so many at the front begin no stop string
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Iterable[int], *, may_stop: bool = True) -> str:
        """Add tokens; returns the text that is certain now. may_stop: False where no stop string may begin or end."""
        for token in ids:
            self._is_held = self._is_held or token in self._hold_at
            if self.stop is None and not self._is_held:
                self._add(token, may_stop)
        return self._shown(len(self._pending) - self._num_uncertain())

    def close(self) -> str:
        """The reply has ended: the rest of its text, if no stop string was found; half a character is U+FFFD."""
        return self._shown(len(self._pending), is_last=True)

    def _add(self, token: int, may_stop: bool) -> None:
        self._pending += self._token_bytes[token]
        if self._watch is None:
            return
        if not may_stop:
            self._watch.skip(token)
            self._num_settled = len(self._pending)
        elif (match := self._watch.feed(token)) is not None:
            self.stop, num_before = match
            self._pending = self._pending[: num_before - self._num_shown]
            self._num_settled = len(self._pending)

    def _num_uncertain(self) -> int:
        open_end = self._pending[self._num_settled :]
        return max((len(start) for start in self._starts if open_end.endswith(start)), default=0)

    def _shown(self, num_bytes: int, is_last: bool = False) -> str:
        ready, self._pending = self._pending[:num_bytes], self._pending[num_bytes:]
        self._num_shown += num_bytes
        self._num_settled = max(0, self._num_settled - num_bytes)
        return self._decoder.decode(ready, final=is_last or self.stop is not None)


def offsets(token_bytes: Sequence[bytes], ids: Iterable[int]) -> list[int]:
    """For each token, how many whole characters of the text stand before it (`text_offset` in OpenAI's API).

    A token that begins inside a character has the offset of that character.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found, num_characters = [], 0
    for token in ids:
        found.append(num_characters)
        num_characters += len(decoder.decode(token_bytes[token]))
    return found
