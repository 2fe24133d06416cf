"""Two ranks have the numbers of one, for every stage that ranks run together: a table, and the jobs of those that sample.

Run as a script, `python test_ranks.py FOLDER` under torchrun's environment, it is one rank of every job.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from on_policy_toy import (
    SMALL,
    GroupToy,
    TamerToy,
    Toy,
    in_two_ranks,
    likes_fives,
    lines,
    small_policy,
    text_rows,
    train,
    work_in,
)
from safetensors.torch import load_file

from lyceum import dist
from lyceum.cli.kinds import KINDS
from lyceum.corpus.records import Conversation, Message, Ranking, write_records
from lyceum.model.checkpoint import save_checkpoint
from lyceum.model.ensemble import MEMBER
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import plain
from lyceum.stages import reward
from lyceum.stages.grpo import WITHOUT_CRITIC, GRPOConfig
from lyceum.stages.onpolicy import OnPolicy
from lyceum.stages.tamer import SimulatedTrainer, TamerConfig
from lyceum.tokens.tokenizer import Tokenizer

HERE, LOOP, DIRECT = "tests/stages/test_ranks.py", "tests/train/test_parallel.py", "tests/stages/test_preference.py"
# kind of section -> where two ranks of it are compared with one
TABLE = {
    "pretrain": (LOOP,), "sft": (LOOP,), "reward": (LOOP, HERE), "preference": (DIRECT,), "ppo": (HERE,),
    "grpo": (HERE,), "tamer": (HERE,),
}  # fmt: skip


def test_every_kind_of_section_that_ranks_run_together_is_in_the_table() -> None:
    assert set(TABLE) == {name for name, kind in KINDS.items() if kind.every_rank}
    for file in {file for files in TABLE.values() for file in files}:
        assert "\ndef test_two_ranks_" in (Path(__file__).parents[2] / file).read_text(encoding="utf-8")


# ---------------------------------------------------------------- those that sample

MIXED: dict[str, Any] = {"ptx_coef": 0.2, "ptx_rows": 0.5, "micro_tokens": 40}
PPO = replace(SMALL, prompts_per_iteration=9, **MIXED)
GRPO = GRPOConfig(
    iterations=2, prompts_per_iteration=5, group_size=3, max_response_tokens=6, lr=4e-3, warmup=0.0, engine_batch=12,
    **MIXED,
)  # fmt: skip
TAMER = TamerConfig(**{**asdict(PPO), "iterations": 3, "missing_end": "keep", "bias": 2.0, "tokens_per_s": 1.5})


def ppo(**changed: Any) -> OnPolicy:
    return Toy(replace(PPO, **changed), text=text_rows, model=small_policy().double())


def grpo(name: str) -> OnPolicy:
    minibatches = 1 if name == "rloo" else 2
    config = replace(GRPO, algorithm=name, minibatches=minibatches)
    return GroupToy(config, text=text_rows, model=small_policy().double())


def tamer(**changed: Any) -> OnPolicy:
    config = replace(TAMER, **changed)
    trainer = SimulatedTrainer(likes_fives, config.tokens_per_s)
    return TamerToy(config, trainer=trainer, text=text_rows, model=small_policy().double())


JOBS: dict[str, Callable[[], OnPolicy]] = {
    "ppo": ppo,
    "ppo, shared critic": lambda: ppo(critic="shared"),
    "ppo, a rank without an episode": lambda: ppo(prompts_per_iteration=1, minibatches=1),
    **{name: lambda name=name: grpo(name) for name in WITHOUT_CRITIC},  # type: ignore[misc]
    "tamer": tamer,
    "tamer, a rank without an episode": lambda: tamer(prompts_per_iteration=1, minibatches=1),
}


# ---------------------------------------------------------------- ensembles of reward models


class Double(reward.Reward):
    """The reward model's stage in double precision."""

    def begin(self, model: Any, *given: Any, **named: Any) -> None:
        super().begin(model.double(), *given, **named)


