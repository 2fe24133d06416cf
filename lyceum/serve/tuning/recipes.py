"""A job as a recipe for the command line: its data as files of records, its hyperparameters as settings of a section.

    found = write_examples(path, folder / "data" / TRAIN, served, limits, "supervised")
    plan = plan_of("supervised", wanted, served, found)       # what "auto" comes to, and what it will take
    write_recipe(folder, plan, seed, has_valid=False)         # what `lyceum run` then runs

What "auto" comes to, for n examples (tried on models of a million weights and less; docs/finetune.md has the table):

- epochs: as many as make `EXAMPLES` of them, 3 at least and 25 at most (reinforcement: `ROUNDS` rounds of sampling, 1 at least);
- batch size: n / 40, between 4 and 16; of dpo pairs the same; of reinforcement 8 prompts, each with 8 replies;
- learning rate: that of `RATES` where a model has at most `SMALL` weights, falling with the square root beyond; the multiplier
  multiplies it;
- above `LARGE` weights low-rank adapters are trained in place of the weights.

What it is not: the training, which is that of the stages; this room imports none of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lyceum import device
from lyceum.config import to_toml
from lyceum.corpus.records import Conversation, write_records
from lyceum.errors import DataError
from lyceum.model.transformer import Decoder
from lyceum.run import write_text
from lyceum.serve.files.checks import Found, Record, at_line, lengths, read_examples
from lyceum.serve.limits import Limits
from lyceum.serve.models import Served
from lyceum.serve.refusals import Refusal

EXAMPLES = 1000  # of all epochs together
ROUNDS = 60  # of reinforcement
REPLIES = 8  # to each prompt of a round
REPLY_TOKENS = 64  # the longest reply of reinforcement, where the context has room for it
SMALL, LARGE = 5e6, 2e8  # weights of a model
RATES: Mapping[str, Mapping[str, float]] = {  # AdamW's, and Muon's of the matrices
    "supervised": {"lr": 2e-3, "matrix_lr": 5e-3},
    "dpo": {"lr": 1e-3},
    "reinforcement": {"lr": 5e-4},
}
ADAPTERS: Mapping[str, float] = {"lora_rank": 16, "lora_alpha": 32.0}
ADAPTER_RATE = 2e-4  # of adapters, whatever the size: Hu et al. 2021
SECTIONS = {"supervised": "sft", "dpo": "preference", "reinforcement": "grpo"}
RECIPE = "job.toml"
TRAIN, VALID = "train.jsonl", "valid.jsonl"  # in the folder data
NUM_SAVES = 20  # of the trainer state: what a killed job loses at most is this share of it
NUM_LINES = 100  # of metrics
SHARE_OF_LIMIT = 0.25  # of the machine's arithmetic that training reaches on short rows, about: see docs/finetune.md


@dataclass(frozen=True)
class Plan:
    """How a job is trained. section: the recipe's; settings: of it. hyperparameters: what "auto" came to. steps: updates, about;
    tokens: that are learned from, or drawn; seconds: that it will take here, about, 0 where nobody knows."""

    section: str
    settings: dict[str, Any]
    hyperparameters: dict[str, Any]
    steps: int
    tokens: int
    seconds: float
    base_folder: str = ""

    def to_json(self) -> dict[str, Any]:
        """It as the store keeps it."""
        return asdict(self)


def plan_of(kind: str, wanted: Mapping[str, Any], served: Served, found: Found, threads: int = 1) -> Plan:
    """What a job is to do.

    Args:
        kind: its method.
        wanted: every hyperparameter, "auto" where it was left open.
        served: the base.
        found: what its file holds.
        threads: that it may compute on.
    """
    num_weights = num_parameters(served)
    is_large = num_weights > LARGE
    scale = min(1.0, math.sqrt(SMALL / num_weights)) if num_weights else 1.0
    rates = {"lr": ADAPTER_RATE} if is_large else {name: rate * scale for name, rate in RATES[kind].items()}
    chosen = {**wanted}
    for name, value in _autos(kind, found.lines).items():
        if chosen.get(name) == "auto":
            chosen[name] = value
    multiplier = float(chosen["learning_rate_multiplier"])
    settings: dict[str, Any] = {name: rate * multiplier for name, rate in rates.items()}
    settings |= {**ADAPTERS} if is_large else {}
    makers = {"supervised": _supervised, "dpo": _dpo, "reinforcement": _reinforcement}
    more, steps, tokens, passes = makers[kind](chosen, found, served.context_length)
    settings |= more
    settings |= {"log_every": max(1, steps // NUM_LINES), "save_every": max(1, steps // NUM_SAVES)}
    settings["snapshots"] = _snapshots(int(chosen["n_epochs"]), kind)
    seconds = passes * seconds_of(served, found, threads)
    folder = str(served.folder.resolve()) if served.folder is not None else ""
    return Plan(SECTIONS[kind], settings, chosen, steps, tokens, seconds, folder)


def _autos(kind: str, num: int) -> dict[str, Any]:
    found: dict[str, Any] = {"learning_rate_multiplier": 1.0, "beta": 0.1, "compute_multiplier": 1.0}
    if kind == "reinforcement":
        return {**found, "batch_size": min(8, num), "n_epochs": max(1, math.ceil(ROUNDS * min(8, num) / num))}
    return {
        **found,
        "batch_size": min(num, max(4, min(16, round(num / 40)))),
        "n_epochs": max(3, min(25, math.ceil(EXAMPLES / num))),
    }


def _supervised(chosen: Mapping[str, Any], found: Found, context: int) -> tuple[dict[str, Any], int, int, float]:
    """(settings, steps, tokens, tokens of all passes as training passes over one token)"""
    epochs, tokens = int(chosen["n_epochs"]), max(1, found.tokens)
    batch_tokens = max(1, round(int(chosen["batch_size"]) * tokens / found.lines))
    steps = epochs * max(1, round(tokens / batch_tokens))
    settings = {"epochs": float(epochs), "batch_tokens": batch_tokens, "warmup": 0.03}
    settings["validate_every"] = max(1, steps // epochs)
    return settings, steps, epochs * tokens, float(epochs * tokens)


def _dpo(chosen: Mapping[str, Any], found: Found, context: int) -> tuple[dict[str, Any], int, int, float]:
    epochs, batch = int(chosen["n_epochs"]), int(chosen["batch_size"])
    steps = epochs * math.ceil(found.lines / batch)
    settings = {"algorithm": "dpo", "epochs": epochs, "batch_prompts": batch, "beta": float(chosen["beta"])}
    settings |= {"nll": 0.1, "valid_share": 0.0, "validate_every": max(1, steps // epochs)}
    return settings, steps, epochs * found.tokens, (epochs + 1 / 3) * found.tokens


def _reinforcement(chosen: Mapping[str, Any], found: Found, context: int) -> tuple[dict[str, Any], int, int, float]:
    batch = int(chosen["batch_size"])
    group = max(2, round(REPLIES * float(chosen["compute_multiplier"])))
    rounds = max(1, math.ceil(int(chosen["n_epochs"]) * found.lines / batch))
    room = min(REPLY_TOKENS, max(context - found.longest, context // 4))  # a prompt that leaves less is left out
    drawn = rounds * batch * group * room
    read = rounds * batch * group * (round(found.tokens / found.lines) + room)
    settings: dict[str, Any] = {
        "iterations": rounds,
        "prompts_per_iteration": batch,
        "group_size": group,
        "kl_beta": 0.01,
    }
    settings |= {"max_response_tokens": room, "rewards": {"grader": 1.0}}
    return settings, rounds, drawn, 2.0 * read  # drawn, read twice, learned from


def _snapshots(epochs: int, kind: str) -> list[float]:
    """Shares of the run after which a model is saved: of each of the last three epochs but the very last."""
    parts = epochs if kind != "reinforcement" else 3
    return [round(number / parts, 2) for number in range(max(1, parts - 2), parts)]


# -- what it takes -----------------------------------------------------------------------------------------------------


def num_parameters(served: Served) -> int:
    """Weights of a model; 0 of one that is no decoder of ours."""
    model = served.engine.model
    return model.spec.num_parameters()["total"] if isinstance(model, Decoder) else 0


def seconds_of(served: Served, found: Found, threads: int) -> float:
    """Seconds to train once on one token of such examples, about; 0 where nobody knows."""
    model = served.engine.model
    if not isinstance(model, Decoder) or not found.lines:
        return 0.0
    flops = model.spec.flops_per_token(max(1, round(found.tokens / found.lines)))
    return flops / (SHARE_OF_LIMIT * threads * _flops_of_a_thread(model.spec.width, model.spec.ffn_width))


@lru_cache(maxsize=8)
def _flops_of_a_thread(width: int, ffn_width: int) -> float:
    """The limit of one thread's arithmetic, measured for a fifth of a second."""
    return device.matmul_flops([(width, width), (width, ffn_width)], 512) / max(1, device.num_threads())


