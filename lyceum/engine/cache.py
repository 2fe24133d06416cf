"""Key/value memory of the running sequences: one slot (row) each, filled from the left, each to its own length.

For small models on a CPU one padded batch is fastest: a forward pass sees the slots as slices, never as gathered
copies, and only as far as the longest live sequence. Memory grows with what is in use. Prompts that are equal are
computed once and copied to the other slots (`spread`); a sequence that moves to another slot is copied as well, which
is cheap beside one forward pass.

It is not paged, and it keeps nothing of sequences that have left; the longest common prefix of earlier requests would
begin here, as slots that outlive their sequence.

Shapes: B rows, T new tokens, S tokens in reach (cached and new), K key/value heads, E head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Cache:
    """Slots 0..num_rows-1. lengths_B: tokens stored in each; the engine alone moves it, the model never does."""

    def __init__(self, num_rows: int, device: torch.device):
        self.num_rows = num_rows
        self.lengths_B = torch.zeros(num_rows, dtype=torch.long, device=device)
        self._layers: dict[int, Tensor] = {}  # layer -> (2, rows, K, time, E); a layer decides its own heads and width

    def window(self, first: int, count: int, num_new: int) -> Window:
        """What one forward pass sees: slots first..first+count-1, each taking num_new tokens after those it has."""
        return Window(self, first, count, num_new)

    def advance(self, first: int, num_new_B: Tensor) -> None:
        """Count tokens that a forward pass has stored; anything it stored beyond (padding) is overwritten later."""
        self.lengths_B[first : first + len(num_new_B)] += num_new_B

    def clear(self, first: int, count: int) -> None:
        """Empty the slots first..first+count-1."""
        self.lengths_B[first : first + count] = 0

    def spread(self, first: int, sources: list[int]) -> None:
        """Fork: slot first+i becomes a copy of slot first+sources[i]; sources are read before any slot is written."""
        if sources == list(range(len(sources))):
            return
        self._copy([first + i for i in range(len(sources))], [first + source for source in sources])

    def move(self, into: list[int], out_of: list[int]) -> None:
        """Copy slots, with their lengths."""
        self._copy(into, out_of)

    def memory(self, layer: int, like_BKTE: Tensor, num_rows: int, num_tokens: int) -> Tensor:
        """A layer's memory (2, rows, K, time, E), at least num_rows by num_tokens."""
        if layer not in self._layers:
            _, num_heads, _, head_width = like_BKTE.shape
            self._layers[layer] = like_BKTE.new_zeros((2, 1, num_heads, 32, head_width))
        return self._grown(layer, num_rows, num_tokens)

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(layer.nbytes for layer in self._layers.values())

    def _copy(self, into: list[int], out_of: list[int]) -> None:
        length = int(self.lengths_B[out_of].max())
        for layer in self._layers:
            memory = self._grown(layer, max(into) + 1, length)
            memory[:, into, :, :length] = memory[:, out_of, :, :length]
        self.lengths_B[into] = self.lengths_B[out_of]

    def _grown(self, layer: int, num_rows: int, num_tokens: int) -> Tensor:
        # by doubling, so that a long chat or a large batch is copied a few times only
        old = self._layers[layer]
        rows, tokens = old.shape[1], old.shape[3]
        if rows >= num_rows and tokens >= num_tokens:
            return old
        while rows < num_rows:
            rows = min(2 * rows, self.num_rows)
        while tokens < num_tokens:
            tokens *= 2
        new = old.new_zeros((2, rows, old.shape[2], tokens, old.shape[4]))
        new[:, : old.shape[1], :, : old.shape[3]] = old
        self._layers[layer] = new
        return new


class Window:
    """The cache as one forward pass sees it: the model's KeyValueCache. Made anew for each pass."""

    def __init__(self, cache: Cache, first: int, count: int, num_new: int):
        self._cache = cache
        self._rows = slice(first, first + count)
        lengths_B = cache.lengths_B[self._rows]
        self._rows_B1 = torch.arange(first, first + count, device=lengths_B.device).unsqueeze(1)
        self._positions_BT = lengths_B.unsqueeze(1) + torch.arange(num_new, device=lengths_B.device)
        shortest, longest = (int(x) for x in lengths_B.aminmax())
        self._reach = longest + num_new
        self._is_fresh = longest == 0
        self._mask: Tensor | None = None
        if not self._is_fresh and (num_new > 1 or shortest < longest):
            keys_S = torch.arange(self._reach, device=lengths_B.device)
            self._mask = (keys_S > self._positions_BT.unsqueeze(-1)).unsqueeze(1)  # (B, 1, T, S), True: not to be seen

    def positions(self, num_new: int) -> Tensor:
        """Absolute positions of the new tokens, (B, T)."""
        assert num_new == self._positions_BT.shape[1], "the window was made for another number of tokens"
        return self._positions_BT

    def append(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """Store a layer's new keys and values. Returns all keys and values in reach, the mask (or None), and is_causal.

        Empty slots need no mask: plain causal attention over the new tokens, padding standing at the right.
        """
        rows = self._rows
        memory = self._cache.memory(layer, k_BKTE, rows.stop, self._reach)
        if self._is_fresh:
            memory[0, rows, :, : self._reach] = k_BKTE
            memory[1, rows, :, : self._reach] = v_BKTE
            return k_BKTE, v_BKTE, None, True
        memory[0][self._rows_B1, :, self._positions_BT] = k_BKTE.transpose(1, 2)
        memory[1][self._rows_B1, :, self._positions_BT] = v_BKTE.transpose(1, 2)
        seen = memory[:, rows, :, : self._reach]
        if self._mask is not None and self._mask.dtype == torch.bool:
            # added to the scores: torch makes this of a boolean mask too, but once a layer (a tenth of decoding)
            self._mask = k_BKTE.new_zeros(self._mask.shape).masked_fill_(self._mask, float("-inf"))
        return seen[0], seen[1], self._mask, False
