"""The shape of a model, as data: `ModelSpec`, and how one number (`depth`) decides all the others.

Why: every variant of the decoder is a value here, never a branch that grows in the model's code; and a reader who
sets `[model] depth = 6` gets every derived width printed with its reason. The counts of parameters, of floating
point operations and of memory are here too, because the plan, the report and the benchmark must agree on them.

Run it: pretraining prints the notes of `ModelConfig.derive`.
What it is not: it holds no weights and imports no torch; learning rates and horizons are the stages' affair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from lyceum.config import setting
from lyceum.errors import ConfigError

WIDTH_STEP = 64  # widths of models that leave the house: llama.cpp's quantised blocks and every matmul kernel like it
MAX_CONTEXT = 4096  # the longest context that from_depth gives by itself


ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN_LINEARS = {"swiglu": ("gate_proj", "up_proj", "down_proj"), "gelu": ("up_proj", "down_proj")}
VARIANTS = {"norm": ("rms", "layer"), "positions": ("rotary", "learned"), "ffn": tuple(FFN_LINEARS)}


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies of a trained model were slowed down, to reach a longer context.

    A pair that turns fewer than `low` times in `original_context` tokens turns `factor` times slower, one that turns
    more than `high` times as before, one in between by a mixture (Llama 3.1's rule). Without the three numbers every
    pair is slowed down alike (Chen et al. 2023, position interpolation).
    """

    factor: float
    low: float | None = None
    high: float | None = None
    original_context: int | None = None

    def __post_init__(self) -> None:
        given = [number for number in (self.low, self.high, self.original_context) if number is not None]
        if not (self.factor > 0 and (not given or (len(given) == 3 and 0 < given[0] < given[1] and given[2] > 0))):
            raise ConfigError(
                f"model: {self} is no scaling of rotary positions",
                hint="factor must be above zero; low < high and original_context are given together or not at all.",
            )


