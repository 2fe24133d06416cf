"""Two models compared: margins by hand, prompts as the unit, and the rule that decides."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from lyceum.batches.pairs import encode_rankings
from lyceum.config import Recipe
from lyceum.corpus.records import Conversation, Message, Ranking, write_records
from lyceum.engine.engine import Engine
from lyceum.errors import RunError
from lyceum.evals import compare, compare_page
from lyceum.evals.compare import CompareConfig, by_prompt, orders, verdict
from lyceum.model.checkpoint import save_checkpoint
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import StageFolder, State, Work, write_state
from lyceum.tokens.chat import ChatFormat
from lyceum.tokens.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["user\nassistant\nsystem\ntool\n yes no what is it " * 40], 300)


@pytest.fixture(scope="module")
def old(tokenizer: Tokenizer) -> Decoder:
    spec = ModelSpec(tokenizer.vocab_size, 2, 32, 4, 2, head_width=8, ffn_width=64, context_length=96)
    return Decoder(spec, torch.Generator().manual_seed(0))


def ranking(question: str, *answers: str, ranks: tuple[float, ...] = ()) -> Ranking:
    prompt = Conversation((Message("user", question),))
    said = tuple(Message("assistant", text) for text in answers)
    return Ranking(prompt, said, ranks or tuple(float(number) for number in range(1, len(answers) + 1)))


RANKINGS = [
    ranking("what is it", "yes", "no"),
    ranking("what is it", "no no", "yes"),
    ranking("is it", "yes", "no", "it"),
]


def leaning(model: Decoder, token: int, by: float) -> Decoder:
    """A copy that finds one token likelier, whatever stands before: its embedding has more of the mean hidden state."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for index, layer in enumerate(changed.parameters()):
            if index == 0 and layer.dim() == 2:
                layer[token] += by * torch.randn(layer.shape[1], generator=torch.Generator().manual_seed(1))
    return changed


def test_the_implicit_margin_is_the_sum_of_log_ratios_over_the_answer(old: Decoder, tokenizer: Tokenizer) -> None:
    """By hand: log-softmax of both models over each row, the answer's tokens summed, better less worse."""
    new = leaning(old, tokenizer.encode("yes")[0], 0.3)
    encoded = encode_rankings(RANKINGS, ChatFormat(tokenizer)).rankings
    margins = []
    for one in encoded:
        ratios = []
        for row in one.rows:
            total = 0.0
            for model, sign in ((new, 1.0), (old, -1.0)):
                with torch.no_grad():
                    logp = model.logits(model(torch.tensor([row])))[0].log_softmax(-1)
                total += sign * sum(float(logp[t - 1, row[t]]) for t in range(one.num_prompt, len(row)))
            ratios.append(total)
        margins.append([ratios[0] - worse for worse in ratios[1:]] + ([ratios[1] - ratios[2]] if ratios[2:] else []))
    found = orders(Engine(old), Engine(new), encoded)
    flat = [margin for own in margins for margin in own]
    assert found["implicit"][0] == pytest.approx(sum(margin > 0 for margin in flat) / len(flat))
    assert found["new_minus_old"][0] == pytest.approx(found["new"][0] - found["old"][0])


def test_a_model_beside_itself_went_no_way_at_all(old: Decoder, tokenizer: Tokenizer) -> None:
    found = orders(Engine(old), Engine(old), encode_rankings(RANKINGS, ChatFormat(tokenizer)).rankings)
    assert found["implicit"] == (0.5, 0.5, 0.5) and found["new_minus_old"] == (0.0, 0.0, 0.0)


def test_what_was_said_of_one_prompt_is_one_draw_of_the_bootstrap(tokenizer: Tokenizer) -> None:
    encoded = encode_rankings(RANKINGS, ChatFormat(tokenizer)).rankings
    groups = by_prompt(encoded, [[1.0, 0.0], [0.0, 3.0], [2.0, 1.0, 0.0]])
    assert groups == [[1.0, -3.0], [1.0, 2.0, 1.0]]


def told(implicit: tuple[float, float, float], old: float = 1.0, new: float = 1.0, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {**compare.stated("implicit", implicit), "old": {"ended": old}, "new": {"ended": new}}
    for name, share in more.items():
        found |= compare.stated(name, share)
    return found


@pytest.mark.parametrize(
    ("found", "is_better"),
    [
        (told((0.7, 0.6, 0.8)), True),
        (told((0.6, 0.49, 0.7)), False),  # the interval holds one half
        (told((0.3, 0.2, 0.4)), False),
        (told((0.9, 0.8, 1.0), old=0.98, new=0.90), False),  # it forgot how to end
        (told((0.9, 0.8, 1.0), old=0.98, new=0.95), True),
        (told((0.6, 0.4, 0.7), judge=(0.8, 0.7, 0.9), preferred=(0.9, 0.8, 0.95)), True),
        (told((0.6, 0.4, 0.7), judge=(0.6, 0.4, 0.9), preferred=(0.9, 0.8, 0.95)), False),  # a judge that knows nothing
        (told((0.6, 0.4, 0.7), judge=(0.8, 0.7, 0.9), preferred=(0.6, 0.4, 0.8)), False),
    ],
)
def test_the_rule(found: dict[str, Any], is_better: bool) -> None:
    better, why = verdict(found, 0.05)
    assert better is is_better and why.startswith("better" if is_better else ("worse", "not shown"))


def test_a_section_compares_a_policy_with_what_it_started_from(
    old: Decoder, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    policy, rankings = StageFolder(tmp_path / "preference"), tmp_path / "judgements"
    save_checkpoint(tmp_path / "elsewhere", old, tokenizer)
    save_checkpoint(policy.checkpoint, leaning(old, tokenizer.encode("yes")[0], 0.3), tokenizer)
    write_records(rankings / "valid.jsonl", [ranking(f"what is it {n}", "yes", "no") for n in range(6)])
    folder = StageFolder(tmp_path / "compare")
    recipe = Recipe("test", 0, {}, (), tmp_path / "test.toml")
    work = Work(folder, {"policy": policy.path, "rankings": rankings}, 1, recipe)
    with pytest.raises(RunError, match="what it started from"):
        compare.run(CompareConfig(), work)
    write_state(policy, State("key", "preference", {}, {"policy": str(tmp_path / "elsewhere")}, finished=True))
    found = compare.run(CompareConfig(prompts=4, max_response_tokens=8), work)
    assert (found["pairs"], found["prompts"], found["answered"]) == (6, 6, 4) and len(found["examples"]) == 4
    assert compare.run(CompareConfig(prompts=4, max_response_tokens=8), work) == found
    page = compare_page.section("compare", {**found, "why": "<b>"})
    assert "&lt;b&gt;" in page and "what is it 0" in page and compare_page.section("compare", {}) == ""
