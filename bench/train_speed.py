"""How fast models of 1 to 30 million parameters train: ours against the peers', and all against the machine's limit.

    python bench/train_speed.py --nanogpt DIR --nanochat DIR --minimind DIR [--sizes 1 3 10 30] [--compile]

A peer is its own model code, from a checkout that the command line names; one that is not named, or whose requirements
are not installed, is skipped with a line. Everyone trains on the same random tokens, 8 rows of 256, vocabulary 4,096
(minimind: its own 6,400), in fp32, with AdamW (nanochat: the optimizer it comes with), each in a process of its own that
waits while the others take their turn. A speed is the median over rounds of a turn's median step.

Shapes: layers, width and heads are the same for all; what a peer does beside them is its own affair (nanochat adds value
embeddings, minimind is grouped differently), so the share of the limit counts each model's own matrix products. The
limit: the best GFLOP/s of matrix products of that width, measured here in between. A busy machine is refused.
What it is not: a learning benchmark; `bench/time_to_loss.py` is one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quiet import busy_share

from lyceum import device

SHAPES = {1: (4, 128, 4), 3: (4, 192, 6), 10: (6, 320, 5), 30: (8, 512, 8)}  # millions -> layers, width, heads
VOCABULARY, ROWS, ROW_TOKENS = 4096, 8, 256
PEERS = ("nanogpt", "nanochat", "minimind")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each model")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn")
    parser.add_argument("--compile", action="store_true", help="also measure everyone under torch.compile")
    parser.add_argument("--force", action="store_true", help="measure even on a busy machine")
    for peer in PEERS:
        parser.add_argument(f"--{peer}", type=Path, help=f"checkout of {peer}")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)  # who, size, checkout
    options = parser.parse_args()
    if options.worker:
        who, size, checkout = options.worker
        return worker(who, int(size), Path(checkout))
    busy = busy_share(options.force)
    if busy is None:
        return 1
    who = {"lyceum": ".", "transformers": "."} | {p: str(path) for p in PEERS if (path := getattr(options, p))}
    for peer in PEERS:
        if peer not in who:
            print(f"{peer}: skipped, no --{peer} DIR was given")
    if options.compile:
        who |= {f"{name}+compile": checkout for name, checkout in who.items()}
    results = [measure(size, who, options.rounds, options.seconds) for size in options.sizes]
    print(json.dumps({"results": results, "busy_share": round(busy, 3), "machine": device.facts()}))
    return 0


def measure(size: int, who: dict[str, str], rounds: int, seconds: float) -> dict[str, Any]:
    """All models of one size in turn; prints a table and returns its figures."""
    layers, width, heads = SHAPES[size]
    print(f"\n{size}M: {layers} layers of width {width}, {heads} heads")
    running: dict[str, subprocess.Popen[str]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name, checkout in who.items():
        command = [sys.executable, __file__, "--worker", name, str(size), checkout]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        line = _answer(process)
        if line is None:
            print(f"{name}: skipped, it does not start: {(process.stderr.read() if process.stderr else '')[-300:]!r}")
            continue
        running[name], facts[name] = process, line
    speeds: dict[str, list[float]] = {name: [] for name in running}
    gflops = 0.0
    for _ in range(rounds):
        gflops = max(gflops, device.matmul_flops([(width, 4 * width)], ROWS * ROW_TOKENS) / 1e9)
        for name, process in running.items():
            assert process.stdin is not None
            process.stdin.write(f"{seconds}\n")
            process.stdin.flush()
            turn = _answer(process)
            assert turn is not None, f"{name} ended in the middle"
            speeds[name].append(turn["tokens_per_s"])
    for process in running.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    found = {}
    for name, values in speeds.items():
        speed = statistics.median(values)
        found[name] = {
            "tokens_per_s": round(speed),
            "spread": [round(min(values)), round(max(values))],
            "share_of_limit": round(speed * facts[name]["flops_per_token"] / (gflops * 1e9), 3),
            **facts[name],
        }
    peers = {name: row["tokens_per_s"] for name, row in found.items() if not name.startswith("lyceum")}
    best = max(peers, key=lambda name: peers[name])
    print(
        f"{'':22} {'tokens/s':>9} {'of limit':>9} {'first step':>11} {'parameters':>11}   spread over {rounds} rounds"
    )
    for name, row in sorted(found.items(), key=lambda item: -item[1]["tokens_per_s"]):
        print(
            f"{name:22} {row['tokens_per_s']:9,} {row['share_of_limit']:9.0%} {row['first_s']:10.1f}s "
            f"{row['parameters']:11,}   {row['spread'][0]:,} to {row['spread'][1]:,}"
        )
    ratios = {name: row["tokens_per_s"] / peers[best] for name, row in found.items() if name.startswith("lyceum")}
    print(f"matrix products: {gflops:.0f} GFLOP/s; " + ", ".join(f"{n} / {best}: {r:.2f}" for n, r in ratios.items()))
    return {"millions": size, "limit_gflops": round(gflops, 1), "models": found, "best_peer": best, "ratio": ratios}


def _answer(process: subprocess.Popen[str]) -> dict[str, Any] | None:
    """The next line of JSON a worker prints, or None if it ends without one."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    return None


