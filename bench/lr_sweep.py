"""Does the dial's learning rate carry over from one width to another: a sweep around it at several widths.

    python bench/lr_sweep.py [--widths 64 128 256] [--factors 0.25 0.5 1 2 4] [--steps 150] [--seeds 3] [--alone] [--muon]

Every run trains a fresh model of the same depth on the bytes of the standard library's sources (no tokenizer: the
vocabulary is 256), flat and then linear to zero as pretraining does, at a multiple of the rate that `lyceum.train.dial`
derives for its width. Shown is the loss on held-out files, in nats a byte, as a mean over seeds with its spread. The law
holds where the best multiple is the same at every width. By default it is AdamW's rate beside Muon; --alone: AdamW
does everything; --muon: Muon's own rate is swept, and AdamW's stays.
What it is not: long. A few hundred thousand tokens say which rate is stable and learns fast, not which one ends lowest.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from lyceum import device

ROW_TOKENS, ROWS = 128, 16
MEGABYTES, HELD_OUT_ROWS = 4, 128


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument(
        "--factors", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0, 4.0], help="of the dial's rate"
    )
    parser.add_argument("--depth", type=int, default=2, help="layers")
    parser.add_argument("--steps", type=int, default=150, help=f"of {ROWS * ROW_TOKENS:,} tokens")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="threads of torch (default: one a core)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--alone", action="store_true", help="AdamW for the matrices too")
    which.add_argument("--muon", action="store_true", help="sweep Muon's rate")
    arguments = parser.parse_args()
    device.prepare("bench", arguments.threads)
    from lyceum.model.spec import ModelSpec
    from lyceum.train.dial import turn

    train_text, held_text = text()
    started, results = time.monotonic(), []
    for width in arguments.widths:
        spec, _ = ModelSpec.from_depth(arguments.depth, vocab_size=256, width=width, context_length=ROW_TOKENS)
        dial, _ = turn(spec, matrix_lr=0.0 if arguments.alone else 0.03)
        for factor in arguments.factors:
            rates = {"lr": dial.lr, "matrix_lr": dial.matrix_lr}
            rates["matrix_lr" if arguments.muon else "lr"] *= factor
            losses = [
                train(spec, train_text, held_text, steps=arguments.steps, seed=seed, **rates)
                for seed in range(arguments.seeds)
            ]
            results.append({"width": width, "factor": factor, **rates, "losses": losses})
    report(results, arguments.factors, {**vars(arguments), "seconds": round(time.monotonic() - started)})
    return 0


def text() -> tuple[Any, Any]:
    """The standard library's sources as bytes: those to train on, and every tenth file, held out."""
    import torch

    found: dict[bool, bytes] = {True: b"", False: b""}
    for number, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        found[number % 10 == 0] += path.read_bytes()
    parts = (found[False][: MEGABYTES << 20], found[True])
    train_text, held_text = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return train_text, held_text


def train(spec: Any, train_text: Any, held_text: Any, *, steps: int, seed: int, lr: float, matrix_lr: float) -> float:
    """Train one model; returns its loss on the held-out bytes, or infinity where it is not a number."""
    import torch

    from lyceum.model.transformer import Decoder
    from lyceum.train.losses import next_token_loss
    from lyceum.train.optim import Learner, OptimizerSettings, schedule

    generator = torch.Generator().manual_seed(seed)
    model = Decoder(spec, generator)
    learner = Learner(model, OptimizerSettings(lr=lr, matrix_lr=matrix_lr))
    for step in range(steps):
        learner.gradient.zero_()
        learner.accumulate_in(learner.gradient)
        starts = torch.randint(len(train_text) - ROW_TOKENS, (ROWS,), generator=generator)
        total, count, _ = next_token_loss(model, *rows_at(train_text, starts))
        (total / count).backward()
        norm = float(learner.gradient.norm())
        if not math.isfinite(norm):
            return math.inf
        learner.gradient.mul_(min(1.0, 1.0 / max(norm, 1e-12)))
        learner.update(schedule((step + 0.5) / steps, warmup=0.02, decay=0.6, shape="linear", final=0.0))
    starts = torch.linspace(0, len(held_text) - ROW_TOKENS - 1, HELD_OUT_ROWS).long()
    with torch.no_grad():
        total, count, _ = next_token_loss(model, *rows_at(held_text, starts))
    loss = float(total) / count
    return loss if math.isfinite(loss) else math.inf


def rows_at(data: Any, starts: Any) -> tuple[Any, Any]:
    """Rows of ROW_TOKENS targets that begin at `starts`, and their loss weights."""
    import torch

    tokens_BT = data[starts[:, None] + torch.arange(ROW_TOKENS + 1)].long()
    weights_BT = torch.ones(tokens_BT.shape)
    weights_BT[:, 0] = 0.0
    return tokens_BT, weights_BT


def report(results: list[dict[str, Any]], factors: list[float], settings: dict[str, Any]) -> None:
    """Print a table for people, then the figures as one line of JSON."""
    print(
        f"{'width':>6} {'rate x1':>8}" + "".join(f"{'x' + format(factor, 'g'):>16}" for factor in factors) + "   best"
    )
    swept = "matrix_lr" if settings["muon"] else "lr"
    for width in settings["widths"]:
        mine = [result for result in results if result["width"] == width]
        means = [statistics.mean(result["losses"]) for result in mine]
        cells = [
            f"{m:8.3f} +-{(max(r['losses']) - min(r['losses'])) / 2:5.3f}" for m, r in zip(means, mine, strict=True)
        ]
        best = mine[means.index(min(means))]
        print(
            f"{width:6} {mine[0][swept] / factors[0]:8.4g}"
            + "".join(f"{c:>16}" for c in cells)
            + f"   x{best['factor']:g}"
        )
    print(f"held-out nats a byte: mean over {settings['seeds']} seeds, +- half their range; {settings['seconds']} s")
    print(json.dumps({"settings": settings, "results": results, "machine": device.facts()}))


if __name__ == "__main__":
    sys.exit(main())
