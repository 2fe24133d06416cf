"""Graders in OpenAI's shapes: a sample, and the row that its prompt stood in, in; a number out.

    grade({"type": "string_check", "operation": "eq", "input": "{{ sample.output_text }}", "reference": "{{ item.answer }}", ...},
          "Paris", {"answer": "Paris"})                                          # 1.0

| type | score |
|---|---|
| string_check | 1 or 0: eq, ne; like: the reference stands in the input; ilike: but for case |
| text_similarity | fuzzy_match, bleu, gleu, rouge_1 to rouge_5, rouge_l, 0 to 1 |
| score_model | the number that a model answers, kept within `range`; none, where it answers none |
| multi | a formula over the scores of others, by their names: + - * / ** and min, max, abs, floor, ceil, exp, sqrt, log |

A template names `sample.output_text`, `sample.output_json.PATH` or `item.PATH`, a path being names and numbers with dots.
What cannot be graded (a field that a row lacks, a formula that divides by 0, a judge that says no number) is None: left
out by whoever learns from it (`lyceum.stages.rewards`), never guessed.

As a reward: `rewards = { grader = 1.0 }` in [grpo], where a prompt's meta holds `grader` and `item`.
What it is not: python (which needs a sandbox), or the check of what a client sends (`lyceum.serve.tuning.wishes`).
"""

from __future__ import annotations

import ast
import json
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from lyceum.errors import ConfigError
from lyceum.evals.metrics import words

TEMPLATE = re.compile(r"\{\{\s*([A-Za-z_][\w.\-]*)\s*\}\}")
NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
JUDGE_TOKENS = 64  # what a judge may say, unless its sampling parameters say otherwise
MAX_COMPARED = 2000  # characters of a text that are compared: the time grows with the square
MAX_FORMULA = 1000  # characters
MAX_DEPTH = 64  # of a formula's tree
CHECKS: dict[str, Callable[[str, str], bool]] = {
    "eq": lambda said, wanted: said == wanted,
    "ne": lambda said, wanted: said != wanted,
    "like": lambda said, wanted: wanted in said,
    "ilike": lambda said, wanted: wanted.casefold() in said.casefold(),
}
OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
}
FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}
Judge = Callable[[Mapping[str, Any], Sequence[Mapping[str, str]]], str]  # (grader, messages) -> what it says


class NotGraded(Exception):
    """There is no score here."""


def grade(grader: Mapping[str, Any], said: str, item: Mapping[str, Any], judge: Judge | None = None) -> float | None:
    """The score of what was said to the prompt of `item`; None where there is none.

    Args:
        grader: as OpenAI's API has it.
        said: the reply.
        item: the row of the prompt.
        judge: asks the model of a score_model; by default the checkpoint in `grader["folder"]`.
    """
    try:
        score = _grade(grader, said, item, judge or ask_checkpoint)
    except (NotGraded, ArithmeticError, ValueError):
        return None
    return score if math.isfinite(score) else None


def _grade(grader: Mapping[str, Any], said: str, item: Mapping[str, Any], judge: Judge) -> float:
    kind = grader["type"]
    if kind == "multi":
        scores = {str(name): _grade(one, said, item, judge) for name, one in grader["graders"].items()}
        return evaluate(str(grader["calculate_output"]), scores)
    if kind == "score_model":
        messages = [
            {"role": str(message["role"]), "content": fill(str(message["content"]), said, item)}
            for message in grader["input"]
        ]
        low, high = grader.get("range") or (0.0, 1.0)
        found = NUMBER.search(judge(grader, messages))
        if found is None:
            raise NotGraded("the judge says no number")
        return min(max(float(found.group()), low), high)
    left, right = fill(str(grader["input"]), said, item), fill(str(grader["reference"]), said, item)
    if kind == "string_check":
        return float(CHECKS[grader["operation"]](left, right))
    return SIMILARITIES[grader["evaluation_metric"]](left[:MAX_COMPARED], right[:MAX_COMPARED])


# -- templates ---------------------------------------------------------------------------------------------------------