# -- the workers: one model each ---------------------------------------------------------------------------------------


def worker(who: str, size: int, checkout: Path) -> int:
    """Say what the model is, then train for as many seconds as each line of the input says and report the speed."""
    device.prepare("bench", None)
    import torch

    torch.manual_seed(0)
    name, _, mode = who.partition("+")
    tokens = torch.randint(VOCABULARY, (ROWS, ROW_TOKENS + 1))
    model, step = BUILD[name](size, tokens, mode == "compile", checkout)
    begun = time.perf_counter()
    step()
    first = time.perf_counter() - begun
    step()
    weights = sum(p.numel() for p in model.parameters())
    print(
        json.dumps({"parameters": weights, "first_s": round(first, 2), "flops_per_token": flops(model, size)}),
        flush=True,
    )
    for line in sys.stdin:
        times: list[float] = []
        end = time.perf_counter() + float(line)
        while len(times) < 3 or time.perf_counter() < end:
            begun = time.perf_counter()
            step()
            times.append(time.perf_counter() - begun)
        print(json.dumps({"tokens_per_s": ROWS * ROW_TOKENS / statistics.median(times)}), flush=True)
    return 0


def flops(model: Any, size: int) -> float:
    """Operations a token: 6 for each weight of a matrix product, and causal attention (`ModelSpec.flops_per_token`)."""
    import torch

    layers, width, _ = SHAPES[size]
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    return 6.0 * matrices + 6.0 * layers * width * ROW_TOKENS


def _stepper(loss: Callable[[], Any], optimizer: Any) -> Callable[[], None]:
    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def lyceum_step(size: int, tokens: Any, is_compiled: bool, checkout: Path) -> tuple[Any, Callable[[], None]]:
    from demo_speed import our_step

    from lyceum.model.spec import ModelSpec
    from lyceum.model.transformer import Decoder

    layers, width, heads = SHAPES[size]
    spec, _ = ModelSpec.from_depth(
        layers, vocab_size=VOCABULARY, width=width, num_heads=heads, context_length=ROW_TOKENS
    )
    model = Decoder(spec)
    if is_compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    return _Tied(model, spec), our_step(model, tokens)


class _Tied:
    """A model whose output layer is its embedding, which `flops` would not find among the linear layers."""

    def __init__(self, model: Any, spec: Any) -> None:
        import torch

        self.parameters = model.parameters
        head = torch.nn.Linear(spec.width, spec.vocab_size, bias=False, device="meta")
        self.modules = lambda: [*model.modules(), head]


def transformers_step(size: int, tokens: Any, is_compiled: bool, checkout: Path) -> tuple[Any, Callable[[], None]]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, heads = SHAPES[size]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=-(-8 * width // 3 // 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    called = torch.compile(model, dynamic=False) if is_compiled else model
    inputs = tokens[:, :-1].contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return model, _stepper(lambda: called(input_ids=inputs, labels=inputs).loss, optimizer)


def nanogpt_step(size: int, tokens: Any, is_compiled: bool, checkout: Path) -> tuple[Any, Callable[[], None]]:
    import torch

    sys.path.insert(0, str(checkout))
    from model import GPT, GPTConfig

    layers, width, heads = SHAPES[size]
    model = GPT(
        GPTConfig(
            block_size=ROW_TOKENS,
            vocab_size=VOCABULARY,
            n_layer=layers,
            n_head=heads,
            n_embd=width,
            dropout=0.0,
            bias=False,
        )
    )
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    called = torch.compile(model, dynamic=False) if is_compiled else model
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return model, _stepper(lambda: called(inputs, targets)[1], optimizer)


def nanochat_step(size: int, tokens: Any, is_compiled: bool, checkout: Path) -> tuple[Any, Callable[[], None]]:
    import torch

    sys.path.insert(0, str(checkout))
    from nanochat.gpt import GPT, GPTConfig

    layers, width, heads = SHAPES[size]
    with torch.device("meta"):
        model = GPT(
            GPTConfig(
                sequence_len=ROW_TOKENS,
                vocab_size=VOCABULARY,
                n_layer=layers,
                n_head=heads,
                n_kv_head=heads,
                n_embd=width,
                window_pattern="L",
            )
        )
    model.to_empty(device="cpu")
    model.init_weights()
    optimizer = model.setup_optimizer()
    called = torch.compile(model, dynamic=False) if is_compiled else model
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return model, _stepper(lambda: called(inputs, targets), optimizer)


def minimind_step(size: int, tokens: Any, is_compiled: bool, checkout: Path) -> tuple[Any, Callable[[], None]]:
    import torch

    sys.path.insert(0, str(checkout))
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

    layers, width, heads = SHAPES[size]
    model = MiniMindForCausalLM(
        MiniMindConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    called = torch.compile(model, dynamic=False) if is_compiled else model
    inputs = tokens[:, :-1].contiguous()
    return model, _stepper(lambda: called(inputs, labels=inputs).loss, optimizer)


BUILD = {
    "lyceum": lyceum_step,
    "transformers": transformers_step,
    "nanogpt": nanogpt_step,
    "nanochat": nanochat_step,
    "minimind": minimind_step,
}

if __name__ == "__main__":
    sys.exit(main())
