"""Answers that a rule can check: the exact answer, arithmetic, a format. Text in, 1 for right, 0 for wrong.

Why: where a rule knows what is right, no reward model needs to be trained, and none can be fooled. A question that the
rule cannot decide (no answer is known, no sum is asked for) gets None: that is no wrong answer.

    exact_answer("Capital of France?", "Paris.", {"answer": "paris"})    1.0
    arithmetic("What is 3 * (4 + 5)?", "3 * 9 = 27", {})                  1.0
    form("...", "<answer>7</answer>", {}, r"<answer>.*</answer>")         1.0

With a pattern, the whole response must match it, and what its first group caught is the answer: a right number in the
wrong form is wrong. A bonus for the form beside correctness is easily earned alone.
Named in a recipe: `rewards = { exact_answer = 1.0 }` in [grpo] or [ppo] (`lyceum.stages.rewards`).
What it is not: symbolic algebra, units, or running code.
"""

from __future__ import annotations

import ast
import operator
import re
import unicodedata
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from lyceum.errors import ConfigError
from lyceum.evals.graders import grade

TOLERANCE = 1e-6  # of a number written as a rounded decimal, beside its own size
MAX_POWER = 64  # exponents beyond it are not worked out
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?(?![\w])")
SUM = re.compile(r"[\d.()+\-*/^×÷−\s]*\d[\d.()+\-*/^×÷−\s]*")
OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}

Verifier = Callable[[str, str, Mapping[str, Any], str], float | None]


def exact_answer(prompt: str, response: str, meta: Mapping[str, Any], pattern: str = "") -> float | None:
    """1 if the response is `meta["answer"]`, or one of a list of them, but for case, spaces and punctuation around it."""
    known = meta.get("answer")
    if known is None:
        return None
    accepted = known if isinstance(known, (list, tuple)) else [known]
    found = _answer(response, pattern)
    return float(found is not None and _plain(found) in {_plain(str(one)) for one in accepted})


def arithmetic(prompt: str, response: str, meta: Mapping[str, Any], pattern: str = "") -> float | None:
    """1 if the last number of the response is that of `meta["answer"]` or, without it, of the sum in the prompt."""
    known = meta.get("answer")
    wanted = value_of(prompt) if known is None else last_number(str(known))
    if wanted is None:
        return None
    answer = _answer(response, pattern)
    found = None if answer is None else last_number(answer)
    return float(found is not None and abs(found - wanted) <= TOLERANCE * max(1.0, float(abs(wanted))))


def form(prompt: str, response: str, meta: Mapping[str, Any], pattern: str = "") -> float | None:
    """1 if the whole response matches `meta["format"]` or, without it, the pattern; None where there is neither."""
    wanted = meta.get("format") or pattern
    return float(_match(str(wanted), response) is not None) if wanted else None


def graded(prompt: str, response: str, meta: Mapping[str, Any], pattern: str = "") -> float | None:
    """What `meta["grader"]` says of the response to the row `meta["item"]` (`lyceum.evals.graders`); None without one."""
    grader = meta.get("grader")
    return grade(grader, response, meta.get("item") or {}) if isinstance(grader, Mapping) else None


VERIFIERS: dict[str, Verifier] = {
    "exact_answer": exact_answer,
    "arithmetic": arithmetic,
    "format": form,
    "grader": graded,
}


# ---------------------------------------------------------------- numbers


def last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly: 1,234.5, -7, 3/4; None without one."""
    found = NUMBER.findall(text.replace("−", "-"))
    try:
        return Fraction(found[-1].replace(",", "")) if found else None
    except (ValueError, ZeroDivisionError):  # 3.5/2, 1/0
        return None


def value_of(text: str) -> Fraction | None:
    """The value of the longest sum in a text (+ - * / // % ^ and brackets), exactly; None without one."""
    sums = [part.strip() for part in SUM.findall(text)]
    for part in sorted(sums, key=len, reverse=True):
        written = part.replace("×", "*").replace("÷", "/").replace("−", "-").replace("^", "**").rstrip(".+-*/ ")
        try:
            tree = ast.parse(written.strip(), mode="eval").body
            if isinstance(tree, ast.BinOp):
                return _evaluate(tree)
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
            continue
    return None


def _evaluate(tree: ast.expr) -> Fraction:
    """Exact value of a syntax tree of numbers and operators; ValueError for anything else."""
    if isinstance(tree, ast.Constant) and type(tree.value) in (int, float):
        return Fraction(str(tree.value))
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, (ast.USub, ast.UAdd)):
        value = _evaluate(tree.operand)
        return -value if isinstance(tree.op, ast.USub) else value
    if isinstance(tree, ast.BinOp):
        left, right = _evaluate(tree.left), _evaluate(tree.right)
        if type(tree.op) in OPERATORS:
            return OPERATORS[type(tree.op)](left, right)
        if isinstance(tree.op, ast.Pow) and right.denominator == 1 and abs(right) <= MAX_POWER:
            return left ** int(right)
    raise ValueError("no sum")


# ---------------------------------------------------------------- texts


def check_pattern(pattern: str) -> None:
    """Raises ConfigError if the pattern is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"reward_pattern {pattern!r} is no regular expression: {error}", hint="write it as Python's re does"
        ) from None


def _match(pattern: str, response: str) -> re.Match[str] | None:
    return re.fullmatch(pattern, response.strip(), re.DOTALL)


def _answer(response: str, pattern: str) -> str | None:
    """What the response answers: all of it or, with a pattern, what its first group caught; None if it does not match."""
    if not pattern:
        return response
    match = _match(pattern, response)
    if match is None:
        return None
    return (match.group(1) or "") if match.re.groups else match.group(0)


def _plain(text: str) -> str:
    words = unicodedata.normalize("NFKC", text).casefold().split()
    return " ".join(words).strip(" .,;:!?\"'`*$()[]")
