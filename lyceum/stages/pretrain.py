"""Pretraining: learn to continue text, one token after another.

The paper: A. Radford et al., "Language models are unsupervised multitask learners" (2019), section 2, eq. 1, with the
mixture of weighted sources of T. Brown et al., "Language models are few-shot learners" (2020), section 2; and, if
`infill_rate` is above 0, M. Bavarian et al., "Efficient training of language models to fill in the middle" (2022). With
`from` it goes on from an earlier pretrain section, on other text, as M. Chen et al., "Evaluating large language models trained on
code" (2021), section 3.2, went on from GPT-3: the schedule begins anew, the optimizer remembers nothing.
Symbols:

    p(x) = prod_t p(s_t | s_1 .. s_t-1)     next_token_loss: the sum of -log p over the targets
    mixture weight of a source              weights; without them docs_share for "docs", the rest for the other parts
    n_ctx                                   row_tokens, at most the model's context length
    FIM rate                                infill_rate; the transformation is lyceum.batches.infill

Deviations, each with its reason:
- Documents are joined by the end-of-text token and cut into rows without regard to their ends, as in the papers, but a
  row (128 tokens) is shorter than what the model can attend to: on a CPU attention over long rows costs more than it
  teaches a small model.
- The optimizer is Muon for the matrices (the papers: Adam), and the schedule is flat, then linear to zero, so that its
  length need not be known before the plateau ends.
- The result is bits per byte of held-out text, not loss per token: it does not depend on the vocabulary.

Run by `lyceum pretrain RECIPE`. What it is not: able to mask attention between documents of one row.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from lyceum import dist
from lyceum.batches.infill import Infill
from lyceum.batches.pack import TokenBatch, collate
from lyceum.batches.shards import Shards, write_shards
from lyceum.batches.stream import Stream, token_batch
from lyceum.config import build, setting
from lyceum.corpus.records import Document, read_documents
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams
from lyceum.errors import CheckpointError, ConfigError, DataError, did_you_mean
from lyceum.log import log
from lyceum.model.checkpoint import load_checkpoint
from lyceum.model.lineage import learned
from lyceum.model.spec import ModelConfig, ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import checkpoint_in, read_state
from lyceum.tokens.chat import Rendered
from lyceum.tokens.tokenizer import Tokenizer
from lyceum.train.dial import turn
from lyceum.train.loop import run_stage
from lyceum.train.losses import mean_loss, next_token_loss
from lyceum.train.stage import Metrics, Stage, Step, Term, TrainConfig, Trained

if TYPE_CHECKING:
    from lyceum.run import Work

VERSION = 1
PROMPTS = ("Return ", "Return the ", "def ", "import ", "class ", "for ")  # continued greedily at each validation
SAMPLE_TOKENS = 32
MANY_EPOCHS = 4.0  # up to here repeated text is worth about as much as new text (N. Muennighoff et al. 2023, section 5)

# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """Settings of pretraining; the model's shape stands in the recipe's [model]."""

    tokens: int = setting(4_000_000, "tokens to train on, over all epochs: the run's length; 0 derives it", low=0)
    row_tokens: int = setting(128, "tokens of one row, at most model.context_length", low=2)
    docs_share: float = setting(0.5, "share of the rows that come from the part docs", low=0.0, high=1.0)
    weights: dict[str, float] = setting(
        {}, "part -> its weight in the mixture, on any scale, in place of docs_share; others are not read", low=0.0
    )
    infill_rate: float = setting(
        0.0, "probability that a document of any part but docs is rearranged to learn infilling", low=0.0, high=1.0
    )
    valid_tokens: int = setting(65_536, "held-out tokens of each part that a validation reads", low=1)

    matrix_lr: float = setting(0.03, "peak learning rate of Muon (matrices inside layers); 0 = AdamW at lr", low=0.0)
    lr: float = setting(0.03, "peak learning rate of AdamW (embeddings, norms); 0 derives it", low=0.0)
    weight_decay: float = setting(0.0, "decoupled, of the matrices inside layers; -1 derives it", low=-1.0)
    batch_tokens: int = setting(2048, "tokens in one optimizer step, over all ranks; 0 derives it", low=0)
    validate_every: int = setting(500, "steps between validations (0 = only at the end)", low=0)

    def derive(self, spec: ModelSpec) -> tuple[PretrainConfig, list[str]]:
        """The settings with what was left to the dial (`lyceum.train.dial`) filled in, and its notes, if any was."""
        asked = {name: getattr(self, name) for name in ("tokens", "batch_tokens", "matrix_lr", "lr", "weight_decay")}
        if self.tokens and self.batch_tokens and self.lr and self.weight_decay >= 0:
            return self, []
        dial, notes = turn(spec, **asked)
        return replace(self, **{name: getattr(dial, name) for name in asked}), notes


# ---------------------------------------------------------------- equations


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """The code length of a text under the model, per byte of the text: nats / (ln 2 * bytes)."""
    return nats / (math.log(2.0) * num_bytes)


def part_weights(parts: Iterable[str], docs_share: float) -> dict[str, float]:
    """Weight of each part in the mixture: `docs_share` for docs, the rest evenly for the others; sums to 1.

    A corpus without docs, or with nothing else, is used as it is.
    """
    others = [part for part in parts if part != "docs"]
    if not others or "docs" not in parts:
        return dict.fromkeys(parts, 1.0 / len(list(parts)))
    return {part: docs_share if part == "docs" else (1.0 - docs_share) / len(others) for part in parts}


def read_weights(folder: Path) -> dict[str, float]:
    """The `weights` that the finished pretrain section in `folder` mixed its parts by; empty where it had none."""
    state = read_state(folder)
    return dict(state.settings.get("weights", {})) if state else {}


def infill_rates(weights: Mapping[str, float], infill_rate: float) -> dict[str, float]:
    """Infill rate of each part in the mixture: `infill_rate`, and 0 for docs.

    Raises:
        ConfigError: the rate is above 0, and no part that is read would be infilled.
    """
    rates = {part: infill_rate for part, weight in weights.items() if part != "docs" and weight}
    if infill_rate and not rates:
        raise ConfigError(
            f"pretrain.infill_rate is {infill_rate}, and only the part docs is read, which is never infilled",
            hint="set infill_rate = 0, give the corpus another part, or lower docs_share",
        )
    return rates


def check_weights(weights: Mapping[str, float], corpus: Path) -> None:
    """Before hours of encoding: whether every part with a weight is in the corpus, as its report says if it has one.

    Raises: ConfigError.
    """
    report = corpus / "report.json"
    known = json.loads(report.read_text(encoding="utf-8"))["documents"]["train"] if report.is_file() else weights
    for part in weights:
        if part not in known:
            raise ConfigError(f"pretrain.weights: the corpus has no part {part!r}", hint=did_you_mean(part, known))
    if weights and not any(weights.values()):
        raise ConfigError("pretrain.weights: no part has a weight above 0", hint="give at least one part a weight")


@dataclass(frozen=True)
class HeldOut:
    """Held-out text of one part: every token a target once, and the bytes of text that those targets spell."""

    batches: list[TokenBatch]
    num_bytes: int


def held_out(documents: Iterable[Document], tokenizer: Tokenizer, config: PretrainConfig) -> dict[str, HeldOut]:
    """Cuts held-out documents into rows, part by part, up to `valid_tokens` each.

    A row begins with the token before its first target (the end-of-text token before the first document), so every
    token is predicted once, from at most row_tokens tokens before it.
    """
    ids: dict[str, list[int]] = {}
    for document in documents:
        part = ids.setdefault(str(document.meta.get("part", "text")), [tokenizer.end_id])
        if len(part) <= config.valid_tokens:
            part += [*tokenizer.encode(document.text), tokenizer.end_id]
    found = {}
    for name, part in ids.items():
        part = part[: config.valid_tokens + 1]
        rows = [part[i : i + config.row_tokens + 1] for i in range(0, len(part) - 1, config.row_tokens)]
        rendered = [Rendered(row, [1.0] * len(row)) for row in rows]
        size = max(1, config.micro_tokens // config.row_tokens)
        batches = [collate(rendered[i : i + size], tokenizer.pad_id) for i in range(0, len(rendered), size)]
        num_bytes = sum(len(tokenizer.token_bytes[token]) for token in part[1:])
        if num_bytes:
            found[name] = HeldOut(batches, num_bytes)
    return found


# ---------------------------------------------------------------- the stage


class Pretrain(Stage[TokenBatch]):
    """Next-token prediction on the corpus."""

    kind = "pretrain"
    headline = "loss/text"
    also_shown = ("bpb",)
    can_shard = True
    config: PretrainConfig

    @property
    def model(self) -> Decoder:
        """What is trained."""
        return cast(Decoder, self.trained["model"].module)

    def start(self, work: Work) -> None:
        """Encodes the corpus into shards (once), makes or loads the model, and says what was derived from the recipe."""
        self.tokenizer = tokenizer = Tokenizer.load(work.inputs["tokenizer"])
        spec, notes = build(ModelConfig, work.recipe.model, "[model]").derive(tokenizer.vocab_size)
        begun = self._load(work, spec) if "policy" in work.inputs else None
        if begun is not None:
            spec, notes = begun.spec, []
        self.config, derived = self.config.derive(spec)
        config = self.config
        if config.row_tokens > spec.context_length:
            raise ConfigError(
                f"pretrain.row_tokens is {config.row_tokens}, the model's context_length {spec.context_length}",
                hint="lower row_tokens or raise context_length in [model]",
            )
        corpus, folder = work.inputs["corpus"], work.folder.path / "shards"
        check_weights(config.weights, corpus)
        if dist.is_main() and not _is_complete(folder, tokenizer, config.row_tokens):
            write_shards(read_documents(corpus / "documents-train.jsonl"), tokenizer, folder, config.row_tokens)
        dist.barrier()
        shards = Shards(folder, tokenizer.fingerprint)
        valid = held_out(read_documents(corpus / "documents-valid.jsonl"), tokenizer, config)
        for note in [*notes, *derived]:
            log.info(f"  {note}")
        self.begin(begun or Decoder(spec), shards, valid, seed=work.seed)
        counts = spec.num_parameters()
        inside = counts["matrices"] + counts["norms"]
        log.info(f"  {counts['total']:,} parameters, {inside:,} of them inside layers")
        rows = self.num_steps * self.rows_per_step
        for part, epochs in self.epochs.items():
            size = shards.parts[part]
            share = epochs * size / rows
            tokens = round(epochs * size) * config.row_tokens
            if tokens:
                read = learned("documents", shards.documents[part], corpus.name, part=part, tokens=tokens)
                self.learned_from.append(read)
            log.info(f"  {part}: {size * config.row_tokens:,} tokens, {share:.1%} of the rows, {epochs:.3g} epochs")
            if epochs > MANY_EPOCHS:
                log.warning(
                    f"{part} is seen {epochs:.3g} times: from about {MANY_EPOCHS:g} times on a model gains ever less from "
                    "text it has seen, and learns it by heart; if that is not wanted, lower its weight or add text"
                )
        if unread := [part for part in shards.parts if part not in self.epochs]:
            log.info(f"  not read, for want of a weight: {', '.join(unread)}")

    def _load(self, work: Work, spec: ModelSpec) -> Decoder:
        """The model to go on from, which must read this vocabulary, and have the shape that [model] asks for if it asks."""
        folder = checkpoint_in(work.inputs["policy"])
        loaded = load_checkpoint(folder)
        if not isinstance(loaded.model, Decoder) or loaded.tokenizer is None:
            raise CheckpointError(
                f"{folder} holds no language model with a tokenizer", hint="pretrain goes on from a pretrain section"
            )
        if loaded.tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise CheckpointError(
                f"{folder} reads another vocabulary than that of the tokenizer section",
                hint="go on from a model of this run, or of one whose tokenizer section made the same",
            )
        if work.recipe.model and loaded.spec != spec:
            raise ConfigError(
                f"{folder} has another shape ({loaded.spec.num_layers} layers of width {loaded.spec.width}) than [model] "
                f"asks for ({spec.num_layers} of width {spec.width})",
                hint="leave out [model], or give it the checkpoint's shape",
            )
        self.parent = work.name_of(folder)
        return loaded.model

    def begin(self, model: Decoder, shards: Shards, valid: dict[str, HeldOut], *, seed: int) -> None:
        """Sets the stage from things in memory; `valid` may be empty."""
        config = self.config
        self.shards, self.valid = shards, valid
        self.rows_per_step = max(1, config.batch_tokens // config.row_tokens)
        self.num_steps = max(1, config.tokens // (self.rows_per_step * config.row_tokens))
        weights = config.weights or part_weights(shards.parts, config.docs_share)
        self.stream = Stream(shards.parts, weights, seed)
        rates = infill_rates(weights, config.infill_rate)
        self.infill = Infill(self.tokenizer, rates, seed) if config.infill_rate else None
        self.epochs = self.stream.epochs(self.num_steps * self.rows_per_step)
        self.trained = {"model": Trained(model, config.optimizer(), config.clip_norm)}
        self.flops_per_token = model.spec.flops_per_token(config.row_tokens)
        self.bytes_V = torch.tensor([len(spelled) for spelled in self.tokenizer.token_bytes])

    def steps(self, first: int) -> Iterator[Step[TokenBatch]]:
        """Step n holds the stream's rows n * rows_per_step and following, whatever the ranks."""
        rows = self.rows_per_step
        size = min(max(1, self.config.micro_tokens // self.config.row_tokens), -(-rows // dist.data_size()))
        for number in range(first, self.num_steps):
            starts = dist.share(range(number * rows, (number + 1) * rows, size))
            ends = [min(start + size, (number + 1) * rows) for start in starts]
            spans = zip(starts, ends, strict=True)
            batches = [token_batch(self.shards, self.stream, a, b - a, self.infill) for a, b in spans]
            yield Step(batches, tokens=rows * self.config.row_tokens)

    def counts(self, micro_batch: TokenBatch) -> dict[str, float]:
        """Targets: every token of a row but its first."""
        return {"text": micro_batch.num_targets}

    def loss(self, micro_batch: TokenBatch) -> tuple[dict[str, Term], Metrics]:
        """Cross-entropy of every target, in nats; bits per byte of the text that the targets spell, as bpb."""
        total, _, metrics = next_token_loss(self.model, micro_batch.tokens_BT, micro_batch.weights_BT)
        num_bytes = float(self.bytes_V[micro_batch.tokens_BT[:, 1:]].sum())
        return {"text": Term(total)}, {**metrics, "bpb": (total.detach() / math.log(2.0), num_bytes)}

    def halves(self, micro_batch: TokenBatch) -> list[TokenBatch]:
        """Its rows in two."""
        return micro_batch.halves()

    def validate(self) -> dict[str, float]:
        """Bits per byte of each part's held-out text, as bpb_<part>."""
        found = {}
        for part, held in self.valid.items():
            measured = mean_loss(self.model, held.batches)
            found[f"bpb_{part}"] = bits_per_byte(measured["loss"] * measured["targets"], held.num_bytes)
        return found

    def samples(self) -> list[dict[str, Any]]:
        """Greedy continuations of fixed beginnings."""
        params = SamplingParams(max_tokens=SAMPLE_TOKENS, temperature=0.0, stop_ids=(self.tokenizer.end_id,))
        prompts = [[self.tokenizer.end_id, *self.tokenizer.encode(prompt)] for prompt in PROMPTS]
        outputs = Engine(self.model).generate(prompts, params)
        replies = [self.tokenizer.decode(output.ids) for output in outputs]
        return [{"prompt": p, "reply": reply} for p, reply in zip(PROMPTS, replies, strict=True)]

    def describe(self, micro_batch: TokenBatch) -> list[dict[str, Any]]:
        """Part and row of the section's shards, and the text in it."""
        return micro_batch.described(self.tokenizer)

    def report(self, final: Mapping[str, float]) -> dict[str, Any]:
        """bpb_<part>, epochs of each part, and the model's size."""
        bpb = {name.removeprefix("valid/"): value for name, value in final.items() if name.startswith("valid/bpb_")}
        said = ", ".join(f"{value:.3f} bits per byte of {name.removeprefix('bpb_')}" for name, value in bpb.items())
        params = self.model.spec.num_parameters()["total"]
        line = f"{params / 1e6:.2f}M parameters, {said or 'no held-out text'}"
        return {"line": line, **bpb, "epochs": self.epochs, "params": params}


def run(config: PretrainConfig, work: Work) -> dict[str, Any]:
    """Trains a fresh model, or one that was pretrained before, on the corpus of `work.inputs`.

    Returns:
        The report: bpb_<part>, epochs, params, tokens, speed, and the last metrics.

    Raises:
        DataError: the corpus is empty or too small for one row. ConfigError: the rows do not fit into the model, or the
        model that was pretrained before is of another shape. CheckpointError: it reads another vocabulary.
    """
    return run_stage(Pretrain(config), work)


def _is_complete(folder: Any, tokenizer: Tokenizer, row_tokens: int) -> bool:
    """True if an earlier attempt at this section has written the shards: they are written whole or not at all."""
    try:
        return Shards(folder, tokenizer.fingerprint).row_tokens == row_tokens
    except DataError:
        return False