MEMBERS = reward.RewardConfig(
    members=2, aggregate="mean_less_deviations", deviations=0.5, batch_prompts=4, micro_tokens=150, log_every=1,
    save_every=2, normalise_on="train",
)  # fmt: skip


def make_school(folder: Path) -> None:
    """What an ensemble starts from: a small policy with its tokenizer, and rankings."""
    tokenizer, draw = Tokenizer.train(["what is it? yes no maybe it is so " * 20], 280), random.Random(0)
    spec = ModelSpec(tokenizer.vocab_size, 1, 32, 2, 2, 16, 64, 64)
    save_checkpoint(folder / "sft" / "checkpoint", Decoder(spec, torch.Generator().manual_seed(0)), tokenizer)
    for part, count in (("train", 13), ("valid", 5)):
        rows = []
        for number in range(count):
            replies = tuple(Message("assistant", draw.choice(("yes ", "no ")) * (n + 1)) for n in range(3))
            rows.append(Ranking(Conversation((Message("user", f"{part} {number}?"),)), replies, (1.0, 2.0, 3.0)))
        write_records(folder / "rankings" / f"{part}.jsonl", rows)


def train_ensemble(folder: Path, school: Path) -> None:
    """An ensemble of two; its report beside it."""
    work = work_in(folder, inputs={"policy": school / "sft", "rankings": school / "rankings"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward, "Reward", Double)
        report = reward.run(MEMBERS, work)
    if dist.is_main():
        (folder / "report.json").write_text(json.dumps(plain(report)))


# ---------------------------------------------------------------- the comparison


def do_all(folder: Path, school: Path) -> None:
    for name, make in JOBS.items():
        train(make(), folder / name)
    train_ensemble(folder / "ensemble", school)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks made of every job in `two`, what one made of it in `one`."""
    folder = tmp_path_factory.mktemp("ranks")
    make_school(folder / "school")
    in_two_ranks(__file__, str(folder / "two"))
    do_all(folder / "one", folder / "school")
    return folder


def assert_same(one: Path, two: Path) -> None:
    """Every logged number, and every tensor that was written: weights, optimizers, what a trainer has taught."""
    for mine, theirs in zip(lines(one), lines(two), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-9)
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(two) for path in two.rglob("*.safetensors")) and files
    for file in files:
        kept, found = load_file(one / file), load_file(two / file)
        assert kept.keys() == found.keys()
        for name in kept.keys() - {"random"}:
            assert torch.allclose(kept[name], found[name], rtol=0, atol=1e-9), (file, name)


@pytest.mark.parametrize("job", JOBS)
def test_two_ranks_train_as_one_does(job: str, both: Path) -> None:
    assert_same(both / "one" / job, both / "two" / job)
    logged = lines(both / "one" / job)
    assert len({line["loss/policy"] for line in logged}) > 1  # something is compared
    if job == "tamer":
        assert logged[-1]["tamer/presses"] > 3
        state = load_file(both / "one" / job / "trainer" / "state.safetensors")
        assert state["stage/human"].abs().max() > 0.01


def test_two_ranks_train_an_ensemble_as_one_does(both: Path) -> None:
    one, two = (both / ranks / "ensemble" for ranks in ("one", "two"))
    for part in (".", f"{MEMBER}2"):
        assert_same(one / part, two / part)
    joined = [json.loads((folder / "checkpoint" / "lyceum.json").read_text())["ensemble"] for folder in (one, two)]
    assert joined[0] == pytest.approx(joined[1], abs=1e-9)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (one, two)]
    assert reports[0].keys() == reports[1].keys() and reports[0]["steps"] == 2 * 4
    for name in ("accuracy_noisy", "length_baseline", "calibration_error", "agreement"):
        if name in reports[0]:
            assert reports[0][name] == pytest.approx(reports[1][name], abs=1e-9)
    assert reports[0]["line"] == reports[1]["line"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.start()
    do_all(Path(sys.argv[1]), Path(sys.argv[1]).with_name("school"))
    dist.stop()
    json.dump({}, sys.stdout)
