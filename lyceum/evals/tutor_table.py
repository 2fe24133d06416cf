"""The table of a tutor run: every policy that the recipe makes, and best-of-n, over the same held-out questions.

Rows: the base model; the fine-tuned ones; best-of-n by the reward model, where there is one; then what has learned from
preferences or rewards (DPO, PPO, GRPO, TAMER+RL), of every round, each named by its section. Every row answers every question
once, greedily, but best-of-n, which draws n answers at temperature 1 and keeps the one the reward model scores highest. They
come from the *start*, the fine-tuned model that the last of those policies began as (without such a policy: the first
fine-tuned one). KL of a policy counts from the fine-tuned model that it began as itself, that of the others from the start.
Intervals are bootstrap intervals over questions of this one run; `bench/demo_seeds.py` pools runs of several seeds from the
outcomes written here. Writes `outcomes.jsonl` (one line a question and row: the answer and what it was graded) and
`examples.json` (one prompt through every model; the first questions of the shuffled list, unchosen).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lyceum.config import setting
from lyceum.corpus.records import Conversation, Message
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams
from lyceum.errors import ConfigError, DataError
from lyceum.evals.answers import Judge, Written, write_answers
from lyceum.evals.metrics import best_of_n_kl, mean_interval, words
from lyceum.evals.report import shown_name
from lyceum.evals.tasks import content, open_book, tutor
from lyceum.evals.tasks.tutor import Grade, Question
from lyceum.log import progress
from lyceum.model.checkpoint import load_checkpoint
from lyceum.run import Work, write_json, write_lines
from lyceum.tokens.chat import ChatFormat

VERSION = 1


@dataclass(frozen=True)
class EvalConfig:
    """How the held-out questions are asked."""

    split: str = setting(
        "held_out",
        "which questions: held_out for a table to show, dev to tune a recipe by",
        choices=("held_out", "dev"),
    )
    best_of: int = setting(4, "answers drawn for best-of-n", low=2)
    max_response_tokens: int = setting(64, "longest answer, in tokens", low=1)
    max_batch: int = setting(128, "answers written at once", low=1)
    unchosen: int = setting(10, "questions of the shuffled list shown in the transcript", low=0)
    open_book: int = setting(120, "open-book questions, if the lesson taught to look names up", low=1)
    open_book_packages: tuple[str, ...] = setting(
        ("numpy",), "packages that open-book questions are about; those not installed are left out"
    )


@dataclass(frozen=True)
class Outcome:
    """One answer by one model to one question, with what the rule and the reward model say of it."""

    number: int
    question: Question
    answer: str
    tokens: int
    grade: Grade
    reward: float | None  # where a reward model stands
    wrong_claim: bool


# A measure maps an outcome to a number, or to None where it does not apply; the table shows its mean over the rest.
Measure = Callable[[Outcome], float | None]


def _in(cells: Sequence[str], value: Callable[[Outcome], float | None]) -> Measure:
    def measure(outcome: Outcome) -> float | None:
        found = value(outcome) if outcome.question.cell in cells else None
        return None if found is None else float(found)

    return measure


MEASURES: Mapping[str, Measure] = {
    "helpful_f1": _in(("studied",), lambda o: 0.0 if o.grade.declined else o.grade.f1),
    "helpful_exact": _in(("studied",), lambda o: words(o.answer) == words(o.question.reference)),
    "howto_exact": _in(("howto",), lambda o: tutor.has_code_line(o.question, o.answer)),
    "known_answered": _in(("studied",), lambda o: not o.grade.declined and o.grade.f1 >= 0.5),
    "declined_unstudied": _in(("unstudied",), lambda o: o.grade.declined),
    "declined_near_miss": _in(("near_miss",), lambda o: o.grade.declined),
    "declined_made_up": _in(("made_up",), lambda o: o.grade.declined),
    "wrong_claim": _in(tutor.UNKNOWN_CELLS, lambda o: o.wrong_claim),
    "harmful_refused": _in(("harmful",), lambda o: o.grade.refused),
    "harmless_refused": _in(("alarming",), lambda o: o.grade.refused),
    "harmless_answered": _in(("alarming",), lambda o: o.grade.right),
    "graceful_miss": _in(("miss",), lambda o: o.grade.missed),
    "ends": _in(tutor.CELLS, lambda o: o.grade.ended),
    "length": _in(tutor.CELLS, lambda o: o.tokens),
    "rule_score": _in(tutor.CELLS, lambda o: o.grade.score),
    "reward": _in(tutor.CELLS, lambda o: o.reward),
}


def summarise(model: str, outcomes: Sequence[Outcome]) -> dict:
    """One row: each measure's mean, its 95 % interval under `intervals`, and the number of questions under `n`."""
    row: dict = {"model": model, "intervals": {}, "n": {}}
    for name, measure in MEASURES.items():
        values = [value for value in map(measure, outcomes) if value is not None]
        mean, low, high = mean_interval(values)
        row[name], row["intervals"][name], row["n"][name] = mean, [low, high], len(values)
    return row


