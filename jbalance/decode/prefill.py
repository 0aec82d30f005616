"""A prompt goes through the model one layer at a time, and through each layer in chunks of its tokens.

At no time does the cache of the whole prompt exist: beside the residual stream there are the keys and
values of one layer, and the activations of one chunk. The number of tokens is data, so that prompts
of any length up to the capacity share one program.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance import attention
from jbalance.attention import TilePlan
from jbalance.cache import _step
from jbalance.cache._channels import query_energy
from jbalance.decode.model import AttentionSpec, Functions, Model
from jbalance.importance.predicted_worth import WorthWeights, predicted_worth
from jbalance.importance.token_worth import (
    NUM_QUERIES,
    later_energy,
    repeated_energy,
    worth_of,
)

CHUNK_TOKENS = 256
BLOCK_TOKENS = 64  # queries and keys of a tile


class LayerTokens(NamedTuple):
    """What a layer leaves of a prompt; rows behind its length mean nothing."""

    k: jax.Array  # [S, K, D]
    v: jax.Array  # [S, K, D]
    w: jax.Array  # [K, S] float32 worth
    energy: jax.Array | None  # [K, D] float32 of the queries, by channel; None where it is unknown


def capacity_for(num_tokens: int) -> int:
    """The capacity of a prompt of at most so many tokens: a multiple of `CHUNK_TOKENS`."""
    return -(-max(num_tokens, 1) // CHUNK_TOKENS) * CHUNK_TOKENS


def layers_of(
    model: Model, tokens: np.ndarray, capacity: int | None = None
) -> Iterator[tuple[jax.Array, LayerTokens]]:
    """Run a prompt through the model: after each layer the residual stream and the layer's tokens.

    Args:
      model: the decoder.
      tokens: [S] ids.
      capacity: S at most, for which the program is compiled; None for `capacity_for` S.

    Raises:
      ValueError: more tokens than the capacity, or a learned worth of another width.

    Yields:
      x [1, capacity, E], only valid until the next layer, and `LayerTokens` of the capacity.
    """
    capacity = capacity_for(len(tokens) if capacity is None else capacity)
    if len(tokens) > capacity:
        raise ValueError(f"tokens has {len(tokens)} entries: the capacity is {capacity}")
    yield from layers_from(model, embedded(model, tokens, capacity), len(tokens), 0)


def layers_from(
    model: Model, x: jax.Array, number: int, first: int
) -> Iterator[tuple[jax.Array, LayerTokens]]:
    """`layers_of` from layer `first` on, before which the residual stream of so many tokens is x."""
    for layer in range(first, model.num_layers):
        weights = model.layers[layer]
        worth = None if model.worth is None else model.worth[layer]
        if worth is not None and worth.hidden.shape[0] != x.shape[-1]:
            raise ValueError(
                f"model.worth[{layer}] is for a width of {worth.hidden.shape[0]}: the model has "
                f"{x.shape[-1]}"
            )
        x, held = _layer(model.functions(layer), weights, worth, x, jnp.int32(number))
        yield x, held


def embedded(model: Model, tokens: np.ndarray, capacity: int | None = None) -> jax.Array:
    """[1, capacity, E]: the residual stream before the first layer; of `layers_of`."""
    padded = np.zeros(capacity_for(len(tokens)) if capacity is None else capacity, np.int32)
    padded[: len(tokens)] = tokens
    return _embed(model.functions(0), model.params, jnp.asarray(padded))


@functools.partial(jax.jit, static_argnums=0)
def _embed(model: Functions, params: Any, tokens: jax.Array) -> jax.Array:
    return model.embed(params, tokens[None], jnp.arange(tokens.shape[0])[None])


def logits_at(model: Model, x: jax.Array, position: int) -> jax.Array:
    """[V] after the token at `position` of x [1, S, E], the residual stream behind the last layer."""
    return _logits_at(model.functions(0), model.params, x, position)


@functools.partial(jax.jit, static_argnums=0)
def _logits_at(model: Functions, params: Any, x: jax.Array, position: jax.Array) -> jax.Array:
    return model.logits(params, lax.dynamic_slice_in_dim(x, position, 1, axis=1))[0, 0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _layer(
    model: Functions, weights: Any, worth: WorthWeights | None, x: jax.Array, number: jax.Array
) -> tuple[jax.Array, LayerTokens]:
    """x [1, S, E] through one layer, of which `number` tokens are there."""
    size = x.shape[1]
    chunks = -(-number // CHUNK_TOKENS)

    def qkv(first, count):
        positions = first + jnp.arange(count)
        part = lax.dynamic_slice_in_dim(x, first, count, axis=1)
        return model.qkv(weights, part, positions[None])

    def keys(i, kv):
        first = i * CHUNK_TOKENS
        new = qkv(first, CHUNK_TOKENS)[1:]
        return tuple(
            lax.dynamic_update_slice_in_dim(old, part, first, axis=1)
            for old, part in zip(kv, new, strict=True)
        )

    shapes = jax.eval_shape(lambda: qkv(0, CHUNK_TOKENS))[1:]
    empty = tuple(jnp.zeros((1, size, *s.shape[2:]), s.dtype) for s in shapes)
    k, v = lax.fori_loop(0, chunks, keys, empty)
    tokens, window = Tokens(k[0], v[0], jnp.int32(0), number), model.spec.window
    if window is not None:
        tokens = tokens.latest(window)
    last = min(NUM_QUERIES, size)
    later = tokens.later(model.spec, qkv(jnp.clip(number - last, 0, size - last), last)[0][0])

    def weighed(w, part, q, first):
        """What the chunk's tokens are worth is predicted, or its queries are asked about all."""
        if worth is None:
            return w + tokens.repeated(model.spec, q, first)
        known = lax.dynamic_slice_in_dim(later, first, CHUNK_TOKENS, axis=1)
        own = predicted_worth(part, known, worth, start=first, num_tokens=number)
        return lax.dynamic_update_slice_in_dim(w, own, first, axis=1)

    def chunk(i, carry):
        x, w, energy = carry
        first = i * CHUNK_TOKENS
        part = lax.dynamic_slice_in_dim(x, first, CHUNK_TOKENS, axis=1)
        q, _, _ = model.qkv(weights, part, (first + jnp.arange(CHUNK_TOKENS))[None])
        plan = causal_chunk(first, size)
        rules: Any = model.limits._asdict() | {"scale": model.spec.scale, "causal": True}
        y = attention.attend(q, k, v, plan, offset=first, **rules).y
        w = weighed(w, part[0], q[0], first)
        energy += query_energy(q[0], k.shape[2], number - first)
        part = model.finish(weights, part, y)
        return lax.dynamic_update_slice_in_dim(x, part, first, axis=1), w, energy

    empty = jnp.zeros_like(later), jnp.zeros(k.shape[2:])
    x, w, energy = lax.fori_loop(0, chunks, chunk, (x, *empty))
    if worth is None:
        w = worth_of(w, later)
    return x, LayerTokens(k[0], v[0], tokens.placed(w, size), energy)


