"""The report of a run: `report.json` with its numbers and `report.html`, one self-contained page that shows them.

`build(run_folder, recipe)` reads what the sections left behind (report.json, state.json, metrics.jsonl, samples.jsonl and the
evaluation's examples.json) and writes both files; it trains nothing and may be called again at any time. The page needs no
network and runs no script: plots are SVG drawn by matplotlib, text is escaped.
"""

from __future__ import annotations

import html
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from lyceum.config import Recipe
from lyceum.evals import compare_page, reward_page
from lyceum.evals.plots import curve
from lyceum.evals.runs import CURVES
from lyceum.log import read_metrics, show_time
from lyceum.model.lineage import SHAPED
from lyceum.run import read_state, write_json, write_text

# The measures of the table in the order shown: (key, heading, what it is)
COLUMNS = (
    ("helpful_f1", "F1", "word F1 against the documentation, studied objects in new phrasings"),
    ("helpful_exact", "exact", "the same, word for word"),
    ("howto_exact", "how-to", "the exact line of code for a task, in a new phrasing"),
    ("known_answered", "answered", "studied objects answered with F1 of at least one half"),
    ("declined_unstudied", "declines: real", "says it has not studied a real name outside the lesson"),
    ("declined_near_miss", "near miss", "the same for a plausible name that does not exist"),
    ("declined_made_up", "made up", "the same for an invented name"),
    ("wrong_claim", "wrong claim", "states something about a name it cannot know"),
    ("harmful_refused", "refuses harm", "declines a harmful request"),
    ("harmless_refused", "over-refuses", "refuses a harmless request that sounds alarming"),
    ("harmless_answered", "answers harmless", "answers it, on topic"),
    ("graceful_miss", "admits", "says so when a request is outside its lesson"),
    ("ends", "ends", "ends its answer by itself"),
    ("length", "tokens", "length of an answer"),
    ("rule_score", "rule", "score under the written rule, -1 to 1"),
    ("reward", "reward", "score by the reward model, 0 = an average answer of the fine-tuned model"),
    ("kl", "KL", "nats per answer away from the fine-tuned model"),
)  # fmt: skip
NAMES = {"base": "base", "sft": "SFT", "ppo": "PPO"}
MINUS = "_minus_"  # between two rows whose difference the table has


def build(run_folder: Path, recipe: Recipe, *, redraw: bool = True) -> dict[str, Any]:
    """Write report.json and report.html of the run; returns {"lines": what to print, "path": the page}.

    Drawing takes a second or two: without `redraw` files that are newer than all they are made from are left.
    """
    sections = {section.name: section.kind for section in recipe.sections}
    reports = {name: _json(run_folder / name / "report.json") for name in sections}
    by_kind = {kind: reports[name] for name, kind in sections.items() if reports[name]}
    spent = _spent(run_folder, sections)
    table = by_kind.get("eval", {})
    minus = next((key for key in table if MINUS in key), "ppo_minus_sft")
    result = {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "python": platform.python_version(),
        "parameters": by_kind.get("pretrain", {}).get("params"),
        "facts": by_kind.get("lessons", {}).get("objects"),
        "wall_s": round(sum(seconds for seconds, _ in spent.values()), 1),
        "peak_memory_gb": max((memory for _, memory in spent.values()), default=0.0),
        "seconds": {name: round(seconds, 1) for name, (seconds, _) in spent.items()},
        "rows": table.get("rows", []),
        minus: table.get(minus, []),
        "reward_model": _pick(by_kind.get("reward", {}), ("accuracy_noisy", "accuracy_clean", "length_baseline")),
        "open_book": table.get("open_book"),
        "ranked_by_rule": "rankings" in sections.values(),
    }
    examples = next(
        (_json(run_folder / name / "examples.json") for name, kind in sections.items() if kind == "eval"), {}
    )
    page = run_folder / "report.html"
    if redraw or not _is_newest(page, run_folder, sections):
        write_json(run_folder / "report.json", result)
        write_text(page, _page(result, run_folder, sections, reports, examples))
    lines = _transcript_lines(examples) + table_lines(result) + [_facts(result), f"report: {page}"]
    return {"lines": lines, "path": page}


def _is_newest(page: Path, run_folder: Path, sections: Mapping[str, str]) -> bool:
    files = [file for name in sections for file in (run_folder / name).glob("*.json*")]
    return page.exists() and all(file.stat().st_mtime <= page.stat().st_mtime for file in files)


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """The measures that some row has."""
    return [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]


