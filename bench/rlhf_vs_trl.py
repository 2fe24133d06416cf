"""How fast alignment trains: our stages beside TRL's trainers, from the same weights, on the same batches, in one run.

    python bench/rlhf_vs_trl.py --trl PYTHON [--trl-ppo PYTHON] [--stages sft reward4 reward9 dpo grpo ppo]
    python bench/rlhf_vs_trl.py --trl PYTHON --learn 30     # GRPO: reward after 30 seconds of training, five seeds
    python bench/rlhf_vs_trl.py --trl PYTHON --short        # seconds instead of minutes: does it run at all?

`--trl` names a Python that has trl, transformers and datasets; without it ours runs alone. TRL dropped its PPOTrainer
after 1.12, so `--trl-ppo` names another Python for that one; where neither has it, PPO is ours alone, with a line.

One run makes a Llama of three million random weights, a reward model of the same trunk and a vocabulary, as Hugging Face
folders that both sides open. Everybody trains in fp32 with AdamW at the same constant rate, each in a process of its own
that waits while the others take their turn, on the threads of this machine's cores. Prompts have 64 tokens, responses
64; an iteration is one optimizer step on 32 rows (reward models: the responses of 8 prompts at K = 4, of 4 at K = 9),
for PPO 32 episodes and 4 passes over them. TRL is shown twice: with its defaults, but in fp32 (gradients are
recomputed layer by layer), and tuned for a CPU: nothing recomputed, micro-batches of `--trl-rows` rows.

    sft      tokens a second, prompts counted; the loss on the assistant's tokens
    reward4  prompts a second: all pairs of K ranked responses; TRL's format for them is pairs, 6 at K = 4 and 36 at 9
    dpo      pairs a second, the reference's pass included on both sides
    grpo     samples a second: 4 prompts, 8 replies each, the KL to the reference in the loss
    ppo      samples a second: reward model, critic and reference

Of sft, reward and dpo the batches are the same row by row, and the largest difference of the losses is told: ours is the
same mathematics or it is nothing. A speed is the median over rounds of a turn's median iteration; the first
iteration does not count. A busy machine is refused. What it is not: a test of what is learned (but for `--learn`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAME_LOSSES = 20  # steps of sft whose losses are compared
RATE = {"grpo": 1e-6, "ppo": 3e-6}  # TRL's defaults; elsewhere a rate at which losses move
LEARN_RATE, LEARN_SEEDS = 3e-4, 5


@dataclass(frozen=True)
class Size:
    """The model, and what one iteration is made of."""

    layers: int = 4
    width: int = 192
    heads: int = 6
    vocabulary: int = 4096
    prompt: int = 64  # tokens
    reply: int = 64
    rows: int = 32

    @property
    def context(self) -> int:
        """Tokens of a row."""
        return self.prompt + self.reply


FULL = Size()
SHORT = Size(layers=2, width=64, heads=2, vocabulary=400, prompt=40, reply=10, rows=8)


@dataclass(frozen=True)
class Contest:
    """What one iteration of a stage is counted in, and how many times TRL's speed is aimed at."""

    unit: str
    items: Callable[[Size], int]
    aim: float | None
    num_steps: int = 8  # of different batches; then they come again
    responses: int = 1


CONTESTS = {
    "sft": Contest("tokens", lambda size: size.rows * size.context, 2.5, SAME_LOSSES),
    "reward4": Contest("prompts", lambda size: size.rows // 4, None, responses=4),
    "reward9": Contest("prompts", lambda size: size.rows // 8, 6.0, responses=9),
    "dpo": Contest("pairs", lambda size: size.rows, 1.5, responses=2),
    "grpo": Contest("samples", lambda size: size.rows, 2.5),
    "ppo": Contest("samples", lambda size: size.rows, 1.7),
}
OFFLINE = ("sft", "reward4", "reward9", "dpo")  # their batches are the same on both sides


# -- the measurement ---------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="a Python with trl")
    parser.add_argument("--trl-ppo", help="a Python with a trl that still has PPOTrainer, if that is another one")
    parser.add_argument("--trl-rows", type=int, default=16, help="rows of a micro-batch of TRL's when tuned")
    parser.add_argument("--tuned", action="store_true", help="leave TRL with its defaults out")
    parser.add_argument("--stages", nargs="+", choices=tuple(CONTESTS), default=list(CONTESTS))
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side; the median counts")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn, of one iteration at least")
    parser.add_argument("--learn", type=float, metavar="SECONDS", help="GRPO's reward after so much training instead")
    parser.add_argument("--short", action="store_true", help="a tiny model and single iterations")
    parser.add_argument("--force", action="store_true", help="measure even on a busy machine")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # a job, as JSON
    options = parser.parse_args()
    if options.worker:
        job = json.loads(options.worker)
        return (our_side if job["who"] == "lyceum" else trl_side)(job)
    from quiet import busy_share

    from lyceum import device

    busy = busy_share(options.force)
    if busy is None:
        return 1
    device.prepare("bench")
    if not options.trl:
        print("TRL: skipped, no --trl PYTHON was given")
    size = SHORT if options.short else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder, size)
        found: dict[str, Any] = {}
        if options.learn:
            found["learn"] = learn(folder, size, options)
        else:
            for kind in options.stages:
                found[kind] = measure(kind, folder, size, options)
                show(kind, found[kind])
    print(json.dumps({"results": found, "busy_share": round(busy, 3), "machine": device.facts()}))
    return 0


