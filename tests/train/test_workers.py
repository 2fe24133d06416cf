"""Pieces of a micro-batch on threads: the same gradient, the same bits each time, and no thread lost to an error."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lyceum.batches.pack import TokenBatch, collate
from lyceum.batches.pairs import RankingBatch
from lyceum.config import Recipe
from lyceum.log import read_metrics
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import StageFolder, Work
from lyceum.tokens.chat import Rendered
from lyceum.train import loop, workers
from lyceum.train.losses import next_token_loss
from lyceum.train.optim import Learner, OptimizerSettings
from lyceum.train.stage import Metrics, Stage, Step, Term, TrainConfig, Trained
from lyceum.train.workers import Sums, backward, deal, num_workers

CONFIG = TrainConfig(lr=0.01, matrix_lr=0.02, log_every=1, warmup=0.0)
SPEC, _ = ModelSpec.from_depth(2, vocab_size=50, width=32, num_heads=2, context_length=32)


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def rows(count: int, seed: int) -> TokenBatch:
    drawn = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 20, (count,), generator=drawn).tolist()
    texts = [torch.randint(50, (n,), generator=drawn).tolist() for n in lengths]
    return collate([Rendered(ids, [1.0] * len(ids)) for ids in texts], pad_id=0)


class Rows(Stage[TokenBatch]):
    """A tiny decoder in float64, two micro-batches a step; it notes which threads called it, with how many of torch's."""

    kind, headline = "rows", "loss/text"

    def start(self, work: Work) -> None:
        self.num_steps = 5
        self.calls: set[tuple[str, int]] = set()
        self.bad_at: int | None = None
        model = Decoder(SPEC, torch.Generator().manual_seed(0)).double()
        self.trained["net"] = Trained(model, self.config.optimizer(), save_as=None)

    def steps(self, first: int) -> Iterator[Step[TokenBatch]]:
        for number in range(first, self.num_steps):
            yield Step([rows(8, 2 * number), rows(5, 2 * number + 1)], tokens=100)

    def counts(self, micro_batch: TokenBatch) -> dict[str, float]:
        return {"text": micro_batch.num_targets}

    def loss(self, micro_batch: TokenBatch) -> tuple[dict[str, Term], Metrics]:
        self.calls.add((threading.current_thread().name.split("_")[0], torch.get_num_threads()))
        total, _, metrics = next_token_loss(
            self.trained["net"].module, micro_batch.tokens_BT, micro_batch.weights_BT.double()
        )
        return {"text": Term(total)}, metrics

    def halves(self, micro_batch: TokenBatch) -> list[TokenBatch]:
        return micro_batch.halves()


class TwoTerms(Rows):
    """The rows of the second micro-batch, which have names, are also read with other words: a term that the others lack."""

    def steps(self, first: int) -> Iterator[Step[TokenBatch]]:
        for step in super().steps(first):
            step.micro_batches[1] = replace(step.micro_batches[1], names=("turned",) * 5)
            yield step

    def counts(self, micro_batch: TokenBatch) -> dict[str, float]:
        count = micro_batch.num_targets
        return {"text": count, **({"turned": count} if micro_batch.names else {})}

    def loss(self, micro_batch: TokenBatch) -> tuple[dict[str, Term], Metrics]:
        terms, metrics = super().loss(micro_batch)
        if micro_batch.names:
            model, tokens_BT = self.trained["net"].module, 49 - micro_batch.tokens_BT
            terms["turned"] = Term(next_token_loss(model, tokens_BT, micro_batch.weights_BT.double())[0], 0.5)
        return terms, metrics


def trained(
    folder: Path, count: int, monkeypatch: pytest.MonkeyPatch, kind: type[Rows] = Rows
) -> tuple[Rows, list[dict[str, float]]]:
    monkeypatch.setattr(workers, "num_workers", lambda micro_tokens: count)
    monkeypatch.setattr(loop, "pick_device", lambda: torch.device("cpu"))
    stage = kind(CONFIG)
    folder.mkdir()
    loop.run_stage(stage, Work(StageFolder(folder), {}, seed=7, recipe=Recipe("toy", 7, {}, (), Path("toy.toml"))))
    return stage, list(read_metrics(folder / "metrics.jsonl"))


