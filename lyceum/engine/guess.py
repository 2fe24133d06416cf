"""Prompt lookup: what followed these tokens the last time is guessed to follow again, and several guesses cost one pass.

Why: to decode one stream is to read all weights for each token; to read them for five tokens at once costs little more.
Where a reply copies (a text that was looked up, code, an edit), its next tokens stand already in the sequence: behind the
place where its last `SAME` tokens stood before.

Nothing is approximate. The model sees the guesses as if they were a prompt, and the sampler draws at every place, with the
noise of that place, from what the model says there. Guesses count as long as they are what was drawn; so the tokens are
those of decoding one by one, greedy or sampled, but for the rounding of another batch. No rejection sampling is needed,
because the noise is a function of seed and position.

It turns itself off: a pass with guesses must bring `PRICE` more tokens than one without, on average, or it rests.

Source: Saxena 2023 (prompt lookup decoding); checking guesses in one pass: Stern et al. 2018 and Leviathan et al. 2023.
What it is not: a model that drafts; and it does not guess where penalties or a schema shape the next token.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from lyceum.engine.sequence import Draw, Drawn, Sequence

SAME = 3  # tokens that must have been there before
MOST = 7  # tokens guessed at once
FEW = 4  # rows that decode, up to which guessing may pay: beyond, a pass is bound by arithmetic, not by reading
PRICE = 0.7  # what a pass with guesses costs more than one without, in passes
PATIENCE = 2.0  # passes that may be lost before it rests
REST = 32  # tokens; twice as long each time again


class Guesser:
    """The guesses of one sequence, and whether they have paid."""

    def __init__(self) -> None:
        self._follows: dict[tuple[int, ...], int] = {}  # SAME tokens -> where what followed them last begins
        self._num_known = SAME - 1
        self._credit = 0.0
        self._most = MOST // 2
        self._rest, self._rests_until = REST, 0

    def guess(self, tokens: list[int], most: int) -> list[int]:
        """At most `most` tokens that may follow; none where nothing is known, or where it has not paid."""
        if len(tokens) < self._rests_until:
            return []
        for end in range(self._num_known + 1, len(tokens)):
            self._follows[tuple(tokens[end - SAME : end])] = end
        self._num_known = max(self._num_known, len(tokens) - 1)
        start = self._follows.get(tuple(tokens[-SAME:]))
        if start is None:
            return []
        found: list[int] = []
        for place in range(start, start + min(most, self._most)):  # beyond the end: what goes round goes on
            found.append(tokens[place] if place < len(tokens) else found[place - len(tokens)])
        return found

    def learn(self, num_guessed: int, num_right: int, num_tokens: int) -> None:
        """So many of the guesses were right; the sequence has num_tokens now."""
        self._most = MOST if num_right == num_guessed else max(1, MOST // 2)
        self._credit = min(self._credit + num_right - PRICE, PATIENCE)
        if self._credit < -PATIENCE:
            self._credit, self._rests_until, self._rest = 0.0, num_tokens + self._rest, 2 * self._rest
        elif self._credit > 0:
            self._rest = REST


def guesses(decoding: Many[Sequence]) -> list[list[int]]:
    """What may follow each; empty lists if nobody has a guess, or too many decode for it to pay."""
    if len(decoding) > FEW:
        return []
    found = []
    for sequence in decoding:
        room = sequence.num_promised - len(sequence.tokens) - 1  # the pass draws one more than it guesses
        if len(sequence.tokens) - sequence.num_prompt < len(sequence.params.forced):
            room = 0
        found.append(sequence.guesser.guess(sequence.tokens, room) if sequence.guesser is not None and room > 0 else [])
    return found if any(found) else []


def verified(
    decoding: Many[Sequence], found: Many[list[int]], logits_NV: Tensor, device: torch.device
) -> tuple[list[Sequence], Drawn]:
    """Draw at each place of a pass that brought each sequence's last token and its guesses; keep what was guessed right.

    Returns each sequence as often as it has new tokens, and these.
    """
    places = [
        (sequence, ahead) for sequence, guess in zip(decoding, found, strict=True) for ahead in range(len(guess) + 1)
    ]
    draw = Draw([sequence for sequence, _ in places], device, [ahead for _, ahead in places])
    drawn = draw(logits_NV)
    kept: list[int] = []
    start = 0
    for sequence, guess in zip(decoding, found, strict=True):
        num_right = 0
        while num_right < len(guess) and drawn[0][start + num_right] == guess[num_right]:
            num_right += 1
        kept += range(start, start + num_right + 1)
        start += len(guess) + 1
        if guess and sequence.guesser is not None:
            sequence.guesser.learn(len(guess), num_right, len(sequence.tokens) + num_right + 1)
    return [places[i][0] for i in kept], tuple([part[i] for i in kept] for part in drawn)  # type: ignore[return-value]
