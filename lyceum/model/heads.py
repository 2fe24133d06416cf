"""Heads other than the vocabulary: one number a token, for reward models and critics.

Why: a reward model is the policy with its output layer replaced by a single row (Stiennon et al. 2020, section 3.4);
a critic is the same thing with another loss. Both are saved as Hugging Face sequence classifiers with one label.

Shapes: B batch, T time, N positions picked out of (B, T), D width.
What it is not: it does not choose the position that counts (the last real token, for a reward), nor the centre that
is taken off a reward, which stands in `lyceum.json` as `reward_centre`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lyceum.model.attention import KeyValueCache
from lyceum.model.transformer import Decoder


class ScoreModel(nn.Module):
    """A decoder with a scalar head.

    Takes the decoder over as it is, without its output layer: give it a deep copy if the decoder is still needed.
    The head starts at N(0, 1/sqrt(D + 1)) (Stiennon et al. 2020, appendix B.1); `generator` makes it repeatable.
    """

    def __init__(self, decoder: Decoder, generator: torch.Generator | None = None) -> None:
        super().__init__()
        decoder.lm_head = None
        self.decoder = decoder
        self.score = nn.Linear(decoder.spec.width, 1, bias=False)
        with torch.no_grad():
            self.score.weight.normal_(0.0, (decoder.spec.width + 1) ** -0.5, generator=generator)

    @classmethod
    def from_decoder(cls, decoder: Decoder, generator: torch.Generator | None = None) -> ScoreModel:
        """Put a fresh head on `decoder`; nothing is copied."""
        return cls(decoder, generator)

    def forward(self, tokens_BT: Tensor, *, cache: KeyValueCache | None = None, at_N: Tensor | None = None) -> Tensor:
        """Return the raw score (B, T) at every position: what the model says of each row up to there.

        With `at_N`, positions b T + t, only the scores (N,) there.
        """
        hidden = self.decoder(tokens_BT, cache=cache, at_N=at_N)
        with torch.autocast(hidden.device.type, enabled=False):  # two scores are told apart by their last digits
            return self.score(hidden.to(self.score.weight.dtype)).squeeze(-1)

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiply every score by `factor`, in the head's weight, so that the saved folder carries the scale."""
        self.score.weight.mul_(factor)
