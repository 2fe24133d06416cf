"""Is infilling for free? One recipe's pretraining with and without it, same seeds, measured from left to right.

    python bench/infill_free.py recipes/demo.toml --rate 0.5 --seeds 0 1 2

The recipe is run once as far as its tokenizer. Then each seed trains twice, with `infill_rate` 0 and with `--rate`: same
text, vocabulary, rows, first weights and steps. What is compared is the held-out bits per byte of ordinary text, by
part: the price of infilling is the mean difference over seeds, to be read beside how far the seeds of the plain runs lie
apart. Free means that it is no larger than that.

The second table says what was bought: bits per byte of the middles of held-out documents of all parts but docs, by
the infilled models, given prefix and suffix (the infilling prompt) and given the prefix alone.

What is finished is not trained again, and what was killed goes on. Prints two tables for people and, last, one JSON
object. What it is not: a measure of speed, or of the quality of sampled middles.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
from pathlib import Path
from typing import Any

from lyceum import device
from lyceum.cli.river import run_recipe
from lyceum.config import build, find_recipe, load_recipe, settings_of
from lyceum.corpus.records import content_id, read_documents
from lyceum.run import StageFolder, Work
from lyceum.tokens.infill import cut, infill_prompt
from lyceum.tokens.tokenizer import Tokenizer

MIDDLES = 500  # held-out documents whose middles are measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--rate", type=float, default=0.5, help="infill_rate of the second run of each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    if len(options.seeds) < 2 or not 0 < options.rate <= 1:
        parser.error("expected two seeds or more, to see a spread, and a rate above 0 and at most 1")
    folder = run_recipe(options.recipe, overrides=options.overrides, last="tokenizer", runs_dir=options.runs)
    runs = [[train(options, folder, seed, rate) for seed in options.seeds] for rate in (0.0, options.rate)]
    plain, infilled = [[bits(trained) for trained in side] for side in runs]
    figures = {
        "recipe": options.recipe,
        "overrides": options.overrides,
        "infill_rate": options.rate,
        "seeds": options.seeds,
        "left_to_right": compare(plain, infilled),
        "middles": [middles(trained, folder / "corpus") for trained in runs[1]],
        "machine": device.facts(),
    }
    report(figures)


def train(options: argparse.Namespace, run: Path, seed: int, rate: float) -> Path:
    """Pretraining with one seed and rate, on the corpus and vocabulary of `run`; its folder."""
    from lyceum.stages import pretrain

    recipe = load_recipe(find_recipe(options.recipe), options.overrides)
    section = recipe.section("pretrain")
    if section is None:
        raise SystemExit(f"{options.recipe} has no section [pretrain]")
    config = build(pretrain.PretrainConfig, section.settings, "[pretrain]")
    config = dataclasses.replace(config, infill_rate=rate)
    inputs = {name: run / name for name in ("corpus", "tokenizer")}
    text = (inputs["corpus"] / "documents-train.jsonl").read_text(encoding="utf-8")
    made_from = [settings_of(config), recipe.model, Tokenizer.load(inputs["tokenizer"]).fingerprint, content_id(text)]
    key = content_id(json.dumps(made_from))[:8]
    folder = Path(f"{run}-infill") / f"seed{seed}-rate{rate:g}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    report = pretrain.run(config, Work(StageFolder(folder), inputs, seed, recipe))
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return folder


def bits(folder: Path) -> dict[str, float]:
    """Part -> bits per byte of its held-out text, from left to right."""
    found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return {key.removeprefix("bpb_"): value for key, value in found.items() if key.startswith("bpb_")}


def compare(plain: list[dict[str, float]], infilled: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """By part: the bits of every seed, their differences' mean and spread, and the spread of the plain ones."""
    found = {}
    for part in plain[0]:
        before, after = [run[part] for run in plain], [run[part] for run in infilled]
        differences = [b - a for a, b in zip(before, after, strict=True)]
        found[part] = {
            "plain": before,
            "infilled": after,
            "difference": statistics.mean(differences),
            "difference_spread": statistics.stdev(differences),
            "seed_spread": statistics.stdev(before),
        }
    return found


def middles(folder: Path, corpus: Path) -> dict[str, float]:
    """Bits per byte of held-out middles under one infilled model, with their suffix and without it."""
    from lyceum.batches.pack import collate
    from lyceum.model.checkpoint import load_checkpoint
    from lyceum.stages.pretrain import bits_per_byte
    from lyceum.tokens.chat import Rendered
    from lyceum.train.losses import mean_loss

    loaded = load_checkpoint(folder / "checkpoint")
    tokenizer, draw = loaded.tokenizer, random.Random(0).random  # the same cuts for every model
    rows: dict[str, list[Rendered]] = {"with_suffix": [], "without_suffix": []}
    num_bytes = 0
    for document in read_documents(corpus / "documents-valid.jsonl"):
        if document.meta.get("part") == "docs" or len(rows["with_suffix"]) == MIDDLES:
            continue
        text = tokenizer.decode(tokenizer.encode(document.text)[: loaded.spec.context_length // 2])
        prefix, middle, suffix = cut(text, draw)
        ids, before = tokenizer.encode(middle), [tokenizer.end_id, *tokenizer.encode(prefix)]
        prompts = {"with_suffix": infill_prompt(prefix, suffix, tokenizer), "without_suffix": before}
        if ids and max(map(len, prompts.values())) + len(ids) <= loaded.spec.context_length:
            num_bytes += len(middle.encode())
            for name, prompt in prompts.items():
                rows[name].append(Rendered([*prompt, *ids], [0.0] * len(prompt) + [1.0] * len(ids)))
    found = {}
    for name, rendered in rows.items():
        batches = [collate(rendered[i : i + 16], tokenizer.pad_id) for i in range(0, len(rendered), 16)]
        measured = mean_loss(loaded.model, batches)
        found[name] = bits_per_byte(measured["loss"] * measured["targets"], num_bytes)
    return found


def report(figures: dict[str, Any]) -> None:
    """Print two tables for people, then the figures as one line of JSON."""
    print(f"\nbits per byte of held-out text from left to right, infill_rate 0 and {figures['infill_rate']:g}")
    print(f"{'part':<8}{'plain':>9}{'infilled':>10}{'difference':>12}{'its spread':>12}{'seed spread':>13}")
    for part, row in figures["left_to_right"].items():
        means = f"{statistics.mean(row['plain']):>9.4f}{statistics.mean(row['infilled']):>10.4f}"
        print(
            f"{part:<8}{means}{row['difference']:>+12.4f}{row['difference_spread']:>12.4f}{row['seed_spread']:>13.4f}"
        )
    print("\nbits per byte of held-out middles")
    print(f"{'seed':<8}{'with suffix':>13}{'without':>10}")
    for seed, row in zip(figures["seeds"], figures["middles"], strict=True):
        print(f"{seed:<8}{row['with_suffix']:>13.4f}{row['without_suffix']:>10.4f}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
