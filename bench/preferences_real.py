"""A small reward model on real preferences, beside what the length of a response alone would tell.

    python bench/preferences_real.py hh-rlhf/test.jsonl.gz dpo_en_demo.json dpo_zh_500.jsonl [--seeds 3] [--members 1]

Files are whatever `lyceum.corpus.records.read_rankings` reads; .gz too. For each seed all is made anew: a split by prompt
(and, with --strangers, by annotator, where the files name any), a vocabulary and a language model from the training
part's texts alone, both responses of every pair, and on it a reward model. Shown is the share of held-out pairs in the order that
people gave them, with its 95 % bootstrap interval over prompts, that of the length baseline on the same pairs (with one taste in
length for all files, and with each file's own), and the
difference pair by pair; whole and by file. A difference whose interval holds 0 is not shown to be one.

What it is not: a good reward model. A few million weights that have read a few megabytes know little of what people
prefer; the figure says what can be claimed of such a model, and how little the length of a response explains.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lyceum import device

SHOWN = (("accuracy_noisy", "as ranked"), ("length_baseline", "by length"), ("above_length", "above length"))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="rankings or pairs")
    parser.add_argument("--seeds", type=int, default=3, help="splits and trainings")
    parser.add_argument("--members", type=int, default=1, help="of the reward model, combined by their mean")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--context", type=int, default=512, help="tokens; longer rankings are left out and counted")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of pretraining")
    parser.add_argument("--epochs", type=int, default=1, help="of the reward model")
    parser.add_argument("--valid-share", type=float, default=0.2, help="of the prompts")
    parser.add_argument("--strangers", type=float, default=0.0, help="share of the annotators held out")
    parser.add_argument("--threads", type=int, help="threads of torch (default: one a core)")
    arguments = parser.parse_args(words)
    device.prepare("train", arguments.threads)
    begun, results = time.monotonic(), []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            results.append({"seed": seed, **school(arguments, Path(folder), seed)})
        print(rows_of(results[-1]), flush=True)
    settings = {**vars(arguments), "files": [Path(name).name for name in arguments.files]}
    print(summary(results))
    print(json.dumps({"settings": settings, "results": results, "seconds": round(time.monotonic() - begun),
                      "machine": device.facts()}))  # fmt: skip
    return 0


def school(arguments: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """Makes a vocabulary, a language model and a reward model from one split; returns the figures of its held-out part."""
    from lyceum.batches.pairs import read_files, split_rankings
    from lyceum.config import Recipe
    from lyceum.run import StageFolder, Work, plain
    from lyceum.stages import pretrain, reward
    from lyceum.tokens.tokenizer import Tokenizer

    kept, held, _ = split_rankings(read_files(arguments.files), arguments.valid_share, arguments.strangers, seed)
    texts = {"train": texts_of(kept), "valid": texts_of(held)}
    write_corpus(folder / "corpus", texts)
    Tokenizer.train(texts["train"], arguments.vocab).save(folder / "tokenizer")
    model = {"depth": arguments.depth, "width": arguments.width, "context_length": arguments.context}
    recipe = Recipe("preferences-real", seed, model, (), folder / "recipe.toml")

    def work(name: str, *inputs: str, **roles: str) -> Work:
        named = {role: folder / place for role, place in {**dict(zip(inputs, inputs, strict=True)), **roles}.items()}
        (folder / name).mkdir()
        return Work(StageFolder(folder / name), named, seed, recipe)

    read = pretrain.run(
        pretrain.PretrainConfig(tokens=arguments.tokens, validate_every=0, save_every=0),
        work("pretrain", "corpus", "tokenizer"),
    )
    config = reward.RewardConfig(
        data=tuple(arguments.files), valid_share=arguments.valid_share, stranger_share=arguments.strangers,
        members=arguments.members, epochs=arguments.epochs, lr=0.003, matrix_lr=0.01, micro_tokens=4096,
    )  # fmt: skip
    task = work("reward", policy="pretrain")
    report = reward.run(config, task)
    shown = ("accuracy_noisy", "length_baseline", "above_length", "calibration_error", "length_correlation")
    extra = ("baseline_prefers", "pairs", "prompts", "rankings", "by_annotators", "disagreement")
    found = {key: report[key] for key in (*shown, *extra) if key in report}
    found |= {f"{key}_interval": report[f"{key}_interval"] for key, _ in SHOWN}
    return plain({**found, "text_bits_per_byte": read["bpb_docs"], "by_file": by_file(config, task, report)})


def by_file(config: Any, work: Any, report: dict[str, Any]) -> dict[str, Any]:
    """The same figures of each file's held-out pairs, and of all with a baseline that knows each file's own taste in length.

    People who prefer the longer response in one file and the shorter in another make one direction for all worth nothing,
    while a model can tell the files apart.
    """
    from lyceum.evals import agreement
    from lyceum.stages.reward import RewardModel, read_data
    from lyceum.tokens.chat import ChatFormat

    judge = RewardModel.load(work.folder.checkpoint)
    context = judge.model.decoder.spec.context_length
    rankings = read_data(config, work, ChatFormat(judge.tokenizer), context).valid.rankings
    parts: dict[str, list[Any]] = {}
    for ranking in rankings:
        prompt, replies = ranking.rows[0][: ranking.num_prompt], [row[ranking.num_prompt :] for row in ranking.rows]
        scores = [score * report["reward_scale"] for score in judge.score([prompt] * len(replies), replies)]  # type: ignore[operator]
        parts.setdefault(ranking.name.split(" of ", 1)[1], []).extend(agreement.scored_rankings([ranking], [scores]))
    judged = {name: agreement.judge(part) for name, part in sorted(parts.items())}
    signs = {name: 1 if found["baseline_prefers"] == "longer" else -1 for name, found in judged.items()}
    signed = [
        replace(one, lengths=tuple(signs[name] * length for length in one.lengths))
        for name, part in parts.items()
        for one in part
    ]
    judged = {"all, length by file": agreement.judge(signed), **judged}
    keys = [name for key, _ in SHOWN for name in (key, f"{key}_interval")]
    return {name: {key: found[key] for key in (*keys, "pairs")} for name, found in judged.items()}


def texts_of(rankings: Sequence[Any]) -> list[str]:
    """Every conversation as plain text, once with each of its responses."""
    return [
        "\n\n".join(message.content for message in (*ranking.prompt.messages, response))
        for ranking in rankings
        for response in ranking.responses
    ]


def write_corpus(folder: Path, texts: dict[str, list[str]]) -> None:
    """The two files that pretraining reads."""
    from lyceum.corpus.records import Document, write_records

    folder.mkdir()
    for part, given in texts.items():
        documents = (Document(text, meta={"part": "docs"}) for text in given)
        write_records(folder / f"documents-{part}.jsonl", documents)


def share(found: dict[str, Any], key: str) -> str:
    """A share and its interval."""
    low, high = found[f"{key}_interval"]
    return f"{found[key]:6.3f} [{low:6.3f}, {high:6.3f}]"


def rows_of(result: dict[str, Any]) -> str:
    """One seed's rows: all files together, then each."""
    head = f"seed {result['seed']:<24} {'pairs':>6}" + "".join(f"{heading:>26}" for _, heading in SHOWN)
    rows = [("all", result), *result["by_file"].items()]
    lines = [f"  {name:<27} {one['pairs']:6}" + "".join(f"{share(one, k):>26}" for k, _ in SHOWN) for name, one in rows]
    counts = result["rankings"]
    last = (
        f"  calibration error {result['calibration_error']:.3f}, score and length correlate {result['length_correlation']:.2f}; "
        f"of {sum(counts['train'][k] + counts['valid'][k] for k in ('kept', 'all_ties', 'too_long', 'equal_texts')):,} "
        f"rankings {counts['train']['too_long'] + counts['valid']['too_long']:,} too long; "
        f"{result['text_bits_per_byte']:.3f} bits per byte of held-out text"
    )
    return "\n".join([head, *lines, last])


def summary(results: list[dict[str, Any]]) -> str:
    """The mean over seeds, and what may be said of it."""
    by_file = [one["by_file"]["all, length by file"] for one in results]
    means = ", ".join(f"{heading} {statistics.mean(one[key] for one in by_file):.3f}" for key, heading in SHOWN)
    above = sum(one["above_length_interval"][0] > 0 for one in by_file)
    return f"mean of {len(results)} seeds: {means}; above length beyond its interval in {above} of {len(results)}"


if __name__ == "__main__":
    sys.exit(main())
