"""A small causal language model of Flax's modules that learns within some thousand short steps."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from experiments.models import rotary

TAPS = 4  # tokens that the convolution before an attention looks at


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a `LanguageModel`."""

    vocab_size: int
    num_layers: int = 3
    width: int = 208
    num_heads: int = 6
    head_dim: int = 32
    hidden: int = 896
    rope_base: float = 10000.0


class Layer(nnx.Module):
    """Attention and a perceptron, each behind a norm and beside the residual stream.

    Before the attention a causal convolution of each feature (Primer, So et al. 2021): a key then knows
    the tokens before it, which a head needs to continue what has been there (Olsson et al. 2022).
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        c = config
        self.attention_norm = nnx.LayerNorm(c.width, rngs=rngs)
        self.convolution = nnx.Conv(
            c.width,
            c.width,
            kernel_size=(TAPS,),
            padding="CAUSAL",
            feature_group_count=c.width,
            use_bias=False,
            rngs=rngs,
        )
        self.attention = nnx.MultiHeadAttention(
            c.num_heads, c.width, qkv_features=c.num_heads * c.head_dim, decode=False, rngs=rngs
        )
        frequency = rotary.frequencies(c.head_dim, c.rope_base)

        def turned(x: Array) -> Array:
            return rotary.rotate(x, jnp.arange(x.shape[1]), frequency)

        # Flax's module has no rotary embedding; behind its projections it sees x [B, T, H, D].
        module: Any = self.attention
        module.query = nnx.Sequential(module.query, turned)
        module.key = nnx.Sequential(module.key, turned)
        self.norm = nnx.LayerNorm(c.width, rngs=rngs)
        self.up = nnx.Linear(c.width, c.hidden, rngs=rngs)
        self.down = nnx.Linear(c.hidden, c.width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        h = self.attention_norm(x)
        x += self.attention(h + self.convolution(h), is_causal=True)
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class LanguageModel(nnx.Module):
    """tokens [B, T] -> logits [B, T, V], by the embeddings that it reads with."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        c = config
        self.tokens = nnx.Embed(
            c.vocab_size, c.width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs
        )
        self.layers = nnx.List(Layer(c, rngs=rngs) for _ in range(c.num_layers))
        self.norm = nnx.LayerNorm(c.width, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        x = self.tokens(tokens) * math.sqrt(self.tokens.features)
        for layer in self.layers:
            x = layer(x)
        return self.tokens.attend(self.norm(x))
