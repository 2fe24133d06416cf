"""The laboratory's parts by hand, and a small one from end to end: the proxy rises, gold follows no proxy for ever."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lyceum.errors import ConfigError, DataError
from lyceum.model.transformer import Decoder
from lyceum.stages.overoptimisation import (
    GOLD,
    LETTERS,
    Gold,
    LabConfig,
    Laboratory,
    as_text,
    layers_and_width,
    normalise,
    read_letters,
    spec_of,
)

pytestmark = pytest.mark.timeout(500)

SMALL = LabConfig(
    seeds=1, prompt_letters=4, reply_letters=6, policy="1x16", policy_letters=4000, gold="1x32", gold_letters=4000,
    proxies=("1x16",), comparisons=(16,), proxy_epochs=1, iterations=3, replies=8, best_of=8, best_of_prompts=4,
)  # fmt: skip


def test_a_text_becomes_letters_and_nothing_else(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("The  CAT, sat: on\n1 mat. " * 2000)
    ids = read_letters(str(text))
    assert as_text(ids[:21]) == "the cat, sat on mat. " and ids.max() < len(LETTERS)
    text.write_text("too short")
    with pytest.raises(DataError, match="the text has 9 letters"):
        read_letters(str(text))
    with pytest.raises(DataError, match="cannot read the text"):
        read_letters(str(tmp_path / "none"))


def test_without_a_file_it_reads_the_manual_that_comes_with_python() -> None:
    ids = read_letters("")
    assert len(ids) > 200_000 and " the " in as_text(ids[:2000])


def test_shapes_are_read_and_arms_are_each_shape_at_most_data_and_the_last_at_less() -> None:
    assert layers_and_width("2x64") == (2, 64) and spec_of("2x64", 24).num_heads == 4
    for wrong in ("2*64", "0x64", "2x20", "2x0", "big"):
        with pytest.raises(ConfigError, match="is no shape"):
            layers_and_width(wrong)
    with pytest.raises(ConfigError, match="no proxy to follow"):
        LabConfig(proxies=())
    arms = LabConfig(proxies=("1x16", "2x64"), comparisons=(300, 3000, 30)).arms
    assert [(shape, count) for _, shape, count in arms] == [("2x64", 30), ("2x64", 300), ("1x16", 3000), ("2x64", 3000)]


def test_gold_is_fluency_and_taste_by_hand() -> None:
    model = Decoder(spec_of("1x16", 10), torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.output_weight.mul_(20)
    prompts, replies = [[1, 2], [3, 4, 5], [6]], [[6, 7, 8], [9, 10], [1, 1, 2]]
    gold = Gold(model, np.arange(len(LETTERS)) / 10, weight=2.0)
    fluency = []
    for prompt, reply in zip(prompts, replies, strict=True):
        with torch.no_grad():
            logp = torch.log_softmax(model.logits(model(torch.tensor([[*prompt, *reply]]))), -1)[0]
        expected = [float(logp[len(prompt) + i - 1, letter]) for i, letter in enumerate(reply)]
        fluency.append(sum(expected) / len(expected))
    assert gold.fluency(prompts, replies) == pytest.approx(fluency, abs=1e-5)
    assert gold.liking(replies) == pytest.approx([0.7, 0.95, 4 / 30])
    normalise(gold, prompts, replies)

    def z(x: Any) -> Any:
        return (np.asarray(x) - np.mean(x)) / np.std(x)

    expected = z(z(fluency) + 2 * z([0.7, 0.95, 4 / 30]))
    assert gold.score(prompts, replies) == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> tuple[Laboratory, list[dict[str, Any]]]:
    made = Laboratory(SMALL, tmp_path_factory.mktemp("lab"))
    return made, made.run()


@pytest.mark.slow
def test_every_arm_has_a_curve_for_every_iteration_and_for_every_n(
    laboratory: tuple[Laboratory, list[dict[str, Any]]],
) -> None:
    _, results = laboratory
    assert [result["arm"] for result in results] == ["1x16, 16", GOLD]
    for result in results:
        assert [len(values) for values in result["rl"].values()] == [3, 3, 3]
        assert result["best_of_n"]["n"] == [1, 2, 4, 8] and 0 <= result["accuracy"] <= 1
        assert result["rl"]["distance"][0] == pytest.approx(0, abs=1e-2) and len(result["texts"][0]) == 4 + 1 + 6
    control = results[-1]
    assert control["rl"]["proxy"] == pytest.approx(control["rl"]["gold"]) and control["accuracy"] == 1
    assert control["best_of_n"]["gold"] == sorted(control["best_of_n"]["gold"])  # by gold itself it can only rise


@pytest.mark.slow
def test_a_finished_arm_is_read_and_not_run_again(
    laboratory: tuple[Laboratory, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, results = laboratory
    again = Laboratory(SMALL, made.folder)

    def never(*given: Any) -> None:
        raise AssertionError("it was finished")

    monkeypatch.setattr(again, "follow", never)
    monkeypatch.setattr(again, "proxy", never)
    assert again.run() == [{**result, "rl": {k: list(v) for k, v in result["rl"].items()}} for result in results]


@pytest.mark.slow
def test_comparisons_are_golds_and_as_many_as_stated_are_turned_round(
    laboratory: tuple[Laboratory, list[dict[str, Any]]],
) -> None:
    made, _ = laboratory
    clean, noisy = made.pairs(200, 3, 0.0), made.pairs(200, 3, 0.25)
    for one, two in zip(clean, noisy, strict=True):
        assert one.rows == two.rows and len(one.rows[0]) == len(one.rows[1]) == SMALL.context
        width = SMALL.prompt_letters
        gold = made.gold.score([row[:width] for row in one.rows], [row[width:] for row in one.rows])
        assert (gold[0] > gold[1]) == (one.ranks[0] < one.ranks[1])  # type: ignore[operator]
    share = sum(one.ranks != two.ranks for one, two in zip(clean, noisy, strict=True)) / 200
    assert abs(share - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 200)


@pytest.mark.slow
def test_other_letters_make_other_readers_and_the_same_ones_are_kept(
    laboratory: tuple[Laboratory, list[dict[str, Any]]],
) -> None:
    made, _ = laboratory
    again = Laboratory(replace(SMALL, iterations=9), made.folder)
    for one, two in zip(made.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(one, two)
