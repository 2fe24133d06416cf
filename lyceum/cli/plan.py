"""What a recipe would take, before anything runs: `lyceum plan RECIPE`. Weights, tokens, operations, memory, time, money.

Every number is arithmetic over the recipe; only this machine's speed is measured, in half a second. The assumptions,
each printed with the result:

    this machine    CPU_SHARE of the measured speed of its matrix products: what pretraining reached at depths 4, 6 and
                    8 on one thread (0.35 to 0.39)
    a GPU           bf16 products at MFU of the maker's dense peak from width 1,024 up, in proportion below; weights,
                    gradients and optimizer stay in fp32; ROOM of its memory can be used
    an example      EXAMPLE_SHARE of the context is filled by one conversation, response or episode: 44 of 192 tokens in
                    the demo. How many conversations there are, is known once the lessons are written.

The same memory decides whether `lyceum run` begins: what cannot fit is refused before it starts (`check_memory`).
What it is not: a promise. Sampling and data preparation are slower than products; sections that train nothing (corpus,
rankings, eval) are left out; the splits over many GPUs are arithmetic on memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lyceum import device, dist
from lyceum.cli import river
from lyceum.config import Recipe, build, find_recipe, load_recipe
from lyceum.errors import ConfigError, ResourceError
from lyceum.log import aligned, show_time
from lyceum.model.hub import read_json, read_spec
from lyceum.model.spec import ModelConfig, ModelSpec
from lyceum.run import checkpoint_in
from lyceum.train.machine import MachineConfig
from lyceum.train.memory import (
    BASE_BYTES,
    PARTS,
    Memory,
    added,
    cache_memory,
    frozen_memory,
    reference_memory,
    total,
    training_memory,
)
from lyceum.train.workers import num_workers

CPU_SHARE = 0.37
MFU, MFU_WIDTH = 0.40, 1024
ROOM = 0.9
EXAMPLE_SHARE = 0.25
TENSOR_PARALLEL = 8  # GPUs of one node, over which a layer is cut


@dataclass(frozen=True)
class Gpu:
    """A GPU by its maker's sheet: dense bf16 FLOP/s with fp32 sums, and bytes of memory."""

    name: str
    flops: float
    memory: float


GPUS = (
    Gpu("RTX 4090", 165.2e12, 24e9),
    Gpu("A100 80 GB", 312e12, 80e9),
    Gpu("H100 SXM", 989e12, 80e9),
    Gpu("H200", 989e12, 141e9),
)


@dataclass(frozen=True)
class Need:
    """What one section that trains takes; tokens, steps and operations are None where the data are not there yet.

    flops: floating point operations of the whole section. memory: of one process in fp32; of a GPU: in bf16.
    """

    name: str
    kind: str
    spec: ModelSpec
    memory: Memory
    gpu_memory: Memory
    tokens: int | None = None
    steps: int | None = None
    flops: float | None = None
    notes: list[str] = field(default_factory=list)


# -------------------------------------------------------------------------------- from the recipe


def needs(recipe: Recipe, steps: Sequence[river.Step], run: Path | None = None) -> list[Need]:
    """What every section of `steps` that trains takes.

    Args:
        run: the run's folder; finished lessons in it say how many conversations there are.
    """
    by_name = {step.name: step for step in steps}
    makers = {"pretrain": _pretrain, "sft": _sft, "reward": _reward, "preference": _preference}
    makers |= {"ppo": _on_policy, "tamer": _on_policy, "grpo": _on_policy}
    return [makers[s.section.kind](recipe, s, by_name, run) for s in steps if s.section.kind in makers]


def _spec(recipe: Recipe, step: river.Step, by_name: Mapping[str, river.Step]) -> tuple[ModelSpec, list[str]]:
    """The shape that the section's first ancestor makes."""
    while "policy" in step.inputs:
        source = step.inputs["policy"]
        if source not in by_name:  # a checkpoint folder made elsewhere
            config = checkpoint_in(Path(source)) / "config.json"
            return read_spec(read_json(config), config)[0], []
        step = by_name[source]
    vocab_size = by_name[step.inputs["tokenizer"]].config.vocab_size
    return build(ModelConfig, recipe.model, f"[model] in {recipe.path}").derive(vocab_size)