class Tokens(NamedTuple):
    """The tokens of a layer that are weighed: all of a prompt, or those that a window may reach."""

    k: jax.Array  # [N, K, D]
    v: jax.Array  # [N, K, D]
    begin: jax.Array  # [] int32 position of the first
    number: jax.Array  # [] int32, how many there are

    def latest(self, window: int) -> Tokens:
        """Those from a chunk's first on that a window behind the last one may reach."""
        size = self.k.shape[0]
        span = min(capacity_for(window) + CHUNK_TOKENS, size)
        begin = jnp.maximum(-(-self.number // CHUNK_TOKENS) * CHUNK_TOKENS - span, 0)
        k, v = (lax.dynamic_slice_in_dim(x, begin, span) for x in (self.k, self.v))
        return Tokens(k, v, begin, self.number - begin)

    def later(self, spec: AttentionSpec, q: jax.Array) -> jax.Array:
        """[K, N]: what the last queries ask for."""
        q = _step.scaled(q, spec.scale)
        return later_energy(q, *self._operands(), num_tokens=self.number)

    def repeated(self, spec: AttentionSpec, q: jax.Array, first: jax.Array) -> jax.Array:
        """[K, N]: what a chunk of queries [T, H, D] from position `first` on would ask for."""
        q = _step.scaled(q, spec.scale)
        start = first - self.begin
        energy = repeated_energy(
            q,
            *self._operands(),
            jnp.maximum(start, 0),
            frequencies=spec.rotary,
            num_tokens=self.number,
        )
        return jnp.where(start >= 0, energy, 0)  # chunks that come before these tokens

    def _operands(self) -> tuple[jax.Array, jax.Array]:
        return self.k.astype(jnp.float32), self.v.astype(jnp.float32)

    def placed(self, w: jax.Array, size: int) -> jax.Array:
        """Worth [K, N] among all tokens [K, S]; 0 elsewhere."""
        return lax.dynamic_update_slice(jnp.zeros((w.shape[0], size)), w, (0, self.begin))


def causal_chunk(first: jax.Array, num_keys: int) -> TilePlan:
    """The tiles of a chunk of queries that begins at `first`."""
    last = first + (np.arange(CHUNK_TOKENS // BLOCK_TOKENS) + 1) * BLOCK_TOKENS
    blocks = -(-num_keys // BLOCK_TOKENS)
    lists = jnp.broadcast_to(jnp.arange(blocks, dtype=jnp.int32), (1, 1, last.shape[0], blocks))
    count = jnp.minimum(-(-last // BLOCK_TOKENS), blocks).astype(jnp.int32)[None, None]
    return TilePlan(lists, count, CHUNK_TOKENS, num_keys, BLOCK_TOKENS, BLOCK_TOKENS)
