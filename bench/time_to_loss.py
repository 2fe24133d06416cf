"""How soon a loss is reached, from a cold start: our pretraining against nanoGPT's documented recipe for a CPU.

    python bench/time_to_loss.py SHAKESPEARE --nanogpt NANOGPT      a file (or a folder with input.txt), and a checkout
    python bench/time_to_loss.py WIKITEXT --text --plot bits.png    a folder with train.txt(.gz) and valid.txt

The first form trains on a small text, nine tenths of it, and measures nats per character on the last tenth: the whole
of it, in blocks as long as the model's rows that do not overlap, so that each character is a target once. Both sides are
measured so; ours has two targets more, the first character and the end of the text. A vocabulary of 267 is characters:
the 256 bytes and the special tokens, no merges. Lines with merges are named BPE and win nothing, but are shown. The
answer is the seconds of the fastest line of characters that reaches 1.88 and 1.60 nats with every seed, and the lowest
loss of all lines within 3 and 10 minutes. nanoGPT runs its documented recipe to its documented results: for 1.88 the one
of its README (2,000 iterations), for 1.60 the same with 8,000; its time is that of its first own estimate (20 random
batches) at the target or below, or else of its whole run.

The second form trains on WikiText-2 and on the sources of Python's standard library, one run for each of 2, 5 and 10
minutes, and draws held-out bits per byte over time.

Seconds run from the start of the process, imports, vocabulary and encoding included, to the last update; only
validation and saving the model are left out, on both sides (for nanoGPT: what an iteration that evaluates takes beyond
the median iteration; preparing its data is not counted at all). Ours is the Pretrain stage in the one loop,
with the default architecture; each run is a process of its own. Schedules have the length of their run: a line that asks
for minutes is given the tokens that fit, by the speed of a short run before it. Beside busy processes it refuses to
measure. `--share 0.01` tries it out on a hundredth of every budget. Prints tables for people and, last, one JSON object.

What it is not: a search. The lines' settings were found by loss after equal numbers of tokens, on this text and its last
tenth (dev/LOG.md).
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import math
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lyceum import device

CHARACTERS = 267  # the 256 bytes and the special tokens: no merges
TARGETS = {1.88: 2000, 1.60: 8000}  # nats per character -> iterations of nanoGPT's run that is to reach it
WITHIN_MINUTES = (3, 10)
PROBE_TOKENS = 100_000
MARGIN = 0.96  # of a line's minutes: the probe's speed is not exact
CURVE_POINTS = 8


@dataclass(frozen=True)
class Line:
    """One setting of our side: a model, settings of [pretrain], and a length in tokens or in minutes."""

    name: str
    model: dict[str, int]
    settings: dict[str, Any]
    tokens: int = 0
    minutes: float = 0.0
    vocabulary: int = CHARACTERS


def settings(row_tokens: int, batch_tokens: int, rate: float, **others: float) -> dict[str, Any]:
    """Settings of [pretrain]; nothing that decides a result is left to defaults."""
    shape = {"row_tokens": row_tokens, "batch_tokens": batch_tokens, "micro_tokens": 2048}
    rates = {"lr": rate, "matrix_lr": rate, "warmup": 0.02, "decay": 0.6, "weight_decay": 0.0}
    return {**shape, **rates, "save_every": 0, **others}


def shape(depth: int, width: int) -> dict[str, int]:
    """The [model] table of a small model."""
    return {"depth": depth, "width": width, "context_length": 256}


SHAKESPEARE = (
    Line("1.88 soonest", shape(2, 128), settings(64, 1024, 0.02), tokens=235_000),
    Line("1.60 soonest", shape(2, 128), settings(128, 1024, 0.02, lr=0.015), tokens=1_650_000),
    Line("3 minutes", shape(3, 128), settings(128, 2048, 0.02), minutes=3),
    Line("10 minutes", shape(4, 192), settings(128, 2048, 0.02, weight_decay=0.1), minutes=10),
    Line("BPE 1024", shape(2, 128), settings(64, 1024, 0.02), tokens=400_000, vocabulary=1024),
)
TEXT = (
    Line("2 minutes", shape(3, 128), settings(128, 2048, 0.03), minutes=2, vocabulary=2048),
    Line("5 minutes", shape(4, 192), settings(128, 2048, 0.03), minutes=5, vocabulary=2048),
    Line("10 minutes", shape(4, 192), settings(128, 2048, 0.03), minutes=10, vocabulary=2048),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the text: a file or a folder")
    parser.add_argument(
        "--nanogpt", type=Path, metavar="DIR", help="a checkout of karpathy/nanoGPT, which is not changed"
    )
    parser.add_argument("--text", action="store_true", help="bits per byte of WikiText-2 and of the standard library")
    parser.add_argument(
        "--plot", type=Path, default=Path("time_to_loss.png"), metavar="FILE", help="the curves of --text"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these lines of ours alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=device.num_threads(), help="of torch (default: one a core)")
    parser.add_argument("--share", type=float, default=1.0, help="share of every budget, to try it out")
    parser.add_argument("--force", action="store_true", help="measure even on a busy machine")
    options = parser.parse_args()
    known = [line.name for line in (TEXT if options.text else SHAKESPEARE)]
    if wrong := [name for name in options.only if name not in known]:
        parser.error(f"--only {wrong[0]}: the lines are {', '.join(known)}")
    from quiet import busy_share

    busy = busy_share(options.force)
    if busy is None:
        return 1
    with tempfile.TemporaryDirectory(prefix="time-to-loss-") as work:
        figures = text_curves(options, Path(work)) if options.text else shakespeare(options, Path(work))
    print(json.dumps({**figures, "share": options.share, "threads": options.threads, "busy_share": round(busy, 3)}))
    return 0


# -------------------------------------------------------------------------------- the two forms


def shakespeare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Time to a loss and the best loss in a time, ours and nanoGPT's; prints the table."""
    lines = run_lines(SHAKESPEARE, "shakespeare", options, work)
    peers = {}
    if options.nanogpt is None:
        print("nanoGPT is left out: no --nanogpt DIR")
    else:
        for target, iterations in TARGETS.items():
            iterations = max(2, round(iterations * options.share))
            peers[target] = run_nanogpt(options, iterations, work / f"nanogpt-{iterations}")
    print(
        f"\n{'':<22}{'tokens':>11}{'seconds':>9}{'tokens/s':>10}{'nats/char':>11}   spread over seeds {options.seeds}"
    )
    for line in lines:
        losses = [run["nats_per_character"] for run in line["runs"]]
        run = line["runs"][0]
        print(
            f"{line['name']:<22}{run['tokens']:>11,}{line['seconds']:>9.1f}{run['tokens_per_s']:>10,.0f}"
            f"{max(losses):>11.4f}   {min(losses):.4f} to {max(losses):.4f}"
        )
    for peer in peers.values():
        end, whole = peer["curve"][-1], peer["nats_per_character"]
        said = "no checkpoint" if whole is None else f"{whole:.4f}"
        name = f"nanoGPT {peer['iterations']:,}"
        speed = peer["tokens"] / end["seconds"]
        print(
            f"{name:<22}{peer['tokens']:>11,}{end['seconds']:>9.1f}{speed:>10,.0f}{said:>11}   own {peer['best']:.4f}"
        )
    reached = {}
    for target in TARGETS:
        ours = time_to(target, lines)
        theirs = first_below(target, peers[target]["curve"]) if target in peers else None
        ratio = theirs / ours["seconds"] if ours and theirs else None
        reached[f"{target:.2f}"] = {"lyceum": ours, "nanogpt_seconds": theirs, "ratio": ratio}
        said = f"{ours['seconds']:.1f} s ({ours['line']})" if ours else "not reached"
        peer_said = f"; nanoGPT {theirs:.1f} s, ratio {ratio:.1f}" if ratio else ""
        print(f"to {target:.2f} nats per character: {said}{peer_said}")
    within = {}
    for minutes in WITHIN_MINUTES:
        within[str(minutes)] = best = lowest_within(60 * minutes, lines, peers)
        said = ", ".join(f"{name} {value:.4f}" for name, value in best.items() if value is not None)
        print(f"within {minutes} minutes: {said or 'no run ended'}")
    return {"lines": lines, "nanogpt": list(peers.values()), "time_to": reached, "within_minutes": within}


