"""Flax models that decode over a cache of fixed bytes: any length, and nothing overwritten silently."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax import lax
from jax.experimental import checkify

from jbalance import attention, importance
from jbalance.adapters.modules import attentions
from jbalance.cache import live
from jbalance.cache.live import KVCache

COLLECTION = "cache"  # of linen's variables, as that of the stock modules
_SINKS, _RECENT = 4, 32  # tokens of a prompt that stay whatever they are worth


class CacheState(nnx.Variable):
    """The cache of an nnx model."""


class NnxCache(nnx.Module):
    """One cache of fixed bytes for all layers of an nnx model, whose attention it replaces in place.

    A call of the model with a prompt [B, S, E], S > 1, lets it enter the empty cache; a call with
    one token [B, 1, E] attends to all that was kept and to itself. Keys and values stay at the
    precision that they are worth; memory is the same for any length, and the oldest are not lost
    first. The stock `decode=True` overwrites its last slot when it is full: leave it False.

    Positions, masks of prompts and where to stop are the model's own, as ever. All requests of a batch
    have prompts of one length.

    Args:
      model: an nnx module whose `nnx.MultiHeadAttention` layers have the same key/value heads.
      num_bytes: for all of it, never exceeded.
      batch: B.

    Raises:
      ValueError: layers that differ, or bytes that do not hold what is needed at least (`live.create`).
    """

    def __init__(self, model: nnx.Module, num_bytes: int, batch: int = 1) -> None:
        layers = [layer for _, layer in attentions(model)]
        shapes = {(layer.num_kv_heads, layer.head_dim) for layer in layers}
        if len(shapes) > 1:
            raise ValueError(f"model has layers of different (heads, head_dim): {sorted(shapes)}")
        self.state = CacheState(
            live.create(num_bytes, len(layers), *shapes.pop(), num_requests=batch)
        )
        self.rings = CacheState(self.state.get_value().rings)
        # [] int32 pages that prompts lacked for what always stays: not 0, and num_bytes is too few.
        self.lacking = CacheState(jnp.int32(0))
        for i, layer in enumerate(layers):
            layer.attention_fn = nnx.data(_CachedAttention(self, i, len(layers)))

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return self.state.get_value().nbytes

    def reset(self) -> None:
        """Empty, for new prompts."""
        cache = self.state.get_value()
        for request in range(cache.num_requests):
            cache = live.release(cache, request)
        self.state.set_value(cache)
        self.rings.set_value(cache.rings)


class _CachedAttention(nnx.Module):
    """The `attention_fn` of one layer."""

    def __init__(self, cache: NnxCache, layer: int, num_layers: int) -> None:
        self.cache, self.layer, self.num_layers = cache, layer, num_layers

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, **_: Any) -> jax.Array:
        held = self.cache
        if query.shape[1] > 1:
            cache = held.state.get_value()
            y, cache, lacking = prefill(cache, self.layer, query, key, value)
            held.state.set_value(cache)
            held.lacking.set_value(held.lacking.get_value() + lacking)
            held.rings.set_value(cache.rings)
            return y
        cache, rings = held.state.get_value(), held.rings.get_value()
        y, rings, cache = step(cache, rings, self.layer, query, key, value)
        held.rings.set_value(rings)
        if self.layer == self.num_layers - 1:
            held.state.set_value(cache)
        return y


class LinenCachedAttention(linen.Module):
    """An `attention_fn` of one linen layer with a cache of fixed bytes of its own.

    The cache is a variable of the collection "cache", which calls apply as mutable; a prompt or a
    token at a time as with `NnxCache`. Leave the layer's `decode` False.

    Attributes:
      num_bytes: for this layer.
    """

    num_bytes: int

    @linen.compact
    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        del bias, mask  # of a prompt, which is causal
        batch, size, heads, head_dim = key.shape

        def empty() -> KVCache:
            return live.create(self.num_bytes, 1, heads, head_dim, num_requests=batch)

        state = self.variable(COLLECTION, "jbalance", empty)
        if size > 1:
            y, state.value, _ = prefill(state.value, 0, query, key, value)
        else:
            y, _, state.value = step(state.value, state.value.rings, 0, query, key, value)
        return y


def prefill(
    cache: KVCache, layer: int, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, KVCache, jax.Array]:
    """Causal attention of prompts, whose keys and values enter the cache by what they are worth.

    Args:
      cache: whose requests are the batch, without tokens of this layer.
      layer: static.
      q: [B, S, H, D].
      k: [B, S, K, D].
      v: [B, S, K, D].

    Returns:
      y [B, S, H, D], the cache, and [] int32 pages that it lacked for the first and the latest tokens,
      of which none entered then; `checkify` makes that an error.
    """
    size = q.shape[1]
    y = attention.attend(q, k, v, attention.causal(size, size), causal=True).y
    allowed = jnp.int32(cache.arena.num_pages // cache.num_requests)

    def admit(cache: KVCache, request: jax.Array) -> tuple[KVCache, jax.Array]:
        own = q[request], k[request], v[request]
        w = importance.attention_energy(*own, queries=min(size, 64), min_distance=0)
        cache, report = live.admit_layer(
            cache,
            request,
            layer,
            *own[1:],
            jnp.sqrt(w),
            allowed,
            num_sinks=min(_SINKS, size),
            num_recent=min(_RECENT, size),
        )
        return cache, report.shortfall

    cache, lacking = lax.scan(admit, cache, jnp.arange(cache.num_requests))
    lacking = jnp.sum(lacking, dtype=jnp.int32)
    checkify.debug_check(lacking == 0, "the cache is too small for what always stays of a prompt")
    return y, cache, lacking


def step(
    cache: KVCache, rings: live.Ring, layer: int, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, live.Ring, KVCache]:
    """Attention of one token of each request; the last layer's step ends the token.

    Args:
      cache: before the token.
      rings: of all layers, [L, ...].
      layer: static.
      q: [B, 1, H, D].
      k: [B, 1, K, D].
      v: [B, 1, K, D].

    Returns:
      y [B, 1, H, D], the rings, and the cache: as it was until the last layer's step.
    """
    own = jax.tree.map(lambda x: x[layer], rings)
    y, own = live.attend_step(cache, own, layer, q[:, 0], k[:, 0], v[:, 0])
    rings = jax.tree.map(lambda x, new: x.at[layer].set(new.astype(x.dtype)), rings, own)
    if layer == cache.num_layers - 1:
        pages = jnp.full(cache.num_requests, cache.arena.num_pages // cache.num_requests)
        cache, _ = live.end_step(cache, rings, pages)
        rings = cache.rings
    return y[:, None].astype(q.dtype), rings, cache