def _both(of: Callable[[int], list[Memory]]) -> tuple[Memory, Memory]:
    """The memory in fp32 and, on a GPU, in bf16; `of` takes the bytes of an activation."""
    return added(*of(4)), added(*of(2))


def _training_memory(spec: ModelSpec, micro_tokens: int, number_bytes: int, **state: Any) -> Memory:
    """Of one module; in fp32 with the workers that this machine's threads make."""
    count = num_workers(micro_tokens) if number_bytes == 4 else 1
    return training_memory(spec, micro_tokens, number_bytes=number_bytes, num_workers=count, **state)


def _pretrain(recipe: Recipe, step: river.Step, by_name: Mapping[str, river.Step], run: Path | None) -> Need:
    spec, notes = _spec(recipe, step, by_name)
    config, derived = step.config.derive(spec)
    row = config.row_tokens
    rows = max(1, config.batch_tokens // row)
    micro = min(max(1, config.micro_tokens // row), rows) * row
    count = max(1, config.tokens // (rows * row))
    state = {"matrix_lr": config.matrix_lr, "ema": config.ema, "recompute": _recomputes(recipe)}
    memory = _both(lambda size: [_training_memory(spec, micro, size, **state)])
    tokens = count * rows * row
    flops = tokens * spec.flops_per_token(row)
    return Need(step.name, "pretrain", spec, *memory, tokens=tokens, steps=count, flops=flops, notes=[*notes, *derived])


def _sft(recipe: Recipe, step: river.Step, by_name: Mapping[str, river.Step], run: Path | None) -> Need:
    spec, _ = _spec(recipe, step, by_name)
    config = step.config
    longest = min(config.max_tokens or spec.context_length, spec.context_length)
    micro = max(min(config.micro_tokens, config.batch_tokens), longest)
    state = {"matrix_lr": config.matrix_lr, "ema": config.ema, "recompute": _recomputes(recipe)}
    state["lora_rank"] = config.lora_rank
    judge = [frozen_memory(spec)] * (config.best_by == "reward") * _judges(step, by_name)
    memory = _both(lambda size: [_training_memory(spec, micro, size, **state), *judge])
    lessons = run / step.inputs["lessons"] / "train.jsonl" if run and "lessons" in step.inputs else None
    if lessons is None or not lessons.exists():
        return Need(step.name, "sft", spec, *memory)
    with open(lessons, "rb") as file:
        examples = sum(1 for _ in file)
    example = _example(spec)
    tokens = int(config.epochs * examples * example)
    flops = tokens * spec.flops_per_token(example)
    return Need(
        step.name, "sft", spec, *memory, tokens=tokens, steps=max(1, round(tokens / config.batch_tokens)), flops=flops
    )


def _reward(recipe: Recipe, step: river.Step, by_name: Mapping[str, river.Step], run: Path | None) -> Need:
    spec, _ = _spec(recipe, step, by_name)
    config = step.config
    terms = 2 if config.centring else 1
    state = {"matrix_lr": config.matrix_lr, "ema": config.ema, "num_terms": terms, "loss": "score"}
    state["recompute"] = _recomputes(recipe)
    memory = _both(lambda size: [_training_memory(spec, config.micro_tokens, size, **state)])
    if config.data or not _is_counted(
        step, by_name
    ):  # files or judgements of somebody's: not known until they are read
        return Need(step.name, "reward", spec, *memory)
    rankings, example = by_name[step.inputs["rankings"]].config, _example(spec)
    prompts = round(rankings.prompts * (1 - rankings.valid_share))
    tokens = config.members * config.epochs * prompts * rankings.responses * example
    count = config.members * config.epochs * -(-prompts // config.batch_prompts)
    flops = tokens * spec.flops_per_token(example)
    return Need(step.name, "reward", spec, *memory, tokens=tokens, steps=count, flops=flops)


def _preference(recipe: Recipe, step: river.Step, by_name: Mapping[str, river.Step], run: Path | None) -> Need:
    spec, _ = _spec(recipe, step, by_name)
    config, chosen = step.config, step.config.objective()
    state = {"matrix_lr": config.matrix_lr, "ema": config.ema, "num_terms": 2 if chosen.nll else 1, "loss": "chosen"}
    state |= {"recompute": _recomputes(recipe), "lora_rank": config.lora_rank}
    memory = _both(lambda size: [_training_memory(spec, config.micro_tokens, size, **state)])
    if config.data or not _is_counted(
        step, by_name
    ):  # a file or judgements of somebody's: not known until they are read
        return Need(step.name, "preference", spec, *memory)
    rankings, example = by_name[step.inputs["rankings"]].config, _example(spec)
    prompts = round(rankings.prompts * (1 - rankings.valid_share))
    responses = prompts * rankings.responses
    tokens = config.epochs * responses * example
    count = config.epochs * -(-(prompts if chosen.is_paired else responses) // config.batch_prompts)
    # the reference reads every response once; for kto a stranger's is read beside each
    passes = 3 * config.epochs + chosen.uses_reference + (0 if chosen.is_paired else config.epochs + 1)
    flops = responses * example * spec.flops_per_token(example) / 3 * passes
    return Need(step.name, "preference", spec, *memory, tokens=tokens, steps=count, flops=flops)


def _on_policy(recipe: Recipe, step: river.Step, by_name: Mapping[str, river.Step], run: Path | None) -> Need:
    spec, _ = _spec(recipe, step, by_name)
    config, example = step.config, _example(spec)
    has_critic = getattr(config, "critic", "shared") == "own"  # a shared one is a row of numbers
    learned = {"lora_rank": config.lora_rank, "train_layers": config.train_layers}
    num_judges = _judges(step, by_name) if not config.rewards or "model" in config.rewards else 0
    terms = 2 + bool(config.ptx_coef)  # the policy's, and the critic's or the KL
    text = by_name.get(step.inputs.get("pretrain", "")) if config.ptx_coef else None
    text_row = text.config.row_tokens if text is not None else 0

    def models(size: int) -> list[Memory]:
        both = {"num_terms": terms, "ema": config.ema, "recompute": _recomputes(recipe)}
        rate = config.matrix_lr
        policy = _training_memory(spec, config.micro_tokens, size, matrix_lr=rate, loss="chosen", **both, **learned)
        engines = device.num_threads() if device.pick_device().type == "cpu" else 1  # side by side
        cache = cache_memory(spec, min(config.engine_batch * engines, config.episodes), spec.context_length)
        held = [policy, reference_memory(spec, **learned), *[frozen_memory(spec)] * num_judges, cache]
        if has_critic:
            rate = config.critic_matrix_lr
            held.append(_training_memory(spec, config.micro_tokens, size, matrix_lr=rate, loss="score", **both))
        return held

    count = config.iterations * config.epochs * config.minibatches
    episodes = config.iterations * config.episodes * example
    episodes_a_step = config.episodes / config.minibatches
    num_text = count * max(1, round(config.ptx_rows * episodes_a_step)) * text_row
    forward = spec.flops_per_token(example) / 3
    # an episode is sampled, read by policy and reference, by judge and critic; then policy and critic learn from it
    passes = 3 + num_judges + has_critic
    flops = episodes * forward * (passes + (1 + has_critic) * 3 * config.epochs) + 3 * forward * num_text
    tokens = config.epochs * episodes + num_text
    return Need(step.name, step.section.kind, spec, *_both(models), tokens=tokens, steps=count, flops=flops)


def _is_counted(step: river.Step, by_name: Mapping[str, river.Step]) -> bool:
    """Whether the recipe says how many rankings the section learns from."""
    source = by_name.get(step.inputs.get("rankings", ""))
    return source is not None and source.section.kind == "rankings"


def _judges(step: river.Step, by_name: Mapping[str, river.Step]) -> int:
    """Members of the reward model that the section starts from."""
    judge = by_name.get(step.inputs.get("reward", ""))
    return judge.config.members if judge is not None else 1


def _recomputes(recipe: Recipe) -> bool:
    return bool(recipe.machine.get("recompute", False))


def _example(spec: ModelSpec) -> int:
    return max(1, round(EXAMPLE_SHARE * spec.context_length))


# -------------------------------------------------------------------------------- onto machines


def split(need: Need, gpu: Gpu) -> tuple[int, str]:
    """The fewest GPUs, in powers of two, on which the section fits, and how it is cut; (0, why) where 1,024 do not.

    Alone a GPU holds everything. Under FSDP weights, gradients and optimizer are cut over n, and two layers, the
    embedding and the output are whole at a time; tensor parallelism cuts these and the activations over a node too.
    """
    room = ROOM * gpu.memory
    if total(need.gpu_memory) <= room:
        return 1, "one GPU, or data parallel"
    for inside in (1, TENSOR_PARALLEL):
        for num in (2**power for power in range(1, 11)):
            if num >= inside and cut_memory(need.gpu_memory, need.spec, num, inside) <= room:
                cut = [f"{kind} over {n}" for kind, n in (("FSDP", num // inside), ("TP", inside)) if n > 1]
                return num, ", ".join(cut)
    return 0, "does not fit: smaller micro_tokens"


def cut_memory(memory: Memory, spec: ModelSpec, num: int, inside: int) -> float:
    """Bytes that each of `num` GPUs takes of what one process would, `inside` of them sharing each layer's matrices."""
    counts = spec.num_parameters()
    state = sum(memory[part] for part in ("weights", "gradients", "optimizer"))
    whole = 4 * (2 * counts["matrices"] // spec.num_layers + counts["embedding"] + counts["head"])
    return state / num + (whole + total(memory) - state) / inside


def gpu_seconds(need: Need, gpu: Gpu) -> float | None:
    """Seconds of one such GPU, however many share them."""
    mfu = MFU * min(1.0, need.spec.width / MFU_WIDTH)
    return None if need.flops is None else need.flops / (gpu.flops * mfu)


def memory_there() -> tuple[float, float, str]:
    """Bytes that one process's tensors may take, bytes it takes before any, and what has them: this GPU, or this machine."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device.pick_device())
        return float(properties.total_memory), 0.0, properties.name
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    name = "this machine" if ranks == 1 else f"each of the {ranks} processes on this machine"
    return device.memory_bytes() / ranks, float(BASE_BYTES), name


def check_memory(found: Sequence[Need], machine: MachineConfig | None = None) -> None:
    """Refuse what cannot fit into this machine's memory, or this GPU's.

    A sharded model is cut over the ranks; on a CPU rank 0 also puts it together there, to answer prompts.
    Raises ResourceError: what is needed, what there is, and what to lower.
    """
    there, base, name = memory_there()
    for need in found:
        needed = base + total(need.memory)
        if machine and machine.is_sharded:
            needed = base + cut_memory(need.memory, need.spec, dist.world_size(), machine.tensor)
            needed += need.memory["weights"] if base else 0
        if needed > there > 0:
            largest = max(PARTS, key=lambda part: need.memory[part])
            by_micro = largest in ("activations", "logits")
            lower = (
                f"{need.name}.micro_tokens" if by_micro else "ppo.engine_batch" if largest == "cache" else "model.depth"
            )
            raise ResourceError(
                f"{need.name} needs about {_gb(needed)} of memory, of which {largest} {_gb(need.memory[largest])}; "
                f"{name} has {_gb(there)}",
                hint=f"lower {lower}; `lyceum plan` shows every part, and on which machine it fits",
            )


# -------------------------------------------------------------------------------- the page


def plan(
    recipe_path: str | Path, *, overrides: Sequence[str] = (), runs_dir: str | Path = "runs", price: float = 0.0
) -> str:
    """The plan of a recipe as a page of text; `price` is that of an hour of a GPU, 0 leaves the cost out.

    Raises ConfigError: the recipe is wrong, or nothing in it trains.
    """
    recipe = load_recipe(find_recipe(recipe_path), overrides)
    found = needs(recipe, river.plan(recipe), Path(runs_dir) / recipe.name)
    if not found:
        raise ConfigError(
            f"no section of {recipe.path} trains", hint="add one: pretrain, sft, reward, preference, ppo, tamer or grpo"
        )
    lines = [note for need in found for note in need.notes]
    lines += [
        "",
        *_table([["section", "weights", "in layers", "tokens", "steps", "operations", "memory", *PARTS]], found),
    ]
    spec = found[0].spec
    gflops = device.matmul_flops([(spec.width, spec.ffn_width)], 2048) / 1e9
    rows = [
        ["machine", *[need.name for need in found], "together", "GPU hours", *(["cost"] if price else []), "fits on"]
    ]
    seconds = [None if n.flops is None else n.flops / (gflops * 1e9 * CPU_SHARE) for n in found]
    rows.append(
        ["this machine", *map(_time, seconds), _time(_sum(seconds)), "", *([""] if price else []), _fits(found)]
    )
    for gpu in GPUS:
        seconds = [gpu_seconds(need, gpu) for need in found]
        hours = _sum(seconds) / 3600
        num, how = max((split(need, gpu) for need in found), key=lambda split: split[0] or 1 << 20)
        cost = [f"{hours * price:,.2f}"] if price else []
        shown = [_time(s and s / max(1, num)) for s in seconds]
        rows.append([gpu.name, *shown, _time(_sum(seconds) / max(1, num)), f"{hours:,.3g}", *cost, how])
    lines += ["", *_aligned(rows), ""]
    if any(need.tokens is None for need in found):
        lines.append("?: not known until the lessons are written, or a file is read; left out of the sums")
    lines += [
        f"this machine: {gflops:,.0f} GFLOP/s in products, {CPU_SHARE:.0%} of it while training; {_gb(memory_there()[0])}; "
        f"memory is beside {_gb(BASE_BYTES)} of Python and torch",
        f"a GPU: {MFU:.0%} of its dense bf16 peak from width {MFU_WIDTH:,} up, in proportion below; fp32 weights and "
        f"optimizer; {ROOM:.0%} of its memory",
        "FSDP and TP are what the memory asks for: the recipe's [machine], for pretrain, sft and reward; ppo is data "
        "parallel only",
    ]
    return "\n".join(lines).strip()


def _table(rows: list[list[str]], found: Sequence[Need]) -> list[str]:
    for need in found:
        counts = need.spec.num_parameters()
        inside = counts["matrices"] + counts["norms"]
        amounts = [_count(value) for value in (counts["total"], inside, need.tokens, need.steps, need.flops)]
        parts = [_gb(need.memory[part]) for part in PARTS]
        rows.append([need.name, *amounts, _gb(total(need.memory)), *parts])
    return _aligned(rows)


def _fits(found: Sequence[Need]) -> str:
    there, base, name = memory_there()
    return "itself" if base + max(total(need.memory) for need in found) <= there else "too little memory"


def _sum(values: Sequence[float | None]) -> float:
    return sum(value for value in values if value is not None)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    days = seconds / 86400
    return f"{days:,.0f} days" if days >= 3 else show_time(seconds) if seconds >= 1 else "< 1 s"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.0f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:,.1f} GB"


def _count(value: float | None) -> str:
    """Three digits and a letter: 1.12M; operations reach E (10^18) and beyond."""
    if value is None:
        return "?"
    for letter, size in (("Y", 1e24), ("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:,.0f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    return aligned(rows, [False] + [True] * (len(rows[0]) - 1))
