"""How much memory training takes, part by part, before anything is allocated: for `lyceum plan`, and to refuse in time.

The parts are counted from the code that allocates them (fp32, 4 bytes a number):

    weights       the trained module's, and those of every frozen model beside it
    gradients     one flat gradient a module; where a loss has several terms, one more for each of them, since a logging
                  step keeps their gradients apart; or, for each further worker on a CPU (`lyceum.train.workers`), a flat
                  one and the list that autograd fills
    optimizer     AdamW two numbers a weight, Muon one; a running average one more. And what Muon's widest group of equal
                  matrices needs while it is orthogonalised: large blocks, which lie where activations and logits were if
                  these left twice as much, beside them if not
    activations   what autograd keeps of a micro-batch, and one layer's temporaries on the way back
    logits        chunks of them, and the softmax of all that a policy's tokens need (`lyceum.train.losses`), and the head's
                  gradient
    cache         the sampler's keys and values

SLACK and MUON_COPIES are measured: the growth of the resident memory over what the tensors take, in short trainings on a
CPU, glibc keeping what is freed. At depths 2, 4 and 8, widths 128, 256 and 512, under AdamW and Muon, 2,048 tokens and one
thread, the sum of the parts was 7 % below to 2 % above; at three of these shapes on two threads 3 % below; at depth 4, width
512 and 256 tokens 6 % below under AdamW, and under Muon 4, 7 and 19 % below in three runs. Writing the trainer state adds
nothing. `tests/train/test_memory.py` holds some of the shapes to 15 %. On a GPU the slack was not measured.

What it is not: the interpreter's own memory, BASE_BYTES with torch; what earlier sections of the same process left
behind; or token shards, which are mapped and given back under pressure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lyceum.model.spec import ModelSpec
from lyceum.train.losses import MOST_KEPT, chunk_rows

BASE_BYTES = 272_000_000  # resident before training: Python, torch, our modules
SLACK = 1.15  # what a heap holds over what is in it
MUON_COPIES = 6  # of the widest group of equal matrices
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "cache")

Memory = dict[str, int]  # part -> bytes


def total(memory: Mapping[str, int]) -> int:
    """The sum over the parts."""
    return sum(memory.values())


def added(*memories: Mapping[str, int]) -> Memory:
    """Part by part."""
    return {part: sum(memory.get(part, 0) for memory in memories) for part in PARTS}


def training_memory(
    spec: ModelSpec,
    micro_tokens: int,
    *,
    matrix_lr: float = 0.03,
    ema: float = 0.0,
    num_terms: int = 1,
    loss: str = "text",
    number_bytes: int = 4,
    recompute: bool = False,
    num_workers: int = 1,
    lora_rank: int = 0,
    train_layers: int = 0,
) -> Memory:
    """The bytes that one trained module takes at its peak.

    Args:
        micro_tokens: tokens of one micro-batch, pads included.
        matrix_lr: Muon's for the matrices; 0 = AdamW has them.
        ema: decay of the running average; 0 = none.
        num_terms: terms of the stage's loss.
        loss: "text" is next-token loss over chunks, "chosen" a policy's log-probabilities, "score" no vocabulary.
        number_bytes: of an activation, 2 in bf16; weights and optimizer stay at 4.
        recompute: only the inputs of all layers are kept, and what one layer keeps while it is gone back through.
        num_workers: threads that take pieces of a micro-batch side by side.
        lora_rank, train_layers: as `trained_numbers` takes them; what is kept of a micro-batch is taken to be the same.
    """
    num_trained, num_matrices = trained_numbers(spec, lora_rank, train_layers)
    matrix_lr = matrix_lr if num_matrices else 0.0
    in_muon = num_matrices if matrix_lr else 0
    optimizer = in_muon + 2 * (num_trained - in_muon) + (num_trained if ema else 0)
    heads = spec.num_layers * spec.width * spec.num_heads * spec.head_width
    same = 4 if spec.num_kv_heads == spec.num_heads and spec.num_heads * spec.head_width == spec.width else 2
    orthogonalised = max(2 * spec.num_layers * spec.width * spec.ffn_width, same * heads) if matrix_lr else 0
    orthogonalised = orthogonalised * (train_layers or spec.num_layers) // spec.num_layers
    head, chunk = spec.vocab_size * spec.width, chunk_rows(micro_tokens, spec.vocab_size)
    logits = {
        "text": chunk * spec.vocab_size + 2 * head + 2 * micro_tokens * spec.width,
        "chosen": (min(micro_tokens, MOST_KEPT) + 2 * chunk) * spec.vocab_size + head,
        "score": 0,
    }[loss]
    kept = kept_per_token(spec)
    if recompute:
        kept = kept_per_token(replace(spec, num_layers=1)) + spec.num_layers * spec.width
    each_term = num_terms if num_terms > 1 else 0
    gradients = num_trained * (1 + each_term + (num_workers - 1) * (max(1, num_terms) + 1))
    activations = round(SLACK * number_bytes * micro_tokens * (kept + _passing_per_token(spec)))
    later = round(SLACK * 4 * MUON_COPIES * orthogonalised)
    later = min(later, max(0, 2 * later - activations - number_bytes * logits))
    return {
        "weights": 4 * (spec.num_parameters()["total"] + (num_trained if lora_rank else 0)),
        "gradients": 4 * gradients,
        "optimizer": 4 * optimizer + later,
        "activations": activations,
        "logits": number_bytes * logits,
        "cache": 0,
    }


def trained_numbers(spec: ModelSpec, lora_rank: int = 0, train_layers: int = 0) -> tuple[int, int]:
    """(numbers that are trained, of them in matrices that Muon may take).

    Args:
        lora_rank: of adapters on all linear layers inside layers (`lyceum.model.lora`), which AdamW has; 0 = none.
        train_layers: last layers that are trained, with the norm after them and an output layer of its own
            (`lyceum.model.reference`); 0 = everything is.
    """
    counts = spec.num_parameters()
    if lora_rank:
        heads, kv_heads = spec.num_heads * spec.head_width, spec.num_kv_heads * spec.head_width
        sides = 2 * (spec.width + heads) + 2 * (spec.width + kv_heads)
        sides += (3 if spec.ffn == "swiglu" else 2) * (spec.width + spec.ffn_width)
        return spec.num_layers * lora_rank * sides, 0
    if train_layers:
        matrices = counts["matrices"] * train_layers // spec.num_layers
        rest = (counts["total"] - counts["matrices"] - counts["embedding"] - counts["head"]) * train_layers
        return matrices + -(-rest // spec.num_layers) + counts["head"], matrices
    return counts["total"], counts["matrices"]


def frozen_memory(spec: ModelSpec) -> Memory:
    """The bytes of a model that is only run."""
    return {"weights": 4 * spec.num_parameters()["total"]}


def reference_memory(spec: ModelSpec, lora_rank: int = 0, train_layers: int = 0) -> Memory:
    """The bytes that a reference has of its own: a copy of what is trained, and nothing below adapters."""
    return {"weights": 0 if lora_rank else 4 * trained_numbers(spec, 0, train_layers)[0]}


def cache_memory(spec: ModelSpec, num_rows: int, num_tokens: int) -> Memory:
    """The bytes of the sampler's keys and values: rows of `num_tokens`, which grow by doubling from 32."""
    reach = 32
    while reach < num_tokens:
        reach *= 2
    numbers = 2 * spec.num_layers * num_rows * spec.num_kv_heads * spec.head_width * reach
    return {"cache": round(4 * numbers * SLACK)}


def kept_per_token(spec: ModelSpec) -> int:
    """Numbers that autograd keeps of one token: in each layer two norms' outputs, each twice, and the feed-forward's
    gate, up, their activation and product (GELU: up and its activation); queries and keys normed and turned, values, and
    what attention gives."""
    heads, kv_heads = spec.num_heads * spec.head_width, spec.num_kv_heads * spec.head_width
    normed = 1 if spec.qk_norm else 0
    layer = (
        4 * spec.width
        + (2 + normed) * heads
        + (2 + normed) * kv_heads
        + (4 if spec.ffn == "swiglu" else 2) * spec.ffn_width
    )
    return spec.num_layers * layer + 3 * spec.width


def _passing_per_token(spec: ModelSpec) -> int:
    """Numbers of one token that live while one layer is gone back through."""
    return 4 * spec.ffn_width + 4 * spec.width