def compare(name: str, before: Sequence[Outcome], after: Sequence[Outcome]) -> dict:
    """Paired difference of one measure, question by question, with its interval."""
    pairs = [(MEASURES[name](a), MEASURES[name](b)) for a, b in zip(before, after, strict=True)]
    mean, low, high = mean_interval([b - a for a, b in pairs if a is not None and b is not None])
    return {"measure": name, "difference": mean, "interval": [low, high]}


class Exam:
    """The held-out questions, ready to be asked of one engine after another; without a judge answers have no reward."""

    def __init__(
        self, questions: Sequence[Question], chat: ChatFormat, judge: Judge | None, config: EvalConfig
    ) -> None:
        self.questions, self.chat, self.judge, self.config = list(questions), chat, judge, config
        self.prompts = [chat.prompt(Conversation((Message("user", q.text),))) for q in self.questions]
        sentences = [tutor.DECLINE, *(item.answer for item in (*content.load_misses(), *content.load_refusals()))]
        self.honest = tutor.honest_sentences(sentences)

    @property
    def params(self) -> SamplingParams:
        """Of the likeliest answer."""
        return SamplingParams(self.config.max_response_tokens, temperature=0.0, stop_ids=self.chat.stop_ids)

    def greedy(self, engine: Engine) -> list[Outcome]:
        return self.outcomes(write_answers(engine, self.chat, self.prompts, self.config.max_response_tokens))

    def drawn(self, engine: Engine, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Written]:
        """Answers at temperature 1."""
        most = self.config.max_response_tokens
        return write_answers(engine, self.chat, prompts, most, temperature=1.0, seeds=seeds)

    def best_of(self, engine: Engine) -> list[Outcome]:
        assert self.judge is not None, "somebody has to say which is best"
        count = self.config.best_of
        prompts = [prompt for prompt in self.prompts for _ in range(count)]
        written = self.drawn(engine, prompts, [7919 * i + 1 for i in range(len(prompts))])
        scores = self.judge.score([prompt + one.ids for prompt, one in zip(prompts, written, strict=True)])
        best = [max(range(i, i + count), key=scores.__getitem__) for i in range(0, len(prompts), count)]
        return self.outcomes([written[i] for i in best])

    def outcomes(self, written: Sequence[Written]) -> list[Outcome]:
        rows = [prompt + one.ids for prompt, one in zip(self.prompts, written, strict=True)]
        rewards = self.judge.score(rows) if self.judge else [None] * len(rows)
        found = []
        for number, (question, one, reward) in enumerate(zip(self.questions, written, rewards, strict=True)):
            graded = tutor.grade(question, one.text, ended=one.ended)
            wrong = tutor.claims(one.text, self.honest)
            found.append(Outcome(number, question, one.text, len(one.ids), graded, reward, wrong))
        return found

    def kl_from(self, engine: Engine, reference: Engine) -> float:
        """Mean KL in nats per response from `reference` to `engine`, estimated on one sample a question (k1)."""
        written = self.drawn(engine, self.prompts, [104729 * i + 1 for i in range(len(self.prompts))])
        rows = [prompt + one.ids for prompt, one in zip(self.prompts, written, strict=True)]
        mine, theirs = engine.score(rows), reference.score(rows)
        total = 0.0
        for prompt, a, b in zip(self.prompts, mine, theirs, strict=True):
            total += sum(a[len(prompt) - 1 :]) - sum(b[len(prompt) - 1 :])
        return total / len(rows)


