"""What a draw costs beside the model: milliseconds a step of each feature, at two sizes of vocabulary, beside transformers.

    python bench/sampling.py [--rows 1 32] [--sizes 2048 50257] [--seconds 0.5]

Logits are random, the vocabulary is words and pieces of words of Python's own sources, bytes included. Every row asks for
the same feature, but for *mixed*, where every fourth row asks for nothing. Penalties: after 256 tokens of reply. The
peer is what `transformers` does for the same request in `generate`: its logits processors, softmax and
`torch.multinomial`. JSON masks are ours alone: *first* has never seen the state, *again* has, *counted* is inside a
string with a maxLength, where every step is a new state. Each figure is the median of several timings taken in turn, of
the process's own time on one thread, so that others on the machine count little.

Prints a table for people and, last, one JSON object. What it is not: a measure of decoding; add the model's step.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sysconfig
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from lyceum import device
from lyceum.engine.adjust import Adjustment, adjusted
from lyceum.engine.constrain import Form, Forms, Trie
from lyceum.engine.sampling import SamplingParams, sample, uniform
from lyceum.engine.schema import grammar_of

REPLY = 256
ROUNDS = 5
FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "top_k 50": {"top_k": 50},
    "top_p .95": {"top_p": 0.95},
    "min_p .05": {"min_p": 0.05},
    "top_k 50, top_p .95": {"top_k": 50, "top_p": 0.95},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "bias of 100 tokens": {"logit_bias": dict.fromkeys(range(100), 1.0)},
    "mixed": {"top_k": 50, "top_p": 0.95, "presence_penalty": 0.5},
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4000},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "tags"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 50257])
    parser.add_argument("--seconds", type=float, default=0.5, help="of each timing")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    figures: dict[str, Any] = {"ms": [], "masks_ms": [], "machine": device.facts()}
    for size in options.sizes:
        for rows in options.rows:
            for name, settings in FEATURES.items():
                ours, theirs = timed(
                    [ours_of(name, settings, rows, size), theirs_of(settings, rows, size)], options.seconds
                )
                figures["ms"].append(
                    {"vocabulary": size, "rows": rows, "feature": name, "ours": ours, "theirs": theirs}
                )
        figures["masks_ms"].append({"vocabulary": size, **masks(vocabulary(size))})
    report(figures)


def timed(calls: list[Callable[[], Any] | None], seconds: float) -> list[float | None]:
    """Median milliseconds of each, the calls taking turns."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, times in zip(calls, found, strict=True):
            if call is None:
                continue
            call()
            begun, num = time.process_time(), 0
            while time.process_time() - begun < seconds / ROUNDS or num < 2:
                call()
                num += 1
            times.append((time.process_time() - begun) / num * 1000)
    return [round(statistics.median(times), 4) if times else None for times in found]


def logits_of(rows: int, size: int) -> torch.Tensor:
    return 3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(0))


def ours_of(name: str, settings: dict[str, Any], rows: int, size: int) -> Callable[[], Any]:
    """One step of the engine after the model: adjust, draw, and what is kept for the next step."""
    each = [SamplingParams(**({} if name == "mixed" and row % 4 == 3 else settings)) for row in range(rows)]
    logits_BV, rng = logits_of(rows, size), torch.Generator().manual_seed(1)
    adjustments = [Adjustment(one, [], size) if one.is_adjusted else None for one in each]
    for adjustment in adjustments:
        for token in torch.randint(size, (REPLY,), generator=rng).tolist() if adjustment else ():
            adjustment.feed(token)  # type: ignore[union-attr]

    def column(name: str, none: float, kind: torch.dtype) -> torch.Tensor | None:
        values = [getattr(one, name) for one in each]
        return None if set(values) == {none} else torch.tensor(values, dtype=kind)

    temperature_B = torch.tensor([one.temperature for one in each])
    top_k_B = column("top_k", 0, torch.long)
    top_p_B = column("top_p", 1.0, torch.float64)
    min_p_B = column("min_p", 0.0, torch.float32)
    seeds_B = torch.arange(rows)
    has_greedy = any(one.temperature == 0 for one in each)

    def step() -> None:
        adjusted_BV = adjusted(logits_BV, adjustments) if any(adjustments) else None
        noise_B = None if has_greedy else uniform(seeds_B, seeds_B)
        sample(
            logits_BV,
            temperature_B,
            noise_B,
            has_greedy=has_greedy,
            top_k_B=top_k_B,
            top_p_B=top_p_B,
            min_p_B=min_p_B,
            adjusted_BV=adjusted_BV,
        )

    return step


