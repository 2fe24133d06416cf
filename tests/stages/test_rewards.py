"""Reward sources: what functions are given, how several are added, and what becomes of what cannot be scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lyceum.corpus.records import Conversation, Message
from lyceum.errors import ConfigError, UsageError
from lyceum.stages.rewards import Blend, FunctionReward, RewardSource, checked, find_function, reward_source
from lyceum.tokens.chat import ChatFormat
from lyceum.tokens.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(Tokenizer.train(["what is it? 2 + 3 yes no maybe it is so " * 20], 280))


@pytest.fixture
def asked(chat: ChatFormat) -> tuple[list[list[int]], list[list[int]], list[dict[str, Any]]]:
    """Two questions with an answer each: one that ends, one that is nothing but its end."""
    questions = [Conversation((Message("user", text),)) for text in ("what is 2 + 3?", "is it so?")]
    replies = [chat.reply(Message("assistant", text)).ids for text in ("it is 5", "")]
    return [chat.prompt(question) for question in questions], replies, [{"n": 0}, {"n": 1}]


def test_a_function_gets_what_was_last_asked_what_was_answered_and_what_the_record_says(
    chat: ChatFormat, asked: Any
) -> None:
    seen: list[Any] = []

    def reward(*given: Any) -> list[float]:
        seen.append(given)
        return [1, 2]

    assert FunctionReward("mine", reward, chat).score(*asked) == [1.0, 2.0]
    assert seen == [(["what is 2 + 3?", "is it so?"], ["it is 5", ""], [{"n": 0}, {"n": 1}])]


def test_none_and_nan_cannot_be_scored_and_what_is_no_number_is_an_error() -> None:
    assert checked([1, None, math.nan, True], 4) == [1.0, None, None, 1.0]
    for wrong in (math.inf, -math.inf, "good", [1]):
        with pytest.raises(UsageError, match="for response 1") as caught:
            checked([0.0, wrong], 2)  # type: ignore[list-item]
        assert "None" in caught.value.hint
    with pytest.raises(UsageError, match="mine gave 1 scores for 2 responses"):
        checked([1.0], 2, "mine")


def test_an_exception_costs_only_the_response_it_comes_from(
    chat: ChatFormat, asked: Any, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    def reward(prompts: list[str], responses: list[str], meta: Any) -> list[float | None]:
        return [1 / len(text) for text in responses]  # the second is empty

    source = FunctionReward("mine", reward, chat)
    assert source.score(*asked) == [1 / 7, None]
    assert source.score(*asked) == [1 / 7, None]
    said = capsys.readouterr()
    assert (said.out + said.err + caplog.text).count("ZeroDivisionError") == 1  # said once


def test_several_rewards_are_added_by_weight_and_one_that_cannot_score_decides(chat: ChatFormat, asked: Any) -> None:
    def brief(prompts: Any, responses: list[str], meta: Any) -> Sequence[float | None]:
        return [-len(text) for text in responses]

    parts: list[tuple[str, float, RewardSource]] = [
        ("arithmetic", 2.0, reward_source({"arithmetic": 1.0}, chat)),  # the second question is no sum
        ("brief", 0.1, FunctionReward("brief", brief, chat)),
    ]
    blend = Blend(parts)
    assert blend.score(*asked) == [pytest.approx(2.0 - 0.7), None]
    assert blend.means() == {"reward/arithmetic": 1.0, "reward/brief": -3.5}


def test_functions_are_found_in_files_beside_the_recipe_and_in_modules(
    chat: ChatFormat, asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("def length(prompts, responses, meta):\n    return [len(t) for t in responses]\n")
    source = reward_source({"mine.py:length": 1.0}, chat, folder=tmp_path)
    assert source.score(*asked) == [7.0, 0.0]
    monkeypatch.chdir(tmp_path)
    assert find_function("mine.py:length")([""], ["abc"], [{}]) == [3]
    assert find_function("statistics:mean")([1, 2, 3], *[[]] * 0) == 2  # type: ignore[list-item,call-arg]


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("exact_answr", "is no reward", "exact_answer"),
        ("nowhere.py:f", "no file nowhere.py", "recipe's folder"),
        ("no_such_module_at_all:f", "cannot be imported: ModuleNotFoundError", "rewards.py:function"),
        ("statistics:meen", "has no function meen", "mean"),
        ("broken.py:f", "cannot be imported: NameError", "beside the recipe"),
    ],
)
def test_a_reward_that_is_not_there_is_refused_with_the_nearest_name(
    name: str, message: str, hint: str, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text("f = undefined\n")
    with pytest.raises(ConfigError, match=message) as caught:
        find_function(name, tmp_path)
    assert hint in caught.value.hint


def test_the_pattern_reaches_the_verifiers(chat: ChatFormat, asked: Any) -> None:
    def scores(pattern: str) -> list[float | None]:
        return reward_source({"format": 1.0}, chat, pattern=pattern).score(*asked)

    assert scores(r"it is \d") == [1.0, 0.0]
    assert scores("") == [None, None]


def test_a_plain_function_and_a_source_both_serve() -> None:
    from lyceum.stages.rewards import score_function

    def plain(prompts: Any, responses: Any, meta: Any) -> list[float | None]:
        return [1.0]

    found: list[Callable[..., Any]] = [score_function(plain), score_function(Blend([]))]
    assert found[0]([], [[1]], [{}]) == [1.0] and found[1]([], [], []) == []
