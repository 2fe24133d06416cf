"""How fast the demo's model trains: ours against transformers' Llama, and both against the machine's matrix products.

    python bench/demo_speed.py [--threads N] [--rounds 8] [--steps 5] [--force]

Both models have the demo's shape (4 layers of width 128, four heads of 32, vocabulary 2,048, tied) and train in fp32,
eager, on the same random tokens, 16 rows of 128, with the same AdamW, in this one process, in turn: A B A B ... "Uncut"
is ours without workers that share the rows: one operator on all cores after the other. Ours is Qwen3's architecture, so
it does a little more than Llama's: an RMSNorm on every query and key head. Each row gives 127 targets to both.

The limit is what is left if nothing but matrix products took time: the best GFLOP/s over a few shapes, measured here,
over the operations of a token. Measuring beside other busy processes is worthless (two threads on two cores collapse
when a third comes), so it is refused. It needs `transformers`, of the test extra.
What it is not: a learning benchmark. The tokens are noise, and a stage's own bookkeeping is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from quiet import busy_share

from lyceum import device

DEPTH, VOCABULARY, ROWS, ROW_TOKENS = 4, 2048, 16, 128


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="threads of torch (default: one a core)")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each model")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps a turn")
    parser.add_argument("--force", action="store_true", help="measure even on a busy machine")
    arguments = parser.parse_args()
    busy = busy_share(arguments.force)
    if busy is None:
        return 1
    device.prepare("bench", arguments.threads)

    import torch

    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (ROWS, ROW_TOKENS))
    from lyceum.model.spec import ModelSpec
    from lyceum.model.transformer import Decoder

    spec, _ = ModelSpec.from_depth(DEPTH, vocab_size=VOCABULARY)
    steps = {
        "lyceum": our_step(Decoder(spec), tokens),
        "lyceum, uncut": our_step(Decoder(spec), tokens, is_cut=False),
        "transformers": transformers_step(spec, tokens),
    }
    speeds = take_turns(steps, tokens.numel(), arguments.rounds, arguments.steps)
    shapes = [(spec.width, spec.ffn_width), (spec.ffn_width, spec.width), (1024, 1024)]
    limit_gflops = device.matmul_flops(shapes, tokens.numel()) / 1e9
    flops = spec.flops_per_token(ROW_TOKENS)
    limit = limit_gflops * 1e9 / flops
    ratios = [a / b for a, b in zip(speeds["lyceum"], speeds["transformers"], strict=True)]
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    figures = {
        "tokens_per_s": {name: round(value) for name, value in medians.items()},
        "spread": {name: [round(min(values)), round(max(values))] for name, values in speeds.items()},
        "ratio": round(statistics.median(ratios), 3),
        "limit_tokens_per_s": round(limit),
        "limit_gflops": round(limit_gflops, 1),
        "mflops_per_token": round(flops / 1e6, 3),
        "share_of_limit": {name: round(value / limit, 3) for name, value in medians.items()},
        "parameters": spec.num_parameters()["total"],
        "rounds": arguments.rounds,
        "busy_share": round(busy, 3),
        "machine": device.facts(),
    }
    report(figures)
    return 0


def report(figures: dict[str, Any]) -> None:
    """Print a table for people, then the figures as one line of JSON."""
    print(f"{'':14} {'tokens/s':>9} {'of limit':>9}   spread over {figures['rounds']} rounds")
    for name, value in figures["tokens_per_s"].items():
        low, high = figures["spread"][name]
        print(f"{name:14} {value:9,} {figures['share_of_limit'][name]:9.0%}   {low:,} to {high:,}")
    print(f"{'matmul limit':14} {figures['limit_tokens_per_s']:9,} {'100%':>9}   {figures['limit_gflops']} GFLOP/s")
    print(f"ratio lyceum / transformers: {figures['ratio']} (median over rounds)")
    print(json.dumps(figures))


def our_step(model: Any, tokens: Any, is_cut: bool = True) -> Callable[[], None]:
    """One training step of a decoder of ours, of the parts that the loop is made of.

    Args:
        tokens: (B, T + 1); is_cut: whether workers may share the rows (`lyceum.train.workers`).
    """
    import torch

    from lyceum.batches.pack import TokenBatch
    from lyceum.train.losses import next_token_loss
    from lyceum.train.optim import Learner, OptimizerSettings
    from lyceum.train.workers import backward, deal, num_workers

    learner = Learner(model, OptimizerSettings(lr=1e-3))
    weights = torch.ones(tokens.shape).index_fill(1, torch.tensor([0]), 0.0)
    batch = TokenBatch(tokens, weights, torch.full((len(tokens),), tokens.shape[1]))
    piles = deal([batch], TokenBatch.halves, num_workers(tokens.numel()) if is_cut else 1)

    def loss(piece: TokenBatch, sums: Any = None) -> torch.Tensor:
        return next_token_loss(model, piece.tokens_BT, piece.weights_BT)[0] / batch.num_targets

    def step() -> None:
        learner.gradient.zero_()
        if len(piles) > 1:
            backward(piles, lambda *its: {"": loss(*its)}, {}, [learner], {"": [learner.gradient]})
        else:
            learner.accumulate_in(learner.gradient)
            loss(batch).backward()
        learner.update(1.0)

    return step


def transformers_step(spec: Any, tokens: Any) -> Callable[[], None]:
    """A Llama of the same shape and one training step of it, as its documentation writes it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.width,
        intermediate_size=spec.ffn_width,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        max_position_embeddings=spec.context_length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def take_turns(
    steps: dict[str, Callable[[], None]], num_tokens: int, rounds: int, steps_a_round: int
) -> dict[str, list[float]]:
    """Run the models in turn; return each one's tokens a second, one number a round (by its median step)."""
    speeds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            seconds = []
            for _ in range(steps_a_round):
                start = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - start)
            speeds[name].append(num_tokens / statistics.median(seconds))
    return speeds


if __name__ == "__main__":
    sys.exit(main())