@dataclass(frozen=True)
class ModelSpec:
    """The shape of one decoder; the defaults are Qwen3's architecture, the other values those of its relatives.

    `width` is D, `num_heads` H, `num_kv_heads` K, `head_width` E (H * E may differ from D, as in Qwen3-0.6B),
    `ffn_width` the hidden width of the feed-forward layer; `tied` shares the embedding with the output layer; `qk_norm`
    puts an RMSNorm on every query and key head (without it the architecture is Llama's). `biases` names the linear
    layers that have one (Qwen2: q, k, v). With norm "layer", positions "learned", ffn "gelu" and all biases the
    architecture is GPT-2's.
    Raises ConfigError when the numbers do not fit together.
    """

    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    ffn_width: int
    context_length: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tied: bool = True
    qk_norm: bool = True
    biases: tuple[str, ...] = ()
    norm: str = "rms"
    positions: str = "rotary"
    ffn: str = "swiglu"
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and field.name not in ("tied", "qk_norm") and not value > 0:
                raise ConfigError(f"model: {field.name} is {value}", hint=f"{field.name} must be above zero.")
        for name, known in VARIANTS.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"model: {name} is {getattr(self, name)!r}", hint=f"choose {' or '.join(known)}.")
        if unknown := set(self.biases) - set(self.linears):
            raise ConfigError(
                f"model: there is no linear layer {min(unknown)} to have a bias", hint=f"known: {self.linears}"
            )
        object.__setattr__(self, "biases", tuple(name for name in self.linears if name in self.biases))
        if self.positions == "rotary" and self.head_width % 2:
            raise ConfigError(
                f"model: head_width is {self.head_width}, an odd number",
                hint="rotary positions turn pairs of numbers: choose an even head_width, usually 32, 64 or 128.",
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model: {self.num_heads} heads cannot share {self.num_kv_heads} key/value heads evenly",
                hint=f"choose num_kv_heads among the divisors of {self.num_heads}.",
            )

    @classmethod
    def from_depth(cls, depth: int, *, vocab_size: int, **overrides: Any) -> tuple[ModelSpec, list[str]]:
        """Derive a whole shape from the number of layers.

        `overrides` are fields of ModelSpec; each one given replaces its step. Returns the spec and one printable,
        numbered note a step. The one dial is nanochat's idea (its width is 64 * depth); the steps below bend it for
        models of a few million parameters, where our own measurements say what a small machine bears.
        """
        notes: list[str] = []

        def step(name: str, derived: Any, reason: str) -> Any:
            given = overrides.pop(name, None)
            value = derived if given is None else given
            notes.append(f"{len(notes) + 1}. {name} = {value}: {reason if given is None else 'given in the recipe'}")
            return value

        num_layers = step("num_layers", depth, "the depth")
        width = step(
            "width",
            _round_up(min(16 * depth**1.5, 128 * depth), WIDTH_STEP if depth < 16 else 2 * WIDTH_STEP),
            "16 * depth^1.5, at most 128 * depth: 32 a layer at depth 4, where a wider model learned less in the same "
            "minutes on two cores, rising as in GPT-3's table 2.1 (64 a layer at 12, 85 at 24, 128 at 96)",
        )
        usual_head = 32 if width <= 256 else 64 if width <= 1024 else 128
        given_heads = overrides.get("num_heads")
        head_width = step(
            "head_width",
            max(2, width // given_heads) if given_heads else usual_head,
            "32 up to width 256 (on two cores heads of 64 were 9 % slower at width 128), 64 up to 1024 as in GPT-2, "
            "128 above as in GPT-3's larger models; width / heads where the heads are given",
        )
        num_heads = step("num_heads", max(1, width // head_width), "width / head_width")
        num_kv_heads = step("num_kv_heads", num_heads, "one for each head: a small model's cache is small as it is")
        ffn_width = step(
            "ffn_width",
            _round_up(8 * width / 3, WIDTH_STEP),
            f"8/3 of the width, so that SwiGLU's three matrices cost what two of 4 * width did (Shazeer 2020, "
            f"section 2), up to a multiple of {WIDTH_STEP}",
        )
        context_length = step(
            "context_length",
            min(MAX_CONTEXT, 2 ** math.ceil(math.log2(64 * depth))),
            f"64 * depth, up to a power of two, at most {MAX_CONTEXT}: at width 128 attention over 256 tokens already "
            "costs what a layer's matrices do",
        )
        spec = cls(
            vocab_size=vocab_size,
            num_layers=num_layers,
            width=width,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_width=head_width,
            ffn_width=ffn_width,
            context_length=context_length,
            **overrides,
        )
        return spec, notes

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of the linear layers inside every layer."""
        return ATTENTION_LINEARS + FFN_LINEARS[self.ffn]

    def num_parameters(self) -> dict[str, int]:
        """Count the weights, as a dict of these and their `total`.

        `embedding` (learned positions included), `head` (0 when tied), `matrices` and `biases` of the linear layers,
        `norms`.
        """
        heads, kv_heads = self.num_heads * self.head_width, self.num_kv_heads * self.head_width
        reads = {"o_proj": heads, "down_proj": self.ffn_width}  # all others read, and these two write, the width
        writes = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
        writes |= dict.fromkeys(("gate_proj", "up_proj"), self.ffn_width)
        matrices = sum(reads.get(name, self.width) * writes.get(name, self.width) for name in self.linears)
        one_norm = self.width * (2 if self.norm == "layer" else 1)
        norms = 2 * one_norm + (2 * self.head_width if self.qk_norm else 0)
        num_positions = self.context_length if self.positions == "learned" else 0
        counts = {
            "embedding": (self.vocab_size + num_positions) * self.width,
            "head": 0 if self.tied else self.vocab_size * self.width,
            "matrices": self.num_layers * matrices,
            "biases": self.num_layers * sum(writes.get(name, self.width) for name in self.biases),
            "norms": self.num_layers * norms + one_norm,
        }
        return {**counts, "total": sum(counts.values())}

    def flops_per_token(self, context_length: int | None = None) -> float:
        """Floating point operations to train on one token: 6 a weight that multiplies, plus causal attention.

        `context_length` is the length of the rows trained on, in tokens (default: the model's). A weight costs 2
        operations forward and 4 backward; the embedding is looked up, so only the output layer counts. Attention over
        a causal row reads T/2 keys on average, twice (scores and values), in every layer: 6 * L * H * E * T.
        Source: Chowdhery et al. 2022 (PaLM), appendix B, halved there where ours is causal.
        """
        length = self.context_length if context_length is None else context_length
        weights = self.num_parameters()["matrices"] + self.vocab_size * self.width
        return 6.0 * weights + 6.0 * self.num_layers * self.num_heads * self.head_width * length


@dataclass(frozen=True)
class ModelConfig:
    """The `[model]` table of a recipe; 0 leaves a number to be derived from the depth."""

    preset: str = setting("", "a published shape by its name, such as qwen3-0.6b, in place of the depth")
    depth: int = setting(4, "layers; every other number follows from it", low=1)
    width: int = setting(0, f"width of the hidden states, a multiple of {WIDTH_STEP}; 0 derives it", low=0)
    heads: int = setting(0, "attention heads; 0 derives it", low=0)
    kv_heads: int = setting(0, "key/value heads, a divisor of heads; 0 makes them equal", low=0)
    head_width: int = setting(0, "width of one head, even; 0 derives it", low=0)
    ffn_width: int = setting(0, f"hidden width of the SwiGLU, a multiple of {WIDTH_STEP}; 0 derives it", low=0)
    context_length: int = setting(0, "longest row in tokens; 0 derives it (256 at depth 4)", low=0)
    tied: bool = setting(True, "share the embedding with the output layer")
    rope_theta: float = setting(10000.0, "base of the rotary positions' wavelengths", low=1.0)

    def derive(self, vocab_size: int) -> tuple[ModelSpec, list[str]]:
        """Return the spec for a vocabulary of `vocab_size` tokens and the notes that explain it.

        Raises ConfigError when a given number does not fit, a width is not a multiple of 64, or beside a preset another
        number than the context length is given.
        """
        if self.preset:
            return self._preset(vocab_size)
        for name in ("width", "ffn_width"):
            if getattr(self, name) % WIDTH_STEP:
                raise ConfigError(
                    f"[model] {name} = {getattr(self, name)} is not a multiple of {WIDTH_STEP}",
                    hint=f"use {_round_up(getattr(self, name), WIDTH_STEP)}, so that every runtime opens the checkpoint.",
                )
        given = {
            "width": self.width,
            "num_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "head_width": self.head_width,
            "ffn_width": self.ffn_width,
            "context_length": self.context_length,
        }
        overrides = {name: value for name, value in given.items() if value}
        return ModelSpec.from_depth(
            self.depth, vocab_size=vocab_size, tied=self.tied, rope_theta=self.rope_theta, **overrides
        )

    def _preset(self, vocab_size: int) -> tuple[ModelSpec, list[str]]:
        from lyceum.model.presets import find_shape  # which is made of this module

        beside = {f.name for f in fields(self) if f.name not in ("preset", "context_length")}
        given = [name for name in sorted(beside) if getattr(self, name) != getattr(ModelConfig, name)]
        if given:
            raise ConfigError(
                f"[model] preset = {self.preset!r} decides the shape, and {given[0]} = {getattr(self, given[0])} is given too",
                hint=f"leave out {', '.join(given)}, or the preset",
            )
        spec = find_shape(self.preset).spec(vocab_size, self.context_length)
        values = {f.name: getattr(spec, f.name) for f in fields(spec)}
        return spec, [
            f"{n}. {name} = {value}: preset {self.preset}" for n, (name, value) in enumerate(values.items(), 1)
        ]

    def spec(self, vocab_size: int) -> ModelSpec:
        """Return the spec for a vocabulary of `vocab_size` tokens (see `derive`)."""
        return self.derive(vocab_size)[0]


def _round_up(value: float, step: int) -> int:
    return max(step, math.ceil(value / step) * step)