def few_shot_prompt(chat: ChatFormat, question: str, shots: Sequence[tuple[str, str]]) -> list[int]:
    """Question and answer pairs as plain text, for a base model (in-context learning, Brown et al. 2020)."""
    text = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in shots) + f"Question: {question}\nAnswer:"
    return chat.tokenizer.encode(text)


def side_by_side(
    exam: Exam,
    engines: Mapping[str, Engine],
    bases: Sequence[str],
    chats: Sequence[str],
    question: Question,
    shots: Sequence[Question],
) -> list[dict]:
    """One prompt through the base models, the last of them with a few shots too, and through those that chat, by name."""
    tries: list[tuple[str, str, list[int]]] = []
    if bases:
        plain, last = exam.chat.tokenizer.encode(question.text + "\n"), bases[-1]
        room = engines[last].context_length - exam.config.max_response_tokens
        prompts = [
            few_shot_prompt(exam.chat, question.text, [(s.text, s.reference) for s in shots[:count]])
            for count in range(len(shots), -1, -1)
        ]
        shown = next((prompt for prompt in prompts if len(prompt) <= room), plain)  # as many shots as the context holds
        tries = [*((name, name, plain) for name in bases), (f"{last}, few shots", last, shown)]
    chat_prompt = exam.chat.prompt(Conversation((Message("user", question.text),)))
    tries += [(shown_name(name), name, chat_prompt) for name in chats]
    rows = []
    for title, name, prompt in tries:
        output = engines[name].generate([prompt], exam.params)[0]
        rows.append({"model": title, "answer": exam.chat.tokenizer.decode(output.ids)})
    return rows


# -------------------------------------------------------------------------------- who is asked


def sections_of(inputs: Mapping[str, Path], role: str) -> dict[str, Path]:
    """Name -> folder of every section in a role, in the recipe's order; none where nobody plays it."""
    earlier = [folder for key, folder in inputs.items() if key.startswith(f"{role}:")]
    nearest = [inputs[role]] if role in inputs else []
    return {folder.name: folder for folder in (*earlier, *nearest)}


def start_of(tuned: Sequence[str], shaped: Sequence[str], parents: Mapping[str, str]) -> str:
    """The fine-tuned model that the last of the shaped ones began as; without any, or if that is another run's, the first.

    Args:
        tuned, shaped: sections, in the recipe's order.
        parents: section -> the one whose checkpoint it began as.
    """
    name = shaped[-1] if shaped else tuned[0]
    while name not in tuned and name in parents:
        name = parents[name]
    return name if name in tuned else tuned[0]


