"""Insert from the first step: some documents of a row are rewritten so that filling a hole is continuing.

M. Bavarian et al., "Efficient training of language models to fill in the middle" (2022), section 3: at the level of the
context, cut at characters, half PSM and half SPM. A row is taken apart at its end-of-text tokens; each document in it,
whole or as far as the row holds it, is cut and rearranged (`lyceum.tokens.infill`) with its part's rate as probability;
then the row is put together again and has the length it had. Everything in it is learned, the marks too.

Rearranging makes a row longer: three marks, the last document's end token, words that were cut in two. So the row ends
earlier in the corpus, by some tokens that this epoch does not see. If the document at its end is rearranged, it gives up
the beginning of its prefix, then the end of its suffix: never the middle, nor the end token that says the middle is
complete (what cuts only the row's end teaches a share of documents never to stop). If not even the middle fits, it
stays as it was.

    infill = Infill(tokenizer, {"code": 0.5}, seed)
    batch = token_batch(shards, stream, start, count, infill)

Not here: rows that hold another document's text to copy from, and spans that end at lines.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lyceum.corpus.mixture import key_of
from lyceum.tokens.infill import arrange, cut
from lyceum.tokens.tokenizer import Tokenizer

_MARKS = 4  # of a rearranged document: prefix, suffix, middle, end
_PREFIX_LATE = 0.5  # share of the rearranged documents that are SPM


@dataclass(frozen=True)
class Infill:
    """Rewrites rows for infilling; what row k becomes is a function of k, the seed and the row.

    Args:
        tokenizer: of the rows.
        rates: part -> probability that a document of it is rearranged; a part that is not named stays as it is.
        seed: another seed, other cuts.
    """

    tokenizer: Tokenizer
    rates: Mapping[str, float]
    seed: int

    def row(self, ids: NDArray[Any], part: str, k: int) -> NDArray[Any]:
        """Row number k of the stream, rewritten: as many ids, the last of which may be pads."""
        rate, room = self.rates.get(part, 0.0), len(ids)
        if not rate:
            return ids
        draw = random.Random(key_of(self.seed, "infill", k)).random
        found: list[int] = []
        for document in _documents(ids, self.tokenizer.end_id):
            chosen = self._rearranged(document, room - len(found), draw) if draw() < rate else None
            found += chosen or document
            if len(found) >= room:
                break
        found += [self.tokenizer.pad_id] * (room - len(found))
        return np.array(found[:room], ids.dtype)

    def _rearranged(self, document: list[int], room: int, draw: Callable[[], float]) -> list[int] | None:
        """A document with its middle last, in at most `room` ids; None if it has no text or its middle no room."""
        spelled = b"".join([self.tokenizer.token_bytes[number] for number in document])
        text = spelled.decode("utf-8", "ignore")  # at the row's edges a character may be cut: its bytes are left out
        prefix, middle, suffix = map(self.tokenizer.encode, cut(text, draw))
        prefix_late = draw() < _PREFIX_LATE
        over = max(0, _MARKS + len(prefix) + len(middle) + len(suffix) - room)
        prefix, over = prefix[over:], max(0, over - len(prefix))
        if not text or over > len(suffix):
            return None
        return arrange(prefix, middle, suffix[: len(suffix) - over], self.tokenizer, prefix_late=prefix_late)


def _documents(ids: NDArray[Any], end_id: int) -> Iterator[list[int]]:
    """The documents of a row, each with its end token; the last lacks it if the row ends first."""
    after_ends: Sequence[int] = (np.flatnonzero(ids == end_id) + 1).tolist()
    for start, stop in pairwise(dict.fromkeys([0, *after_ends, len(ids)])):
        yield ids[start:stop].tolist()
