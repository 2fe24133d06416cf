"""The over-optimisation laboratory: what a policy gains, and loses, by following a reward model that is not quite right.

The paper: L. Gao, J. Schulman, J. Hilton, "Scaling laws for reward model overoptimization" (2022). People are replaced by a
*gold* judge, so that what is really wanted can be measured; *proxies* learn from its judgements; PPO and best-of-n follow a
proxy, and the gold score is drawn against d = sqrt(KL). Symbols and names:

    gold RM              `Gold`: how fluent a reply is to a larger language model, and how much it likes the letters in it
    proxy RMs            `lyceum.stages.reward`, of several sizes, trained on several amounts of the gold judge's comparisons
    pi_init              the policy: a smaller language model; what it is at the start is where d is measured from
    alpha, beta          of the forms in `lyceum.evals.frontier`

Every model reads letters (English prose that Python carries, or any text file), a prompt is some of them and a reply the next
ones, always as many. Scores have mean 0 and deviation 1 on replies of the first policy. There is no KL penalty: Gao et al. found
that it stops early, and moves no curve.

Deviations, each with its reason:
- Gold is no reward model trained on people's labels. It wants two things: fluent text, as a larger language model knows it, and
  letters after a secret taste (random numbers). Taste is learned from few comparisons, fluency is not, and no rule says how
  far to go for the one at the cost of the other. Proxies begin as small language models, as theirs began as GPT-3s.
- A stated share of comparisons is turned round (people's labels are noisy; theirs were not).
- Sizes are thousands of parameters, not millions; see how well the forms fit before believing them.

The control is the same PPO with gold itself as the reward: it must not turn. Run by `lyceum lab overoptimisation`; finished arms
are kept, so a stopped laboratory goes on. What it is not: a statement about your reward model; that needs your gold.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lyceum.batches.pack import TokenBatch, bucket, pad
from lyceum.batches.pairs import EncodedRanking, EncodedRankings, Prompts
from lyceum.config import Recipe, setting
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import mix_seed
from lyceum.errors import ConfigError, DataError
from lyceum.evals.agreement import accuracy, differences
from lyceum.evals.frontier import Curve, best_of_n_curve
from lyceum.log import log, read_metrics
from lyceum.model.heads import ScoreModel
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import StageFolder, Work, write_json
from lyceum.stages.ppo import PPO, PPOConfig
from lyceum.stages.reward import Reward, RewardConfig, RewardModel
from lyceum.stages.rewards import Blend, Ids, RewardSource, Score
from lyceum.stages.rollouts import sample_replies
from lyceum.train import policy as algebra
from lyceum.train.loop import run_stage
from lyceum.train.losses import next_token_loss
from lyceum.train.stage import Metrics, Stage, Step, Term, TrainConfig, Trained

LETTERS = " abcdefghijklmnopqrstuvwxyz.,"  # the vocabulary: a letter's id is its place
GOLD = "gold"  # the arm in which gold itself is the reward: the control

# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class LabConfig:
    """Settings of the laboratory; shapes are written layers x width."""

    text: str = setting("", "file of English text; empty = the reference manual that comes with Python")
    seeds: int = setting(3, "runs of every arm, each with comparisons, proxy and noise of its own", low=1)
    prompt_letters: int = setting(8, "letters of a prompt", low=1)
    reply_letters: int = setting(16, "letters of a reply", low=2)
    policy: str = setting("1x64", "shape of the policy")
    policy_letters: int = setting(
        400_000, "letters that the policy, and every proxy before its head, has read", low=1000
    )
    gold: str = setting("2x128", "shape of the gold judge")
    gold_letters: int = setting(300_000, "letters that it has read", low=1000)
    taste: float = setting(1.0, "weight of its taste for letters beside fluency", low=0.0)
    proxies: tuple[str, ...] = setting(
        ("1x16", "1x32", "1x64"), "shapes of proxies, all trained on the most comparisons"
    )
    comparisons: tuple[int, ...] = setting(
        (300, 1500), "pairs that gold judged; fewer than the most: the last shape alone", low=8
    )
    flipped: float = setting(0.1, "share of comparisons that are turned round", low=0.0, high=0.5)
    proxy_epochs: int = setting(4, "passes of a proxy over its comparisons", low=1)
    proxy_lr: float = setting(3e-3, "its peak learning rate", low=0.0)
    iterations: int = setting(50, "PPO's", low=2)
    replies: int = setting(64, "replies of one iteration", low=4)
    lr: float = setting(2.5e-4, "PPO's learning rate, constant", low=0.0)
    best_of: int = setting(256, "replies drawn for each prompt of best-of-n: the largest n", low=2)
    best_of_prompts: int = setting(48, "prompts of best-of-n", low=1)

    def __post_init__(self) -> None:
        for shape in (self.policy, self.gold, *self.proxies):
            layers_and_width(shape)
        if not self.proxies or not self.comparisons:
            raise ConfigError("no proxy to follow", hint="name at least one of proxies, and of comparisons")

    @property
    def arms(self) -> list[tuple[str, str, int]]:
        """(name, shape, comparisons) of every proxy: each shape at most data, the last shape at less."""
        most, last = max(self.comparisons), self.proxies[-1]
        wanted = [(last, count) for count in sorted(self.comparisons) if count < most]
        wanted += [(shape, most) for shape in self.proxies]
        return [(f"{shape}, {count}", shape, count) for shape, count in wanted]

    @property
    def context(self) -> int:
        """Letters of a prompt with its reply."""
        return self.prompt_letters + self.reply_letters


def layers_and_width(shape: str) -> tuple[int, int]:
    """The two numbers of a shape such as "2x64".

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"(\d+)x(\d+)", shape)
    if not found or int(found[1]) < 1 or int(found[2]) % 16 or not int(found[2]):
        raise ConfigError(f"{shape!r} is no shape", hint="write layers x width, the width a multiple of 16: 2x64")
    return int(found[1]), int(found[2])


