"""The dial's other half: pretraining's horizon, batch, learning rate and weight decay from the shape that depth gave.

Why: what is right at depth 4 on a laptop is wrong at depth 32 on a rack. Every number here is our measured optimum at
depth 4 (width 128, dev/LOG.md: 2,048 tokens a step, Muon at 0.03, AdamW at 0.03, or at 0.004 where it does
everything), carried to other shapes by a law from the literature; at depth 4 the laws give back exactly what was
measured. The steps are numbered and printed, and a number that is given replaces its step; later steps follow it.

    tokens         20 a weight                              Hoffmann et al. 2022 (Chinchilla), table 3; the horizon at
                                                            which Kaplan et al. 2020 would stop far earlier
    batch_tokens   ~ sqrt(tokens), powers of two            McCandlish et al. 2018: the batch worth taking grows as the
                                                            loss falls; Zhang et al. 2024 and Bergsma et al. 2025 fit
                                                            it to the tokens of a run, with exponents 0.38 to 0.47
    matrix_lr      0.03 at every width                      Jordan 2024: Muon's update has a spectral norm of
                                                            sqrt(max(1, rows / cols)), whatever the width; Yang et al.
                                                            2023 show that to be what transfers
    lr             ~ 1 / width                              Yang et al. 2022 (muP), table 8, AdamW
    weight_decay   1 / (0.22 * rate * steps)                Wang & Aitchison 2024: what transfers is the time over which
                                                            weights average their updates, as a share of the run; 0.22
                                                            is Bergsma et al. 2025's fit at 20 tokens a weight

A longer run wants a lower rate and a larger batch a higher one; with the batch at sqrt(tokens) the two nearly cancel
(Bjorck et al. 2024: tokens^-0.32; Malladi et al. 2022: sqrt(batch)), so neither is a step.

Run by pretraining, where a setting of 0 (weight_decay: -1) asks for its step; `lyceum plan` shows the same notes.
What it is not: measured above depth 6. `bench/lr_sweep.py` measures what `lr` and `matrix_lr` want at other widths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lyceum.model.spec import ModelSpec

TOKENS_A_WEIGHT = 20
WIDTH, BATCH_TOKENS, TOKENS = 128, 2048, 20_000_000  # of the measured point; its horizon at 20 tokens a weight
LR, LR_ALONE = 0.03, 0.004  # AdamW's at that width: beside Muon, and where the matrices are AdamW's too
AVERAGED_SHARE = 0.22  # of the run, over which weight decay lets the weights average their updates


@dataclass(frozen=True)
class Dial:
    """The numbers of a run that follow from its shape; `num_steps` is tokens / batch_tokens."""

    tokens: int
    batch_tokens: int
    matrix_lr: float
    lr: float
    weight_decay: float

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return max(1, self.tokens // self.batch_tokens)


def turn(
    spec: ModelSpec,
    *,
    tokens: int = 0,
    batch_tokens: int = 0,
    matrix_lr: float = 0.03,
    lr: float = 0.0,
    weight_decay: float = -1.0,
) -> tuple[Dial, list[str]]:
    """Derive what is asked for, 0 (weight_decay: -1), and keep what is given; also one numbered note for each step.

    `matrix_lr` is never derived: 0 gives the matrices to AdamW, whose rate then is one for matrices.
    """
    notes: list[str] = []

    def step(name: str, given: float, is_given: bool, derived: float, reason: str) -> float:
        value = given if is_given else derived
        notes.append(f"{len(notes) + 1}. {name} = {value:,}: {'given in the recipe' if is_given else reason}")
        return value

    count = spec.num_parameters()["total"]
    tokens = int(
        step("tokens", tokens, tokens > 0, TOKENS_A_WEIGHT * count, f"20 for each of {count:,} weights (Hoffmann 2022)")
    )
    batch_tokens = int(
        step(
            "batch_tokens",
            batch_tokens,
            batch_tokens > 0,
            BATCH_TOKENS * 2 ** max(0, round(math.log2(math.sqrt(tokens / TOKENS)))),
            f"{BATCH_TOKENS:,} * sqrt(tokens / 20M), a power of two and no less (McCandlish 2018; Zhang 2024)",
        )
    )
    step("matrix_lr", matrix_lr, False, matrix_lr, "Muon's holds at every width (Jordan 2024); 0 = AdamW")
    base = LR if matrix_lr else LR_ALONE
    reason = f"{base} * {WIDTH} / width: AdamW's rate falls as the width grows (muP, Yang 2022)"
    lr = step("lr", lr, lr > 0, float(f"{base * WIDTH / spec.width:.4g}"), reason)
    rate = matrix_lr or lr
    weight_decay = step(
        "weight_decay",
        weight_decay,
        weight_decay >= 0,
        float(f"{1 / (AVERAGED_SHARE * rate * max(1, tokens // batch_tokens)):.4g}"),
        f"1 / ({AVERAGED_SHARE} * rate * steps), so that weights average over {AVERAGED_SHARE:.0%} of the run "
        "(Wang & Aitchison 2024)",
    )
    return Dial(tokens, batch_tokens, matrix_lr, lr, weight_decay), notes