def fill(template: str, said: str, item: Mapping[str, Any]) -> str:
    """A template with what its places name. Raises NotGraded for a place that names nothing."""

    def value(match: re.Match[str]) -> str:
        found = _look_up(match.group(1).split("."), said, item)
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

    return TEMPLATE.sub(value, template)


def places(template: str) -> list[str]:
    """What a template names."""
    return TEMPLATE.findall(template)


def _look_up(path: list[str], said: str, item: Mapping[str, Any]) -> Any:
    if path == ["sample", "output_text"]:
        return said
    found: Any = item
    rest = path[1:]
    if path[:2] == ["sample", "output_json"]:
        rest = path[2:]
        try:
            found = json.loads(said)
        except (ValueError, RecursionError):
            raise NotGraded("the reply is no JSON") from None
    elif path[0] != "item" or not rest:
        raise NotGraded(f"there is no {'.'.join(path)}")
    for step in rest:
        if isinstance(found, Mapping) and step in found:
            found = found[step]
        elif isinstance(found, list) and step.isdigit() and int(step) < len(found):
            found = found[int(step)]
        else:
            raise NotGraded(f"there is no {'.'.join(path)}")
    return found


# -- formulas ----------------------------------------------------------------------------------------------------------


def check_formula(formula: str, names: Sequence[str]) -> None:
    """Raises ConfigError unless a formula is one over these names."""
    try:
        evaluate(formula, dict.fromkeys(names, 0.5))
    except ArithmeticError:
        pass  # of other scores it may be a number
    except (NotGraded, ValueError) as error:
        hint = f"+ - * / ** over {', '.join(names)}, and {', '.join(FUNCTIONS)}"
        raise ConfigError(f"calculate_output {formula[:80]!r} is no formula: {error}", hint=hint) from None


def evaluate(formula: str, scores: Mapping[str, float]) -> float:
    """The value of a formula. Raises NotGraded for what is none, ArithmeticError or ValueError for what has no value."""
    if len(formula) > MAX_FORMULA:
        raise NotGraded(f"it is longer than {MAX_FORMULA} characters")
    try:
        tree = ast.parse(formula.replace("^", "**").strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NotGraded("it cannot be read") from None
    return float(_value(tree, scores, 0))


def _value(tree: ast.expr, scores: Mapping[str, float], depth: int) -> float:
    if depth > MAX_DEPTH:
        raise NotGraded("it is too deep")

    def inner(part: ast.expr) -> float:
        return _value(part, scores, depth + 1)

    if isinstance(tree, ast.Constant) and type(tree.value) in (int, float):
        return float(tree.value)  # type: ignore[arg-type]
    if isinstance(tree, ast.Name) and tree.id in scores:
        return scores[tree.id]
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, (ast.USub, ast.UAdd)):
        return -inner(tree.operand) if isinstance(tree.op, ast.USub) else inner(tree.operand)
    if isinstance(tree, ast.BinOp) and type(tree.op) in OPERATORS:
        return OPERATORS[type(tree.op)](inner(tree.left), inner(tree.right))
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.keywords:
        if tree.func.id in FUNCTIONS and tree.args:
            try:
                return FUNCTIONS[tree.func.id](*map(inner, tree.args))
            except TypeError:
                raise NotGraded(f"{tree.func.id} takes another number of values") from None
    raise NotGraded(f"{type(tree).__name__} means nothing here")


# -- how alike two texts are -------------------------------------------------------------------------------------------


