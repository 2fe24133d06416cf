"""Key/value memory: a slot (row) for each running sequence, and a shelf of what earlier ones left.

A slot is contiguous and filled from the left, so a forward pass sees slices of it, never gathered copies: copying is what
paging costs on a CPU, once a step. The cache knows no lengths; who calls it says how many tokens a slot holds.

Two ways to look at the slots while decoding (`is_exact`): one padded product over all rows, masked to each one's length,
or a product for each row over exactly its own length. The first makes fewer calls and reads the padding too, so it pays
for small models and for rows of like length; `Cache.window` counts both costs.

Shapes: N tokens of several sequences, one behind the other, B rows, T new tokens of a row, S positions that may be seen,
K key/value heads, E head width.
What it is not: it is not paged, and what is on the shelf is copied, not shared.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lyceum import device as machine
from lyceum.model.attention import Reach

FIRST_TOKENS = 32  # time that new memory has room for
CALL_CELLS = 1 << 15  # numbers that attention reads in the time of one call more: 18 us at 1.5 a ns, on one CPU thread
MEMORY_SHARE = 0.25  # of the machine's memory, for keys and values, where nothing else is asked for
MIN_REUSE = 8  # tokens: what is worth copying from an earlier sequence


@dataclass(frozen=True)
class Stretch:
    """New tokens of one row in a pass: `num_new` of them behind the `start` that it holds."""

    row: int
    start: int
    num_new: int


class Cache:
    """Slots 0..num_rows-1, and the shelf.

    max_tokens: most tokens that slots and shelf have room for together, in use or not (0: no bound). num_kept: most
    sequences on the shelf.
    """

    def __init__(self, num_rows: int, device: torch.device, *, max_tokens: int = 0, num_kept: int = 0):
        self.num_rows = num_rows
        self.device = device
        self.max_tokens = max_tokens
        self.shelf = Shelf(num_kept)
        self._reserved = (0, 0)
        self._room = (0, 0)  # rows and tokens that every layer has memory for
        self._layers: dict[int, Tensor] = {}  # layer -> (2, rows, K, time, E); a layer decides its own heads and width
        self._views: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def window(self, starts: Many[int], chunks: Many[Stretch] = (), *, first: int = 0) -> Window:
        """What one forward pass sees: slots first, first + 1, ... with a token each behind their `starts`; then chunks."""
        return Window(self, first, list(starts), list(chunks))

    def reserve(self, num_rows: int, num_tokens: int) -> None:
        """The slots 0..num_rows-1 are in use, up to num_tokens each: there is room for them, and it is not given up."""
        self._reserved = (num_rows, num_tokens)
        self._make_room(num_rows, num_tokens)

    def _make_room(self, num_rows: int, num_tokens: int) -> None:
        # It grows by doubling, so that a long chat or a large batch is copied a few times only; rows or time that nobody
        # needs any longer are given up then, and under a bound it is no larger than needed and the shelf gives way.
        if num_rows <= self._room[0] and num_tokens <= self._room[1]:
            return
        has_grown = False
        for layer, old in self._layers.items():
            rows, tokens = old.shape[1], old.shape[3]
            if rows >= num_rows and tokens >= num_tokens:
                continue
            needed_rows, needed_tokens = max(num_rows, self._reserved[0]), max(num_tokens, self._reserved[1])
            rows, tokens = min(_doubled(rows, num_rows), self.num_rows), _doubled(tokens, num_tokens)
            if (
                rows * tokens > 4 * needed_rows * needed_tokens
            ):  # many short rows before, now a long one, or the reverse
                rows, tokens = min(_doubled(1, needed_rows), self.num_rows), _doubled(FIRST_TOKENS, needed_tokens)
            if self.max_tokens and rows * tokens > self.max_tokens:
                rows = needed_rows
                tokens = max(needed_tokens, min(tokens, self.max_tokens // rows))
            new = old.new_zeros((2, rows, old.shape[2], tokens, old.shape[4]))
            kept_rows, kept_tokens = min(rows, old.shape[1]), min(tokens, old.shape[3])
            new[:, :kept_rows, :, :kept_tokens] = old[:, :kept_rows, :, :kept_tokens]
            self._layers[layer] = new
            self._views.clear()
            has_grown = True
        shapes = [(memory.shape[1], memory.shape[3]) for memory in self._layers.values()] or [(0, 0)]
        self._room = min(rows for rows, _ in shapes), min(tokens for _, tokens in shapes)
        if self.max_tokens and has_grown:
            self.shelf.shrink(max(0, self.max_tokens - self.slot_tokens))

    def copy(self, into: int, out_of: int, start: int, end: int) -> None:
        """Fork: slot `into` takes positions start..end-1 of slot `out_of`."""
        self._make_room(max(into, out_of) + 1, end)
        for memory in self._layers.values():
            memory[:, into, :, start:end] = memory[:, out_of, :, start:end]

    def move(self, into: list[int], out_of: list[int], num_tokens: int) -> None:
        """Copy the first num_tokens of whole slots, all at once: sources are read before any slot is written."""
        self._make_room(max(*into, *out_of) + 1, num_tokens)
        for memory in self._layers.values():
            memory[:, into, :, :num_tokens] = memory[:, out_of, :, :num_tokens]

    def keep(self, row: int, ids: Many[int], key: str) -> None:
        """Put a copy of a slot, which holds these tokens, on the shelf; of a chat that goes on only what is new is copied."""
        if self.shelf.num_kept == 0 or len(ids) < MIN_REUSE or not self._layers or self.shelf.touch(ids, key):
            return
        kept = self.shelf.find(ids, key)[0]
        if kept is not None and len(kept.ids) < len(ids) <= kept.size and kept.ids == ids[: len(kept.ids)]:
            for layer, memory in self._layers.items():
                kept.layers[layer][:, :, len(kept.ids) : len(ids)] = memory[:, row, :, len(kept.ids) : len(ids)]
            kept.ids = list(ids)
            return
        size = len(ids) + len(ids) // 2  # to go on in
        if self.max_tokens:
            room = self.max_tokens - self.slot_tokens
            if len(ids) > room:
                return
            if 2 * (self.shelf.num_tokens + size) > room:
                size = len(ids)
            self.shelf.shrink(room - size)
        layers = {}
        for layer, memory in self._layers.items():
            _, _, num_heads, _, head_width = memory.shape
            layers[layer] = memory.new_empty((2, num_heads, size, head_width))
            layers[layer][:, :, : len(ids)] = memory[:, row, :, : len(ids)]
        self.shelf.put(Kept(key, list(ids), layers, size))

    def take(self, row: int, kept: Kept, num_tokens: int) -> None:
        """Copy the first num_tokens of something on the shelf into a slot."""
        self._make_room(row + 1, num_tokens)
        for layer, memory in self._layers.items():
            memory[:, row, :, :num_tokens] = kept.layers[layer][:, :, :num_tokens]

    def memory(self, layer: int, like_N2KE: Tensor, num_rows: int, num_tokens: int) -> Tensor:
        """A layer's memory (2, rows, K, time, E), at least num_rows by num_tokens."""
        if layer not in self._layers:
            _, _, num_heads, head_width = like_N2KE.shape
            self._layers[layer] = like_N2KE.new_zeros((2, 1, num_heads, FIRST_TOKENS, head_width))
            self._room = (0, 0)
            self._make_room(max(num_rows, self._reserved[0]), max(num_tokens, self._reserved[1]))
        return self._layers[layer]

    def views(self, layer: int, first: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Slots first, first + 1, ... of a layer that has memory: keys and values (rows, K, time, E), and to write to.

        The last is (rows, time, 2, K, E), of one slot without the first dimension. Made once: a view costs as much as a sum.
        """
        if (layer, first, num_rows) not in self._views:
            slots = self._layers[layer][:, first : first + num_rows]
            written = slots.permute(1, 3, 0, 2, 4)
            self._views[layer, first, num_rows] = slots[0], slots[1], written[0] if num_rows == 1 else written
        return self._views[layer, first, num_rows]

    @property
    def slots(self) -> list[Tensor]:
        """Every layer's memory (2, rows, K, time, E), in the order of the layers; none before the first pass."""
        return [self._layers[layer] for layer in sorted(self._layers)]

    @property
    def slot_tokens(self) -> int:
        """Tokens that the slots have room for."""
        return max((memory.shape[1] * memory.shape[3] for memory in self._layers.values()), default=0)

    @property
    def num_bytes(self) -> int:
        """Memory held in all."""
        return sum(memory.nbytes for memory in self._layers.values()) + self.shelf.num_bytes

    def check(self) -> None:
        """Asserts that the shelf has counted well and that all is within the bound."""
        self.shelf.check()
        total = self.slot_tokens + self.shelf.num_tokens
        assert not self.max_tokens or total <= self.max_tokens, f"{total} tokens of memory, {self.max_tokens} allowed"


def _doubled(size: int, least: int) -> int:
    while size < least:
        size *= 2
    return size


def most_tokens(spec: Any, weight: Tensor, max_bytes: int | None) -> int:
    """How many tokens of keys and values have room: never fewer than one whole context; 0: no bound.

    max_bytes: by default MEMORY_SHARE of the memory that there is.
    """
    if not hasattr(spec, "num_kv_heads"):
        return 0
    num_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_width * weight.element_size()
    has = machine.memory_bytes()
    if weight.device.type == "cuda":
        has = torch.cuda.get_device_properties(weight.device).total_memory
    limit = max_bytes if max_bytes is not None else int(MEMORY_SHARE * has)
    return max(limit // num_bytes, spec.context_length) if limit else 0


class Window:
    """The cache as one forward pass sees it: the model's KeyValueCache. Made anew for each pass.

    Rows first, first + 1, ... bring one token each, behind the `starts` that they hold; then come the chunks.
    """

    is_kept = True

    def __init__(self, cache: Cache, first: int, starts: list[int], chunks: list[Stretch]):
        self._cache = cache
        self._rows = slice(first, first + len(starts))
        self._starts = starts
        self._chunks = chunks
        self._num_rows = max([self._rows.stop if starts else 0, *(chunk.row + 1 for chunk in chunks)])
        self._num_tokens = max([*(start + 1 for start in starts), *(chunk.start + chunk.num_new for chunk in chunks)])
        cache._make_room(self._num_rows, self._num_tokens)
        device = cache.device
        ranges = [torch.arange(chunk.start, chunk.start + chunk.num_new, device=device) for chunk in chunks]
        self._starts_B = torch.tensor(starts, dtype=torch.long, device=device)
        self._positions_N = torch.cat((self._starts_B, *ranges)) if ranges else self._starts_B
        self._rows_B = torch.arange(len(starts), device=device) if len(starts) > 1 else None
        self._masks: dict[int, Tensor | None] = {}

    def positions(self, num_new: int) -> Tensor:
        """Absolute positions of the new tokens, (1, N)."""
        assert num_new == len(self._positions_N), "the window was made for another number of tokens"
        return self._positions_N.unsqueeze(0)

    def append(self, layer: int, kv_N2KE: Tensor) -> Iterator[Reach]:
        """Store a layer's new keys and values; all that the new tokens may look at, padding masked."""
        memory = self._cache.memory(layer, kv_N2KE, self._num_rows, self._num_tokens)
        end = len(self._starts)
        slots = self._cache.views(layer, self._rows.start, end) if end else None
        if slots is not None:
            new = kv_N2KE[:end] if self._chunks else kv_N2KE
            if self._rows_B is None:
                slots[2].index_copy_(0, self._starts_B, new)
            else:
                slots[2][self._rows_B, self._starts_B] = new
        for chunk in self._chunks:
            new, end = kv_N2KE[end : end + chunk.num_new], end + chunk.num_new
            memory[:, chunk.row, :, chunk.start : chunk.start + chunk.num_new] = new.permute(1, 2, 0, 3)
        return self._reaches(memory, slots)

    def _reaches(self, memory: Tensor, slots: tuple[Tensor, Tensor, Tensor] | None) -> Iterator[Reach]:
        if slots is not None:
            k_BKTE, v_BKTE, _ = slots
            longest = max(self._starts) + 1
            padding = len(self._starts) * longest - sum(self._starts) - len(self._starts)
            cells = 2 * memory.shape[2] * memory.shape[4]
            if padding * cells <= (len(self._starts) - 1) * CALL_CELLS:
                k, v = k_BKTE.narrow(2, 0, longest), v_BKTE.narrow(2, 0, longest)
                mask = self._once(-1, lambda: _length_mask(self._starts_B, longest, memory) if padding else None)
                yield Reach(len(self._starts), 1, k, v, mask)
            else:
                for row, start in enumerate(self._starts):
                    yield Reach(1, 1, k_BKTE[row : row + 1, :, : start + 1], v_BKTE[row : row + 1, :, : start + 1])
        for number, chunk in enumerate(self._chunks):
            k, v = memory[:, chunk.row : chunk.row + 1, :, : chunk.start + chunk.num_new].unbind(0)
            if chunk.start == 0:
                yield Reach(1, chunk.num_new, k, v, None, True)
            else:
                yield Reach(1, chunk.num_new, k, v, self._once(number, lambda at=chunk: _chunk_mask(at, memory)))

    def _once(self, number: int, make: Any) -> Tensor | None:
        # added to the scores: torch makes this of a boolean mask too, but once a layer (a tenth of decoding)
        if number not in self._masks:
            self._masks[number] = make()
        return self._masks[number]


def _length_mask(starts_B: Tensor, num_seen: int, like: Tensor) -> Tensor:
    """(B, 1, 1, S): 0 up to a row's new token, which is at its start, and minus infinity behind."""
    hidden_BS = torch.arange(num_seen, device=like.device) > starts_B.unsqueeze(1)
    return like.new_zeros(hidden_BS.shape).masked_fill_(hidden_BS, float("-inf"))[:, None, None]


def _chunk_mask(chunk: Stretch, like: Tensor) -> Tensor:
    """(1, 1, T, S): a chunk sees what came before it, and itself causally."""
    mask_TS = like.new_full((chunk.num_new, chunk.start + chunk.num_new), float("-inf"))
    return mask_TS.triu_(chunk.start + 1)[None, None]


# -- what earlier sequences left ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class Kept:
    """Keys and values of a sequence that has left: layer -> (2, K, time, E). key: whose requests may see it.

    size: tokens that there is room for, should it go on; 0: as many as there are.
    """

    key: str
    ids: list[int]
    layers: dict[int, Tensor]
    size: int = 0

    def __post_init__(self) -> None:
        self.size = self.size or len(self.ids)


class Shelf:
    """At most `num_kept` of what sequences left, the least recently used going first.

    Tokens are compared, not hashes, so nothing can collide; and a request finds only what requests of its own key left,
    so the time to a first token tells nobody what others have asked.
    """

    def __init__(self, num_kept: int):
        self.num_kept = num_kept
        self.num_tokens = 0
        self._kept: list[Kept] = []  # least recently used first

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, ids: Many[int], key: str) -> tuple[Kept | None, int]:
        """The one that shares most leading tokens with ids, and how many; of equals the last used."""
        best, most = None, 0
        for kept in self._kept:
            if kept.key == key and (num := num_shared(kept.ids, ids)) >= max(most, MIN_REUSE):
                best, most = kept, num
        if best is not None:
            self._kept.remove(best)
            self._kept.append(best)
        return best, most

    def touch(self, ids: Many[int], key: str) -> bool:
        """Whether these tokens are here already, as the beginning of something; that one then counts as used."""
        kept, num = self.find(ids, key)
        return kept is not None and num == len(ids)

    def put(self, new: Kept) -> None:
        """Take it in; those that it continues go, and if need be the least recently used."""
        for kept in [kept for kept in self._kept if kept.key == new.key]:
            if num_shared(kept.ids, new.ids) == len(kept.ids):
                self._drop(kept)
        self._kept.append(new)
        self.num_tokens += new.size
        while len(self._kept) > self.num_kept:
            self._drop(self._kept[0])

    def shrink(self, num_tokens: int) -> None:
        """Let the least recently used go until at most num_tokens are held."""
        while self._kept and self.num_tokens > num_tokens:
            self._drop(self._kept[0])

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(tensor.nbytes for kept in self._kept for tensor in kept.layers.values())

    def check(self) -> None:
        """Asserts that the count of tokens is that of what is here."""
        assert self.num_tokens == sum(kept.size for kept in self._kept), "the shelf has miscounted its tokens"
        assert all(len(kept.ids) <= kept.size for kept in self._kept), "something on the shelf has outgrown its room"
        assert len(self._kept) <= self.num_kept, "the shelf holds more than it may"

    def _drop(self, kept: Kept) -> None:
        self._kept.remove(kept)
        self.num_tokens -= kept.size


def num_shared(one: Many[int], other: Many[int]) -> int:
    """How many leading tokens two sequences share; 0 if they are fewer than MIN_REUSE, as is nearly always so."""
    if one[:MIN_REUSE] != other[:MIN_REUSE]:
        return 0
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
