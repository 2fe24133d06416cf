"""The demo's table over several seeds: trains the whole river once a seed and pools the held-out outcomes.

    python bench/demo_seeds.py recipes/demo.toml --seeds 0 1 2

Intervals are 95 % bootstrap intervals over questions and seeds (`lyceum.evals.metrics.seeds_interval`): the seeds change every
weight, every sampled answer and the lesson's random choices; the questions that all seeds share are paired. Runs that are
already finished are not trained again. Prints a table for people and, last, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from lyceum.config import load_recipe
from lyceum.evals.metrics import seeds_interval
from lyceum.evals.tasks.tutor import Grade, Question
from lyceum.evals.tutor_table import MEASURES, Outcome


def read_outcomes(path: Path) -> dict[str, dict[str, Outcome]]:
    """Model -> question text -> outcome."""
    found: dict[str, dict[str, Outcome]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        model = row.pop("model")
        question = Question.from_meta(row.pop("question"))
        outcome = Outcome(question=question, grade=Grade(**row.pop("grade")), **row)
        found.setdefault(model, {})[question.text] = outcome
    return found


def values(outcomes: dict[str, Outcome], measure: str) -> dict[str, float]:
    found = {text: MEASURES[measure](outcome) for text, outcome in outcomes.items()}
    return {text: value for text, value in found.items() if value is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    name = load_recipe(options.recipe).name
    runs, reports = [], []
    for seed in options.seeds:
        run_name = f"{name}-seed{seed}"
        sets = [f"seed={seed}", f'name="{run_name}"', *options.overrides]
        command = [sys.executable, "-m", "lyceum", "run", options.recipe, "--runs", options.runs]
        subprocess.run(command + [part for item in sets for part in ("--set", item)], check=True)
        folder = Path(options.runs) / run_name
        runs.append(read_outcomes(folder / "eval" / "outcomes.jsonl"))
        reports.append(json.loads((folder / "report.json").read_text(encoding="utf-8")))
    models = list(runs[0])
    rows = []
    for model in models:
        row: dict = {"model": model}
        for measure in MEASURES:
            row[measure] = [
                round(number, 4) for number in seeds_interval([values(run[model], measure) for run in runs])
            ]
        rows.append(row)
    changes = {}
    for measure in ("wrong_claim", "rule_score", "helpful_f1", "known_answered"):
        differences = []
        for run in runs:
            before, after = values(run["sft"], measure), values(run["ppo"], measure)
            differences.append({text: after[text] - before[text] for text in before})
        changes[measure] = [round(number, 4) for number in seeds_interval(differences)]
    print(f"{len(runs)} seeds, mean [95 % interval over questions and seeds]")
    print(f"{'':<22}" + "".join(f"{model:>26}" for model in models))
    for measure in MEASURES:
        cells = "".join(f"{row[measure][0]:>9.3f} [{row[measure][1]:6.3f},{row[measure][2]:6.3f}]" for row in rows)
        print(f"{measure:<22}{cells}")
    for measure, (mean, low, high) in changes.items():
        print(f"PPO minus SFT, {measure}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]")
    keep = ("seed", "wall_s", "peak_memory_gb", "reward_model", "parameters")
    runs_json = [{key: report.get(key) for key in keep} for report in reports]
    print(json.dumps({"seeds": options.seeds, "rows": rows, "ppo_minus_sft": changes, "runs": runs_json}))


if __name__ == "__main__":
    main()