def common(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for one in left:
        before = 0
        for column, other in enumerate(right, 1):
            before, row[column] = row[column], before + 1 if one == other else max(row[column], row[column - 1])
    return row[-1]


def fuzzy_match(said: str, wanted: str) -> float:
    """1 less the share of letters to insert and delete: 2 LCS / (both lengths), as the library rapidfuzz's ratio."""
    return 2 * common(said, wanted) / (len(said) + len(wanted)) if said or wanted else 1.0


def grams(tokens: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    """The runs of so many tokens, counted."""
    return Counter(tuple(tokens[at : at + size]) for at in range(len(tokens) - size + 1))


def rouge(said: str, wanted: str, size: int) -> float:
    """F1 of the runs of `size` words (Lin 2004, ROUGE-N)."""
    left, right = grams(words(said), size), grams(words(wanted), size)
    return _f1((left & right).total(), left.total(), right.total())


def rouge_l(said: str, wanted: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, ROUGE-L)."""
    left, right = words(said), words(wanted)
    return _f1(common(left, right), len(left), len(right))


def _f1(shared: int, said: int, wanted: int) -> float:
    return 2 * shared / (said + wanted) if said and wanted else float(said == wanted)


def bleu(said: str, wanted: str) -> float:
    """Geometric mean of the precisions of runs of 1 to 4 words, times a penalty for brevity (Papineni et al. 2002).

    Of one sentence: precisions of longer runs than single words are smoothed by adding one (Lin & Och 2004).
    """
    left, right = words(said), words(wanted)
    if not left or not right:
        return float(left == right)
    total = 0.0
    for size in range(1, 5):
        ours, theirs = grams(left, size), grams(right, size)
        hits, count, more = (ours & theirs).total(), ours.total(), int(size > 1)
        if not hits + more:
            return 0.0
        total += math.log((hits + more) / (count + more))
    return min(1.0, math.exp(1 - len(right) / len(left))) * math.exp(total / 4)


def gleu(said: str, wanted: str) -> float:
    """The smaller of precision and recall of all runs of 1 to 4 words together (Wu et al. 2016, section 4.3)."""
    left, right = words(said), words(wanted)
    if not left or not right:
        return float(left == right)
    pairs = [(grams(left, size), grams(right, size)) for size in range(1, 5)]
    hits = sum((ours & theirs).total() for ours, theirs in pairs)
    return hits / max(sum(ours.total() for ours, _ in pairs), sum(theirs.total() for _, theirs in pairs))


def _rouge_of(size: int) -> Callable[[str, str], float]:
    return lambda said, wanted: rouge(said, wanted, size)


SIMILARITIES: dict[str, Callable[[str, str], float]] = {
    "fuzzy_match": fuzzy_match,
    "bleu": bleu,
    "gleu": gleu,
    "rouge_l": rouge_l,
    **{f"rouge_{size}": _rouge_of(size) for size in range(1, 6)},
}


# -- a model that judges -----------------------------------------------------------------------------------------------


def ask_checkpoint(grader: Mapping[str, Any], messages: Sequence[Mapping[str, str]]) -> str:
    """What the model in `grader["folder"]` answers, greedily unless its sampling parameters say otherwise."""
    from lyceum.corpus.records import Conversation, Message
    from lyceum.engine.sampling import SamplingParams

    engine, chat = _judge_in(str(grader["folder"]))
    wanted = grader.get("sampling_params") or {}
    roles = {"developer": "system"}
    talk = Conversation(tuple(Message(roles.get(m["role"], m["role"]), m["content"]) for m in messages))
    prompt = chat.prompt(talk)
    room = engine.context_length - len(prompt)
    if room < 1:
        raise NotGraded("the judge's prompt does not fit into its context")
    params = SamplingParams(
        min(int(wanted.get("max_completions_tokens") or JUDGE_TOKENS), room),
        temperature=float(wanted.get("temperature") or 0.0),
        top_p=float(wanted.get("top_p") or 1.0),
        seed=int(wanted.get("seed") or 0),
        stop_ids=chat.stop_ids,
    )
    (output,) = engine.generate([prompt], params)
    return chat.parse(output.ids).content


@lru_cache(maxsize=2)
def _judge_in(folder: str) -> tuple[Any, Any]:
    from lyceum.device import pick_device
    from lyceum.engine.engine import Engine
    from lyceum.model.checkpoint import load_checkpoint
    from lyceum.tokens.chat import ChatFormat

    loaded = load_checkpoint(folder)
    if loaded.tokenizer is None:
        raise ConfigError(f"{folder} has no tokenizer", hint="name another model in the grader")
    return Engine(loaded.model.eval().to(pick_device()), max_batch=1), ChatFormat(loaded.tokenizer)
