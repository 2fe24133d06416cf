"""The tutor's lesson: conversations to imitate, prompts to practise on, and held-out questions, from facts and written content.

What the lesson says about objects is their own documentation (the corpus section's `objects.jsonl`); everything else is
hand-written content (`lyceum/evals/tasks/content`). Rules decide who is asked what and how often; a fixed seed makes the same
lesson. Splits follow `lyceum.evals.tasks.tutor`: a name or phrasing that is held out appears in no other file.

Writes into the section's folder: `train.jsonl` and `valid.jsonl` (conversations for supervised fine-tuning), `prompts.jsonl`
(prompts for rankings and PPO; names of the practice split, which fine-tuning never saw), `held_out.jsonl` (questions for the
table) and `dev.jsonl` (more of the kind, to tune a recipe by), and returns the counts. Run by `lyceum lessons RECIPE`.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from lyceum.config import setting
from lyceum.corpus.packages import ObjectFact
from lyceum.corpus.records import Conversation, Message, write_records
from lyceum.errors import DataError
from lyceum.evals.tasks import content, open_book, tutor
from lyceum.evals.tasks.tutor import Question
from lyceum.log import progress
from lyceum.run import Work, write_lines

VERSION = 1


@dataclass(frozen=True)
class LessonsConfig:
    """How often each part of the lesson is asked; one count is one conversation in `train.jsonl`."""

    does: int = setting(10, "phrasings of 'what does it do' for each studied object", low=0)
    takes: int = setting(3, "phrasings of 'what does it take and return' for each studied object", low=0)
    module: int = setting(2, "phrasings of 'in which module is it' for each studied object", low=0)
    which: int = setting(2, "phrasings of 'which function does this' for each studied object", low=0)
    howto: int = setting(3, "rounds over all training phrasings of the how-do-I intents", low=0)
    intents: int = setting(0, "how-do-I intents to teach; 0 for all", low=0)
    small_talk: int = setting(1, "rounds over the training phrasings of small talk", low=0)
    harmful: float = setting(1.0, "rounds over the training requests to refuse; 0.3 = about that share of them", low=0)
    alarming: float = setting(1.0, "rounds over the training requests that only sound alarming", low=0)
    miss_share: float = setting(0.15, "share of conversations that are graceful misses", low=0, high=0.9)
    unstudied: int = setting(500, "declined real but unstudied names", low=0)
    near_miss: int = setting(250, "declined near misses", low=0)
    made_up: int = setting(250, "declined made-up names", low=0)
    open_book: int = setting(0, "conversations in which names are looked up, with made-up entries to copy", low=0)
    follow_up_share: float = setting(0.2, "share of object conversations with a second question", low=0, high=1)
    practice: int = setting(2500, "prompts for rankings and PPO, about", low=8)
    practice_unknown_share: float = setting(0.35, "share of practice prompts that ask for unknown names", low=0, high=1)
    practice_follow_up_share: float = setting(
        0.0, "share of practice prompts that come second, after a question that was answered", low=0, high=1
    )
    held_out: int = setting(120, "held-out questions a cell (studied and how-to: twice as many)", low=1)


EXAMS = ("dev", "held_out")

SMALL_WORDS = frozenset("a an the my do i to is in of me so that can it".split())


def restyle(text: str, chance: random.Random, keep: str = "") -> str:
    """The same question as people type it: lower case, a missing mark, a slip of the fingers (never inside `keep`)."""
    roll = chance.random()
    if roll < 0.5:
        return text
    if roll < 0.65:
        return text[:1].lower() + text[1:] if not text.startswith(keep or "\0") else text
    if roll < 0.8:
        return text.rstrip("?.!") or text
    if roll < 0.92:
        return text.lower().rstrip("?.!") or text
    return _slip(text, chance, keep)


def reword(text: str, chance: random.Random) -> str:
    """A hand-written request in fewer words: the key words alone, or a word left out."""
    pieces = text.rstrip("?.!").split(" ")
    if chance.random() < 0.3:
        pieces = [piece for piece in pieces if piece.lower() not in SMALL_WORDS] or pieces
    elif len(pieces) > 3:
        pieces.pop(chance.randrange(len(pieces)))
    return " ".join(pieces)


def frame(text: str, chance: random.Random) -> str:
    """Now and then, something said before a question or after it, as people do."""
    frames = content.load_frames()
    if chance.random() < 0.2:
        text = f"{chance.choice(frames['before'])} {text}"
    if chance.random() < 0.1:
        text = f"{text} {chance.choice(frames['after'])}"
    return text


def _slip(text: str, chance: random.Random, keep: str) -> str:
    """Two neighbouring letters of one longer word exchanged."""
    pieces = text.split(" ")
    places = [i for i, piece in enumerate(pieces) if len(piece) > 3 and piece.isalpha() and piece not in keep]
    if not places:
        return text
    place = chance.choice(places)
    word = pieces[place]
    at = chance.randrange(1, len(word) - 1)
    pieces[place] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(pieces)


def conversation(*turns: tuple[str, str], meta: dict | None = None) -> Conversation:
    """A conversation of (question, answer) turns; an empty last answer leaves it open for a reply."""
    messages = [
        message
        for question, answer in turns
        for message in (Message("user", question), Message("assistant", answer))
        if message.content
    ]
    return Conversation(tuple(messages), meta=meta or {})


class Lesson:
    """The lesson over given facts: knows the split of everything and yields conversations, prompts and questions."""

    def __init__(
        self,
        objects: Sequence[ObjectFact],
        unstudied: Sequence[str],
        config: LessonsConfig,
        seed: int,
        others: Sequence[ObjectFact] = (),
    ) -> None:
        if not objects:
            raise DataError("the lesson has no studied objects", hint="give the corpus section a package with docs")
        self.config, self.seed = config, seed
        self.objects, self.unstudied = list(objects), unstudied
        self.others, self.real = others, [*(fact.name for fact in objects), *unstudied]
        self.names = tutor.Names.divide(objects, unstudied, seed=seed)
        intents = content.load_intents()
        self.intents = intents[: config.intents] if config.intents else intents
        untaught = (question for split in EXAMS for question in self.written_questions(split))
        self._untaught = {content.normalise(question.text) for question in untaught}

    # --- supervised conversations

    def train(self) -> list[Conversation]:
        """All conversations for supervised fine-tuning, shuffled; graceful misses fill up to their share."""
        chance = random.Random(f"{self.seed} train")
        parts = [
            *self._object_conversations(chance),
            *self._written(chance, "train"),
            *self._declines(chance),
        ]
        share = self.config.miss_share
        misses = [question for question in self.written_questions("train") if question.cell == "miss"]
        wanted = round(len(parts) * share / (1 - share))
        parts += [self._ask(chance.choice(misses), chance) for _ in range(wanted)]
        if self.config.open_book:
            parts += open_book.lesson(self.others, self.real, parts, self.config.open_book, self.seed)
        chance.shuffle(parts)
        return parts

    def _ask(self, question: Question, chance: random.Random) -> Conversation:
        text = self._typed(question, chance)
        return conversation((text, question.reference), meta={"cell": question.cell, "kind": question.kind})

    def _typed(self, question: Question, chance: random.Random) -> str:
        """The question as somebody might type it, but never a question of an exam by accident."""
        text = question.text
        if not question.template and chance.random() < 0.5:
            text = reword(text, chance)
        text = restyle(frame(text, chance), chance, question.name)
        return question.text if content.normalise(text) in self._untaught else text

    def _object_conversations(self, chance: random.Random) -> Iterator[Conversation]:
        for kind in ("does", "takes", "module", "which"):
            rounds = getattr(self.config, kind)
            by_name: dict[str, list[Question]] = {}
            for question in tutor.object_questions(self.objects, kind, "train"):
                by_name.setdefault(question.name, []).append(question)
            facts = {fact.name: fact for fact in self.objects}
            for name, questions in by_name.items():
                chance.shuffle(questions)
                for i in range(rounds):
                    question = questions[i % len(questions)]
                    first = (self._typed(question, chance), question.reference)
                    meta = {"cell": "studied", "kind": kind}
                    if chance.random() < self.config.follow_up_share:
                        yield conversation(first, *self._follow_up(facts[name], kind, chance), meta=meta)
                    else:
                        yield conversation(first, meta=meta)

    def _follow_up(self, fact: ObjectFact, kind: str, chance: random.Random) -> list[tuple[str, str]]:
        """A second turn: another side of the same object, or the same side of another one."""
        sides = [side for side in ("takes", "module") if side != kind and tutor.answer_to(side, fact)]
        if kind != "does" or (sides and chance.random() < 0.6):
            if not sides:
                return []
            side = chance.choice(sides)
            return [(restyle(chance.choice(tutor.FOLLOW_UPS[side]), chance), tutor.answer_to(side, fact))]
        other = chance.choice(self.objects)
        text = chance.choice(tutor.FOLLOW_UPS["does"]).format(name=other.name)
        return [(restyle(text, chance, other.name), tutor.answer_to("does", other))]

    def _written(self, chance: random.Random, split: str) -> Iterator[Conversation]:
        rounds = {cell: getattr(self.config, cell) for cell in ("howto", "small_talk", "harmful", "alarming")}
        for question in self.written_questions(split):
            whole, rest = divmod(rounds.get(question.cell, 0), 1)
            for _ in range(int(whole) + (rest > 0 and chance.random() < rest)):
                yield self._ask(question, chance)

    def _declines(self, chance: random.Random) -> Iterator[Conversation]:
        for cell in tutor.UNKNOWN_CELLS:
            names = self.names.classes[cell]["train"]
            for name in names[: getattr(self.config, cell)]:
                yield self._ask(self._unknown(name, cell, "train", chance), chance)

    def _unknown(self, name: str, cell: str, split: str, chance: random.Random) -> Question:
        kind = chance.choice(("does", "does", "does", "takes", "module"))
        return chance.choice(tutor.unknown_questions([name], cell, kind, split))

    # --- hand-written questions

    def written_questions(self, split: str) -> list[Question]:
        """Questions of a split of the hand-written content: how-to, small talk, harmful, alarming and misses."""
        questions = [
            Question(text, "howto", "howto", f"{intent.answer}\n{intent.code}", name=intent.id, code=intent.code)
            for intent in self.intents
            for text in getattr(intent, split)
        ]
        for item in content.load_small_talk():
            questions += [Question(text, "small_talk", item.id, item.answer) for text in getattr(item, split)]
        for item in content.load_refusals():
            questions += [Question(text, "harmful", item.id, item.answer) for text in getattr(item, split)]
        for item in content.load_misses():
            questions += [Question(text, "miss", item.id, item.answer) for text in getattr(item, split)]
        for topic in content.load_alarming():
            answer = f"{topic.answer}\n{topic.code}" if topic.code else topic.answer
            questions += [
                Question(text, "alarming", topic.id, answer, topic=topic.keywords) for text in getattr(topic, split)
            ]
        return questions

    # --- prompts to practise on, and held-out questions

    def practice(self) -> list[Question]:
        """Prompts for rankings and PPO: training phrasings, and unknown names that fine-tuning never saw."""
        chance = random.Random(f"{self.seed} practice")
        total = self.config.practice
        unknown = round(total * self.config.practice_unknown_share)
        share = {"unstudied": 0.4, "near_miss": 0.35, "made_up": 0.25}
        questions = []
        for cell, part in share.items():
            names = self.names.classes[cell]["practice"][: round(unknown * part)]
            questions += [self._unknown(name, cell, "practice", chance) for name in names]
        written = self.written_questions("train")
        rest = total - len(questions)
        parts = {"does": 0.36, "takes": 0.06, "module": 0.05, "which": 0.04}
        for kind, part in parts.items():
            questions += _draw(tutor.object_questions(self.objects, kind, "train"), round(rest * part), chance)
        cells = {"howto": 0.2, "harmful": 0.09, "alarming": 0.1, "miss": 0.06, "small_talk": 0.04}
        for cell, part in cells.items():
            questions += _draw([q for q in written if q.cell == cell], round(rest * part), chance)
        questions = [replace(q, text=self._typed(q, chance)) for q in questions]
        chance.shuffle(questions)
        return questions

    def prompts(self, practice: Sequence[Question]) -> Iterator[Conversation]:
        """Practice questions as conversations that wait for an answer; a stated share of them come second.

        Before those stands a question about a studied object, with its answer. A question about that same object then only points
        to it ("And the module?"), as does half of the questions what another name is ("What about json.parse?").
        """
        chance, facts = random.Random(f"{self.seed} prompts"), {fact.name: fact for fact in self.objects}
        for question in practice:
            if chance.random() >= self.config.practice_follow_up_share:
                yield conversation((question.text, ""), meta=question.to_meta())
                continue
            is_same = question.cell == "studied" and question.kind in ("takes", "module")
            fact = facts[question.name] if is_same else chance.choice(self.objects)
            if is_same or (question.kind == "does" and chance.random() < 0.5):
                said = chance.choice(tutor.FOLLOW_UPS[question.kind]).format(name=question.name)
                question = replace(question, text=restyle(said, chance, question.name))
            first = chance.choice(tutor.object_questions([fact], "does", "train"))
            meta = question.to_meta()
            yield conversation((self._typed(first, chance), first.reference), (question.text, ""), meta=meta)

    @cached_property
    def _exam_names(self) -> tutor.Names:
        return tutor.Names.divide(self.objects, self.unstudied, seed=0) if self.seed else self.names

    def exam(self, split: str) -> list[Question]:
        """Questions for the table: phrasings and names of "dev" or "held_out" only, in a fixed shuffled order.

        They do not depend on the seed: runs with different seeds sit the same exam.
        """
        chance, unknown = random.Random(split), self._exam_names.classes
        size = self.config.held_out
        questions: list[Question] = []
        for kind, part in (("does", 1.25), ("takes", 0.25), ("module", 0.25), ("which", 0.25)):
            questions += _draw(tutor.object_questions(self.objects, kind, split), round(size * part), chance)
        for cell in tutor.UNKNOWN_CELLS:
            names = unknown[cell][split][:size]
            questions += [self._unknown(name, cell, split, chance) for name in names]
        written = self.written_questions(split)
        for cell in ("howto", "harmful", "alarming", "miss", "small_talk"):
            of_cell = [q for q in written if q.cell == cell]
            questions += _draw(of_cell, size * (2 if cell == "howto" else 1), chance)
        chance.shuffle(questions)
        return questions

    def about(self, package_text: str) -> dict:
        """What the chat says when it opens: what was studied, what it cannot do, three questions to ask."""
        studied = [fact.name for fact in self.objects]
        name = next((name for name in ("json.dumps", "os.path.join", "sorted", "len") if name in studied), studied[0])
        return {
            "studied": f"{len(self.objects)} functions, classes and methods of {package_text} and "
            f"{len(self.intents)} everyday tasks",
            "cannot": "It is a very small model: it knows nothing else, cannot calculate, and can be wrong.",
            "ask": [f"What does {name} do?", self.intents[0].train[0], "What does json.parse do?"],
        }


def _draw(questions: list[Question], count: int, chance: random.Random) -> list[Question]:
    """`count` questions, spread over names first: one template of each name before a second of any."""
    by_name: dict[str, list[Question]] = {}
    for question in questions:
        by_name.setdefault(question.name or question.text, []).append(question)
    groups = list(by_name.values())
    chance.shuffle(groups)
    for group in groups:
        chance.shuffle(group)
    rounds = max((len(group) for group in groups), default=0)
    spread = [group[i] for i in range(rounds) for group in groups if i < len(group)]
    return spread[:count]


def run(config: LessonsConfig, work: Work) -> dict:
    """Write the lesson of the corpus in `work.inputs["corpus"]`; returns its counts."""
    corpus = work.inputs["corpus"]
    with open(corpus / "objects.jsonl", encoding="utf-8") as file:
        objects = [ObjectFact.from_json(json.loads(line)) for line in file]
    names = json.loads((corpus / "names.json").read_text(encoding="utf-8"))
    others = open_book.read_facts(corpus / "others.jsonl") if config.open_book else []
    folder = work.folder.path
    with progress(4, "lessons", unit="step") as bar:
        lesson = Lesson(objects, names["unstudied"], config, work.seed, others)
        bar.update(1, names=len(lesson.real))
        train = lesson.train()
        validation = [train.pop() for _ in range(len(train) // 40 + 1)]
        bar.update(1, conversations=len(train))
        practice, exams = lesson.practice(), {split: lesson.exam(split) for split in EXAMS}
        bar.update(1, questions=len(practice))
        write_records(folder / "train.jsonl", train)
        write_records(folder / "valid.jsonl", validation)
        write_records(folder / "prompts.jsonl", lesson.prompts(practice))
        for split, questions in exams.items():
            write_lines(folder / f"{split}.jsonl", (json.dumps(q.to_meta()) for q in questions))
        bar.update(1)
    about = lesson.about(names["title"])
    return {
        "line": f"{len(train)} conversations about {len(objects)} objects and {len(lesson.intents)} tasks, "
        f"{len(practice)} practice prompts, {len(exams['held_out'])} held-out questions",
        "objects": len(objects),
        "intents": len(lesson.intents),
        "conversations": dict(Counter(str(c.meta["cell"]) for c in train)),
        "practice": dict(Counter(q.cell for q in practice)),
        "held_out": dict(Counter(q.cell for q in exams["held_out"])),
        "about": about,
    }
