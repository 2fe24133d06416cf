"""A reward model on a run's page: what it orders rightly, for whom, and whether it has learned more than length.

`section(name, report)` turns the figures that `lyceum.evals.agreement` left in a reward section's report into HTML. It
computes nothing. What it is not: a verdict; the intervals are for the reader.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from lyceum.evals.plots import histogram, reliability

SHARES = (  # (key, heading, what it is)
    ("accuracy_noisy", "as ranked", "held-out pairs in the order of their ranks"),
    ("length_baseline", "by length alone", "the same, by the length of the responses and nothing else"),
    ("above_length", "above length", "the first less the second, pair by pair"),
    ("accuracy_clean", "clean", "pairs in their order before noise was added"),
    ("noisy_ceiling", "ceiling", "what knowing the clean order would reach against the noisy ranks"),
    ("calibration_error", "calibration error", "how far stated probabilities are from what came true, on average"),
    ("length_correlation", "length correlation", "of score and length, among the responses to one prompt"),
)
LEFT_OUT = (
    ("all_ties", "without any order"),
    ("too_long", "longer than the context"),
    ("equal_texts", "of equal texts"),
)


def section(name: str, report: Mapping[str, Any]) -> str:
    """The HTML of one reward section; empty where its report has no figures."""
    if not report.get("calibration"):
        return ""
    parts = [
        f"<h2>Reward model: {html.escape(name)}</h2>",
        f"<p>{_introduction(report)}</p>",
        _figures(report),
        f"<div class='plots'>{_plots(report)}</div>",
        _groups("By how far those who ranked agreed", report.get("by_agreement", {}), with_ceiling=True),
        _groups("By who ranked", report.get("by_annotators", {})),
        _members(report),
        _left_out(report.get("rankings", {})),
    ]
    return "".join(parts)


def _introduction(report: Mapping[str, Any]) -> str:
    pairs, prompts = report["pairs"], report["prompts"]
    what = "<b>its own training rankings</b>" if report.get("judged_on_training_data") else "held-out rankings"
    normalised = html.escape(str(report.get("normalised_on", "")))
    low = report["above_length_interval"][0]
    verdict = (
        "It is above what length alone would tell."
        if low is not None and low > 0
        else "It is <b>not</b> shown to be above what length alone would tell: do not train against it."
    )
    return f"Judged by {what}: {pairs:,} pairs of {prompts:,} prompts. Normalised on {normalised}. {verdict}"


def _figures(report: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{heading}<small>{meaning}</small></th><td>{_number(report[key])}"
        f"{_interval(report.get(key + '_interval'))}</td></tr>"
        for key, heading, meaning in SHARES
        if report.get(key) is not None
    )
    return f"<table class='numbers'>{rows}</table>"


def _plots(report: Mapping[str, Any]) -> str:
    margins = report["margins"]
    return reliability(report["calibration"], "right, of those stated so") + histogram(
        margins["edges"], margins["counts"], "pairs by margin; red: ordered wrongly", "score of better less worse"
    )


def _groups(title: str, groups: Mapping[str, Mapping[str, Any]], *, with_ceiling: bool = False) -> str:
    if not groups:
        return ""
    ceiling = "<th>ceiling</th>" if with_ceiling else ""
    rows = "".join(
        f"<tr><th>{html.escape(name.replace('_', ' '))}<small>{html.escape(str(group.get('meaning', '')))}</small></th>"
        f"<td>{group['pairs']:,}</td><td>{_number(group['accuracy'])}{_interval(group['accuracy_interval'])}</td>"
        + (f"<td>{_number(group.get('ceiling'))}</td>" if with_ceiling else "")
        + "</tr>"
        for name, group in groups.items()
    )
    head = f"<tr><th></th><th>pairs</th><th>as ranked</th>{ceiling}</tr>"
    return f"<h3>{title}</h3><table class='numbers'>{head}{rows}</table>"


def _members(report: Mapping[str, Any]) -> str:
    members: Sequence[Mapping[str, Any]] = report.get("members", ())
    if not members:
        return ""
    rows = "".join(
        f"<tr><th>member {number}</th><td>{_number(member['accuracy_noisy'])}"
        f"{_interval(member['accuracy_noisy_interval'])}</td><td>{_number(member['calibration_error'])}</td></tr>"
        for number, member in enumerate(members, 1)
    )
    how, differ = report["ensemble"], report["disagreement"]
    words = html.escape(how["aggregate"].replace("_", " "))
    spread = ", ".join(f"{_number(differ[key])} {text}" for key, text in SPREADS if key in differ)
    return (
        f"<h3>Members</h3><p>{how['size']} members, combined by {words}. They differ by {spread} (standard deviations "
        "among members, where a score has deviation 1).</p><table class='numbers'><tr><th></th><th>as ranked</th>"
        f"<th>calibration error</th></tr>{rows}</table>"
    )


SPREADS = (
    ("scores", "on a response"),
    ("right", "on the margin of a pair that they order rightly"),
    ("wrong", "on that of one they order wrongly"),
)


def _left_out(rankings: Mapping[str, Any]) -> str:
    said = []
    for part, counts in rankings.items():
        if not isinstance(counts, Mapping):
            continue
        reasons = [f"{counts[key]:,} {text}" for key, text in LEFT_OUT if counts.get(key)]
        empty = f"; {counts['empty_responses']:,} kept responses are empty" if counts.get("empty_responses") else ""
        said.append(f"{html.escape(part)}: {counts['kept']:,} kept, left out {', '.join(reasons) or 'none'}{empty}")
    strangers = rankings.get("known_prompts_of_strangers")
    if strangers:
        said.append(f"{strangers:,} by held-out annotators of prompts that others ranked for training: in neither")
    return f"<p class='facts'>Rankings, {'; '.join(said)}.</p>" if said else ""


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.3f}"


def _interval(low_high: Sequence[float | None] | None) -> str:
    if not low_high or None in low_high:
        return ""
    return f"<small>{low_high[0]:.3f} to {low_high[1]:.3f}</small>"