def time_to(target: float, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest line of characters that is at `target` or below with every seed."""
    good = [
        {"line": line["name"], "seconds": line["seconds"], "tokens": line["runs"][0]["tokens"]}
        for line in lines
        if line["vocabulary"] == CHARACTERS and all(run["nats_per_character"] <= target for run in line["runs"])
    ]
    return min(good, key=lambda found: found["seconds"], default=None)


def first_below(target: float, curve: list[dict[str, Any]]) -> float:
    """Seconds to the first estimate at `target` or below; to the end of the run if there is none."""
    return next((point["seconds"] for point in curve if point["loss"] <= target), curve[-1]["seconds"])


def lowest_within(
    seconds: float, lines: list[dict[str, Any]], peers: dict[float, dict[str, Any]]
) -> dict[str, float | None]:
    """The lowest loss in that time: our characters, our BPE (each a line's mean over seeds), nanoGPT's own estimate."""
    found: dict[str, list[float]] = {"characters": [], "BPE": [], "nanoGPT": []}
    for line in lines:
        if line["seconds"] <= seconds:
            mean = statistics.mean(run["nats_per_character"] for run in line["runs"])
            found["characters" if line["vocabulary"] == CHARACTERS else "BPE"].append(mean)
    for peer in peers.values():
        found["nanoGPT"] += [point["loss"] for point in peer["curve"] if point["seconds"] <= seconds]
    return {name: min(losses, default=None) for name, losses in found.items()}


def text_curves(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Bits per byte over minutes on two texts; prints the table and draws the plot."""
    texts = {name: run_lines(TEXT, name, options, work / name) for name in ("wikitext", "stdlib")}
    print(f"\nbits per byte of held-out text\n{'':<14}" + "".join(f"{line['name']:>14}" for line in texts["stdlib"]))
    for name, lines in texts.items():
        cells = [statistics.mean(run["bits_per_byte"] for run in line["runs"]) for line in lines]
        print(f"{name:<14}" + "".join(f"{cell:>14.4f}" for cell in cells))
    draw(texts, options.plot)
    return {"texts": texts, "plot": str(options.plot)}


def draw(texts: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """One panel a text, one curve a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(texts), figsize=(10, 4), constrained_layout=True)
    for panel, (name, lines) in zip(panels, texts.items(), strict=True):
        for line in lines:
            points = line["runs"][0]["curve"]
            xs, ys = [p["seconds"] / 60 for p in points], [p["bits_per_byte"] for p in points]
            panel.plot(xs, ys, marker="o", markersize=3, label=f"{line['name']}: {ys[-1]:.3f}")
        panel.set(title=name, xlabel="minutes from the start of the process", ylabel="held-out bits per byte")
        panel.legend()
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"the curves are in {path}")


# -------------------------------------------------------------------------------- our side


def run_lines(lines: Iterable[Line], text: str, options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Run every line with every seed, each in a process of its own."""
    found = []
    for line in lines:
        if options.only and line.name not in options.only:
            continue
        line = fit(line, text, options, work)
        runs = [run_line(line, text, seed, options, work) for seed in options.seeds]
        seconds = statistics.median(run["seconds"] for run in runs)
        print(f"{text}, {line.name}: {seconds:.1f} s, {runs[0]['tokens']:,} tokens", flush=True)
        found.append({**asdict(line), "seconds": seconds, "runs": runs})
    return found


def fit(line: Line, text: str, options: argparse.Namespace, work: Path) -> Line:
    """The line at its share of the budget, its minutes turned into tokens by the speed of a short run."""
    tokens = line.tokens
    if line.minutes:
        short = replace(line, name=f"{line.name} probe", tokens=PROBE_TOKENS)
        probe = run_line(short, text, 0, options, work)
        left = 60 * line.minutes * options.share * MARGIN - probe["startup_s"]
        tokens = max(PROBE_TOKENS, int(left * probe["tokens_per_s"]))
    else:
        tokens = int(tokens * options.share)
    steps = max(1, tokens // line.settings["batch_tokens"])
    every = max(1, steps // CURVE_POINTS) if options.text else 0
    return replace(line, tokens=tokens, settings={**line.settings, "validate_every": every})


def run_line(line: Line, text: str, seed: int, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One run of one line in a fresh process; the clock starts here."""
    folder = work / f"{line.name}-{seed}".replace(" ", "-")
    folder.mkdir(parents=True)
    request = {"text": text, "data": str(options.data.resolve()), "threads": options.threads, "seed": seed}
    request |= {"line": asdict(line), "folder": str(folder), "started": time.time()}
    return worker("train", request)


def worker(what: str, request: dict[str, Any]) -> dict[str, Any]:
    """Do one of WORK in a process of its own; what it prints goes to our standard error, its answer comes back."""
    command = [sys.executable, __file__, "--worker", what, json.dumps(request)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def train(request: dict[str, Any]) -> dict[str, Any]:
    """In its own process: one run of the Pretrain stage, with its clock."""
    clock = Clock(request["started"])
    device.prepare("bench", request["threads"])

    from lyceum.config import Recipe, build
    from lyceum.corpus.records import write_records
    from lyceum.run import StageFolder, Work
    from lyceum.stages.pretrain import PretrainConfig
    from lyceum.tokens.tokenizer import Tokenizer
    from lyceum.train.loop import run_stage

    clock.mark("imports")
    line, folder, seed = Line(**request["line"]), Path(request["folder"]), request["seed"]
    documents = dict(zip(("train", "valid"), READERS[request["text"]](Path(request["data"])), strict=True))
    for split, found in documents.items():
        write_records(folder / "corpus" / f"documents-{split}.jsonl", found)
    sample = (document.text for document in documents["train"]) if line.vocabulary > CHARACTERS else ()
    Tokenizer.train(sample, line.vocabulary).save(folder / "tokenizer")
    clock.mark("text and vocabulary")
    valid_text = "".join(document.text for document in documents["valid"])
    lengths = {"tokens": line.tokens, "valid_tokens": len(valid_text.encode()) + len(documents["valid"])}
    config = build(PretrainConfig, {**line.settings, **lengths}, f"the line {line.name}")
    recipe = Recipe("time-to-loss", seed, line.model, (), Path(__file__))
    inputs = {name: folder / name for name in ("corpus", "tokenizer")}
    stage = timed(config, clock)
    report = run_stage(stage, Work(StageFolder(folder / "pretrain"), inputs, seed, recipe))
    clock.mark("saving")
    bits = clock.points[-1]["bits_per_byte"]
    return {
        "seed": seed,
        "tokens": report["tokens"],
        "seconds": clock.points[-1]["seconds"],
        "bits_per_byte": bits,
        "nats_per_character": bits * math.log(2.0) * len(valid_text.encode()) / len(valid_text),
        "tokens_per_s": report["tokens_per_s"],
        "startup_s": sum(clock.spent[name] for name in STARTUP),
        "spent_s": clock.spent,
        "parameters": report["params"],
        "epochs": report["epochs"]["text"],
        "curve": clock.points,
        "machine": device.facts(),
    }


STARTUP = ("imports", "text and vocabulary", "shards and model")


class Clock:
    """Seconds since the process was started, by what they were spent on; validation is not counted in `points`."""

    def __init__(self, started: float) -> None:
        self.started = self.last = started
        self.spent: dict[str, float] = {}
        self.points: list[dict[str, float]] = []

    def mark(self, what: str) -> None:
        """Everything since the last mark was spent on this."""
        now = time.time()
        self.spent[what] = self.spent.get(what, 0.0) + now - self.last
        self.last = now

    def counted(self) -> float:
        """Seconds so far, without validation and saving."""
        return sum(seconds for what, seconds in self.spent.items() if what not in ("validation", "saving"))


def timed(config: Any, clock: Clock) -> Any:
    """The Pretrain stage as it is, on a clock, without the samples of program text."""
    from lyceum.stages.pretrain import Pretrain

    class Timed(Pretrain):
        made = 0  # tokens, the step under way included

        def steps(self, first: int) -> Iterator[Any]:
            clock.mark("shards and model")
            for step in super().steps(first):
                self.made += step.tokens
                yield step

        def validate(self) -> dict[str, float]:
            clock.mark("training")
            numbers = super().validate()
            clock.mark("validation")
            point = {"seconds": clock.counted(), "tokens": self.made, "bits_per_byte": numbers["bpb_text"]}
            clock.points.append(point)
            return numbers

        def samples(self) -> list[dict[str, Any]]:
            return []

    return Timed(config)


# -------------------------------------------------------------------------------- the texts


def split_text(path: Path) -> tuple[str, str]:
    """The first nine tenths of a text, by characters, and the rest."""
    text = (path / "input.txt" if path.is_dir() else path).read_text(encoding="utf-8")
    end = int(len(text) * 0.9)
    return text[:end], text[end:]


def read_shakespeare(path: Path) -> tuple[list[Any], list[Any]]:
    """One document each."""
    from lyceum.corpus.records import Document

    train_text, valid_text = split_text(path)
    return [Document(train_text)], [Document(valid_text)]


def read_wikitext(folder: Path) -> tuple[list[Any], list[Any]]:
    """The files' own split; an article is a document."""
    from lyceum.corpus.records import Document

    packed = folder / "train.txt.gz"
    raw = gzip.decompress(packed.read_bytes()) if packed.exists() else (folder / "train.txt").read_bytes()
    texts = raw.decode("utf-8"), (folder / "valid.txt").read_text(encoding="utf-8")
    heading = re.compile(r"^(?= = [^=\n]+ = $)", re.MULTILINE)
    first, second = ([Document(part) for part in heading.split(text) if part.strip()] for text in texts)
    return first, second


def read_stdlib(_: Path) -> tuple[list[Any], list[Any]]:
    """The library's modules without its tests; one in twenty is held out, by the hash of its path."""
    from lyceum.corpus.packages import read_source
    from lyceum.corpus.records import Document, content_id

    root = Path(sysconfig.get_path("stdlib"))
    sides: tuple[list[Any], list[Any]] = [], []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not {"test", "tests", "idlelib", "site-packages", "dist-packages"} & set(name.parts):
            text = read_source(path)
            if text and text.strip():
                sides[int(content_id(name.as_posix()), 16) % 20 == 0].append(Document(text))
    return sides


READERS: dict[str, Callable[[Path], tuple[list[Any], list[Any]]]] = {
    "shakespeare": read_shakespeare,
    "wikitext": read_wikitext,
    "stdlib": read_stdlib,
}


# -------------------------------------------------------------------------------- nanoGPT


def run_nanogpt(options: argparse.Namespace, iterations: int, folder: Path) -> dict[str, Any]:
    """nanoGPT's documented CPU recipe over `iterations`, in a copy of the checkout; then its last checkpoint's loss."""
    shutil.copytree(options.nanogpt, folder, ignore=shutil.ignore_patterns(".git", "*.ipynb", "assets"))
    write_nanogpt_data(split_text(options.data), folder / "data" / "shakespeare_char")
    recipe = "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4"
    recipe += f" --n_head=4 --n_embd=128 --max_iters={iterations} --lr_decay_iters={iterations} --dropout=0.0"
    command = [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", *recipe.split()]
    if iterations < 250:  # tried out on a share of the budget
        command.append(f"--eval_interval={iterations // 2}")
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    started = time.time()
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    curve = read_nanogpt((time.time() - started, text) for text in process.stdout)
    whole_s = time.time() - started
    if process.wait() != 0:
        raise SystemExit(f"nanoGPT ended with exit status {process.returncode}")
    checkpoint = folder / "out-shakespeare-char" / "ckpt.pt"
    loss = worker("measure_nanogpt", {"folder": str(folder), "threads": options.threads}) if checkpoint.exists() else {}
    print(f"nanoGPT, {iterations:,} iterations: {curve[-1]['seconds']:.1f} s", flush=True)
    return {
        "iterations": iterations,
        "tokens": iterations * 64 * 12,
        "curve": curve,
        "best": min(point["loss"] for point in curve),
        "whole_process_s": whole_s,
        "nats_per_character": loss.get("nats_per_character"),
        "checkpoint_iteration": loss.get("iteration"),
    }


def write_nanogpt_data(texts: tuple[str, str], folder: Path) -> None:
    """The three files that nanoGPT's prepare.py makes (which wants a package that nothing else here needs)."""
    import numpy

    letters = sorted(set("".join(texts)))
    number = {letter: index for index, letter in enumerate(letters)}
    for name, text in zip(("train", "val"), texts, strict=True):
        numpy.array([number[letter] for letter in text], numpy.uint16).tofile(folder / f"{name}.bin")
    meta = {"vocab_size": len(letters), "stoi": number, "itos": dict(enumerate(letters))}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def read_nanogpt(lines: Iterable[tuple[float, str]]) -> list[dict[str, float]]:
    """nanoGPT's own estimates after training began, by its lines and when each came: iteration, seconds, loss.

    The time printed for an iteration that evaluates holds its evaluation too; what is beyond the median is left out.
    """
    before: list[tuple[int, float, float]] = []  # iteration, when the one before it ended, estimate
    times: dict[int, float] = {}
    last = 0.0
    for seconds, text in lines:
        if found := re.match(r"step (\d+): train loss [\d.]+, val loss ([\d.]+)", text):
            before.append((int(found[1]), last, float(found[2])))
        elif found := re.match(r"iter (\d+): loss [\d.]+, time ([\d.]+)ms", text):
            times[int(found[1])] = float(found[2]) / 1000
            last = seconds
    if not before or not before[-1][0]:
        raise SystemExit("nanoGPT printed no estimate of its loss after training began")
    usual = statistics.median(times.values())
    curve, left_out = [], 0.0
    for iteration, seconds, loss in before:
        if iteration:
            curve.append({"iteration": iteration, "seconds": seconds - left_out, "loss": loss})
        left_out += max(0.0, times.get(iteration, usual) - usual)
    return curve


def measure_nanogpt(request: dict[str, Any]) -> dict[str, Any]:
    """In its own process: nats per character of nanoGPT's checkpoint on the whole held-out text."""
    import numpy
    import torch

    folder = Path(request["folder"])
    torch.set_num_threads(request["threads"])
    sys.path.insert(0, str(folder))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    saved = torch.load(folder / "out-shakespeare-char" / "ckpt.pt", weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict(saved["model"])
    ids = torch.from_numpy(numpy.fromfile(folder / "data/shakespeare_char/val.bin", numpy.uint16).astype(numpy.int64))

    def mean_loss(inputs: Any, targets: Any) -> float:
        return float(model(inputs, targets)[1])

    return {
        "nats_per_character": blocks_loss(mean_loss, ids, saved["model_args"]["block_size"]),
        "iteration": saved["iter_num"],
    }


def blocks_loss(mean_loss: Callable[[Any, Any], float], ids: Any, block: int) -> float:
    """Mean loss over all tokens but the first, in blocks of at most `block` that do not overlap, the last one shorter."""
    import torch

    whole = (len(ids) - 1) // block
    end = whole * block
    rows = zip(*(part.view(whole, block).split(64) for part in (ids[:end], ids[1 : end + 1])), strict=True)
    pairs = [*rows] if whole else []
    if end < len(ids) - 1:
        pairs.append((ids[None, end:-1], ids[None, end + 1 :]))
    with torch.no_grad():
        return sum(mean_loss(inputs, targets) * targets.numel() for inputs, targets in pairs) / (len(ids) - 1)


WORK = {"train": train, "measure_nanogpt": measure_nanogpt}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        with contextlib.redirect_stdout(sys.stderr):
            answer = WORK[sys.argv[2]](json.loads(sys.argv[3]))
        print(json.dumps(answer))
    else:
        sys.exit(main())
