"""Prompts enter the cache: causal attention of their tokens, which are kept at what they are worth."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance import _axes, attention, checks
from jbalance._bits import in_32_bits
from jbalance._debug_check import debug_check
from jbalance.attention import Partial, TilePlan, Tiling, merge
from jbalance.cache import _admit, _channels, _codec, _price
from jbalance.cache._admit import Report
from jbalance.cache._cache import KVCache
from jbalance.cache._settle import checked_allowance
from jbalance.cache._sight import Ages
from jbalance.cache._step import (
    check_growing,
    check_without_windows,
    held_attention,
    recent_attention,
    scaled,
)
from jbalance.importance import token_worth
from jbalance.importance._rotary import check as rotary_frequencies
from jbalance.importance.blending import blend
from jbalance.importance.knowledge import Knowledge, imply
from jbalance.importance.token_worth import NUM_RECENT, NUM_SINKS


@in_32_bits
def prefill(
    cache: KVCache,
    layer: jax.Array | int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    frequencies: Any,
    lengths: jax.Array | None = None,
    scale: float | None = None,
    allowance_pages: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """Causal attention of prompts in one layer, whose keys and values enter the cache.

    A prompt's tokens see those before them and all that the cache holds of their request: a second
    prompt (the next turn of a chat) goes on from the first. Each token is kept at the precision that it
    is worth (`importance.token_worth`), or joins the centroids, beside what came from other layers.

    Args:
      cache: before; donate it, and it is changed in place.
      layer: [] int32 in 0..L-1.
      q: [B, S, H, D] float queries, H a multiple of K, after the rotary embedding.
      k: [B, S, K, D] float keys, after the rotary embedding.
      v: [B, S, K, D] float values.
      frequencies: [D/2] of the rotary embedding, radians per position of each pair of features; None for
        a model without.
      lengths: [B] int32 in 0..S, tokens of each prompt, padded on the right; None for S.
      scale: of the logits; None for 1 / sqrt(D).
      allowance_pages: [B] int32, at least `KVCache.floor_pages` each; None for `KVCache.even_pages`.

    Returns:
      y [B, S, H, D] in q's type, of which rows behind a prompt's length mean nothing, and the cache.
      For heads of other devices y = 0.

    Raises:
      ValueError: shapes that do not fit, lengths outside 0..S, an allowance below the floor, concrete
        values that are not finite. Traced ones: y of their prompt may be NaN, and a unit whose key or
        value it is does not keep the token.
    """
    q, k, v = _checked(cache, q, k, v)
    requests, size = q.shape[:2]
    layer = checks.one_int("layer", layer, 0, cache.num_layers - 1)
    allowance_pages = checked_allowance(cache, allowance_pages)
    lengths = checked_lengths(lengths, requests, size)
    if scale is not None:
        scale = checks.static_float("scale", scale, -checks.SCALE_MAX, checks.SCALE_MAX)
    frequencies = rotary_frequencies(frequencies, cache.head_dim)
    return _prefilled(cache, layer, q, k, v, frequencies, lengths, allowance_pages, scale)


@functools.partial(jax.jit, static_argnames="scale")  # once for all eager calls of equal shapes
def _prefilled(cache, layer, q, k, v, frequencies, lengths, allowance_pages, scale):
    """Attention of the prompts, and the cache with their tokens."""
    requests, size = q.shape[:2]
    own = attention.attend(q, k, v, causal_plan(size), causal=True, scale=scale)
    queries = scaled(q, scale)
    heads = jax.vmap(lambda x: by_kv_head(x, cache.num_kv_heads))(queries)
    own = Partial(*(jax.vmap(lambda x: by_kv_head(x, cache.num_kv_heads))(x) for x in own))

    def read(row):
        request, heads, own = row
        y = _with_held(cache, request, layer, heads, own)
        known = cache.units(request, layer) < cache.key_mean.shape[0]
        return jnp.where(known[:, None, None], y, 0)

    def enter(cache, row):
        request, k, v, q = row
        w = token_worth(q, k, v, frequencies=frequencies, num_tokens=lengths[request])
        cache, report = admit(
            cache,
            request,
            layer,
            k,
            v,
            w,
            allowance_pages[request],
            num_tokens=lengths[request],
            energy=_channels.query_energy(q, cache.num_kv_heads, lengths[request]),
        )
        return cache, report.shortfall

    request = jnp.arange(requests)
    y = lax.map(read, (request, heads, own))
    # No y is above infinity. XLA, which does not see that, reads for all requests before any tokens
    # enter, where it would copy the arena to read from later.
    request = jnp.where(y[:, 0, 0, 0] > jnp.inf, -1, request)
    cache, shortfall = lax.scan(enter, cache, (request, k, v, queries))
    debug_check(jnp.all(shortfall == 0), "allowance_pages is below KVCache.floor_pages")
    return jax.vmap(lambda x: by_token(x, size))(y).astype(q.dtype), cache


def _with_held(cache, request, layer, heads, own) -> jax.Array:
    """Attention [K, T, D] of a prompt merged with that over what its request holds, if anything."""

    def merged():
        held = held_attention(cache, request, layer, heads)
        return merge(merge(own, held), recent_attention(cache, request, layer, heads)).y

    n = cache.units_per_request
    held = lax.dynamic_slice_in_dim(cache.arena.count, request * n, n)
    warm = jnp.any(held > 0) | (cache.recent_count[request] > 0)
    return lax.cond(warm, merged, lambda: own.y.astype(jnp.float32))


def by_kv_head(x: jax.Array, kv_heads: int) -> jax.Array:
    """[T, H, ...] to [K, T G, ...]: the queries of each key/value head."""
    x = jnp.moveaxis(x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:]), 1, 0)
    return x.reshape(kv_heads, -1, *x.shape[3:])


def by_token(x: jax.Array, size: int) -> jax.Array:
    """The inverse of `by_kv_head`: [K, T G, ...] to [T, H, ...]."""
    x = jnp.moveaxis(x.reshape(x.shape[0], size, -1, *x.shape[2:]), 0, 1)
    return x.reshape(size, -1, *x.shape[3:])


def causal_plan(size: int) -> TilePlan:
    """All tiles of a causal prompt; narrower blocks for one that is shorter."""
    block = min(64, size)
    return attention.dense(Tiling(size, size, block, block))


def _checked(cache, q, k, v):
    """q, k and v as arrays; ValueError for shapes that do not fit."""
    checks.instance("cache", cache, KVCache)
    check_without_windows(cache)
    check_growing(cache)
    requests, heads, head_dim = cache.num_requests, cache.num_kv_heads, cache.head_dim
    _axes.unsplit(q=q, k=k, v=v)
    q, k, v = (
        jnp.asarray(checks.floats(name, x, 4, "[B, S, H or K, D]"))
        for name, x in (("q", q), ("k", k), ("v", v))
    )
    shape = (requests, np.shape(q)[1], heads, head_dim)
    fits = q.shape[0] == requests and q.shape[2] % heads == 0 and q.shape[3] == head_dim
    if not fits or q.shape[1] == 0:
        raise ValueError(
            f"q has shape {q.shape}: it must be [B, S, H, D] = ({requests}, at least 1, a multiple of "
            f"{heads}, {head_dim})"
        )
    for name, x in (("k", k), ("v", v)):
        if np.shape(x) != shape:
            raise ValueError(
                f"{name} has shape {np.shape(x)}: it must be [B, S, K, D] = {shape}; the cache is "
                f"for self-attention, whose keys are those of its queries' tokens; for cross-attention "
                f"there are `write` and `attend`"
            )
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.largest_finite(name, x, _codec.MOST)
    return q, k, v


def checked_lengths(lengths: jax.Array | None, requests: int, size: int) -> jax.Array:
    """[B] int32 in 0..S, S for None; ValueError for others."""
    if lengths is None:
        return jnp.full(requests, size, jnp.int32)
    checks.rank("lengths", lengths, 1, "[B]")
    if np.shape(lengths) != (requests,):
        raise ValueError(f"lengths has shape {np.shape(lengths)}: it must be [B] = ({requests},)")
    lengths = checks.int_in_range("lengths", lengths, 0, size)
    return jnp.asarray(lengths, jnp.int32)


def admit(
    cache: KVCache,
    request: jax.Array | int,
    layer: jax.Array | int,
    k: jax.Array,
    v: jax.Array,
    w: jax.Array,
    allowance_pages: jax.Array | int,
    *,
    num_tokens: jax.Array | int | None = None,
    start: jax.Array | int = 0,
    energy: jax.Array | None = None,
    known: Knowledge | None = None,
) -> tuple[KVCache, Report]:
    """Let one layer's tokens of a prompt enter.

    A unit's mean key and channels are taken from the first tokens that enter it, without the sinks, and
    stay until `release`. The first and the latest tokens of a request's first prompt always stay; the
    latest of later ones enter at the highest worth.

    Args:
      cache: before; donate it.
      request: [] int32.
      layer: [] int32.
      k: [S, K, D] float keys, after the rotary embedding.
      v: [S, K, D] float values.
      w: [K, S] float worth, >= 0.
      allowance_pages: [] int32, for the whole request.
      num_tokens: [] int32, how many of the S there are; None for all.
      start: [] int32, position of the first, where layers have windows.
      energy: [K, D] of the queries, `_channels.query_energy`; None if it is not known.
      known: rules about the S tokens; the allowance must hold those that always stay by them.

    Returns:
      The cache, and the `Report` of `_admit.admit`; with a shortfall, which only an allowance below the
      floor gives, arena and centroids are as before, and none of the tokens entered.

    Raises:
      ValueError: shapes that do not fit, or a request or layer that there is not.
    """
    heads, head_dim = cache.num_kv_heads, cache.head_dim
    checks.rank("k", k, 3, "[S, K, D]")
    if np.shape(k)[1:] != (heads, head_dim) or np.shape(v) != np.shape(k):
        raise ValueError(
            f"k has shape {np.shape(k)} and v {np.shape(v)}: both must be [S, {heads}, {head_dim}]"
        )
    size = np.shape(k)[0]
    if np.shape(w) != (heads, size):
        raise ValueError(f"w has shape {np.shape(w)}: it must be [K, S] = {(heads, size)}")
    request = checks.one_int("request", request, 0, cache.num_requests - 1)
    layer = checks.one_int("layer", layer, 0, cache.num_layers - 1)
    units = cache.units(request, layer)
    number = jnp.asarray(size if num_tokens is None else num_tokens, jnp.int32)
    k, v = (jnp.swapaxes(jnp.asarray(x), 0, 1).astype(jnp.float32) for x in (k, v))
    fresh = _channels.untouched(cache, units)
    basis = _channels.entered(cache, units, k, v, w, number, energy)
    k, v = basis.stored(k, v)
    time, ages, clock = None, None, cache.clock
    if clock is not None:
        after = jnp.asarray(start, jnp.int32) + number
        time = jnp.broadcast_to(start + jnp.arange(size, dtype=jnp.int32), (heads, size))
        # Other layers' tokens that were there before may still be asked by the first of these.
        ages = Ages(clock.window, jnp.asarray(start, jnp.int32), after)
        clock = dataclasses.replace(clock, next=clock.next.at[request].max(after))
    arena, centroids, report = _admit.admit(
        cache.arena,
        cache.centroids,
        request * cache.units_per_request,
        cache.units_per_request,
        units,
        k,
        v,
        prompt_codes(w, number, fresh, known),
        allowance_pages,
        num_tokens=jnp.broadcast_to(number, (heads,)),
        certain=cache.certain,
        time=time,
        ages=ages,
    )
    cache = dataclasses.replace(cache, arena=arena, centroids=centroids, clock=clock)
    return _channels.with_units(cache, units, basis), report


def prompt_codes(
    w: jax.Array, number: jax.Array | int, fresh: jax.Array, known: Knowledge | None = None
) -> jax.Array:
    """[K, S] uint8 codes of worth [K, S], by rules about the S tokens if there are any.

    The first and latest tokens always stay where `fresh` [K].
    """
    w = w if known is None else blend(w, known.prior, known.beta)
    token = np.arange(w.shape[1])
    latest, first = token >= number - NUM_RECENT, token < NUM_SINKS
    code = jnp.where(latest, np.uint8(_price.HIGHEST), _price.encode_worth(w))
    protected = (first | latest) & fresh[:, None]
    code = jnp.where(protected, np.uint8(_price.PROTECTED), code)
    if known is None:
        return code
    return imply(jnp.where(known.keep, np.uint8(_price.PROTECTED), code), known)
