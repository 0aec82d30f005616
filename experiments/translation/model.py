"""A small encoder-decoder in Flax nnx whose attentions are given by the caller."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a model."""

    vocabulary: int
    width: int = 96
    heads: int = 4
    hidden: int = 192  # of the feed-forward layers
    encoder_layers: int = 2
    decoder_layers: int = 2
    positions: int = 32


KINDS = ("encoder", "decoder", "cross")


class Attend(Protocol):
    """Attention of one layer, over whatever the caller keeps."""

    def __call__(self, kind: str, layer: int, q: Array, k: Array, v: Array) -> Array:
        """q [N, H, D] and k, v [M, H, D] of tokens in the order of the caller -> y [N, H, D]."""


class Attention(nnx.Module):
    """The projections around attention."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        def linear() -> nnx.Linear:
            return nnx.Linear(config.width, config.width, use_bias=False, rngs=rngs)

        self.heads = config.heads
        self.query, self.key, self.value, self.out = linear(), linear(), linear(), linear()

    def __call__(self, kind: str, layer: int, x: Array, memory: Array, attend: Attend) -> Array:
        q, k, v = (
            y.reshape(y.shape[0], self.heads, -1)
            for y in (self.query(x), self.key(memory), self.value(memory))
        )
        return self.out(attend(kind, layer, q, k, v).reshape(x.shape))


class Layer(nnx.Module):
    """Self-attention, cross-attention where there is a memory, and a feed-forward layer."""

    def __init__(self, config: Config, kind: str, rngs: nnx.Rngs):
        self.kind = kind
        self.own = Attention(config, rngs)
        self.own_norm = nnx.RMSNorm(config.width, rngs=rngs)
        if kind == "decoder":
            self.cross = Attention(config, rngs)
            self.cross_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.up = nnx.Linear(config.width, config.hidden, rngs=rngs)
        self.down = nnx.Linear(config.hidden, config.width, rngs=rngs)

    def __call__(self, layer: int, x: Array, memory: Array | None, attend: Attend) -> Array:
        h = self.own_norm(x)
        x = x + self.own(self.kind, layer, h, h, attend)
        if memory is not None:
            x = x + self.cross("cross", layer, self.cross_norm(x), memory, attend)
        return x + self.down(jax.nn.relu(self.up(self.norm(x))))


class Translator(nnx.Module):
    """Subwords to subwords. One embedding serves both sides and the output."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        start = nnx.initializers.normal(config.width**-0.5)
        self.embed = nnx.Embed(config.vocabulary, config.width, embedding_init=start, rngs=rngs)
        self.place = nnx.Embed(
            config.positions, config.width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs
        )
        self.encoder = nnx.List(
            [Layer(config, "encoder", rngs) for _ in range(config.encoder_layers)]
        )
        self.decoder = nnx.List(
            [Layer(config, "decoder", rngs) for _ in range(config.decoder_layers)]
        )
        self.encoder_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.decoder_norm = nnx.RMSNorm(config.width, rngs=rngs)

    def _embedded(self, ids: Array, position: Array) -> Array:
        return self.embed(ids) * self.config.width**0.5 + self.place(position)

    def encode(self, ids: Array, position: Array, attend: Attend) -> Array:
        """Tokens [N] and their positions -> h [N, width]."""
        x = self._embedded(ids, position)
        for i, layer in enumerate(self.encoder):
            x = layer(i, x, None, attend)
        return self.encoder_norm(x)

    def decode(self, ids: Array, position: Array, memory: Array, attend: Attend) -> Array:
        """Tokens [N] that were there before -> h [N, width], for the tokens that follow."""
        x = self._embedded(ids, position)
        for i, layer in enumerate(self.decoder):
            x = layer(i, x, memory, attend)
        return self.decoder_norm(x)

    def logits(self, h: Array) -> Array:
        """h [N, width] -> [N, vocabulary]."""
        return jnp.matmul(h, self.embed.embedding[...].T)


def num_parameters(model: nnx.Module) -> int:
    """Of all of them."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