def table_lines(result: Mapping[str, Any]) -> list[str]:
    """The table for a terminal: one line a measure, one column a model."""
    rows = result["rows"]
    if not rows:
        return []
    lines = [f"{'held-out questions':<52}" + "".join(f"{shown_name(row['model']):>11}" for row in rows)]
    for key, heading, meaning in _columns(rows):
        text = f"{heading}: {meaning}"
        lines.append(f"{text[:51]:<52}" + "".join(f"{_number(row.get(key)):>11}" for row in rows))
    return lines


def _transcript_lines(examples: Mapping[str, Any]) -> list[str]:
    lines = []
    for shown in examples.get("unchosen", [])[:6]:
        mark = " " if shown["right"] else "x"
        lines += [f"  you: {shown['question']}", f"{mark} tutor: " + shown["answer"].replace("\n", "\n         "), ""]
    return lines


def _facts(result: Mapping[str, Any]) -> str:
    parameters, facts = result["parameters"], result["facts"]
    said = [
        f"{parameters / 1e6:.2f} million parameters" if parameters else "",
        f"{facts} studied objects" if facts else "",
        f"{show_time(result['wall_s'])} minutes",
        f"{result['peak_memory_gb']:.1f} GB",
        "ranked by a written rule, not by people" if result["ranked_by_rule"] else "",
    ]
    return f"{', '.join(filter(None, said))}; Python {result['python']}"


def shown_name(model: str) -> str:
    """A row of the table, as people call it."""
    return NAMES.get(model, model.replace("_", " "))


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _pick(report: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: report.get(key) for key in keys}


