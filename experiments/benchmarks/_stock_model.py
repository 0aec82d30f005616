"""A decoder of Flax's own layers: seconds to compile a prompt and a step, stock and over `NnxCache`."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
from flax import nnx

from jbalance.adapters import NnxCache

LAYERS, HEADS, WIDTH, VOCABULARY = 3, 8, 512, 1000
PROMPT, NUM_BYTES = 1024, 2 << 20


class _Block(nnx.Module):
    def __init__(self, decode: bool, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=decode, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x += self.attention(self.norms[0](x), is_causal=True)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class _Decoder(nnx.Module):
    def __init__(self, decode: bool) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = nnx.List([_Block(decode, rngs) for _ in range(LAYERS)])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(x)


def compile_seconds() -> tuple[float, float]:
    """Of the stock model (a prompt without cache, a step with its dense one), and over `NnxCache`."""
    decoding = _Decoder(decode=True)
    for block in decoding.blocks:
        block.attention.init_cache((1, PROMPT, WIDTH))
    stock = _seconds(_Decoder(decode=False), PROMPT) + _seconds(decoding, 1)
    model = _Decoder(decode=False)
    cache = NnxCache(model, NUM_BYTES)
    assert cache.num_bytes <= NUM_BYTES
    return stock, _seconds(model, PROMPT) + _seconds(model, 1)


def _seconds(model: nnx.Module, num_tokens: int) -> float:
    """Until a call with so many tokens is compiled."""
    graph, state = nnx.split(model)

    def call(state, tokens):
        model = nnx.merge(graph, state)
        return model(tokens), nnx.state(model)

    start = time.perf_counter()
    tokens = jnp.zeros((1, num_tokens), jnp.int32)
    jax.jit(call, donate_argnums=0).lower(state, tokens).compile()
    return time.perf_counter() - start
