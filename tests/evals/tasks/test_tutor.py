"""The benchmark's promises: splits that do not meet, names that are what their class says, and a rule with known scores."""

from __future__ import annotations

import itertools

import pytest

from lyceum.corpus.packages import ObjectFact
from lyceum.evals.metrics import words
from lyceum.evals.tasks import tutor
from lyceum.evals.tasks.tutor import DECLINE, Question, grade


def fact(
    name: str, summary: str, *, kind: str = "function", parameters: tuple[str, ...] = ("x",), returns: str = ""
) -> ObjectFact:
    module = name.rsplit(".", 1)[0] if "." in name else "built-in"
    return ObjectFact(
        name=name, kind=kind, module=module, signature="", parameters=parameters, returns=returns,
        summary=summary, doc=summary, uses=1, package="stdlib",
    )  # fmt: skip


FACTS = [
    fact(
        "json.dumps",
        "Serialize obj to a JSON formatted str.",
        parameters=("obj", "skipkeys", "a", "b", "c"),
        returns="a str",
    ),
    fact("len", "Return the number of items in a container."),
    fact("str.join", "Concatenate any number of strings.", kind="method", parameters=("iterable",)),
    fact("math.sqrt", "Return the square root of x."),
    fact("cmath.sqrt", "Return the square root of a complex x."),
]
OTHERS = [f"mod{i}.thing{i}" for i in range(200)]


def test_every_name_falls_in_one_split_and_all_splits_are_filled() -> None:
    names = tutor.Names.divide(FACTS, OTHERS, seed=0, made_up=300)
    for cell in tutor.UNKNOWN_CELLS:
        pools = [set(names.classes[cell][split]) for split in tutor.SPLITS]
        assert all(pools), cell
        assert all(not a & b for a, b in itertools.combinations(pools, 2))


def test_division_does_not_depend_on_which_other_names_there_are() -> None:
    few = tutor.Names.divide(FACTS, OTHERS[:100], seed=0, made_up=10).classes["unstudied"]
    many = tutor.Names.divide(FACTS, OTHERS, seed=5, made_up=10).classes["unstudied"]
    assert all(set(few[split]) <= set(many[split]) for split in tutor.SPLITS)


def test_templates_of_training_and_exams_do_not_overlap() -> None:
    for kind, by_split in tutor.TEMPLATES.items():
        asked = [tuple(words(template)) for templates in by_split.values() for template in templates]
        shared = {one for one in asked if asked.count(one) > 1}
        assert not shared - {("name",)}, kind  # "{name}" and "{name}?" are two ways to type one training template


def test_every_template_names_what_it_asks_about() -> None:
    wanted = {"does": "{name}", "takes": "{name}", "module": "{leaf}", "which": "{summary}"}
    for kind, by_split in tutor.TEMPLATES.items():
        for template in itertools.chain(*by_split.values()):
            assert wanted[kind] in template and template.replace("{kind}", "").count("{") == 1, template


def test_near_misses_and_made_up_names_are_not_real() -> None:
    real = {f.name for f in FACTS} | set(OTHERS)
    assert not set(tutor.near_misses(FACTS, real, 0)) & real
    assert not set(tutor.made_up_names(500, real, 0)) & real


def test_a_question_that_cannot_single_out_its_object_is_not_asked() -> None:
    asked = {q.name for q in tutor.object_questions(FACTS, "module", "train")}
    assert asked == {"json.dumps", "len", "str.join"}  # sqrt is in two studied modules


def test_reference_answers() -> None:
    assert tutor.takes_answer(FACTS[0]) == "It takes obj, skipkeys, a and 2 more. It returns a str."
    assert tutor.takes_answer(FACTS[1]) == "It takes x."
    assert tutor.module_answer(FACTS[0]) == "dumps is in the json module."
    assert tutor.module_answer(FACTS[1]) == "len is built in."
    assert tutor.module_answer(FACTS[2]) == "join is a method of str."


STUDIED = Question("What does len do?", "studied", "does", "Return the number of items in a container.", name="len")
UNKNOWN = Question("What does flurb do?", "made_up", "does", DECLINE, name="flurb")
HOWTO = Question("reverse a list", "howto", "howto", "Use reversed.\nlist(reversed(x))", code="list(reversed(x))")


@pytest.mark.parametrize(
    ("question", "answer", "score"),
    [
        (STUDIED, STUDIED.reference, 1.0),
        (STUDIED, DECLINE, -0.6),
        (STUDIED, "Open a file.", -0.6),
        (UNKNOWN, DECLINE, 1.0),
        (UNKNOWN, "Return the number of items in a container.", -1.0),
        (HOWTO, HOWTO.reference, 1.0),
    ],
)
def test_the_rule_on_known_answers(question: Question, answer: str, score: float) -> None:
    assert grade(question, answer).score == pytest.approx(score)


def test_a_how_to_without_its_line_is_not_right() -> None:
    assert not grade(HOWTO, "Use reversed.\nlist(reverse(x))").right


def test_not_ending_and_rambling_cost() -> None:
    assert grade(STUDIED, STUDIED.reference, ended=False).score == pytest.approx(0.5)
    long = STUDIED.reference * 4
    assert grade(STUDIED, long).rambled
    assert grade(STUDIED, long).score < grade(STUDIED, STUDIED.reference).score - 0.3


def test_an_order_of_answers_the_rule_must_keep() -> None:
    """Right beats half right beats wrong for a studied object; a needless decline is no better than a wrong answer."""
    half = "Return the number of items."
    scores = [grade(STUDIED, answer).score for answer in (STUDIED.reference, half, "Sort the list.")]
    assert scores == sorted(set(scores), reverse=True)
    assert grade(STUDIED, DECLINE).score == scores[-1]


def test_claims_are_found_by_exact_lookup_not_by_the_rule() -> None:
    honest = tutor.honest_sentences([DECLINE])
    assert not tutor.claims(DECLINE, honest)
    assert not tutor.claims("", honest)
    assert tutor.claims("I have not studied cats, they purr.", honest)  # the rule's pattern would take it for a decline
    assert grade(UNKNOWN, "I have not studied cats, they purr.").declined


def test_a_question_survives_its_own_json() -> None:
    question = Question("kill it", "alarming", "alarming", "Use kill.", topic=("kill", "terminate"))
    assert Question.from_meta(question.to_meta()) == question
