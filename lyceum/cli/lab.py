"""Experiments: ``lyceum lab overoptimisation`` runs the laboratory, fits its curves, and writes a table and a page.

    lyceum lab overoptimisation                                   in runs/lab-overoptimisation, about ten minutes
    lyceum lab overoptimisation --set seeds=5 --set flipped=0     another setting: lyceum/stages/overoptimisation.py

The folder has `lab.json` (the settings), `arms/` (what every arm gave; a finished one is not run again), `report.json` and
`report.html`. Other settings want another folder: two experiments are not mixed.
What it is not: a section of a recipe. It makes its own models, and nothing starts from them.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lyceum import device
from lyceum.config import build, read_value, settings_of
from lyceum.errors import RunError, UsageError
from lyceum.run import write_json, write_text

if TYPE_CHECKING:
    from lyceum.evals.frontier import Curve, Fit

EXPERIMENTS = ("overoptimisation",)
HEADINGS = (
    ("accuracy", "held-out pairs right"),
    ("peak", "gold at its peak"),
    ("peak_distance", "at sqrt(KL)"),
    ("end", "gold at the end"),
    ("end_distance", "at sqrt(KL)"),
    ("gold_fell", "gold fell by"),
    ("proxy_rose", "proxy rose meanwhile"),
)


def lab(experiment: str, *, overrides: Sequence[str] = (), out: str = "") -> Path:
    """Run an experiment, or what is missing of it; prints its table.

    Returns:
        The page.

    Raises:
        UsageError: an override is no assignment. ConfigError: no such setting. RunError: the folder has other settings.
    """
    assert experiment in EXPERIMENTS, "the command line knows them"
    device.prepare("lab")
    from lyceum.stages.overoptimisation import LabConfig, Laboratory

    config = build(LabConfig, _settings(overrides), f"lyceum lab {experiment}")
    folder = Path(out or f"runs/lab-{experiment}")
    _claim(folder, settings_of(config))
    results = Laboratory(config, folder).run()
    found = summary(results)
    write_json(folder / "report.json", {"settings": settings_of(config), "arms": found, "machine": device.facts()})
    page = folder / "report.html"
    write_text(page, _page(found, results, config.seeds))
    print("\n".join(table(found)))
    print(f"report: {page}")
    return page


def _settings(overrides: Sequence[str]) -> dict[str, Any]:
    found = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {override} is no assignment", hint="write --set key=value")
        found[key.strip()] = read_value(text)
    return found


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """The folder is this experiment's; refuses one with other settings."""
    place = folder / "lab.json"
    if place.exists():
        before = json.loads(place.read_text(encoding="utf-8"))
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed:
            raise RunError(
                f"{folder} holds an experiment with another {', '.join(changed)}",
                hint="give this one a folder of its own: --out FOLDER",
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(place, settings)


# -------------------------------------------------------------------------------- what came of it


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Arm -> mean and standard error over its seeds of what HEADINGS names, and both fits."""
    from lyceum.evals.frontier import BEST_OF_N, RL, fit, mean_and_error, turnover

    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(result["arm"] for result in results):
        mine = [result for result in results if result["arm"] == name]
        turns = [{"accuracy": result["accuracy"], **turnover(_rl(result))} for result in mine]
        row: dict[str, Any] = {key: mean_and_error([turn[key] for turn in turns]) for key, _ in HEADINGS}
        row["seeds"] = len(mine)
        for form, curves in ((RL, [_rl(r) for r in mine]), (BEST_OF_N, [_best_of_n(r) for r in mine])):
            d, gold = (sum((getattr(c, key) for c in curves), ()) for key in ("distance", "gold"))
            fitted = fit(form, d, gold)
            row[form] = {"alpha": fitted.alpha, "beta": fitted.beta, "r_squared": fitted.r_squared, "turn": fitted.turn}
        found[name] = row
    return found


def _rl(result: Mapping[str, Any]) -> Curve:
    from lyceum.evals.frontier import Curve

    return Curve(**{key: tuple(values) for key, values in result["rl"].items()})


def _best_of_n(result: Mapping[str, Any]) -> Curve:
    from lyceum.evals.frontier import Curve

    drawn = result["best_of_n"]
    return Curve(tuple(kl**0.5 for kl in drawn["kl"]), tuple(drawn["proxy"]), tuple(drawn["gold"]))


def _said(value: Any) -> str:
    mean, error = value
    return f"{mean:.2f} ± {error:.2f}"


def table(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table for a terminal: a line an arm."""
    from lyceum.evals.frontier import BEST_OF_N, RL

    heads = [*(heading for _, heading in HEADINGS), "RL: alpha, beta, R2", "best-of-n: alpha, beta, R2"]
    lines = [f"{'proxy':<12}" + "".join(f"{head:>27}" if ":" in head else f"{head:>22}" for head in heads)]
    for name, row in found.items():
        cells = "".join(f"{_said(row[key]):>22}" for key, _ in HEADINGS)
        forms = "".join(
            f"{row[form]['alpha']:>13.2f}{row[form]['beta']:>7.2f}{row[form]['r_squared']:>7.2f}"
            for form in (RL, BEST_OF_N)
        )
        lines.append(f"{name:<12}{cells}{forms}")
    return lines


def _page(found: Mapping[str, Mapping[str, Any]], results: Sequence[Mapping[str, Any]], seeds: int) -> str:
    from lyceum.evals.frontier import BEST_OF_N, RL, Fit, plot
    from lyceum.evals.report import PAGE

    parts = ["<h1>Over-optimisation: gold score against distance</h1>"]
    for form, curve_of in ((RL, _rl), (BEST_OF_N, _best_of_n)):
        curves = {name: [curve_of(r) for r in results if r["arm"] == name] for name in found}
        fits: dict[str, Fit] = {
            name: Fit(form, row[form]["alpha"], row[form]["beta"], row[form]["r_squared"])
            for name, row in found.items()
        }
        title = f"{form}: gold (line), proxy (dashes), fitted form (dots); a proxy is shape, comparisons"
        parts.append(plot(curves, fits, title))
    head = "".join(f"<th>{html.escape(heading)}</th>" for _, heading in HEADINGS)
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>" + "".join(f"<td>{_said(row[key])}</td>" for key, _ in HEADINGS) + "</tr>"
        for name, row in found.items()
    )
    parts.append(f"<h2>Where gold turns</h2><table class='numbers'><tr><th>proxy</th>{head}</tr>{body}</table>")
    head = "".join(f"<th>{form}: {word}</th>" for form in (RL, BEST_OF_N) for word in ("alpha", "beta", "turn", "R²"))
    keys = ("alpha", "beta", "turn", "r_squared")
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{row[form][key]:.2f}</td>" for form in (RL, BEST_OF_N) for key in keys)
        + "</tr>"
        for name, row in found.items()
    )
    parts.append(f"<h2>Gao's forms</h2><table class='numbers'><tr><th>proxy</th>{head}</tr>{body}</table>")
    rows = "".join(
        f"<tr><td>{n:.0f}</td><td>{kl:.3f}</td><td>{measured:.3f}</td></tr>" for n, kl, measured in _kls(results)
    )
    parts.append(
        "<h2>KL of best-of-n</h2><p>log n - (n - 1) / n, and by the ranks of the replies drawn (mean over arms).</p>"
        f"<table class='numbers'><tr><th>n</th><th>formula</th><th>measured</th></tr>{rows}</table>"
    )
    rows = "".join(
        f"<tr><th>{html.escape(r['arm'])}</th><td class='say'>{html.escape(text)}</td></tr>"
        for r in results if r["seed"] == 0 for text in r["texts"]
    )  # fmt: skip
    parts.append(f"<h2>What the last policy writes</h2><p>Prompt | reply.</p><table class='left'>{rows}</table>")
    parts.append(f"<p class='facts'>{seeds} seeds; ± is the standard error over them. The control is the arm gold.</p>")
    return PAGE.substitute(title="over-optimisation", body="\n".join(parts))


def _kls(results: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, float]]:
    drawn = [result["best_of_n"] for result in results]
    return [
        (n, kl, sum(one["kl_measured"][i] for one in drawn) / len(drawn))
        for i, (n, kl) in enumerate(zip(drawn[0]["n"], drawn[0]["kl"], strict=True))
    ]
