"""A small causal language model from Flax's own modules: what a user of nnx begins with."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a `Decoder`."""

    vocab_size: int
    max_tokens: int
    num_layers: int = 3
    width: int = 192
    num_heads: int = 6
    head_dim: int = 32
    hidden: int = 768


class DecoderLayer(nnx.Module):
    """Attention and a perceptron, each behind a norm and beside the residual stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        c = config
        self.attention_norm = nnx.LayerNorm(c.width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            c.num_heads, c.width, qkv_features=c.num_heads * c.head_dim, decode=False, rngs=rngs
        )
        self.norm = nnx.LayerNorm(c.width, rngs=rngs)
        self.up = nnx.Linear(c.width, c.hidden, rngs=rngs)
        self.down = nnx.Linear(c.hidden, c.width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x += self.attention(self.attention_norm(x), is_causal=True)
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Decoder(nnx.Module):
    """tokens [B, T] -> logits [B, T, V], T up to `max_tokens`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        c = config
        embedding: Any = nnx.initializers.normal(0.02)
        self.tokens = nnx.Embed(c.vocab_size, c.width, embedding_init=embedding, rngs=rngs)
        self.positions = nnx.Embed(c.max_tokens, c.width, embedding_init=embedding, rngs=rngs)
        self.layers = nnx.List(DecoderLayer(c, rngs=rngs) for _ in range(c.num_layers))
        self.norm = nnx.LayerNorm(c.width, rngs=rngs)
        self.head = nnx.Linear(c.width, c.vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def num_parameters(model: nnx.Module) -> int:
    """Of all that is trained."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