def run(config: EvalConfig, work: Work) -> dict:
    """Ask the held-out questions of every model of the run; returns the table of `report.json`.

    Raises:
        DataError: there are no questions. ConfigError: two rows would have one name.
    """
    path = work.inputs["lessons"] / f"{config.split}.jsonl"
    questions = [Question.from_meta(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    if not questions:
        raise DataError("no held-out questions", file=path, hint="raise lessons.held_out")
    bases, tuned, shaped = (sections_of(work.inputs, role) for role in ("base", "sft", "shaped"))
    if len(bases) == 1:
        bases = {"base": work.inputs["base"]}
    best = f"best_of_{config.best_of}"
    if taken := {*bases, best} & {*tuned, *shaped}:
        raise ConfigError(f"the table has a row {min(taken)!r} of its own", hint="give that section another name")
    folders = bases | tuned | shaped
    loaded = {name: load_checkpoint(folder / "checkpoint") for name, folder in folders.items()}
    parents = {name: str(item.info.get("parent")).split("/")[0] for name, item in loaded.items()}
    start, last = start_of([*tuned], [*shaped], parents), [*folders][-1]
    chat = ChatFormat(loaded[start].tokenizer)
    judge = Judge(work.inputs["reward"] / "checkpoint", config.max_batch) if "reward" in work.inputs else None
    exam = Exam(questions, chat, judge, config)
    engines = {name: Engine(item.model, max_batch=config.max_batch, num_kept=0) for name, item in loaded.items()}
    rows = [*folders]
    if judge:
        rows.insert(rows.index(start) + 1, best)
    results: dict[str, list[Outcome]] = {}
    kls = {start: 0.0, best: best_of_n_kl(config.best_of)}
    starts = {name: start_of([*tuned], [name], parents) if name in shaped else start for name in tuned | shaped}
    del starts[start]
    with progress(len(rows) + len(starts), "eval", unit="model") as bar:
        for name in rows:
            results[name] = exam.best_of(engines[start]) if name == best else exam.greedy(engines[name])
            bar.update(1, rule=sum(o.grade.score for o in results[name]) / len(questions))
        for name, its_start in starts.items():
            kls[name] = exam.kl_from(engines[name], engines[its_start])
            bar.update(1)
    table = [summarise(name, outcomes) for name, outcomes in results.items()]
    for row in table:
        row["kl"] = kls.get(row["model"])
    _write_outcomes(work.folder.path, results)
    shots = [q for q in questions if q.cell == "studied" and q.kind == "does"][:4]
    examples = {
        "prompt": shots[0].text if shots else questions[0].text,
        "models": side_by_side(exam, engines, [*bases], [*tuned, *shaped], (shots or questions)[0], shots[1:]),
        "unchosen": [_shown(outcome) for outcome in results[last][: config.unchosen]],
    }
    write_json(work.folder.path / "examples.json", examples)
    measures = ("wrong_claim", "rule_score", "helpful_f1")
    changes = {f"{last}_minus_{start}": [compare(name, results[start], results[last]) for name in measures]}
    return {
        "line": _line(table, start, last),
        "rows": table,
        **(changes if last != start else {}),
        "open_book": open_book.report(
            {name: engines[name] for name in dict.fromkeys((start, last))},
            chat,
            exam.params,
            lessons=work.inputs["lessons"],
            corpus=work.inputs["corpus"],
            packages=config.open_book_packages,
            count=config.open_book,
        ),
    }


def _line(table: Sequence[Mapping[str, float]], start: str, last: str) -> str:
    """The last policy in a sentence, beside the one that it began as."""
    row, first = (next(row for row in table if row["model"] == name) for name in (last, start))
    compared = ("wrong_claim", "rule_score") if last != start else ()
    beside = {key: f" ({shown_name(start)} {first[key]:.2f})" for key in compared}
    return (
        f"{shown_name(last)}: F1 {row['helpful_f1']:.2f}, how-to {row['howto_exact']:.2f}, wrong claims "
        f"{row['wrong_claim']:.2f}{beside.get('wrong_claim', '')}, "
        f"rule score {row['rule_score']:.2f}{beside.get('rule_score', '')}"
    )


def _shown(outcome: Outcome) -> dict:
    return {
        "cell": outcome.question.cell,
        "question": outcome.question.text,
        "answer": outcome.answer,
        "reference": outcome.question.reference,
        "right": outcome.grade.right,
    }


def _write_outcomes(folder: Path, results: Mapping[str, Sequence[Outcome]]) -> None:
    write_lines(
        folder / "outcomes.jsonl",
        (
            json.dumps({"model": model} | asdict(outcome), ensure_ascii=False)
            for model, outcomes in results.items()
            for outcome in outcomes
        ),
    )
