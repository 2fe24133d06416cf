"""Published shapes by name: GPT-1 to GPT-3, the API's ada to davinci, Llama and Qwen3, each with its exact count of weights.

Why: a shape that everybody knows is the best check of our arithmetic, and a good place to begin: `[model] preset =
"qwen3-0.6b"` makes a model of that shape, with the recipe's own vocabulary in place of the published one. The counts
are held to the published numbers and to the classes of `transformers`.

Sources: Radford et al. 2018 (GPT-1) and 2019 (GPT-2) with their released weights; Brown et al. 2020 (GPT-3), table
2.1; Touvron et al. 2023 (Llama 2), Grattafiori et al. 2024 (Llama 3), Yang et al. 2025 (Qwen3) with their config.json.

Mended misprints of GPT-3's table 2.1: XL is printed with 24 heads of 128, which is 3072 and not its width of 2048, so
it has 16 here, as in the table of Bavarian et al. 2022 (fill-in-the-middle), who say that GPT-3's has misprints; 13B
is printed with a width of 5140, which no 40 heads of 128 fill, so it has 5120.

What it is not: a list of checkpoints. GPT-3's alternating sparse attention and Llama 3.2's stretched rotary positions
(beyond 8,192 tokens) are not part of a shape; neither has weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lyceum.errors import ConfigError, did_you_mean
from lyceum.model.spec import FFN_LINEARS, ModelSpec

GPT2: dict[str, Any] = {
    "norm": "layer",
    "positions": "learned",
    "ffn": "gelu",
    "biases": ("q_proj", "k_proj", "v_proj", "o_proj", *FFN_LINEARS["gelu"]),
}


@dataclass(frozen=True)
class Shape:
    """One published shape; `lr` and `batch_tokens` are what its paper trained it with (AdamW), 0 where not stated.

    family: gpt1 (norms after each block, none at the end), gpt2 (GPT-3 too), llama or qwen3. The first two have
    learned positions, LayerNorm and biases; ffn_width is the hidden width of the one feed-forward block.
    """

    family: str
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    ffn_width: int
    context_length: int
    vocab_size: int
    tied: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    lr: float = 0.0
    batch_tokens: int = 0

    def num_parameters(self) -> int:
        """Count every weight, tied ones once."""
        if self.family != "gpt1":
            return self.spec().num_parameters()["total"]
        # attention 4 D^2 + 4 D, feed-forward 2 D F + F + D, two norms of 2 D each
        layer = 4 * self.width**2 + 2 * self.width * self.ffn_width + self.ffn_width + 9 * self.width
        return (self.vocab_size + self.context_length) * self.width + self.num_layers * layer

    def spec(self, vocab_size: int | None = None, context_length: int = 0) -> ModelSpec:
        """Return the model's spec, with another vocabulary or context if given.

        Raises ConfigError for a family that ModelSpec cannot say.
        """
        if self.family == "gpt1":
            raise ConfigError(
                "GPT-1 has its norms after each block and none at the end, which the decoder has not",
                hint=f"choose another preset: {', '.join(buildable())}",
            )
        return ModelSpec(
            vocab_size=vocab_size or self.vocab_size,
            num_layers=self.num_layers,
            width=self.width,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_width=self.head_width,
            ffn_width=self.ffn_width,
            context_length=context_length or self.context_length,
            rope_theta=self.rope_theta,
            norm_eps=self.norm_eps,
            tied=self.tied,
            qk_norm=self.family == "qwen3",
            **(GPT2 if self.family == "gpt2" else {}),
        )


def _gpt(layers: int, width: int, heads: int, context: int, lr: float = 0.0, batch: int = 0) -> Shape:
    return Shape(
        "gpt2", layers, width, heads, heads, width // heads, 4 * width, context, 50257, lr=lr, batch_tokens=batch
    )


def _qwen3(layers: int, width: int, heads: int, ffn: int, tied: bool) -> Shape:
    return Shape("qwen3", layers, width, heads, 8, 128, ffn, 40960, 151936, tied, 1e6, 1e-6)


SHAPES: dict[str, Shape] = {
    "gpt": Shape("gpt1", 12, 768, 12, 12, 64, 3072, 512, 40478, lr=2.5e-4, batch_tokens=64 * 512),
    "gpt2": _gpt(12, 768, 12, 1024),
    "gpt2-medium": _gpt(24, 1024, 16, 1024),
    "gpt2-large": _gpt(36, 1280, 20, 1024),
    "gpt2-xl": _gpt(48, 1600, 25, 1024),
    "gpt3-small": _gpt(12, 768, 12, 2048, 6.0e-4, 500_000),
    "gpt3-medium": _gpt(24, 1024, 16, 2048, 3.0e-4, 500_000),
    "gpt3-large": _gpt(24, 1536, 16, 2048, 2.5e-4, 500_000),
    "gpt3-xl": _gpt(24, 2048, 16, 2048, 2.0e-4, 1_000_000),  # printed: 24 heads
    "gpt3-2.7b": _gpt(32, 2560, 32, 2048, 1.6e-4, 1_000_000),
    "gpt3-6.7b": _gpt(32, 4096, 32, 2048, 1.2e-4, 2_000_000),
    "gpt3-13b": _gpt(40, 5120, 40, 2048, 1.0e-4, 2_000_000),  # printed: width 5140
    "gpt3-175b": _gpt(96, 12288, 96, 2048, 0.6e-4, 3_200_000),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, True),
    "qwen3-4b": _qwen3(36, 2560, 32, 9728, True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12288, False),
    "llama2-7b": Shape("llama", 32, 4096, 32, 32, 128, 11008, 4096, 32000, False, lr=3e-4, batch_tokens=4_000_000),
    "llama3-8b": Shape("llama", 32, 4096, 32, 8, 128, 14336, 8192, 128256, False, 5e5, lr=3e-4),
    "llama3.2-1b": Shape("llama", 16, 2048, 32, 8, 64, 8192, 8192, 128256, True, 5e5),
}

# OpenAI never published the sizes behind its API's names. EleutherAI inferred these in 2021 ("On the sizes of OpenAI API
# models", its blog) from evaluation scores; the widths of the embeddings once served under the names (1024, 2048, 4096,
# 12288) agree. They are inferences, and approximate.
INFERRED = {"ada": "gpt3-medium", "babbage": "gpt3-xl", "curie": "gpt3-6.7b", "davinci": "gpt3-175b"}


def find_shape(name: str) -> Shape:
    """Return the shape of that name, in any case.

    Raises ConfigError when there is none; the hint names the nearest.
    """
    known = name.lower()
    known = INFERRED.get(known, known)
    if known not in SHAPES:
        raise ConfigError(f"there is no preset {name!r}", hint=did_you_mean(name.lower(), [*SHAPES, *INFERRED]))
    return SHAPES[known]


def buildable() -> list[str]:
    """The names of the shapes that ModelSpec can say."""
    return [name for name, shape in SHAPES.items() if shape.family != "gpt1"]