def theirs_of(settings: dict[str, Any], rows: int, size: int) -> Callable[[], Any] | None:
    """The same by transformers, one setting for all rows (it has no other); None where it has no such feature."""
    from transformers.generation import logits_process as processors

    if "presence_penalty" in settings and "repetition_penalty" not in settings:
        return None  # it has neither presence nor frequency penalties
    known = {
        "repetition_penalty": processors.RepetitionPenaltyLogitsProcessor,
        "top_k": processors.TopKLogitsWarper,
        "top_p": processors.TopPLogitsWarper,
        "min_p": processors.MinPLogitsWarper,
    }
    chain = [kind(settings[name]) for name, kind in known.items() if name in settings]
    if "logit_bias" in settings:
        bias = {(token,): value for token, value in settings["logit_bias"].items()}
        chain.append(processors.SequenceBiasLogitsProcessor(bias))
    logits_BV = logits_of(rows, size)
    ids_BT = torch.randint(size, (rows, REPLY), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        scores_BV = logits_BV.clone()
        for processor in chain:
            scores_BV = processor(ids_BT, scores_BV)
        if settings.get("temperature") == 0.0:
            scores_BV.argmax(-1)
        else:
            torch.multinomial(scores_BV.softmax(-1), 1)

    return step


def vocabulary(size: int) -> list[bytes]:
    """All bytes, then the most frequent pieces of the standard library's sources, of up to 16 letters."""
    counts: Counter[str] = Counter()
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for word in re.findall(r" ?\w+| ?[^\s\w]+|\s+", file.read_text(encoding="utf-8")):
            counts.update(
                word[start : start + length] for start in (0, 1) for length in range(2, min(len(word), 16) + 1)
            )
    pieces = [piece.encode() for piece, _ in counts.most_common(2 * size)]
    return [*(bytes([byte]) for byte in range(256)), *dict.fromkeys(pieces)][: size - 1] + [b""]


def masks(token_bytes: list[bytes]) -> dict[str, float]:
    """Milliseconds: the trie, once for a vocabulary; a schema, once; masks of its states."""
    begun = time.process_time()
    trie = Trie(token_bytes)
    found = {"trie": time.process_time() - begun}
    begun = time.process_time()
    form = Form(grammar_of(PERSON), trie, token_bytes)
    found["schema"] = time.process_time() - begun
    stops = (len(token_bytes) - 1,)
    state = form.grammar.start
    times: list[float] = []
    for letter in b'{"name":"' + b"a" * 64:
        begun = time.process_time()
        form.forbidden(state, stops)
        times.append(time.process_time() - begun)
        state = form.grammar.step(state, letter)
    found["structure"] = statistics.median(times[:8])
    found["counted"] = statistics.median(times[10:])
    constraint = Forms(token_bytes).constraint({"type": "object"}, stops)
    for letter in b'{"':
        constraint.feed(letter)
    for name in ("first", "again"):
        begun = time.process_time()
        constraint.forbidden()
        found[name] = time.process_time() - begun
    columns = ("trie", "schema", "structure", "first", "again", "counted")
    return {name: round(1000 * found[name], 4) for name in columns}


def report(figures: dict[str, Any]) -> None:
    print("| vocabulary | rows | feature | Lyceum, ms | transformers, ms |\n|---|---|---|---|---|")
    for row in figures["ms"]:
        theirs = "" if row["theirs"] is None else row["theirs"]
        print(f"| {row['vocabulary']} | {row['rows']} | {row['feature']} | {row['ours']} | {theirs} |")
    print("\n| vocabulary | trie | schema | structure | first | again | counted |\n|---|---|---|---|---|---|---|")
    for row in figures["masks_ms"]:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