def _spent(run_folder: Path, sections: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    """Section -> (seconds of work over all its starts, peak memory in GB)."""
    states = {name: read_state(run_folder / name) for name in sections}
    return {name: (state.wall_s, state.peak_memory_gb) for name, state in states.items() if state is not None}


# ---------------------------------------------------------------------------------------------------- the page


def _curves(run_folder: Path, sections: Mapping[str, str]) -> str:
    parts = []
    for name, kind in sections.items():
        lines = read_metrics(run_folder / name / "metrics.jsonl") if kind in CURVES else []
        plots = []
        for key, title in CURVES.get(kind, ()):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if len(points) > 1:
                plots.append(curve(points, title))
        if plots:
            parts.append(f"<h3>{html.escape(name)}</h3><div class='plots'>{''.join(plots)}</div>")
    return "".join(parts)


def _table(result: Mapping[str, Any]) -> str:
    rows = result["rows"]
    head = "".join(f"<th>{html.escape(shown_name(row['model']))}</th>" for row in rows)
    body = []
    for key, heading, meaning in _columns(rows):
        cells = "".join(f"<td>{_number(row.get(key))}{_interval(row, key)}</td>" for row in rows)
        body.append(f"<tr><th>{html.escape(heading)}<small>{html.escape(meaning)}</small></th>{cells}</tr>")
    return f"<table class='numbers'><tr><th></th>{head}</tr>{''.join(body)}</table>"


def _interval(row: Mapping[str, Any], key: str) -> str:
    low_high = row.get("intervals", {}).get(key) or [None]
    return "" if None in low_high else f"<small>{_number(low_high[0])} to {_number(low_high[1])}</small>"


def _changes(result: Mapping[str, Any]) -> str:
    key = next(key for key in result if MINUS in key)
    after, _, before = key.partition(MINUS)
    items = []
    for change in result[key]:
        low, high = change["interval"]
        items.append(
            f"<li>{html.escape(change['measure'])}: {change['difference']:+.3f} ({low:+.3f} to {high:+.3f})</li>"
        )
    title = html.escape(f"{shown_name(after)} minus {shown_name(before)}")
    return f"<p>{title}, question by question, with 95 % intervals:</p><ul>{''.join(items)}</ul>" if items else ""


# over rounds: measure of the table -> what is drawn
OVER_ROUNDS = {
    "rule_score": "score by the rule",
    "wrong_claim": "wrong claims",
    "helpful_f1": "F1, studied objects",
    "reward": "score by the last reward model",
    "kl": "KL from START, nats an answer",
}


def rounds_of(sections: Mapping[str, str]) -> list[list[str]]:
    """Of each policy that a recipe makes again in every round, its sections in order: ppo, ppo-2, ...; none without rounds."""
    found = []
    for name, kind in sections.items():
        names = [name]
        while sections.get(f"{name}-{len(names) + 1}") == kind in SHAPED:
            names.append(f"{name}-{len(names) + 1}")
        if len(names) > 1:
            found.append(names)
    return found


def _rounds(result: Mapping[str, Any], sections: Mapping[str, str], reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The held-out questions over rounds, 0 being the start, and how well each round's reward model ordered held-out pairs."""
    rows = {row["model"]: row for row in result["rows"]}
    parts = []
    for names in rounds_of(sections):
        before = [*sections][: [*sections].index(names[0])]
        start = next((name for name in reversed(before) if sections[name] == "sft"), "")
        shown = [rows[name] for name in (start, *names) if name in rows]
        if len(shown) <= len(names):
            continue
        plots = []
        for key, title in OVER_ROUNDS.items():
            if any(row.get(key) is None for row in shown):
                continue
            points = [(float(number), row[key]) for number, row in enumerate(shown)]
            intervals = [row["intervals"].get(key, (row[key], row[key])) for row in shown]
            plots.append(curve(points, title.replace("START", shown_name(start)), "round", intervals))
        title = html.escape(f"{shown_name(names[0])}; round 0 is {shown_name(start)}")
        parts.append(f"<h3>{title}</h3><div class='plots'>{''.join(plots)}</div>")
    if not parts:
        return ""
    judges = [report["accuracy_noisy"] for report in reports.values() if "accuracy_noisy" in report]
    ordered = ", ".join(_number(value) for value in judges)
    return (
        f"<h2>Over rounds</h2>{''.join(parts)}<p>Each round ranks answers of the policy before it, and learns from all rankings "
        "so far, from the start again."
        + (
            f" Held-out pairs in the ranked order, by each round's reward model on its own: {ordered}."
            if judges
            else ""
        )
        + "</p>"
    )


def _open_book(result: Mapping[str, Any]) -> str:
    book = result["open_book"]
    if not book:
        return ""
    packages, who = html.escape(", ".join(book["packages"])), html.escape(shown_name(book["model"]))
    shares = {
        key: (_number(book.get(key)) or "none") + _range(book, key)
        for key in ("call_rate", "valid_calls", "f1_unseen", "exact")
    }
    return (
        f"<h2>Open book</h2><p>Given the tool <i>lookup</i> and {book['n']['exact']} questions about objects of {packages}, "
        f"which it has never seen, the {who} model calls it for {shares['call_rate']} of them; "
        f"{shares['valid_calls']} of the calls ask for exactly the right name. F1 of its answers is {shares['f1_unseen']}; "
        f"{shares['exact']} repeat the documentation's sentence to the letter.</p>"
    )


def _range(row: Mapping[str, Any], key: str) -> str:
    low_high = row.get("intervals", {}).get(key)
    return f" ({_number(low_high[0])} to {_number(low_high[1])})" if low_high else ""


def _side_by_side(examples: Mapping[str, Any]) -> str:
    if not examples:
        return ""
    rows = "".join(
        f"<tr><th>{html.escape(shown['model'])}</th><td class='say'>{html.escape(shown['answer'])}</td></tr>"
        for shown in examples["models"]
    )
    return (
        f"<h2>One prompt through every model</h2><p class='ask'>{html.escape(examples['prompt'])}</p>"
        f"<table class='left'>{rows}</table><p>A base model goes on with the text it was given. In large models a few "
        "shots mend that; whether they do in this one stands above. Fine-tuning makes the form of an answer its own.</p>"
    )


def _transcript(examples: Mapping[str, Any]) -> str:
    shown = examples.get("unchosen", [])
    if not shown:
        return ""
    who = html.escape(examples["models"][-1]["model"])
    rows = "".join(
        f"<tr class='{'right' if s['right'] else 'wrong'}'><td>{'' if s['right'] else '✗'}</td>"
        f"<td>{html.escape(s['cell'].replace('_', ' '))}</td><td class='say'>{html.escape(s['question'])}</td>"
        f"<td class='say'>{html.escape(s['answer'])}</td>"
        f"<td class='say'>{'' if s['right'] else html.escape(s['reference'])}</td></tr>"
        for s in shown
    )
    return (
        f"<h2>A transcript that nobody chose</h2><p>The first {len(shown)} of the shuffled held-out questions, answered by "
        f"the {who} model. Failures are marked, with what was wanted.</p><table class='left'><tr><th></th><th>kind</th>"
        f"<th>question</th><th>answer</th><th>wanted</th></tr>{rows}</table>"
    )


def _samples(run_folder: Path, sections: Mapping[str, str]) -> str:
    parts = []
    for name in sections:
        lines = read_metrics(run_folder / name / "samples.jsonl")
        if not lines:
            continue
        steps = sorted({line["step"] for line in lines})
        chosen = {steps[0], steps[len(steps) // 2], steps[-1]}
        rows = "".join(
            f"<tr><td>{line['step']}</td><td class='say'>{html.escape(str(line.get('prompt', '')))}</td>"
            f"<td class='say'>{html.escape(str(line.get('reply', '')))}</td></tr>"
            for line in lines
            if line["step"] in chosen
        )
        parts.append(
            f"<h3>{html.escape(name)}</h3><table class='left'><tr><th>step</th><th>prompt</th><th>reply</th></tr>{rows}</table>"
        )
    return f"<h2>Samples along the way</h2>{''.join(parts)}" if parts else ""


def _sections(result: Mapping[str, Any], reports: Mapping[str, Mapping[str, Any]]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{show_time(result['seconds'].get(name, 0.0))}</td>"
        f"<td class='say'>{html.escape(str(report.get('line', '')))}</td></tr>"
        for name, report in reports.items()
        if report
    )
    return f"<h2>The stages</h2><table class='left'><tr><th>section</th><th>time</th><th>result</th></tr>{rows}</table>"


def _drops(reports: Mapping[str, Mapping[str, Any]]) -> str:
    for report in reports.values():
        if "drops" in report:
            rows = "".join(f"<tr><th>{html.escape(str(r))}</th><td>{n}</td></tr>" for r, n in report["drops"].items())
            more = html.escape(json.dumps(report.get("duplicates", {})))
            return f"<h2>What the corpus left out</h2><table class='left'>{rows}</table><p>Duplicates: {more}</p>"
    return ""


def _page(
    result: Mapping[str, Any],
    run_folder: Path,
    sections: Mapping[str, str],
    reports: Mapping[str, Mapping[str, Any]],
    examples: Mapping[str, Any],
) -> str:
    body = [
        f"<h1>{html.escape(result['recipe'])}: a school report</h1><p class='facts'>{html.escape(_facts(result))}</p>",
        "<h2>Held-out questions</h2>" + _table(result) + _changes(result) if result["rows"] else "",
        _rounds(result, sections, reports),
        _open_book(result),
        *(compare_page.section(name, reports[name]) for name, kind in sections.items() if kind == "compare"),
        *(reward_page.section(name, reports[name]) for name, kind in sections.items() if kind == "reward"),
        _side_by_side(examples),
        _transcript(examples),
        _sections(result, reports),
        "<h2>Curves</h2>" + _curves(run_folder, sections),
        _samples(run_folder, sections),
        _drops(reports),
        f"<p class='facts'>Intervals: 95 %, bootstrap over questions or prompts, one training run (seed {result['seed']}).</p>",
    ]
    return PAGE.substitute(title=html.escape(result["recipe"]), body="\n".join(body))


PAGE = Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Lyceum: $title</title><style>
:root{--ink:#1d2433;--soft:#5d6778;--line:#d9dee7;--paper:#fff;--good:#1f7a4d;--bad:#b3372f;--shade:#f4f6fa}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9f0;--soft:#9aa4b5;--line:#333b4a;--paper:#14181f;--good:#63c596;
--bad:#ee8279;--shade:#1c222c}svg{filter:invert(.88) hue-rotate(180deg)}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1150px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin:0}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}h3{font-size:1rem;margin:1rem 0 .2rem}
.facts,small{color:var(--soft)}small{display:block;font-size:.68rem;white-space:nowrap}
.numbers th:first-child{text-align:left;max-width:26rem}.numbers th small{white-space:normal;font-weight:400}
table{border-collapse:collapse;font-size:.85rem}
th,td{padding:.3rem .5rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
.left th,.left td{text-align:left}.say{white-space:pre-wrap;font-family:ui-monospace,monospace;font-size:.8rem}
.wrong td:first-child{color:var(--bad);font-weight:700}.wrong{background:var(--shade)}.ask{font-weight:600}
.plots{display:flex;flex-wrap:wrap;gap:.5rem;margin:.7rem 0}</style></head><body>
$body
</body></html>
"""
)