def sides(kind: str, options: argparse.Namespace) -> dict[str, str]:
    """Who takes part -> the Python that runs it."""
    trl = (options.trl_ppo or options.trl) if kind == "ppo" else options.trl
    others = ("trl, tuned",) if options.tuned else ("trl, tuned", "trl")
    return {"lyceum": sys.executable, **(dict.fromkeys(others, trl) if trl else {})}


def measure(kind: str, folder: Path, size: Size, options: argparse.Namespace) -> dict[str, Any]:
    """All sides of one stage in turn; returns their figures."""
    (folder / f"{kind}.json").write_text(json.dumps(list(rows_for_trl(kind, folder, size))))
    started: dict[str, Worker] = {}
    for name, python in reversed(sides(kind, options).items()):
        job = {"kind": kind, "rows": options.trl_rows, "seed": 0, "rate": RATE.get(kind, 1e-4), "warm": 1}
        if name == "lyceum":  # last and alone, since what it does before its first step is measured
            for other in started.values():
                other.ready()
        started[name] = Worker(name, python, folder, size, job)
    workers: dict[str, Worker] = {}
    for name, worker in reversed(started.items()):
        if worker.ready():
            workers[name] = worker
        else:
            print(f"{kind}: {name} skipped, it does not start: {worker.error()!r}")
    speeds: dict[str, list[float]] = {name: [] for name in workers}
    contest = CONTESTS[kind]
    for _ in range(1 if options.short else options.rounds):
        for name, worker in workers.items():
            turn = worker.turn(0.0 if options.short else options.seconds)
            speeds[name].append(contest.items(size) / statistics.median(turn["seconds"]))
    for name, worker in workers.items():
        if kind == "sft" and name != "trl" and len(worker.losses) < SAME_LOSSES:
            worker.turn(0.0, SAME_LOSSES - len(worker.losses))
    found: dict[str, Any] = {}
    for name, worker in workers.items():
        reference = worker.facts.get("reference_s", 0.0)  # of one pair, spent before the first step
        each = [1 / (1 / speed + reference) for speed in speeds[name]]
        found[name] = {
            "per_s": statistics.median(each),
            "spread": [min(each), max(each)],
            "losses": worker.losses[: contest.num_steps] if kind in OFFLINE else [],
            **worker.finish(),
        }
    for name, row in found.items():
        if name != "lyceum":
            row["ratio"] = found["lyceum"]["per_s"] / row["per_s"]
            if kind in OFFLINE:
                pairs = list(zip(found["lyceum"]["losses"], row["losses"], strict=False))
                row["loss_gap"], row["steps_compared"] = max(abs(a - b) for a, b in pairs), len(pairs)
    return found


def show(kind: str, found: dict[str, Any]) -> None:
    """The table for people."""
    contest = CONTESTS[kind]
    print(f"\n{kind}, {contest.unit} a second" + (f"; the aim is {contest.aim} times TRL's, tuned" * bool(contest.aim)))
    for name, row in found.items():
        low, high = row["spread"]
        print(f"{name:14} {row['per_s']:9,.1f}   {low:,.1f} to {high:,.1f}   {row['memory_mb']:,.0f} MB", end="")
        if name != "lyceum":
            print(f"   lyceum / {name}: {row['ratio']:.2f}", end="")
        if "loss_gap" in row:
            print(f"; losses of {row['steps_compared']} steps differ by {row['loss_gap']:.1e} at most", end="")
        print()


