"""Pretraining: learn to continue text, one token after another.

The paper: A. Radford et al., "Language models are unsupervised multitask learners" (2019), section 2, eq. 1, with the
mixture of weighted sources of T. Brown et al., "Language models are few-shot learners" (2020), section 2. Symbols:

    p(x) = prod_t p(s_t | s_1 .. s_t-1)     next_token_loss: the sum of -log p over the targets
    mixture weight of a source              docs_share for "docs", the rest for the other parts
    n_ctx                                   row_tokens, at most the model's context length

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

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lyceum import dist
from lyceum.batches.pack import TokenBatch, collate
from lyceum.batches.shards import Shards, write_shards
from lyceum.batches.stream import Stream, token_batch
from lyceum.config import build, setting
from lyceum.corpus.records import Document, read_documents
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams
from lyceum.errors import ConfigError, DataError
from lyceum.log import log
from lyceum.model.spec import ModelConfig, ModelSpec
from lyceum.model.transformer import Decoder
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

# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """Settings of pretraining; the model's shape stands in the recipe's [model]."""

    tokens: int = setting(4_000_000, "tokens to train on, over all epochs: the run's length; 0 derives it", low=0)
    row_tokens: int = setting(128, "tokens of one row, at most model.context_length", low=2)
    docs_share: float = setting(0.5, "share of the rows that come from the part docs", low=0.0, high=1.0)
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
    config: PretrainConfig

    def start(self, work: Work) -> None:
        """Encodes the corpus into shards (once), makes the model, and says what was derived from the recipe."""
        self.tokenizer = tokenizer = Tokenizer.load(work.inputs["tokenizer"])
        shape = build(ModelConfig, work.recipe.model, "[model]")
        spec, notes = shape.derive(tokenizer.vocab_size)
        self.config, derived = self.config.derive(spec)
        config = self.config
        if config.row_tokens > spec.context_length:
            raise ConfigError(
                f"pretrain.row_tokens is {config.row_tokens}, the model's context_length {spec.context_length}",
                hint="lower row_tokens or raise context_length in [model]",
            )
        corpus, folder = work.inputs["corpus"], work.folder.path / "shards"
        if dist.is_main() and not _is_complete(folder, tokenizer, config.row_tokens):
            write_shards(read_documents(corpus / "documents-train.jsonl"), tokenizer, folder, config.row_tokens)
        dist.barrier()
        shards = Shards(folder, tokenizer.fingerprint)
        valid = held_out(read_documents(corpus / "documents-valid.jsonl"), tokenizer, config)
        for note in [*notes, *derived]:
            log.info(f"  {note}")
        self.begin(Decoder(spec), shards, valid, seed=work.seed)
        counts = spec.num_parameters()
        inside = counts["matrices"] + counts["norms"]
        log.info(f"  {counts['total']:,} parameters, {inside:,} of them inside layers")
        for part, epochs in self.epochs.items():
            log.info(f"  {part}: {shards.parts[part] * config.row_tokens:,} tokens, {epochs:.1f} epochs")

    def begin(self, model: Decoder, shards: Shards, valid: dict[str, HeldOut], *, seed: int) -> None:
        """Sets the stage from things in memory; `valid` may be empty."""
        config = self.config
        self.model, self.shards, self.valid = model, shards, valid
        self.rows_per_step = max(1, config.batch_tokens // config.row_tokens)
        self.num_steps = max(1, config.tokens // (self.rows_per_step * config.row_tokens))
        self.stream = Stream(shards.parts, part_weights(shards.parts, config.docs_share), seed)
        self.epochs = self.stream.epochs(self.num_steps * self.rows_per_step)
        self.trained = {"model": Trained(model, config.optimizer(), config.clip_norm)}

    def steps(self, first: int) -> Iterator[Step[TokenBatch]]:
        """Step n holds the stream's rows n * rows_per_step and following, whatever the ranks."""
        rows = self.rows_per_step
        size = min(max(1, self.config.micro_tokens // self.config.row_tokens), -(-rows // dist.world_size()))
        for number in range(first, self.num_steps):
            starts = dist.share(range(number * rows, (number + 1) * rows, size))
            ends = [min(start + size, (number + 1) * rows) for start in starts]
            batches = [token_batch(self.shards, self.stream, a, b - a) for a, b in zip(starts, ends, strict=True)]
            yield Step(batches, tokens=rows * self.config.row_tokens)

    def counts(self, micro_batch: TokenBatch) -> dict[str, float]:
        """Targets: every token of a row but its first."""
        return {"text": micro_batch.num_targets}

    def loss(self, micro_batch: TokenBatch) -> tuple[dict[str, Term], Metrics]:
        """Cross-entropy of every target, in nats."""
        total, _, metrics = next_token_loss(self.model, micro_batch.tokens_BT, micro_batch.weights_BT)
        return {"text": Term(total)}, metrics

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

    def report(self, final: Mapping[str, float]) -> dict[str, Any]:
        """bpb_<part>, epochs of each part, and the model's size."""
        bpb = {name.removeprefix("valid/"): value for name, value in final.items() if name.startswith("valid/bpb_")}
        said = ", ".join(f"{value:.3f} bits per byte of {name.removeprefix('bpb_')}" for name, value in bpb.items())
        params = self.model.spec.num_parameters()["total"]
        line = f"{params / 1e6:.2f}M parameters, {said or 'no held-out text'}"
        return {"line": line, **bpb, "epochs": self.epochs, "params": params}


def run(config: PretrainConfig, work: Work) -> dict[str, Any]:
    """Trains a fresh model on the corpus of `work.inputs`.

    Returns:
        The report: bpb_<part>, epochs, params, tokens, speed, and the last metrics.

    Raises:
        DataError: the corpus is empty or too small for one row. ConfigError: the rows do not fit into the model.
    """
    return run_stage(Pretrain(config), work)


def _is_complete(folder: Any, tokenizer: Tokenizer, row_tokens: int) -> bool:
    """True if an earlier attempt at this section has written the shards: they are written whole or not at all."""
    try:
        return Shards(folder, tokenizer.fingerprint).row_tokens == row_tokens
    except DataError:
        return False