def spec_of(shape: str, context: int) -> ModelSpec:
    """A decoder over letters: heads of 16, a feed-forward layer of twice the width, nothing tied."""
    layers, width = layers_and_width(shape)
    heads = width // 16
    return ModelSpec(len(LETTERS), layers, width, heads, heads, 16, 2 * width, context, tied=False)


# ---------------------------------------------------------------- text


def read_letters(path: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A text as letters' ids: lower case, whatever is no letter of ours becomes one space.

    Raises:
        DataError: there is no such text, or hardly any letter in it.
    """
    if path:
        try:
            text = Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise DataError(f"cannot read the text: {error.strerror}", file=path, hint="name a text file") from None
    else:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise DataError(
                "this Python has no reference manual in it (pydoc_data)", hint="name a text: --set text=FILE"
            ) from None
        text = "\n".join(topics[name] for name in sorted(topics))
    plain = re.sub(r"[^a-z.,]+", " ", text.lower())
    place = {letter: number for number, letter in enumerate(LETTERS)}
    ids = np.array([place[letter] for letter in plain], dtype=np.int64)
    if len(ids) < 20_000:
        raise DataError(f"the text has {len(ids)} letters", file=path or None, hint="a hundred thousand are few")
    return ids


def as_text(ids: Ids) -> str:
    """Ids as letters."""
    return "".join(LETTERS[i] for i in ids)


# ---------------------------------------------------------------- the three kinds of training


@dataclass(frozen=True)
class ReadingConfig(TrainConfig):
    """Settings of a language model of letters."""

    letters: int = setting(100_000, "letters to read", low=1)


class Reading(Stage[TokenBatch]):
    """Next-letter prediction on rows of the text, in memory."""

    kind = "reading"
    config: ReadingConfig

    def __init__(self, config: ReadingConfig, spec: ModelSpec, ids: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        super().__init__(config)
        self.spec, self.ids = spec, ids

    def start(self, work: Work) -> None:
        """A fresh model."""
        self.model, self.seed = Decoder(self.spec, torch.Generator().manual_seed(work.seed)), work.seed
        self.trained = {"model": Trained(self.model, self.config.optimizer(), self.config.clip_norm, save_as=None)}
        self.num_steps = max(1, self.config.letters // self.config.batch_tokens)

    def steps(self, first: int) -> Iterator[Step[TokenBatch]]:
        """Rows that begin anywhere, as the seed and the step say."""
        width = self.spec.context_length
        rows = max(1, self.config.batch_tokens // width)
        for number in range(first, self.num_steps):
            starts = np.random.default_rng([self.seed, number]).integers(0, len(self.ids) - width, rows)
            tokens = torch.from_numpy(self.ids[starts[:, None] + np.arange(width)])
            weights = torch.ones(tokens.shape)
            weights[:, 0] = 0.0
            yield Step([TokenBatch(tokens, weights, torch.full((rows,), width))], tokens=rows * width)

    def counts(self, micro_batch: TokenBatch) -> dict[str, float]:
        """Letters to be predicted."""
        return {"text": micro_batch.num_targets}

    def loss(self, micro_batch: TokenBatch) -> tuple[dict[str, Term], Metrics]:
        """Cross-entropy of the next letter."""
        return {"text": Term(next_token_loss(self.model, micro_batch.tokens_BT, micro_batch.weights_BT)[0])}, {}

    def halves(self, micro_batch: TokenBatch) -> list[TokenBatch]:
        """Its rows in two."""
        return micro_batch.halves()

    def save(self, folder: Path, snapshot: str = "") -> None:
        """The weights alone."""
        save_file(self.model.state_dict(), folder / "model.safetensors")


class Judging(Reward):
    """A proxy: a reward model on pairs of replies as ids, in memory."""

    def __init__(self, config: RewardConfig, model: Decoder, pairs: Sequence[EncodedRanking]) -> None:
        super().__init__(config)
        self.reader, self.comparisons = model, pairs

    def start(self, work: Work) -> None:
        """A fresh head on the reader; of the chat format nothing but the padding is asked, and rows need none."""
        rows = EncodedRankings(list(self.comparisons), 0, 0)
        chat: Any = SimpleNamespace(tokenizer=SimpleNamespace(pad_id=0))
        head = torch.Generator().manual_seed(work.seed)
        self.begin(
            ScoreModel.from_decoder(copy.deepcopy(self.reader).requires_grad_(True), head),
            rows,
            EncodedRankings([], 0, 0),
            chat,
            seed=work.seed,
        )

    def save(self, folder: Path, snapshot: str = "") -> None:
        """The weights alone; the laboratory judges them itself."""
        save_file(self.model.state_dict(), folder / "model.safetensors")

    def report(self, final: Any) -> dict[str, Any]:
        """Nothing of its own."""
        return {}


class Following(PPO):
    """PPO against rewards in memory, from a policy in memory."""

    def __init__(self, config: PPOConfig, reward: RewardSource, policy: Decoder, prompts: Prompts) -> None:
        super().__init__(config, reward)
        self.first_policy, self.given = policy, prompts

    def start(self, work: Work) -> None:
        """The policy as it was at first."""
        self.begin(copy.deepcopy(self.first_policy).requires_grad_(True), self.given, seed=work.seed)

    def save(self, folder: Path, snapshot: str = "") -> None:
        """The weights alone."""
        save_file(self.policy.state_dict(), folder / "model.safetensors")


# ---------------------------------------------------------------- the judges


@dataclass
class Gold:
    """The gold judge: fluency under a larger reader, and a secret taste for letters, each normalised, then their sum.

    reader: whose mean log-probability of a reply's letters is its fluency. taste_V: what each letter is worth. weight: of taste.
    """

    reader: Decoder
    taste_V: np.ndarray[Any, Any]
    weight: float
    centre: float = 0.0
    scale: float = 1.0
    parts: tuple[tuple[float, float], tuple[float, float]] = ((0.0, 1.0), (0.0, 1.0))  # (centre, scale): fluency, taste
    micro_tokens: int = 8192

    def score(
        self, prompts: Sequence[Ids], responses: Sequence[Ids], meta: Sequence[dict[str, Any]] = ()
    ) -> list[Score]:
        """One number for each reply."""
        (c0, s0), (c1, s1) = self.parts
        both = (self.fluency(prompts, responses) - c0) / s0 + self.weight * (self.liking(responses) - c1) / s1
        return [float(value) for value in (both - self.centre) / self.scale]

    @torch.no_grad()
    def fluency(self, prompts: Sequence[Ids], responses: Sequence[Ids]) -> np.ndarray[Any, Any]:
        """The mean log-probability of each reply's letters."""
        rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        found = np.zeros(len(rows))
        for group in bucket([len(row) for row in rows], self.micro_tokens, 0):
            tokens_BT, lengths_B = pad([rows[i] for i in group], 0)
            starts_B = torch.tensor([len(prompts[i]) for i in group])
            positions_T = torch.arange(tokens_BT.shape[1])
            mask_BT = (positions_T >= starts_B[:, None]) & (positions_T < lengths_B[:, None])
            hidden_ND = self.reader(tokens_BT, at_N=algebra.predicting(mask_BT))
            logp_BT, _ = algebra.chosen_logprobs(hidden_ND, self.reader.output_weight, tokens_BT, mask_BT)
            found[group] = (logp_BT.double().sum(1) / mask_BT.sum(1)).numpy()
        return found

    def liking(self, responses: Sequence[Ids]) -> np.ndarray[Any, Any]:
        """The mean worth of each reply's letters."""
        return np.array([self.taste_V[list(response)].mean() for response in responses])


def normalise(who: Gold | RewardModel, prompts: Sequence[Ids], replies: Sequence[Ids]) -> None:
    """Scores of these replies get mean 0 and deviation 1, gold's two parts each too."""
    if isinstance(who, Gold):
        found = who.fluency(prompts, replies), who.liking(replies)
        who.parts = tuple((float(part.mean()), float(part.std())) for part in found)  # type: ignore[assignment]
    scores = np.array(who.score(prompts, replies, [{}] * len(replies)), dtype=np.float64)
    if isinstance(who, Gold):
        who.centre, who.scale = float(scores.mean()), float(scores.std())
    else:
        who.model.rescale(1 / float(scores.std()))
        who.centre = float(scores.mean() / scores.std())


# ---------------------------------------------------------------- the laboratory


@dataclass
class Pool:
    """Replies of the first policy: N to each of P prompts, and what gold says of them."""

    prompts: list[list[int]]
    replies: list[list[int]]
    gold_PN: np.ndarray[Any, Any]


class Laboratory:
    """One over-optimisation experiment in a folder.

    Args:
        config: its settings.
        folder: where everything is written; what is finished in it is not made again.
    """

    def __init__(self, config: LabConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.ids = read_letters(config.text)
        held = len(self.ids) // 10
        self.train_ids, self.held_ids = self.ids[:-held], self.ids[-held:]
        self.pools: dict[int, Pool] = {}  # of the present seed
        self.policy = self.reader(config.policy, config.policy_letters)
        taste = np.random.default_rng(29).normal(size=len(LETTERS))
        self.gold = Gold(self.reader(config.gold, config.gold_letters), taste, config.taste)
        first = self.pool(0, max(64, 2048 // config.best_of), min(config.best_of, 8))
        normalise(self.gold, first.prompts, first.replies)

    def work(self, name: str, seed: int = 0) -> Work:
        """A folder of the laboratory as a stage wants it."""
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return Work(StageFolder(path), {}, seed, Recipe("overoptimisation", seed, {}, (), self.folder / "lab.json"))

    def reader(self, shape: str, letters: int) -> Decoder:
        """A language model of that shape that has read so many letters; read once, then kept."""
        spec = spec_of(shape, self.config.context)
        work = self.work(f"readers/{shape}-{letters}", seed=7)
        config = ReadingConfig(letters=letters, warmup=0.05, micro_tokens=4096, save_every=0)
        run_stage(Reading(config, spec, self.train_ids), work)
        model = Decoder(spec)
        model.load_state_dict(load_file(work.folder.path / "model.safetensors"))
        return model.eval().requires_grad_(False)

    def prompts(self, count: int, seed: int) -> list[list[int]]:
        """Pieces of the text that no model has read."""
        width = self.config.prompt_letters
        starts = np.random.default_rng([seed, 1]).integers(0, len(self.held_ids) - width, count)
        return [self.held_ids[start : start + width].tolist() for start in starts]

    def replies(self, model: Decoder, prompts: Sequence[Ids], seed: int) -> list[list[int]]:
        """A sampled reply to each prompt."""
        engine = Engine(model, max_batch=256, num_kept=0)
        outputs = sample_replies(
            engine, prompts, range(len(prompts)), seed=seed, iteration=0, temperature=1.0,
            max_tokens=self.config.reply_letters, stop_ids=(),
        )  # fmt: skip
        return [output.ids for output in outputs]

    def pool(self, seed: int, num_prompts: int, each: int) -> Pool:
        """Replies of the first policy, `each` to every prompt, scored by gold."""
        prompts = [prompt for prompt in self.prompts(num_prompts, seed) for _ in range(each)]
        replies = self.replies(self.policy, prompts, mix_seed(seed, 5))
        gold = np.array(self.gold.score(prompts, replies), dtype=np.float64)
        return Pool(prompts, replies, gold.reshape(num_prompts, each))

    def pairs(self, count: int, seed: int, flipped: float) -> list[EncodedRanking]:
        """Pairs of replies of the first policy that gold has put in order, some of them turned round."""
        drawn = self.pool(mix_seed(seed, 2), count, 2)
        chance = np.random.default_rng([seed, 3])
        found = []
        for number in range(count):
            rows = [[*drawn.prompts[i], *drawn.replies[i]] for i in (2 * number, 2 * number + 1)]
            clean = (1.0, 2.0) if drawn.gold_PN[number, 0] > drawn.gold_PN[number, 1] else (2.0, 1.0)
            ranks = clean[::-1] if chance.random() < flipped else clean
            found.append(EncodedRanking(rows, (ranks[0], ranks[1]), None, {"clean_ranks": list(clean)}))
        return found

    # -- one arm

    def arm(self, name: str, shape: str, count: int, seed: int) -> dict[str, Any]:
        """Follow one proxy, or gold itself, by PPO and by best-of-n; made once, then read."""
        place = self.folder / "arms" / re.sub(r"\W+", "-", name) / str(seed)
        done = place / "arm.json"
        if done.exists():
            found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
            return found
        own = mix_seed(seed, 11)
        if seed not in self.pools:
            self.pools = {seed: self.pool(mix_seed(own, 9), self.config.best_of_prompts, self.config.best_of)}
        base = self.pools[seed]
        proxy: RewardSource = self.gold
        accuracy = 1.0
        if name != GOLD:
            proxy, accuracy = self.proxy(f"{place.relative_to(self.folder)}/proxy", shape, count, own)
            normalise(proxy, base.prompts, base.replies)
        said = np.array(proxy.score(base.prompts, base.replies, [{}] * base.gold_PN.size), dtype=np.float64)
        curve, texts = self.follow(f"{place.relative_to(self.folder)}/ppo", proxy, own)
        found = {
            "arm": name,
            "seed": seed,
            "shape": shape,
            "comparisons": count,
            "accuracy": accuracy,
            "rl": vars(curve),
            "best_of_n": best_of_n_curve(said.reshape(base.gold_PN.shape), base.gold_PN),
            "texts": texts,
        }
        write_json(done, found)
        return found

    def proxy(self, name: str, shape: str, count: int, seed: int) -> tuple[RewardModel, float]:
        """A proxy trained on so many comparisons, and how many held-out pairs it orders as gold does."""
        config = self.config
        pairs = self.pairs(count, seed, config.flipped)
        held = self.pairs(400, mix_seed(seed, 4), 0.0)
        training = RewardConfig(
            epochs=config.proxy_epochs, lr=config.proxy_lr, micro_tokens=8192, log_every=50, save_every=0, batch_prompts=32
        )  # fmt: skip
        work = self.work(name, mix_seed(seed, 6))
        stage = Judging(training, self.reader(shape, config.policy_letters), pairs)
        run_stage(stage, work)
        model = ScoreModel.from_decoder(Decoder(spec_of(shape, config.context)))
        model.load_state_dict(load_file(work.folder.path / "model.safetensors"))
        proxy = RewardModel(model.eval().requires_grad_(False), 0.0, None)
        rows = [row for pair in held for row in pair.rows]
        scores = np.array(proxy.score([()] * len(rows), rows), dtype=np.float64).reshape(-1, 2)
        margins = [differences(two, pair.ranks) for two, pair in zip(scores.tolist(), held, strict=True)]
        return proxy, accuracy(margins)[0]

    def follow(self, name: str, proxy: RewardSource, seed: int) -> tuple[Curve, list[str]]:
        """PPO against the proxy, with gold looking on; the curve, one point an iteration, and replies of the last policy."""
        config = self.config
        training = PPOConfig(
            iterations=config.iterations, prompts_per_iteration=config.replies, epochs=2, minibatches=1,
            max_response_tokens=config.reply_letters, missing_end="keep", kl_beta=0.0, lr=config.lr,
            critic_lr=4 * config.lr, warmup=0.0, engine_batch=config.replies, micro_tokens=8192, save_every=0,
        )  # fmt: skip
        asked = self.prompts(512, mix_seed(seed, 7))
        reward = Blend([("proxy", 1.0, proxy), (GOLD, 0.0, self.gold)])
        work = self.work(name, mix_seed(seed, 8))
        run_stage(Following(training, reward, self.policy, Prompts(asked, [{} for _ in asked])), work)
        lines = read_metrics(work.folder.metrics)[:: training.epochs * training.minibatches]
        curve = Curve(
            tuple(max(line["objective/kl"], 0.0) ** 0.5 for line in lines),
            tuple(line["reward/proxy"] for line in lines),
            tuple(line[f"reward/{GOLD}"] for line in lines),
        )
        last = copy.deepcopy(self.policy)
        last.load_state_dict(load_file(work.folder.path / "model.safetensors"))
        prompts = asked[:3]
        shown = zip(prompts, self.replies(last.eval(), prompts, mix_seed(seed, 10)), strict=True)
        return curve, [f"{as_text(prompt)}|{as_text(reply)}" for prompt, reply in shown]

    def run(self) -> list[dict[str, Any]]:
        """All arms of all seeds, the control among them."""
        arms = [*self.config.arms, (GOLD, self.config.gold, 0)]
        found = []
        for seed in range(self.config.seeds):
            for number, (name, shape, count) in enumerate(arms):
                log.title(f"[{seed * len(arms) + number + 1}/{self.config.seeds * len(arms)}] {name}, seed {seed}")
                found.append(self.arm(name, shape, count, seed))
        return found