def learn(folder: Path, size: Size, options: argparse.Namespace) -> dict[str, Any]:
    """GRPO from the same weights for the same time: the mean reward of the last replies, seed by seed."""
    (folder / "grpo.json").write_text(json.dumps(list(rows_for_trl("grpo", folder, size))))
    found: dict[str, Any] = {name: {"reward": [], "iterations": []} for name in sides("grpo", options)}
    for seed in range(1 if options.short else LEARN_SEEDS):
        for name, python in sides("grpo", options).items():
            job = {"kind": "grpo", "rows": options.trl_rows, "seed": seed, "rate": LEARN_RATE, "warm": 0}
            worker = Worker(name, python, folder, size, job)
            worker.ready()
            turn = worker.turn(options.learn)
            worker.finish()
            found[name]["reward"].append(statistics.mean(turn["scores"][-4:]))
            found[name]["iterations"].append(len(turn["seconds"]))
    print(f"\ngrpo, mean reward of the last four iterations after {options.learn:g} s (0.5 at the start), by seed")
    for name, row in found.items():
        rewards = ", ".join(f"{reward:.3f}" for reward in row["reward"])
        print(f"{name:14} {statistics.mean(row['reward']):.3f}   ({rewards})   iterations: {row['iterations']}")
    return found


class Worker:
    """One side in a process of its own, which trains for as long as a line of JSON asks for and waits meanwhile."""

    def __init__(self, name: str, python: str, folder: Path, size: Size, job: dict[str, Any]):
        job = {**job, "who": name, "folder": str(folder), "size": asdict(size)}
        self._stderr = (folder / f"{job['kind']}-{name}.log").open("w+")
        here = {"PYTHONPATH": str(ROOT)} if name == "lyceum" else {}
        quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        self._process = subprocess.Popen(
            [python, __file__, "--worker", json.dumps(job)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True,
            env={**os.environ, **here, **quiet},
        )  # fmt: skip
        self.losses: list[float] = []
        self.facts: dict[str, Any] = {}
        self._first: dict[str, Any] | None = None

    def ready(self) -> bool:
        """Wait until it has made its first iterations; False if it has ended."""
        self._first = self._first or self._answer()
        return self._first is not None

    def turn(self, seconds: float, steps: int = 1) -> dict[str, Any]:
        """Train for so long, and for so many iterations at least; returns the seconds of each."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"seconds": seconds, "steps": steps}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if answer is None:
            raise RuntimeError(f"a worker ended in the middle: {self.error()}")
        return answer

    def finish(self) -> dict[str, Any]:
        """End it; returns what it says of itself, and the most memory that it held."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._answer()
        self._process.wait()
        return self.facts

    def error(self) -> str:
        """The end of what it complained of."""
        self._process.wait()
        self._stderr.seek(0)
        return self._stderr.read()[-500:]

    def _answer(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{"'):  # TRL prints dictionaries too, in Python's spelling
                answer = json.loads(line)
                self.losses += answer.pop("losses", [])
                self.facts |= answer.pop("facts", {})
                return answer
        return None


# -- what both sides learn from ----------------------------------------------------------------------------------------


def make_models(folder: Path, size: Size) -> None:
    """A policy and a reward model of random weights, with a vocabulary of this repository's own text."""
    import torch

    from lyceum.model.checkpoint import save_checkpoint
    from lyceum.model.heads import ScoreModel
    from lyceum.model.spec import ModelSpec
    from lyceum.model.transformer import Decoder
    from lyceum.tokens.tokenizer import Tokenizer

    files = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("lyceum/**/*.py")])
    tokenizer = Tokenizer.train((file.read_text(encoding="utf-8") for file in files), size.vocabulary)
    spec = ModelSpec(
        vocab_size=size.vocabulary,
        num_layers=size.layers,
        width=size.width,
        num_heads=size.heads,
        num_kv_heads=size.heads,
        head_width=size.width // size.heads,
        ffn_width=-(-8 * size.width // 3 // 64) * 64,
        context_length=2 * size.context,
        qk_norm=False,  # a Llama, which asks no more of transformers than it must
    )
    generator = torch.Generator().manual_seed(0)
    policy = Decoder(spec, generator)
    save_checkpoint(folder / "policy", policy, tokenizer)
    save_checkpoint(folder / "judge", ScoreModel.from_decoder(policy, generator), tokenizer)


def talks(chat: Any, size: Size, num_prompts: int, responses: int) -> Iterator[tuple[str, list[str]]]:
    """Questions with answers, of words that are one token each, so that rows have the lengths that were asked for."""
    from lyceum.corpus.records import Conversation, Message

    tokenizer, draw = chat.tokenizer, random.Random(0)
    words = [
        text.decode() for text in tokenizer.token_bytes if text[:1] == b" " and text[1:].isalpha() and text.isascii()
    ]
    words = [word for word in words if len(tokenizer.encode(word)) == 1]
    around = len(chat.prompt(Conversation((Message("user", ""),))))
    for _ in range(num_prompts):
        texts = [size.prompt - around, *[size.reply - 1] * responses]  # a reply ends with a token of its own
        question, *answers = ("".join(draw.choices(words, k=number)) for number in texts)
        yield question, answers


def our_stage(kind: str, folder: Path, size: Size, rate: float, seed: int, seen: list[float]) -> tuple[Any, int]:
    """One of our stages, set from things in memory, and the optimizer steps of one iteration.

    seen: the mean reward of every iteration of `grpo` is added to it.
    """
    from lyceum.batches.pairs import EncodedRanking, EncodedRankings, Prompts
    from lyceum.batches.preferences import Encoded, Judged
    from lyceum.corpus.records import Conversation, Message
    from lyceum.model.checkpoint import load_checkpoint
    from lyceum.stages import grpo, ppo, preference, reward, sft
    from lyceum.tokens.chat import ChatFormat

    contest, items = CONTESTS[kind], CONTESTS[kind].items(size)
    loaded = load_checkpoint(folder / ("judge" if kind.startswith("reward") else "policy"))
    chat = ChatFormat(loaded.tokenizer)
    num_prompts = contest.num_steps * (size.rows if kind == "sft" else items)
    data = list(talks(chat, size, num_prompts, contest.responses))
    prompts = [chat.prompt(Conversation((Message("user", question),))) for question, _ in data]
    replies = [[chat.reply(Message("assistant", text)).ids for text in texts] for _, texts in data]
    assert {len(ids) for ids in prompts} == {size.prompt} and {len(i) for r in replies for i in r} == {size.reply}
    same: dict[str, Any] = {
        "lr": rate, "matrix_lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "warmup": 0.0, "decay": 0.0, "log_every": 10,
        "save_every": 0,
    }  # fmt: skip
    online: dict[str, Any] = {
        **same, "iterations": 10**6, "max_response_tokens": size.reply, "missing_end": "keep", "minibatches": 1
    }  # fmt: skip
    stage: Any
    begin: Callable[[], None]
    steps = 1
    if kind == "sft":
        stage = sft.SFT(sft.SFTConfig(epochs=1e5, batch_tokens=size.rows * size.context, **same))
        written = [(Message("user", q), Message("assistant", a[0].rpartition(" ")[0])) for q, a in data]
        begin = partial(stage.begin, loaded.model, [Conversation(w) for w in written], [], chat, seed=seed)
    elif kind.startswith("reward"):
        stage = reward.Reward(reward.RewardConfig(epochs=10**5, batch_prompts=items, **same))
        ranks = tuple(float(number + 1) for number in range(contest.responses))
        rankings = [
            EncodedRanking([p + ids for ids in rows], ranks, None, {}) for p, rows in zip(prompts, replies, strict=True)
        ]
        train = EncodedRankings(rankings, 0, 0)
        begin = partial(stage.begin, loaded.model, train, EncodedRankings([], 0, 0), chat, seed=seed)
    elif kind == "dpo":
        stage = preference.Preference(preference.PreferenceConfig(epochs=10**5, batch_prompts=items, **same))
        judged = [Judged(p, rows, ((0, 1, 1.0),), (0,)) for p, rows in zip(prompts, replies, strict=True)]
        begin = partial(stage.begin, loaded.model, Encoded(judged), Encoded([]), chat, seed=seed)
    else:
        given = Prompts(prompts, [{}] * len(prompts))
        if kind == "grpo":

            def score(prompts: Any, responses: Any, meta: Any) -> list[float | None]:
                scores = [share_of_even(ids) for ids in responses]
                seen.append(statistics.mean(scores))
                return list(scores)

            stage = grpo.GRPO(grpo.GRPOConfig(prompts_per_iteration=items // 8, group_size=8, **online), score)
            begin = partial(stage.begin, loaded.model, given, seed=seed, stop_ids=chat.stop_ids)
        else:
            steps = 4
            judge = reward.RewardModel.load(folder / "judge", reads=loaded.tokenizer)
            config = ppo.PPOConfig(prompts_per_iteration=items, epochs=steps, critic_lr=rate, vf_coef=0.1, **online)
            stage = ppo.PPO(config, judge)
            stage.frozen["reward"] = judge.model
            begin = partial(stage.begin, loaded.model, given, seed=seed, judge=judge, stop_ids=())
    stage.tokenizer, stage.start = loaded.tokenizer, lambda work: begin()
    return stage, steps


def rows_for_trl(kind: str, folder: Path, size: Size) -> Iterator[dict[str, Any]]:
    """What TRL's trainer of this stage learns from: our batches in our order, in its format."""
    from lyceum.train.policy import ranking_pairs

    stage, _ = our_stage(kind, folder, size, 0.0, 0, [])
    stage.start(None)
    if kind in ("grpo", "ppo"):
        for ids in stage.prompts.ids:
            yield {"input_ids": ids} if kind == "ppo" else {"prompt": stage.tokenizer.decode(ids, keep_special=True)}
        return
    for batch in (batch for step in islice(stage.steps(0), CONTESTS[kind].num_steps) for batch in step.micro_batches):
        if kind == "dpo":
            for one in batch.judged:
                texts = [stage.tokenizer.decode(ids, keep_special=True) for ids in (one.prompt, *one.responses)]
                yield dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
            continue
        rows = [row[:length].tolist() for row, length in zip(batch.tokens_BT, batch.lengths_B, strict=True)]
        if kind == "sft":
            for row, weights in zip(rows, batch.weights_BT, strict=True):
                yield {"input_ids": row, "completion_mask": [int(w > 0) for w in weights[: len(row)]]}
        else:
            pairs = ranking_pairs(batch.ranks_B, batch.group_B)
            for better, worse in zip(pairs.better_P.tolist(), pairs.worse_P.tolist(), strict=True):
                yield {"chosen_ids": rows[better], "rejected_ids": rows[worse]}


def share_of_even(ids: Sequence[int]) -> float:
    """The reward of `grpo`: the share of a reply's ids that are even numbers."""
    return sum(number % 2 == 0 for number in ids) / max(len(ids), 1)


# -- the workers: one side each ----------------------------------------------------------------------------------------


class Finished(Exception):
    """There are no more turns."""


class Turns:
    """Lets training run for as long as each line of the input says, and holds it still in between."""

    def __init__(self, warm: int) -> None:
        self.facts: dict[str, Any] = {}
        self.loss = 0.0  # of the iteration at hand
        self.scores: list[float] = []
        self._seconds: list[float] = []
        self._losses: list[float] = []
        self._steps, self._until = warm, 0.0
        self._last = time.perf_counter()

    def begin(self) -> None:
        """The first iteration begins."""
        self._last = time.perf_counter()
        if not self._steps:
            self._pause()

    def tick(self) -> None:
        """An iteration has ended; returns when the next may begin."""
        now = time.perf_counter()
        self._seconds.append(now - self._last)
        self._losses.append(self.loss)
        self.loss = 0.0
        if len(self._seconds) >= self._steps and now >= self._until:
            self._pause()
        else:
            self._last = now

    def _pause(self) -> None:
        told = {"seconds": self._seconds, "losses": self._losses, "scores": self.scores}
        print(json.dumps({**told, "facts": {**self.facts, "memory_mb": _memory_mb()}}), flush=True)
        self._seconds, self._losses = [], []
        self.scores.clear()
        line = sys.stdin.readline()
        if not line:
            raise Finished
        asked = json.loads(line)
        self._last = time.perf_counter()
        self._steps, self._until = asked["steps"], self._last + asked["seconds"]


def _memory_mb() -> float:
    found = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(found[0].split()[1]) / 1e3 if found else -1.0


def our_side(job: dict[str, Any]) -> int:
    """Train one of our stages by the training loop that everybody gets."""
    from lyceum import __version__, device

    device.prepare("bench")
    from lyceum.config import Recipe
    from lyceum.run import StageFolder, Work
    from lyceum.train.loop import run_stage

    kind, turns, counted = job["kind"], Turns(job["warm"]), count(1)
    folder, size = Path(job["folder"]), Size(**job["size"])
    stage, steps = our_stage(kind, folder, size, job["rate"], job["seed"], turns.scores)
    turns.facts["version"] = f"lyceum {__version__}"
    start, after_step = stage.start, stage.after_step

    def begin(work: Any) -> None:
        begun = time.perf_counter()
        start(work)
        if kind == "dpo":  # nearly all of it is the reference's pass
            turns.facts["reference_s"] = (time.perf_counter() - begun) / len(stage.train)
        turns.begin()

    def after(metrics: Any) -> dict[str, float]:
        found = after_step(metrics)
        turns.loss = metrics["loss"]
        if next(counted) % steps == 0:
            turns.tick()
        return found

    stage.start, stage.after_step = begin, after
    place = folder / f"run-{kind}-{job['seed']}"
    recipe = Recipe("rlhf-vs-trl", job["seed"], {}, (), Path(__file__))
    try:
        run_stage(stage, Work(StageFolder(place), {}, job["seed"], recipe))
    except Finished:
        pass
    return 0


def trl_side(job: dict[str, Any]) -> int:
    """Train by one of TRL's trainers; runs in a Python that has no lyceum."""
    import datasets
    import torch
    import transformers
    import trl

    kind, turns, size = job["kind"], Turns(job["warm"]), Size(**job["size"])
    folder, is_tuned = Path(job["folder"]), job["who"].endswith("tuned")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    rows = json.loads((folder / f"{kind}.json").read_text())
    data = datasets.Dataset.from_list(rows)
    turns.facts["version"] = (
        f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    )

    def causal() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)

    def scorer() -> Any:
        it = transformers.AutoModelForSequenceClassification
        return it.from_pretrained(folder / "judge", num_labels=1, dtype=torch.float32)

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *given: Any, **named: Any) -> None:
            turns.begin()

        def on_step_end(self, *given: Any, **named: Any) -> None:
            turns.tick()

    paired = kind.startswith("reward") or kind == "dpo"
    whole = len(rows) // CONTESTS[kind].num_steps if kind in OFFLINE else size.rows  # items of one optimizer step
    part = max(1, min(whole, job["rows"] // (2 if paired else 1))) if is_tuned else whole
    while whole % part:
        part -= 1
    common: dict[str, Any] = {
        "output_dir": str(folder / "trl"), "per_device_train_batch_size": part, "learning_rate": job["rate"],
        "gradient_accumulation_steps": whole // part, "lr_scheduler_type": "constant", "warmup_steps": 0,
        "weight_decay": 0.0, "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False,
        "logging_steps": 10, "seed": job["seed"], **({"gradient_checkpointing": False} if is_tuned else {}),
    }  # fmt: skip
    forever = {"max_steps": 10**6}
    more: dict[str, Any] = {"train_dataset": data, "processing_class": tokenizer, "callbacks": [Clock()]}
    if kind == "sft":
        config = trl.SFTConfig(max_length=None, completion_only_loss=True, **common, **forever)
        trainer = trl.SFTTrainer(model=causal(), args=config, **more)
    elif kind.startswith("reward"):
        config = trl.RewardConfig(max_length=None, **common, **forever)
        trainer = trl.RewardTrainer(model=scorer(), args=config, **more)
    elif kind == "dpo":
        config = trl.DPOConfig(max_length=None, **common, **forever)
        trainer = trl.DPOTrainer(model=causal(), args=config, **more)
    elif kind == "grpo":

        def score(completion_ids: list[list[int]], **given: Any) -> list[float]:
            scores = [share_of_even(ids) for ids in completion_ids]
            turns.scores.append(statistics.mean(scores))
            return scores

        config = trl.GRPOConfig(
            num_generations=8, max_completion_length=size.reply, beta=0.04, loss_type="grpo", temperature=1.0,
            **common, **forever,
        )  # fmt: skip
        trainer = trl.GRPOTrainer(model=causal(), reward_funcs=score, args=config, **more)
    else:
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        config = PPOConfig(
            total_episodes=size.rows * 10**6, response_length=size.reply, num_ppo_epochs=4, num_mini_batches=1,
            local_rollout_forward_batch_size=part if is_tuned else 64, num_sample_generations=0, temperature=1.0,
            **common,
        )  # fmt: skip
        models = {"model": causal(), "ref_model": causal(), "reward_model": scorer(), "value_model": scorer()}
        trainer = PPOTrainer(args=config, eval_dataset=data.select(range(size.rows)), **models, **more)
    if kind in OFFLINE:
        trainer._get_train_sampler = lambda *given: torch.utils.data.SequentialSampler(trainer.train_dataset)
        training_step = trainer.training_step

        def counted(*given: Any, **named: Any) -> Any:
            loss = training_step(*given, **named)
            turns.loss += float(loss)
            return loss

        trainer.training_step = counted
    try:
        trainer.train()
    except Finished:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
