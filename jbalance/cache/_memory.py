"""Cross-attention: an encoder's keys and values, written once at one price and then only read.

Whisper and other encoder-decoders attend from every token to the same frames. These are all there
before the first token, so that no recent buffer is needed, nothing is re-encoded as the cache fills,
and no frame is kept for its place: the worth alone decides. A cache without a recent buffer holds them.

    memory = cache.create(budget_bytes, L, K, D, num_requests=B, recent_tokens=0)
    memory = cache.write(memory, k, v, w)             # k, v [L, B, S, K, D], w [L, B, K, S]
    y = cache.attend(memory, layer, q)                # q [B, T, H, D], each layer of each token
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance import _axes, checks
from jbalance._bits import in_32_bits
from jbalance.attention import merge
from jbalance.cache import _centroids, _channels, _codec, _pages, _price
from jbalance.cache._cache import KVCache
from jbalance.cache._prefill import by_kv_head, by_token, checked_lengths
from jbalance.cache._requests import release
from jbalance.cache._step import (
    check_without_windows,
    held_attention,
    recent_attention,
    scaled,
)


@in_32_bits
def write(
    cache: KVCache,
    k: jax.Array,
    v: jax.Array,
    w: jax.Array,
    *,
    lengths: jax.Array | None = None,
) -> KVCache:
    """Store the encoder's keys and values of all layers, each frame at the precision that it is worth.

    One price holds for all layers and heads of a request, whose pages are its even share of the arena.
    Each kept frame is encoded once, the others join their unit's centroids. What the cache held before
    is forgotten: the next window of a recording takes the place of the last, without a recompile.

    Args:
      cache: made with `recent_tokens=0`; donate it, and it is changed in place.
      k: [L, B, S, K, D] float keys.
      v: [L, B, S, K, D] float values.
      w: [L, B, K, S] float worth of each frame, >= 0 (`importance.cross_worth`).
      lengths: [B] int32 in 0..S, frames of each request, padded on the right; None for S.

    Returns:
      The cache.

    Raises:
      ValueError: a cache with a recent buffer, shapes that do not fit, lengths outside 0..S, concrete
        values that are not finite or worth below 0. Traced: a unit does not keep a frame whose key or
        value is not finite.
    """
    _check_memory(cache)
    k, v, w = _checked(cache, k, v, w)
    lengths = checked_lengths(lengths, cache.num_requests, k.shape[2])
    return _written(cache, k, v, w, lengths)


@jax.jit  # once for all eager calls of equal shapes
def _written(cache, k, v, w, lengths):
    def one_request(cache, row):
        return _write_request(release(cache, row[0]), *row), None

    rows = jnp.arange(cache.num_requests), *(jnp.moveaxis(x, 1, 0) for x in (k, v, w)), lengths
    return lax.scan(one_request, cache, rows)[0]


def _write_request(cache, request, k, v, w, number):
    """One request's frames k, v [L, S, K, D] of worth w [L, K, S], `number` of them there."""
    bits, n, size = cache.arena.bits, cache.units_per_request, k.shape[1]
    finite = _codec.usable(k, v)
    there = jnp.swapaxes(finite, 1, 2) & (jnp.arange(size) < number)
    code = _price.encode_worth(w)
    unit = jnp.where(cache.slots >= 0, cache.slots, n)[..., None]
    histogram = jnp.zeros((n, len(bits), _price.NUM_CODES), jnp.int32)
    histogram = histogram.at[unit, 0, code].add(there, mode="drop")
    steps = _price.steps(cache.head_dim, bits)
    found = _price.price_of(histogram, steps, cache.arena.page_tokens, cache.even_pages)
    pages = lax.dynamic_update_slice(cache.arena.pages, found.pages, (request * n, 0))
    arena, _ = _pages.reallocate(cache.arena, pages)  # even shares are always there
    least = found.least.at[unit[..., 0]].get(mode="clip")
    level = jnp.where(there, _price.levels_of(code, least[:, :, None]), absent(bits))

    def one_layer(cache, row):
        layer, k, v, w, level, code = row
        return write_layer(cache, request, layer, (k, v, w), level, code, number), None

    rows = jnp.arange(cache.num_layers), k, v, w, level, code
    return lax.scan(one_layer, dataclasses.replace(cache, arena=arena), rows)[0]


def absent(bits: tuple[int, ...]) -> int:
    """The level of what is no token: neither kept nor evicted."""
    return len(bits) + 1


