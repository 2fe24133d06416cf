"""Two models compared, on the page of the run: the verdict, the figures behind it, and answers of both.

`section(name, report)` turns the report of a compare section into HTML. It computes nothing. What it is not: the whole page
(`lyceum.evals.report`).
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

SHARES = (  # (key, heading, what it is)
    ("implicit", "the way people point", "held-out pairs on which the new model moved towards the better answer"),
    ("preferred", "preferred", "held-out prompts on which the reward model puts the new model's answer first"),
    ("judge", "the reward model itself", "held-out pairs that it orders as people did"),
    ("likelier_old", "likelier: old", "pairs whose better answer the old model finds likelier"),
    ("likelier_new", "likelier: new", "the same for the new model"),
    ("likelier_new_minus_old", "new less old", "the second less the first, pair by pair"),
)


def section(name: str, report: Mapping[str, Any]) -> str:
    """The HTML of one compare section; empty where it has not been run."""
    if "implicit" not in report:
        return ""
    shares = "".join(
        f"<tr><th>{heading}<small>{meaning}</small></th><td>{report[key]:.3f}{_interval(report[key + '_interval'])}</td></tr>"
        for key, heading, meaning in SHARES
        if report.get(key) is not None
    )
    models = "".join(
        f"<tr><th>{which}</th><td>{told['ended']:.3f}{_interval(told['ended_interval'])}</td><td>{told['tokens']:.1f}</td></tr>"
        for which, told in (("old", report["old"]), ("new", report["new"]))
    )
    answers = "".join(
        f"<tr><td class='say'>{html.escape(shown['prompt'])}</td><td class='say'>{html.escape(shown['old'])}</td>"
        f"<td class='say'>{html.escape(shown['new'])}</td></tr>"
        for shown in report["examples"]
    )
    return (
        f"<h2>The new model and the old: {html.escape(name)}</h2><p class='ask'>{html.escape(report['why'])}</p>"
        f"<p>{report['pairs']:,} held-out pairs of {report['prompts']:,} prompts.</p>"
        f"<table class='numbers'>{shares}</table><h3>Their own answers to {report['answered']:,} of the prompts</h3>"
        f"<table class='numbers'><tr><th></th><th>came to an end</th><th>tokens</th></tr>{models}</table>"
        f"<table class='left'><tr><th>prompt</th><th>old</th><th>new</th></tr>{answers}</table>"
    )


def _interval(low_high: list[float | None]) -> str:
    low, high = low_high
    return "" if low is None or high is None else f"<small>{low:.3f} to {high:.3f}</small>"
