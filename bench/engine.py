"""How fast the engine generates: beside transformers' generate and llama.cpp, and beside what the memory's bandwidth allows.

    python bench/engine.py [--llama PYTHON] [--sizes 3 30 124] [--types f32 q8_0] [--rounds 3] [--swift] [--spinning] [--unpacked]
                           [--batching]
    python bench/engine.py --short      # seconds instead of minutes: does it run at all?

One run makes a model of random weights of each size, as a Hugging Face folder and, for llama.cpp, as GGUF files, and asks
every engine for the same greedy replies to the same random prompts: each in a process of its own that waits while the
others take their turn. `--llama` names a Python that has llama-cpp-python; without it llama.cpp is skipped with a line.
`lyceum, half` is our engine with the weights of large matrices in 16 bits; `--swift` adds it with compiled steps, made before
anything is timed, `--spinning` with threads that wait for each other as torch has them wait by itself, `--unpacked` on the
model's own weights, `--batching` transformers' continuous batching.
llama.cpp waits for its threads as it would by itself, not as our `lyceum/device.py` sets the environment.
On a machine with a GPU all but llama.cpp run on it, 16 bits are bf16, `--swift` records steps (`lyceum, swift`, and of weights in
16 bits `lyceum, swift, half`), and the bound is that of its memory.

    prefill         512 tokens to the first token of a reply
    1, 4, 8, 32     streams: 64 tokens of prompt each, 128 new ones; tokens of all streams a second after the first one
    second turn     time to its first token, 512 tokens and a reply having gone before: as a share of the time when cold
    neighbour       how much slower a single stream is beside a process that never rests
    memory          the most that the process held
    of bound        the single stream as a share of the bound below; of weights in 16 bits, of twice that

The bound: one stream reads every weight once a token, so it cannot pass bandwidth / bytes of weights; the bandwidth is that
of products of a matrix of this many bytes with a vector, measured here. (For many streams it is the bound times streams,
or the machine's operations over those of a token, whichever is less.) A busy machine is refused.
What it is not: a test of quality, nor of a server; HTTP and text are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

SHAPES = {3: (4, 192, 6, 4096), 30: (8, 512, 8, 8192), 124: (12, 768, 12, 32768)}  # layers, width, heads, vocabulary
STREAMS = (1, 4, 8, 32)
PROMPT, NEW, LONG, TURN, REPLY = 64, 128, 512, 16, 32  # tokens
CONTEXT = 1024
OURS = ("lyceum", "lyceum, half", "lyceum, swift", "lyceum, swift, half")
BYTES = {"half": 2.0, "f16": 2.0, "q8_0": 34 / 32}  # of a weight, where it is not 4; q8_0 has a scale for 32


class Runner(Protocol):
    """An engine that has the model in memory."""

    def generate(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
        """Greedy replies of num_new tokens each to prompts of one length."""


# -- the measurement ---------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", choices=tuple(SHAPES), default=list(SHAPES), metavar="MILLIONS")
    parser.add_argument("--llama", help="a Python with llama-cpp-python")
    parser.add_argument("--types", nargs="+", default=["f32", "q8_0"], help="GGUF files for llama.cpp")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each engine; the median counts")
    parser.add_argument("--swift", action="store_true", help="also our engine with compiled steps, where it has them")
    parser.add_argument(
        "--spinning", action="store_true", help="also our engine with threads that spin while they wait"
    )
    parser.add_argument("--unpacked", action="store_true", help="also our engine without its packed weights")
    parser.add_argument("--batching", action="store_true", help="also transformers' continuous batching (much memory)")
    parser.add_argument("--short", action="store_true", help="one round of the smallest model, few tokens")
    parser.add_argument("--force", action="store_true", help="measure even on a busy machine")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)  # who, folder or file
    options = parser.parse_args()
    if options.worker:
        return worker(*options.worker)
    from quiet import busy_share

    from lyceum import device

    busy = busy_share(options.force)
    if busy is None:
        return 1
    device.prepare("bench")
    if not options.llama:
        print("llama.cpp: skipped, no --llama PYTHON was given")
    plan = Plan(options.rounds, STREAMS, NEW, LONG)
    sizes = options.sizes
    if options.short:
        plan, sizes = Plan(1, (1, 4), 8, 64), sizes[:1]
    results = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(size, Path(folder), options, plan))
    print(json.dumps({"results": results, "busy_share": round(busy, 3), "machine": device.facts()}))
    return 0


class Plan:
    """What every engine is asked for."""

    def __init__(self, rounds: int, streams: tuple[int, ...], num_new: int, num_long: int):
        self.rounds, self.streams, self.num_new, self.num_long = rounds, streams, num_new, num_long


def measure(size: int, folder: Path, options: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """All engines on one model; prints a table and returns its figures."""
    spec = make_model(size, folder, options.types if options.llama else [])
    who = dict.fromkeys(("lyceum", "lyceum, half", "transformers"), (sys.executable, folder))
    more = {
        "lyceum, swift": options.swift,
        "lyceum, swift, half": options.swift and has_gpu(),
        "lyceum, spinning": options.spinning,
        "lyceum, unpacked": options.unpacked,
    }
    who |= {name: (sys.executable, folder) for name, is_wanted in more.items() if is_wanted}
    if options.batching:
        who["transformers, batching"] = (sys.executable, folder)
    if options.llama:
        who |= {f"llama.cpp {name}": (options.llama, folder / f"{name}.gguf") for name in options.types}
    bound = bounds(spec)
    print(
        f"\n{size}M: {spec.num_layers} layers of width {spec.width}, {bound['weight_mb']} MB of weights a token in f32"
    )
    workers = {}
    for name, (python, path) in who.items():
        worker = Worker(name, python, path)
        if worker.facts is None:
            print(f"{name}: skipped, it does not start: {worker.error!r}")
        else:
            workers[name] = worker
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for number in range(plan.rounds):
        for name, worker in workers.items():
            turns[name].append(one_turn(worker, spec.vocab_size, plan, number))
    found = {}
    for name, worker in workers.items():
        figures = {key: statistics.median(turn[key] for turn in turns[name]) for key in turns[name][0]}
        spread = {key: [min(t[key] for t in turns[name]), max(t[key] for t in turns[name])] for key in figures}
        found[name] = {**figures, "memory_mb": worker.finish(), "spread": spread}
    show(found, bound, plan)
    return {"millions": size, "engines": found, "bound": bound}


def one_turn(worker: Worker, vocab_size: int, plan: Plan, number: int) -> dict[str, float]:
    """One engine's figures; its prompts are new ones each time, and the same for every engine."""
    draw = random.Random(number)

    def prompts(count: int, length: int) -> list[list[int]]:
        return [[draw.randrange(vocab_size) for _ in range(length)] for _ in range(count)]

    figures: dict[str, float] = {}
    for count in plan.streams:
        worker.seconds(prompts(count, PROMPT), 2)  # warm: memory for so many
        first = worker.seconds(prompts(count, PROMPT), 1)
        whole = worker.seconds(prompts(count, PROMPT), plan.num_new)
        figures[f"decode_{count}"] = count * (plan.num_new - 1) / positive(whole - first)
    figures["cold_s"] = worker.seconds(prompts(1, plan.num_long), 1)
    figures["prefill"] = plan.num_long / figures["cold_s"]
    history, turn = prompts(1, plan.num_long)[0], prompts(1, TURN)[0]
    reply = worker.reply([history], REPLY)[0]
    figures["second_turn_s"] = worker.seconds([history + reply + turn], 1)
    figures["second_turn_share"] = figures["second_turn_s"] / worker.seconds(
        prompts(1, plan.num_long + REPLY + TURN), 1
    )
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        first = worker.seconds(prompts(1, PROMPT), 1)
        whole = worker.seconds(prompts(1, PROMPT), plan.num_new)
    finally:
        neighbour.kill()
        neighbour.wait()
    figures["neighbour_slowdown"] = figures["decode_1"] * positive(whole - first) / (plan.num_new - 1)
    return figures