def write_layer(
    cache: KVCache,
    request: jax.Array | int,
    layer: jax.Array | int,
    tokens: tuple[jax.Array, ...],
    level: jax.Array,
    code: jax.Array,
    number: jax.Array | int,
    *,
    centroids: bool = True,
) -> KVCache:
    """One layer's tokens at levels that were chosen, into units that have the pages and no tokens.

    Args:
      cache: before.
      request: [] int32.
      layer: [] int32.
      tokens: keys [S, K, D], values [S, K, D], worth [K, S], and the energy of the queries if it is
        known, as `_prefill.admit` takes them.
      level: [K, S] int, index into the bits; their number where evicted, one more where `absent`.
      code: [K, S] uint8 codes of worth.
      number: [] int32, how many of the S tokens there are, for the mean key and the channels.
      centroids: whether evicted tokens join centroids, or are lost; static.

    Returns:
      The cache.
    """
    units = cache.units(request, layer)
    k, v, w, *energy = tokens
    k, v = (jnp.swapaxes(x, 0, 1).astype(jnp.float32) for x in (k, v))
    basis = _channels.measured(k, v, w, number, *energy)
    k, v = basis.stored(k, v)
    here = (units < cache.key_mean.shape[0])[:, None]
    arena = cache.arena
    time = jnp.broadcast_to(np.arange(k.shape[1], dtype=np.int32), level.shape)
    for m in range(len(arena.bits)):
        own = (level == m) & here
        first = jnp.argsort(~own, axis=1, stable=True)
        first_k, first_v, first_code, first_time = (
            jnp.take_along_axis(x, first.reshape(first.shape + (1,) * (x.ndim - 2)), axis=1)
            for x in (k, v, code, time)
        )
        number_m = jnp.sum(own, axis=1, dtype=jnp.int32)
        arena, _ = _pages.write(
            arena, units, m, first_k, first_v, first_code, number_m, time=first_time
        )
    rest = cache.centroids
    if centroids:
        evicted = (level == len(arena.bits)) & here
        rest = _centroids.absorb(rest, units, k, v, _price.decode_worth(code), evicted)
    cache = dataclasses.replace(cache, arena=arena, centroids=rest)
    return _channels.with_units(cache, units, basis)


@in_32_bits
def attend(
    cache: KVCache, layer: jax.Array | int, q: jax.Array, *, scale: float | None = None
) -> jax.Array:
    """Cross-attention: queries see all that the cache holds of their request; nothing enters.

    y = softmax(q kᵀ / sqrt(D)) v over the kept frames, and over a centroid as over as many frames as it
    stands for.

    Args:
      cache: only read.
      layer: [] int32 in 0..L-1.
      q: [B, T, H, D] float queries, H a multiple of K.
      scale: of the logits; None for 1 / sqrt(D).

    Returns:
      y [B, T, H, D] in q's type; 0 for heads of other devices, and for a request without frames.

    Raises:
      ValueError: shapes that do not fit, a layer that there is not, a cache with windows, concrete
        values that are not finite.
    """
    checks.instance("cache", cache, KVCache)
    check_without_windows(cache)
    _axes.unsplit(q=q)
    q = jnp.asarray(checks.floats("q", q, 4, "[B, T, H, D]"))
    requests, heads, head_dim = cache.num_requests, cache.num_kv_heads, cache.head_dim
    if q.shape[0] != requests or 0 in q.shape or q.shape[2] % heads or q.shape[3] != head_dim:
        raise ValueError(
            f"q has shape {q.shape}: it must be [B, T, H, D] = ({requests}, at least 1, a multiple of "
            f"{heads}, {head_dim})"
        )
    checks.largest_finite("q", q, _codec.MOST)
    layer = checks.one_int("layer", layer, 0, cache.num_layers - 1)
    if scale is not None:
        scale = checks.static_float("scale", scale, -checks.SCALE_MAX, checks.SCALE_MAX)
    return _attended(cache, layer, q, scale)


@functools.partial(jax.jit, static_argnames="scale")
def _attended(cache, layer, q, scale):
    def one_request(row):
        request, q = row
        part = held_attention(cache, request, layer, q)
        if cache.recent_tokens:
            part = merge(part, recent_attention(cache, request, layer, q))
        return part.y

    heads = jax.vmap(lambda x: by_kv_head(x, cache.num_kv_heads))(scaled(q, scale))
    y = lax.map(one_request, (jnp.arange(cache.num_requests), heads))
    return jax.vmap(lambda x: by_token(x, q.shape[1]))(y).astype(q.dtype)


def _check_memory(cache):
    """ValueError unless the cache is one that is written once."""
    checks.instance("cache", cache, KVCache)
    check_without_windows(cache)
    if cache.recent_tokens:
        raise ValueError(
            f"cache has recent buffers of {cache.recent_tokens} tokens: it is for self-attention, by "
            f"`prefill` and `step`; create one with recent_tokens=0 for an encoder's frames"
        )


def _checked(cache, k, v, w):
    """k, v and w as arrays; ValueError for shapes that do not fit."""
    _axes.unsplit(k=k, v=v, w=w)
    lead, heads = (cache.num_layers, cache.num_requests), cache.num_kv_heads
    k, v = (
        jnp.asarray(checks.floats(name, x, 5, "[L, B, S, K, D]"))
        for name, x in (("k", k), ("v", v))
    )
    size = k.shape[2]
    shape = (*lead, size, heads, cache.head_dim)
    for name, x in (("k", k), ("v", v)):
        if x.shape != shape or not size:
            raise ValueError(
                f"{name} has shape {x.shape}: it must be [L, B, S, K, D] = ({lead[0]}, {lead[1]}, "
                f"{max(size, 1)}, {heads}, {cache.head_dim})"
            )
        checks.largest_finite(name, x, _codec.MOST)
    checks.rank("w", w, 4, "[L, B, K, S]")
    if np.shape(w) != (*lead, heads, size):
        raise ValueError(
            f"w has shape {np.shape(w)}: it must be [L, B, K, S] = {(*lead, heads, size)}"
        )
    return k, v, jnp.asarray(checks.non_negative("w", w))