@pytest.mark.parametrize(("count", "kind"), [(2, Rows), (4, Rows), (2, TwoTerms)])
def test_workers_train_as_one_thread_does(
    count: int, kind: type[Rows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, lines = trained(tmp_path / "alone", 1, monkeypatch, kind)
    beside, others = trained(tmp_path / "beside", count, monkeypatch, kind)
    assert {threads for _, threads in alone.calls} == {4} and {name for name, _ in alone.calls} == {"MainThread"}
    assert beside.calls == {("MainThread", 4 // count), ("worker", 4 // count)}
    norms = [name for name in lines[0] if "grad_norm/" in name]
    assert len(norms) == (2 if kind is Rows else 3)
    for name in ("loss", "token_accuracy", *norms):
        assert [line[name] for line in others] == pytest.approx([line[name] for line in lines], abs=1e-10)
    for one, other in zip(
        alone.trained["net"].module.parameters(), beside.trained["net"].module.parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)
    assert torch.get_num_threads() == 4


def test_the_bits_do_not_depend_on_which_worker_ends_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def weights(name: str) -> torch.Tensor:
        stage, _ = trained(tmp_path / name, 4, monkeypatch)
        return torch.cat([p.detach().flatten() for p in stage.trained["net"].module.parameters()])

    first = weights("0")
    assert all(torch.equal(first, weights(str(number))) for number in range(1, 4))


def test_a_micro_batch_is_cut_and_what_cannot_be_cut_stays_whole() -> None:
    def halves(piece: str) -> list[str]:
        return [piece[: len(piece) // 2], piece[len(piece) // 2 :]] if len(piece) > 1 else [piece]

    assert deal(["abcd", "efg"], halves, 2) == [["ab", "e"], ["cd", "fg"]]
    assert deal(["abcd"], halves, 4) == [["a"], ["b"], ["c"], ["d"]]
    assert deal(["a", "bcd"], halves, 2) == [["a", "cd"], ["b"]]
    assert deal(["a", "b"], halves, 2) == [["a", "b"]]  # a stage that cuts nothing promised nothing
    assert deal(["ab"], halves, 4) == [["ab"]]  # not enough for all
    assert deal(["abcd"], halves, 1) == [["abcd"]]


def test_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [num_workers(tokens) for tokens in (512, 2048, 4095, 4096, 1 << 20)] == [1, 2, 2, 4, 4]
    torch.set_num_threads(1)
    assert num_workers(1 << 20) == 1


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_in_a_worker_is_the_steps_error_and_the_threads_come_back(bad: int) -> None:
    def losses(piece: int, sums: Sums) -> dict[str, torch.Tensor]:
        seen.append(piece)
        if piece == bad:
            raise ValueError("broken")
        return {"": learner.parameters[0].sum()}

    seen: list[int] = []
    learner = Learner(torch.nn.Linear(2, 2), OptimizerSettings(lr=0.1))
    with pytest.raises(ValueError, match="broken"):
        backward([[0], [1]], losses, {}, [learner], {"": [learner.gradient]})
    assert sorted(seen) == [0, 1] and torch.get_num_threads() == 4


def test_ranking_batches_are_halved_by_prompt() -> None:
    lengths, group = torch.tensor([3, 4, 5, 2, 2]), torch.tensor([0, 0, 1, 1, 2])
    tokens = torch.arange(25).view(5, 5)
    batch = RankingBatch(tokens, lengths, group, torch.tensor([1.0, 2, 1, 2, 1]), None, [{"n": n} for n in range(3)])
    first, second = batch.halves()
    assert (
        torch.equal(first.tokens_BT, tokens[:2, :4]) and first.group_B.tolist() == [0, 0] and first.meta == [{"n": 0}]
    )
    assert torch.equal(second.tokens_BT, tokens[2:]) and second.group_B.tolist() == [0, 0, 1] and second.num_groups == 2
    assert second.ranks_B.tolist() == [1, 2, 1] and first.halves() == [first]
    chances: Any = replace(batch, probabilities_B=torch.tensor([0.5, 0.5, 1.0, 0.0, 1.0])).halves()
    assert [half.probabilities_B.tolist() for half in chances] == [[0.5, 0.5], [1.0, 0.0, 1.0]]