def minutes(seconds: float) -> str:
    """A time for a person."""
    if not seconds:
        return ""
    return f"about {max(1, math.ceil(seconds / 60))} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


# -- files -------------------------------------------------------------------------------------------------------------


def write_examples(
    source: Path,
    target: Path,
    served: Served,
    limits: Limits,
    kind: str,
    grader: Mapping[str, Any] | None = None,
) -> Found:
    """Write a file of training examples as records, one after the other; returns what they come to in a base's own tokens.

    Args:
        source, target: where they come from, and where the records go.
        kind: the method that they are for.
        grader: what judges replies to them, where they are prompts.

    Raises:
        Refusal: a line that is none.
    """
    lines = tokens = longest = too_long = 0

    def records() -> Iterator[Record]:
        nonlocal lines, tokens, longest, too_long
        for number, _, record in read_examples(source, limits, kind):
            try:
                length, most = lengths(record, served)
            except DataError as error:
                raise at_line(number, Refusal(400, error.message)) from None
            lines, tokens = lines + 1, tokens + length
            if most > served.context_length:
                too_long += 1  # and left out
            else:
                longest = max(longest, most)
            if grader is not None and isinstance(record, Conversation):
                record = replace(record, meta={**record.meta, "grader": dict(grader)})
            yield record

    write_records(target, records())
    return Found(kind, lines, tokens, longest, too_long, served.name)


def write_recipe(folder: Path, plan: Plan, seed: int, has_valid: bool) -> None:
    """Write the recipe that `lyceum run` takes, beside the examples; the run's name is the folder's."""
    data = folder.resolve() / "data"
    given: dict[str, Any] = {"prompts": str(data / TRAIN)}
    if plan.section != "grpo":
        given = {"data": str(data / TRAIN), "valid_data": str(data / VALID) if has_valid else ""}
    section = {"from": plan.base_folder, **given, **plan.settings}
    write_text(folder / RECIPE, to_toml({"name": folder.name, "seed": seed, plan.section: section}))


def described(found: Found, served: Served | None, threads: int = 1) -> str:
    """What was found in a file when it came, for a person; of examples, with the time that a job on them would take."""
    if served is None or not found.model:
        return found.line
    wanted = dict.fromkeys(("n_epochs", "batch_size", "learning_rate_multiplier", "beta", "compute_multiplier"), "auto")
    time = minutes(plan_of(found.kind, wanted, served, found, threads).seconds)
    return f"{found.line}; a job with automatic settings takes {time}" if time else found.line