def positive(seconds: float) -> float:
    """A difference of two times; not a number where noise has made it negative, as it can with --short."""
    return seconds if seconds > 0 else math.nan


class Worker:
    """One engine in a process of its own, which does what a line of JSON asks for and waits meanwhile."""

    def __init__(self, name: str, python: str, path: Path):
        command = [python, __file__, "--worker", name, str(path)]
        environment = dict(os.environ)
        if name.startswith("llama"):  # which spins while it waits, unless told otherwise
            from lyceum import device

            environment = {key: value for key, value in environment.items() if key not in device.WAITING}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._process = subprocess.Popen(command, text=True, env=environment, **pipes)  # type: ignore[call-overload]
        self.name = name
        self.facts = self._answer()
        self.error = "" if self.facts is not None else self._process.stderr.read()[-300:]

    def seconds(self, prompts: list[list[int]], num_new: int) -> float:
        """What the replies take."""
        return self._ask(prompts, num_new)["seconds"]

    def reply(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
        """The replies."""
        return self._ask(prompts, num_new)["replies"]

    def finish(self) -> float:
        """End it; returns the most memory that it held, in MB."""
        self._process.stdin.close()
        last = self._answer()
        self._process.wait()
        return -1.0 if last is None else last["memory_mb"]

    def _ask(self, prompts: list[list[int]], num_new: int) -> dict[str, Any]:
        self._process.stdin.write(json.dumps({"prompts": prompts, "num_new": num_new}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if answer is None:
            raise RuntimeError(f"{self.name} ended in the middle: {self._process.stderr.read()[-500:]}")
        return answer

    def _answer(self) -> dict[str, Any] | None:
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return None


def show(found: dict[str, Any], bound: dict[str, float], plan: Plan) -> None:
    """The table for people."""
    columns = [f"{count} stream{'s' * (count > 1)}" for count in plan.streams]
    print(f"{'tokens/s':24} {'prefill':>9}" + "".join(f"{column:>11}" for column in columns), end="")
    print(f"{'second turn':>13} {'of cold':>8} {'neighbour':>10} {'memory':>9} {'of bound':>9}")
    for name, row in found.items():
        print(f"{name:24} {row['prefill']:9,.0f}", end="")
        print("".join(f"{row[f'decode_{count}']:11,.0f}" for count in plan.streams), end="")
        print(f"{row['second_turn_s'] * 1e3:11,.0f}ms {row['second_turn_share']:8.0%}", end="")
        size = BYTES.get(name.split()[-1], 4.0)
        share = row["decode_1"] / bound["bandwidth"] * size / 4
        print(f" {row['neighbour_slowdown']:9.1f}x {row['memory_mb']:6,.0f} MB {share:9.0%}")
    print(f"{'bound, f32':24} {bound['operations']:9,.0f}", end="")
    print("".join(f"{min(count * bound['bandwidth'], bound['operations']):11,.0f}" for count in plan.streams))
    for name, row in found.items():
        for mine in (one for one in OURS if one in found and not name.startswith("lyceum")):
            ours = found[mine]
            ratios = [f"{ours[f'decode_{count}'] / row[f'decode_{count}']:.2f}" for count in plan.streams]
            print(f"{mine} / {name}: prefill {ours['prefill'] / row['prefill']:.2f}, streams {', '.join(ratios)}")


def make_model(size: int, folder: Path, types: list[str]) -> Any:
    """A Llama of random weights as a folder, and as GGUF files of these types; returns its spec."""
    import torch

    from lyceum.model.checkpoint import save_checkpoint
    from lyceum.model.gguf import export_gguf
    from lyceum.model.spec import ModelSpec
    from lyceum.model.transformer import Decoder
    from lyceum.tokens.tokenizer import Tokenizer

    layers, width, heads, vocabulary = SHAPES[size]
    spec = ModelSpec(
        vocab_size=vocabulary,
        num_layers=layers,
        width=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_width=width // heads,
        ffn_width=-(-8 * width // 3 // 64) * 64,
        context_length=CONTEXT,
        qk_norm=False,
    )
    decoder = Decoder(spec, torch.Generator().manual_seed(0))
    save_checkpoint(folder, decoder, Tokenizer.train(["the text of no model\n"] * 50, 300))
    for name in types:
        export_gguf(folder, folder / f"{name}.gguf", name)
    return spec


def has_gpu() -> bool:
    """Whether torch finds one."""
    from lyceum import device

    return device.pick_device().type == "cuda"


def bounds(spec: Any) -> dict[str, float]:
    """Tokens a second that reading the weights allows one stream, and that the operations allow all together."""
    import torch

    from lyceum import device

    qkv = spec.width * spec.head_width * (spec.num_heads + 2 * spec.num_kv_heads)
    layer = qkv + spec.num_heads * spec.head_width * spec.width + 3 * spec.width * spec.ffn_width
    weights = spec.num_layers * layer + spec.vocab_size * spec.width
    where = device.pick_device()
    matrix, vector = torch.ones(weights // 512, 512, device=where), torch.ones(512, device=where)
    best = float("inf")
    for _ in range(20):
        device.finish_queue(where)
        begun = time.perf_counter()
        torch.mv(matrix, vector)
        device.finish_queue(where)
        best = min(best, time.perf_counter() - begun)
    flops = device.matmul_flops([(spec.width, spec.ffn_width), (1024, 1024)], 512)
    return {
        "weight_mb": round(4 * weights / 1e6, 1),
        "gb_per_s": round(4 * weights / best / 1e9, 1),
        "bandwidth": 1 / best,
        "operations": flops / (2 * weights),
    }


# -- the workers: one engine each --------------------------------------------------------------------------------------


def worker(name: str, path: str) -> int:
    """Load the model, then answer line by line until there are no more."""
    make = {"lyceum": lyceum_runner, "transformers": transformers_runner, "llama.cpp": llama_runner}
    runner = make[name.split()[0].rstrip(",")](name, path)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        begun = time.perf_counter()
        replies = runner.generate(job["prompts"], job["num_new"])
        seconds = time.perf_counter() - begun
        assert [len(reply) for reply in replies] == [job["num_new"]] * len(job["prompts"]), "not what was asked for"
        print(json.dumps({"seconds": seconds, "replies": replies}), flush=True)
    peak = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    print(json.dumps({"memory_mb": int(peak[0].split()[1]) / 1e3 if peak else -1.0}), flush=True)
    return 0


def lyceum_runner(name: str, path: str) -> Runner:
    """Our engine."""
    from lyceum import device

    device.prepare("bench")
    if "spinning" in name:  # torch reads these when it is imported, which is below
        for setting in device.WAITING:
            del os.environ[setting]
    from lyceum.engine.engine import Engine
    from lyceum.engine.sampling import SamplingParams
    from lyceum.model.checkpoint import load_checkpoint

    class Ours:
        engine = Engine(
            load_checkpoint(path).model.to(device.pick_device()),
            max_batch=max(STREAMS),
            pack="unpacked" not in name,
            half="half" in name,
            swift="swift" in name,
        )

        def generate(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
            outputs = self.engine.generate(prompts, SamplingParams(max_tokens=num_new, temperature=0.0))
            return [output.ids for output in outputs]

    ours = Ours()
    if ours.engine.swift:  # compile, then choose among the ways for each number of streams
        for num_new in (4, 64):
            for count in STREAMS:
                ours.generate([[number] * 8 for number in range(1, count + 1)], num_new)
            libraries = getattr(ours.engine._swift, "_libraries", {})  # a GPU has recordings, which are there at once
            while not all(one.is_ready or one._process is None for one in libraries.values()):
                time.sleep(1.0)
    return ours


def transformers_runner(name: str, path: str) -> Runner:
    """transformers, as one would call it."""
    from lyceum import device

    device.prepare("bench")
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().to(device.pick_device())
    nothing = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}

    class Theirs:
        @torch.inference_mode()
        def generate(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
            if "batching" in name:
                config = transformers.GenerationConfig(max_new_tokens=num_new, **nothing)
                found = model.generate_batch(inputs=prompts, generation_config=config)
                return [list(one.generated_tokens) for one in found.values()]
            rows = torch.tensor(prompts, device=model.device)
            mask = torch.ones_like(rows)
            more = {"max_new_tokens": num_new, "min_new_tokens": num_new, **nothing}
            return model.generate(rows, attention_mask=mask, **more)[:, rows.shape[1] :].tolist()

    return Theirs()


def llama_runner(name: str, path: str) -> Runner:
    """llama.cpp by the calls of its C interface, one sequence a stream; runs in a Python that has no lyceum."""
    import ctypes

    import llama_cpp.llama_cpp as c
    import numpy as np

    quiet = c.llama_log_callback(lambda level, text, data: None)
    c.llama_log_set(quiet, ctypes.c_void_p(0))
    c.llama_backend_init()
    model = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
    assert model, f"llama.cpp does not open {path}"
    size = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    num_threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))

    class Llama:
        silence = quiet  # called as long as the library lives

        def __init__(self) -> None:
            self._held: list[int] = []  # of the one stream that talks on, what its memory holds
            self._context, self._streams = None, 0

        def generate(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
            self._open(len(prompts))
            memory = c.llama_get_memory(self._context)
            start = 0
            if len(prompts) == 1:  # what its server does: the longest common prefix stays
                while start < min(len(self._held), len(prompts[0]) - 1) and self._held[start] == prompts[0][start]:
                    start += 1
            c.llama_memory_seq_rm(memory, -1, start, -1)
            rows = [(token, start + at, row) for row, p in enumerate(prompts) for at, token in enumerate(p[start:])]
            ends = {row: len(p) - 1 for row, p in enumerate(prompts)}
            replies: list[list[int]] = [[] for _ in prompts]
            for at in range(0, len(rows), 2048):
                self._decode(rows[at : at + 2048], ends, replies)
            for number in range(1, num_new):
                ends = {row: len(p) - 1 + number for row, p in enumerate(prompts)}
                self._decode([(replies[row][-1], ends[row], row) for row in ends], ends, replies)
            self._held = prompts[0] + replies[0][:-1] if len(prompts) == 1 else []
            return replies

        def _open(self, streams: int) -> None:
            if self._context is not None and streams == self._streams:
                return
            if self._context is not None:
                c.llama_free(self._context)
            params = c.llama_context_default_params()
            params.n_ctx, params.n_batch, params.n_seq_max = CONTEXT * streams, 2048, streams
            params.n_threads = params.n_threads_batch = num_threads
            self._context, self._streams, self._held = c.llama_init_from_model(model, params), streams, []

        def _decode(self, rows: list[tuple[int, int, int]], ends: dict[int, int], replies: list[list[int]]) -> None:
            batch = c.llama_batch_init(len(rows), 0, 1)
            for i, (token, position, row) in enumerate(rows):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, row
                batch.logits[i] = position == ends[row]
            batch.n_tokens = len(rows)
            assert c.llama_decode(self._context, batch) == 0, "llama_decode failed"
            for i, (_, position, row) in enumerate(rows):
                if position == ends[row]:
                    logits = np.ctypeslib.as_array(c.llama_get_logits_ith(self._context, i), shape=(size,))
                    replies[row].append(int(logits.argmax()))
            c.llama_batch_free(batch)

    return Llama()


if __name__ == "__main__":
    sys.exit(main())
