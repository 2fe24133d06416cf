"""The Stage contract carries four kinds of stage at once, cut into any micro-batches, on one rank and on two.

Run as a script it is one rank: `python test_stage.py FOLDER` under torchrun's environment trains every toy stage and
writes its weights.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lyceum import dist
from lyceum.config import Recipe
from lyceum.log import read_metrics
from lyceum.run import StageFolder, Work
from lyceum.train import loop
from lyceum.train.loop import run_stage
from lyceum.train.losses import next_token_loss
from lyceum.train.stage import Metrics, Stage, Step, Term, TrainConfig, Trained

DOUBLE = torch.float64
CONFIG = TrainConfig(lr=0.02, matrix_lr=0.02, weight_decay=0.1, clip_norm=0.5, log_every=2, save_every=1, ema=0.5)


class Net(nn.Module):
    """Embedding, one hidden layer, and a read-out of `outputs` numbers (0: tied logits)."""

    def __init__(self, outputs: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6, dtype=DOUBLE)
        self.layers = nn.ModuleList([nn.Linear(6, 6, bias=False, dtype=DOUBLE) for _ in range(2)])
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(6, outputs, dtype=DOUBLE) if outputs else None

    @property
    def output_weight(self) -> Tensor:
        return self.embed.weight

    def forward(self, tokens: Tensor, at_N: Tensor | None = None) -> Tensor:
        x = self.embed(tokens).cumsum(1) / 3
        x = x if at_N is None else x.flatten(0, 1)[at_N]
        for layer in self.layers:
            x = x + self.dropout(torch.tanh(layer(x)))
        return x if self.score is None else self.score(x).squeeze(-1)


class Toy(Stage[Any]):
    """What the four toys share: seeded rows, a step cut into micro-batches of `cut` rows, weights saved as they are."""

    def __init__(self, config: TrainConfig = CONFIG, cut: int = 2) -> None:
        super().__init__(config)
        self.cut = cut

    def train(self, **modules: nn.Module) -> None:
        for name, module in modules.items():
            self.trained[name] = Trained(module, self.config.optimizer(), self.config.clip_norm)
        self.num_steps = 4

    def rows(self, number: int, rows: int = 8) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        return torch.randint(0, 12, (rows, 5), generator=generator)

    def mine(self, *columns: Tensor) -> list[Any]:
        pieces = list(zip(*(column.split(self.cut) for column in columns), strict=True))
        return [piece[0] if len(piece) == 1 else piece for piece in dist.share(pieces)]

    def save(self, folder: Path, snapshot: str = "") -> None:
        states = {f"{n}.{k}": v for n, t in self.trained.items() for k, v in t.module.state_dict().items()}
        save_file(states, folder / f"{snapshot or 'checkpoint'}.safetensors")


class Text(Toy):
    """Pretraining: one model, next-token loss; rows of uneven weight, so that a mean of means would differ."""

    kind = "text"

    def start(self, work: Work) -> None:
        self.train(model=Net())

    def steps(self, first: int) -> Iterator[Step[Any]]:
        for number in range(first, self.num_steps):
            tokens = self.rows(number)
            weights = (tokens > torch.arange(8)[:, None]).double()
            yield Step(self.mine(tokens, weights), tokens=tokens.numel())

    def counts(self, micro_batch: Any) -> dict[str, float]:
        return {"text": float(micro_batch[1][:, 1:].sum())}

    def loss(self, micro_batch: Any) -> tuple[dict[str, Term], Metrics]:
        total, _, metrics = next_token_loss(self.trained["model"].module, *micro_batch)
        return {"text": Term(total)}, metrics


class Ranking(Toy):
    """A K-wise reward model: a micro-batch holds all responses of its prompts; the unit is the pair."""

    kind = "ranking"

    def start(self, work: Work) -> None:
        self.train(reward=Net(outputs=1))

    def steps(self, first: int) -> Iterator[Step[Any]]:
        for number in range(first, self.num_steps):
            yield Step(self.mine(self.rows(number, rows=12).view(4, 3, 5)), tokens=60)

    def counts(self, micro_batch: Tensor) -> dict[str, float]:
        return {"pairs": 3.0 * len(micro_batch), "centre": float(len(micro_batch))}

    def loss(self, micro_batch: Tensor) -> tuple[dict[str, Term], Metrics]:
        score = self.trained["reward"].module(micro_batch.flatten(0, 1))[:, -1].view(-1, 3)
        better, worse = score[:, [0, 0, 1]], score[:, [1, 2, 2]]
        right = (better > worse).double().sum()
        terms = {"pairs": Term(-F.logsigmoid(better - worse).sum()), "centre": Term(score.mean(1).square().sum(), 0.01)}
        return terms, {"accuracy": (right, float(better.numel()))}


class Rollouts(Toy):
    """PPO's shape: two modules with their own rates, rollouts inside `steps`, epochs x minibatches, a text micro-batch
    beside the others, an adaptive coefficient, resumable only where an iteration ends."""

    kind = "rollouts"
    headline = "objective/kl"

    def start(self, work: Work) -> None:
        policy, critic = Net(), Net(outputs=1)
        self.frozen = {"reference": Net()}
        self.frozen["reference"].load_state_dict(policy.state_dict())
        self.trained["policy"] = Trained(policy, self.config.optimizer(), clip_norm=0.5)
        self.trained["critic"] = Trained(critic, self.config.optimizer(lr=0.05, matrix_lr=0.0), 0.1, save_as=None)
        self.num_steps, self.beta = 12, 0.5  # 3 iterations of 2 epochs of 2 minibatches
        self.rollout_marks: list[float] = []
        self.before_mark = 0.0

    def steps(self, first: int) -> Iterator[Step[Any]]:
        assert first % 4 == 0
        policy, reference = self.trained["policy"].module, self.frozen["reference"]
        for iteration in range(first // 4, 3):
            tokens = self.rows(iteration)
            with torch.no_grad():
                old = self.chosen(policy, tokens)
                kl = old - self.chosen(reference, tokens)
                self.rollout_marks.append(float(policy.embed.weight.sum()))
            reward = (tokens[:, 1:] % 3 == 0).double() - self.beta * kl
            for epoch in range(2):
                order = torch.randperm(8, generator=torch.Generator().manual_seed(10 * iteration + epoch))
                for half, index in enumerate(order.view(2, 4)):
                    ppo = self.mine(tokens[index], old[index], reward[index], kl[index])
                    text = self.mine(self.rows(100 + iteration, rows=4))
                    yield Step(ppo + text, tokens=20, can_resume=(epoch, half) == (1, 1))

    @staticmethod
    def chosen(model: nn.Module, tokens: Tensor) -> Tensor:
        logp = torch.log_softmax(model(tokens[:, :-1]) @ model.output_weight.T, -1)
        return logp.gather(-1, tokens[:, 1:, None]).squeeze(-1)

    def counts(self, micro_batch: Any) -> dict[str, float]:
        if isinstance(micro_batch, Tensor):
            return {"text": 4.0 * len(micro_batch)}
        return {"policy": 4.0 * len(micro_batch[0]), "value": float(len(micro_batch[0]))}

    def loss(self, micro_batch: Any) -> tuple[dict[str, Term], Metrics]:
        policy, critic = self.trained["policy"].module, self.trained["critic"].module
        if isinstance(micro_batch, Tensor):
            return {"text": Term(-self.chosen(policy, micro_batch).sum(), weight=0.3)}, {}
        tokens, old, reward, kl = micro_batch
        value = critic(tokens)[:, :-1]
        ratio = (self.chosen(policy, tokens) - old).exp()
        advantage = reward - value.detach()
        surrogate = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
        value_error = 0.5 * (value - reward).square().mean(1).sum()
        metrics: Metrics = {
            "objective/kl": (kl.sum(), float(len(kl))),
            "val/ratio": (ratio.sum(), float(ratio.numel())),
        }
        return {"policy": Term(surrogate), "value": Term(value_error)}, metrics

    def after_step(self, metrics: Mapping[str, float]) -> dict[str, float]:
        self.beta *= 1.0 + 0.1 * max(-1.0, min(1.0, metrics["objective/kl"]))
        return {"objective/kl_coef": self.beta}

    def state_dict(self) -> dict[str, Any]:
        return {"beta": self.beta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.beta = state["beta"]


class Contrastive(Toy):
    """GradCache (arXiv 2101.06983): in-batch negatives over a whole step and all ranks, at micro-batch memory.

    before_step runs every micro-batch without a graph, keeping torch's random state before each, computes the loss of
    the whole step on the representations, and keeps its gradient at each; `loss` runs the micro-batch again with the
    same random state and sends that gradient back.
    """

    kind = "contrastive"
    keeps_graph = False  # the slow way: one graph over the whole step, for comparison

    def __init__(self, config: TrainConfig = CONFIG, cut: int = 2, dropout: float = 0.0) -> None:
        super().__init__(config, cut)
        self.dropout = dropout

    def start(self, work: Work) -> None:
        self.train(encoder=Net(dropout=self.dropout))

    def steps(self, first: int) -> Iterator[Step[Any]]:
        for number in range(first, self.num_steps):
            queries, documents = self.rows(number), self.rows(50 + number)
            yield Step(self.mine(queries, documents, torch.arange(8)), tokens=80)

    def counts(self, micro_batch: Any) -> dict[str, float]:
        return {"contrastive": float(len(micro_batch[0]))}

    def encode(self, micro_batch: Any) -> Tensor:
        encoder = self.trained["encoder"].module
        return torch.stack([F.normalize(encoder(side)[:, -1], dim=-1) for side in micro_batch[:2]])

    def before_step(self, step: Step[Any]) -> None:
        self.random, found = [], []
        with torch.set_grad_enabled(self.keeps_graph):
            for micro_batch in step.micro_batches:
                self.random.append(torch.get_rng_state())
                found.append(self.encode(micro_batch))
        everyone = torch.zeros(2, 8, 6, dtype=DOUBLE)
        for micro_batch, pair in zip(step.micro_batches, found, strict=True):
            everyone[:, micro_batch[2]] = pair.detach()
        dist.sum_tensors(everyone)
        everyone.requires_grad_()
        losses = F.cross_entropy(everyone[0] @ everyone[1].T / 0.1, torch.arange(8), reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), everyone)
        self.values, self.gradient, self.next, self.graph = losses.detach(), gradient, 0, found

    def loss(self, micro_batch: Any) -> tuple[dict[str, Term], Metrics]:
        if self.keeps_graph:
            pair = self.graph[self.next]
        else:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self.random[self.next])
                pair = self.encode(micro_batch)
        self.next += 1
        surrogate = (pair * self.gradient[:, micro_batch[2]]).sum()
        value = self.values[micro_batch[2]].sum()
        return {"contrastive": Term(surrogate + (value - surrogate).detach())}, {}


TOYS = {toy.kind: toy for toy in (Text, Ranking, Rollouts, Contrastive)}


def work_in(folder: Path) -> Work:
    folder.mkdir(parents=True, exist_ok=True)
    return Work(StageFolder(folder), {}, seed=3, recipe=Recipe("toy", 3, {}, (), Path("toy.toml")))


def train(stage: Toy, folder: Path) -> dict[str, Tensor]:
    run_stage(stage, work_in(folder))
    return load_file(folder / "checkpoint.safetensors")


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "pick_device", lambda: torch.device("cpu"))


# -------------------------------------------------------------------------------- cuts and ranks


@pytest.mark.parametrize("kind", TOYS)
def test_cutting_a_step_into_micro_batches_does_not_change_the_weights(kind: str, tmp_path: Path) -> None:
    weights = [train(TOYS[kind](cut=cut), tmp_path / str(cut)) for cut in (8, 2, 1)]
    assert largest_difference(weights[0], weights[1]) < 1e-9
    assert largest_difference(weights[0], weights[2]) < 1e-9
    lines = [read_metrics(tmp_path / str(cut) / "metrics.jsonl") for cut in (8, 1)]
    for one, other in zip(*lines, strict=True):
        assert all(one[k] == pytest.approx(other[k], abs=1e-9) for k in one if k not in loop.TIMINGS)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every toy trained by two processes; the folder holds one folder a toy."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **address, "PYTHONPATH": str(Path(dist.__file__).parents[1])}
    with open(folder / "said", "w") as said:
        command = [sys.executable, __file__, str(folder)]
        ranks = [subprocess.Popen(command, env={**env, "RANK": rank}, stdout=said, stderr=said) for rank in "01"]
        try:
            codes = [process.wait(timeout=100) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    assert codes == [0, 0], (folder / "said").read_text()
    return folder


@pytest.mark.parametrize("kind", TOYS)
def test_two_ranks_reach_the_weights_and_metrics_of_one(kind: str, two_ranks: Path, tmp_path: Path) -> None:
    alone = train(TOYS[kind](), tmp_path)
    assert largest_difference(alone, load_file(two_ranks / kind / "checkpoint.safetensors")) < 1e-9
    lines = zip(read_metrics(tmp_path / "metrics.jsonl"), read_metrics(two_ranks / kind / "metrics.jsonl"), strict=True)
    for one, other in lines:
        assert all(one[k] == pytest.approx(other[k], abs=1e-9) for k in one if k not in loop.TIMINGS)


# -------------------------------------------------------------------------------- what each kind needs


def test_gradcache_with_dropout_equals_one_graph_over_the_whole_step(tmp_path: Path) -> None:
    cached, graph = Contrastive(dropout=0.3), Contrastive(dropout=0.3)
    graph.keeps_graph = True
    assert largest_difference(train(cached, tmp_path / "a"), train(graph, tmp_path / "b")) < 1e-12
    other = train(Contrastive(dropout=0.0), tmp_path / "c")
    assert largest_difference(train(cached, tmp_path / "a"), other) > 1e-6  # the dropout did something


def test_gradcache_reports_the_loss_not_the_surrogate(tmp_path: Path) -> None:
    stage = Contrastive()
    train(stage, tmp_path)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["loss"] == pytest.approx(stage.values.mean().item(), abs=1e-12)


def test_rollouts_are_made_with_every_earlier_update(tmp_path: Path) -> None:
    stage = Rollouts()
    train(stage, tmp_path)
    assert len(stage.rollout_marks) == 3 == len(set(stage.rollout_marks))  # three iterations, three policies


def test_two_modules_have_their_own_rates_and_terms_their_own_gradient_norms(tmp_path: Path) -> None:
    train(Rollouts(), tmp_path)
    line = read_metrics(tmp_path / "metrics.jsonl")[1]
    assert line["lr/critic"] == pytest.approx(2.5 * line["lr/policy"])
    assert "matrix_lr/policy" in line and "matrix_lr/critic" not in line
    norms = {term: line[f"grad_norm/{term}"] for term in ("policy", "value", "text")}
    assert all(norm > 0 for norm in norms.values())
    assert line["module_grad_norm/critic"] == pytest.approx(norms["value"])  # only the value term reaches the critic
    assert line["module_grad_norm/policy"] <= norms["policy"] + norms["text"] + 1e-12


def test_frozen_modules_keep_their_weights_and_want_no_gradient(tmp_path: Path) -> None:
    stage = Rollouts()
    train(stage, tmp_path)
    reference = stage.frozen["reference"]
    assert not reference.training and not any(p.requires_grad for p in reference.parameters())
    torch.manual_seed(3)
    assert torch.equal(reference.embed.weight, Net().embed.weight)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.start()
    loop.pick_device = lambda: torch.device("cpu")
    for name, toy in TOYS.items():
        run_stage(toy(), work_in(Path(sys.argv[1]) / name))
    dist.stop()
