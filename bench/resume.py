"""Kill a pretraining run with SIGKILL at random moments, again and again, and compare its losses with a straight run's.

    python bench/resume.py [--kills 20] [--seed 0] [--tokens 300000]

Both are `lyceum run recipes/smoke.toml --until pretrain` in processes of their own, every step logged, a state saved
every five. The killed one is a single chain: each attempt goes on where the last was killed, and is killed in its turn,
at a moment drawn from a seeded generator: one in five within seconds of its start, while it loads and restores, the
others a drawn number of new steps and a drawn part of a second later, so also while it writes. The last attempt is left
alone. Equal means: the same lines in metrics.jsonl bit for bit (without what a clock says), the same samples, the same
bytes of weights.

Threads are 1 unless the environment says otherwise: which sums are equal depends on them, and both runs have the same.
What it is not: a proof for a machine that loses power. What the system has been given to write it will write.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lyceum import device
from lyceum.log import read_metrics

ROOT = Path(__file__).resolve().parent.parent
SAVE_EVERY, STEP_TOKENS = 5, 2048
EARLY, LOADING_S = 0.2, 4.0  # share of the kills that come this soon after the start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many times the run is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--tokens", type=int, default=300_000, help="length of the run; 2,048 make a step")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        straight, killed = Path(folder) / "straight", Path(folder) / "killed"
        attempt(straight, arguments.tokens)
        straight_s = time.monotonic() - begun
        kills = chain(killed, arguments.tokens, arguments.kills, random.Random(arguments.seed))
        figures = {
            **compare(straight / "smoke" / "pretrain", killed / "smoke" / "pretrain"),
            "kills": kills,
            "seed": arguments.seed,
            "straight_s": round(straight_s, 1),
            "seconds": round(time.monotonic() - begun, 1),
            "machine": device.facts(),
        }
    report(figures)
    return 0 if figures["equal"] else 1


def start(runs: Path, tokens: int) -> subprocess.Popen[bytes]:
    """One attempt at the run, as a process of its own."""
    settings = {"tokens": tokens, "log_every": 1, "save_every": SAVE_EVERY}
    words = [word for name, value in settings.items() for word in ("--set", f"pretrain.{name}={value}")]
    recipe = str(ROOT / "recipes" / "smoke.toml")
    command = [sys.executable, "-m", "lyceum", "run", recipe, "--until", "pretrain", "--runs", str(runs), *words]
    runs.mkdir(parents=True, exist_ok=True)
    with open(runs / "said.txt", "wb") as said:
        return subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, start_new_session=True)


def attempt(runs: Path, tokens: int) -> None:
    """An attempt that is left alone."""
    if start(runs, tokens).wait():
        sys.exit(f"the run failed:\n{(runs / 'said.txt').read_text()}")


def chain(runs: Path, tokens: int, num_kills: int, draw: random.Random) -> list[dict[str, Any]]:
    """Kill the run `num_kills` times, then let it end; returns what is known of each kill."""
    kills: list[dict[str, Any]] = []
    folder, reached = runs / "smoke" / "pretrain", 0
    while len(kills) < num_kills:
        room = (tokens // STEP_TOKENS - reached) // (num_kills - len(kills) + 1)  # new steps that this attempt may make
        is_early = reached > 0 and draw.random() < EARLY
        wanted = reached + draw.randint(1, max(1, room))
        pause_s = draw.random() * (LOADING_S if is_early else 0.1)
        process, begun = start(runs, tokens), time.monotonic()
        while process.poll() is None and not is_early and logged(folder) < wanted:
            time.sleep(0.005)
        time.sleep(pause_s)
        if process.poll() is not None:
            sys.exit(f"the run ended after {len(kills)} kills, by itself:\n{(runs / 'said.txt').read_text()}")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reached = max(reached, logged(folder))
        kills.append({"after_s": round(time.monotonic() - begun, 2), "step": logged(folder), "is_early": is_early})
    attempt(runs, tokens)
    return kills


def logged(folder: Path) -> int:
    """The last step in a section's metrics; 0 if there is none."""
    lines = read_metrics(folder / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def compare(straight: Path, killed: Path) -> dict[str, Any]:
    """What is equal between two sections' folders, bit for bit."""
    from lyceum.train.loop import TIMINGS  # here, as it imports torch

    one, other = (
        [
            {name: value for name, value in line.items() if name not in TIMINGS}
            for line in read_metrics(f / "metrics.jsonl")
        ]
        for f in (straight, killed)
    )
    differing = [a["step"] for a, b in zip(one, other, strict=False) if a != b]
    equal = {
        "metrics": one == other and len(one) > 0,
        "samples": same_bytes(straight, killed, "samples.jsonl"),
        "weights": same_bytes(straight, killed, "checkpoint/model.safetensors"),
    }
    return {
        "equal": all(equal.values()),
        **{f"equal_{name}": value for name, value in equal.items()},
        "first_difference": differing[0] if differing else None,
        "steps": [len(one), len(other)],
        "losses": [[lines[at]["loss"] for at in (0, len(lines) // 2, -1)] for lines in (one, other)],
    }


def same_bytes(one: Path, other: Path, name: str) -> bool:
    return (one / name).read_bytes() == (other / name).read_bytes()


def report(figures: dict[str, Any]) -> None:
    """Print a table for people, then the figures as one line of JSON."""
    print("kill  seconds after start  last step logged  while")
    for number, kill in enumerate(figures["kills"], start=1):
        where = "starting" if kill["is_early"] else "training"
        print(f"{number:4}  {kill['after_s']:19.2f}  {kill['step']:16}  {where}")
    print(f"steps logged: straight {figures['steps'][0]}, killed {figures['steps'][1]}")
    for name in ("metrics", "samples", "weights"):
        print(f"{name}: {'equal bit for bit' if figures[f'equal_{name}'] else 'DIFFERENT'}")
    print(json.dumps(figures))


if __name__ == "__main__":
    sys.exit(main())
