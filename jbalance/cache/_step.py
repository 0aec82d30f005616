"""Decoding over the cache: one new token of each request, layer by layer, in constant bytes."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance import _axes, checks
from jbalance._bits import in_32_bits
from jbalance.attention import EMPTY, Partial, merge
from jbalance.cache import _centroids, _channels, _codec
from jbalance.cache._attend import attend_pages
from jbalance.cache._cache import KVCache, bits_of, of_bits
from jbalance.cache._settle import advanced, checked_allowance, settle
from jbalance.cache._sight import FULL, Limits, Sight, capped


@in_32_bits
def step(
    cache: KVCache,
    layer: jax.Array | int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    context: KVCache | None = None,
    scale: float | None = None,
    active: jax.Array | None = None,
    allowance_pages: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """One layer's attention for one new token of each request, which sees itself and all before it.

    Call it once a layer for each token, in any order of the layers. The token joins the recent buffer;
    after the last of L layers, full buffers let their older half enter the arena, at one price for all
    layers and heads of the request. What others hold does not change a bit of a request's result:
    kernels read each unit by itself, and XLA's loops one request after the other.

    Args:
      cache: before; donate it, and it is changed in place.
      layer: [] int32 in 0..L-1.
      q: [B, H, D] float queries, H a multiple of K, after the rotary embedding.
      k: [B, K, D] float keys, after the rotary embedding.
      v: [B, K, D] float values.
      context: a cache of one request that all requests see besides their own, only read.
      scale: of the logits; None for 1 / sqrt(D).
      active: [B] bool, requests that have a token now, the same for all layers; the results of others
        mean nothing.
      allowance_pages: [B] int32, at least `KVCache.floor_pages` each; None for `KVCache.even_pages`.

    Returns:
      y [B, H, D] float32, and the cache. For heads of other devices y = 0.

    Raises:
      ValueError: shapes that do not fit, an allowance below the floor, concrete values that are not
        finite, or beyond 1e15. Of traced ones `checkify` tells; y of such a token is NaN, and a unit
        whose key or value it is does not keep it: what others see is as if it had not been.
    """
    q, k, v = _checked(cache, q, k, v, context)
    layer = checks.one_int("layer", layer, 0, cache.num_layers - 1)
    allowance_pages = checked_allowance(cache, allowance_pages)
    if active is None:
        active = jnp.ones(cache.num_requests, bool)
    active = jnp.asarray(checks.booleans("active", active, (cache.num_requests,), "[B]"))
    return _stepped(cache, layer, scaled(q, scale), k, v, active, context, allowance_pages)


@jax.jit  # once for all eager calls of equal shapes
def _stepped(cache, layer, q, k, v, active, context, allowance_pages):
    """One layer's attention, and the cache with the tokens."""
    y, cache = attend_token(cache, layer, q, k, v, active, context)
    done = cache.layers_done + 1 == cache.num_layers
    cache = advanced(cache, active & done)
    cache = dataclasses.replace(cache, layers_done=jnp.where(done, 0, cache.layers_done + 1))
    return y, settle(cache, allowance_pages)[0]


@in_32_bits
def step_in_order(
    cache: KVCache, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, *, last: bool
) -> tuple[jax.Array, KVCache]:
    """`step` of all requests for a caller who knows which layer is a token's last.

    The end of a step, which lets full buffers enter the arena, takes longer to compile than attention:
    a program of many layers then holds it once.
    """
    q, k, v = _checked(cache, q, k, v, None)
    active = jnp.ones(cache.num_requests, bool)
    y, cache = attend_token(cache, layer, scaled(q, None), k, v, active)
    if not last:
        return y, cache
    cache = advanced(cache, active)
    return y, settle(cache, checked_allowance(cache, None))[0]


def attend_token(
    cache: KVCache,
    layer: jax.Array | int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    active: jax.Array,
    context: KVCache | None = None,
    limits: Limits = FULL,
) -> tuple[jax.Array, KVCache]:
    """One layer of `step` without its end: the token is in the recent buffer, but does not count yet."""
    requests = cache.num_requests
    q = q.reshape(requests, cache.num_kv_heads, -1, cache.head_dim)
    request = jnp.arange(requests)
    units = jax.vmap(lambda b: cache.units(b, layer))(request)
    buffers = cache.recent_keys, cache.recent_values, cache.recent_energy
    keys, values, energy = (x.at[units].get(mode="clip") for x in buffers)
    place = (cache.recent_start + cache.recent_count) % cache.recent_tokens
    keys, values = (
        jax.vmap(lambda x, new, at: x.at[:, at].set(bits_of(new)))(x, new, place)
        for x, new in ((keys, k), (values, v))
    )
    size = q.shape[2]  # queries that share a key, of one token
    position = None if cache.clock is None else cache.clock.next[:, None].repeat(size, axis=1)
    held = _held_by_all(cache, units, q, position, limits)
    if context is not None:
        held = merge(held, _held_by_one(context, layer, q, position, limits))
    position = None if position is None else position[:, :1]
    before = jax.vmap(lambda b, e, at: _recent_seen(cache, b, e, at, limits))(
        request, energy, position
    )[:, :, 0]
    seen = before | (np.arange(cache.recent_tokens) == place[:, None])[:, None]
    y, attention = jax.vmap(_attend_recent, (0, 0, 0, 0, 0, None))(
        q, of_bits(keys), of_bits(values), seen[:, :, None], held, limits
    )
    gained = jnp.sum(jnp.square(attention), axis=2)
    gained = jnp.where(before & active[:, None, None] & jnp.isfinite(gained), gained, 0)
    known = units < cache.key_mean.shape[0]
    y = jnp.where(known[:, :, None, None], y, 0)
    # What is written is taken from what was read. XLA, which does not see that it is the token, then
    # reads before it writes, where it would copy all buffers to read from later.
    k, v = (jax.vmap(lambda x, at: x[:, at])(x, place) for x in (keys, values))
    finite = _codec.usable(of_bits(k), of_bits(v))
    at = units, place[:, None]
    energy = cache.recent_energy.at[units].add(gained, mode="drop")
    cache = dataclasses.replace(
        cache,
        recent_keys=_put(cache.recent_keys, at, jnp.where(finite[..., None], k, 0)),
        recent_values=_put(cache.recent_values, at, jnp.where(finite[..., None], v, 0)),
        recent_energy=energy.at[at].set(jnp.where(finite, 0.0, -1.0), mode="drop"),
    )
    return y.reshape(requests, -1, cache.head_dim), cache


def _put(buffer, at, new):
    """New tokens [B, K, D] in their places of the recent buffers."""
    return buffer.at[at].set(new, mode="drop")


def held_attention(
    cache: KVCache,
    request: jax.Array | int,
    layer: jax.Array | int,
    q: jax.Array,
    position: jax.Array | None = None,
    limits: Limits = FULL,
) -> Partial:
    """Attention of queries [K, T, D] over a request's arena and centroids.

    The mean key that is missing in both shifts all logits of a query by the same. Queries have
    positions [T], which a window needs; a unit with a window has no centroids.
    """
    latest = None if cache.clock is None else cache.clock.next[request]
    return _held(cache, cache.units(request, layer), q, position, latest, limits)


def _held_by_all(cache, units, q, position, limits) -> Partial:
    """Attention of queries [B, K, T, D] at positions [B, T] over the arenas of their requests."""
    lead, heads = q.shape[:3], q.shape[1]
    latest = None
    if position is not None:
        position, latest = (x.repeat(heads, axis=0) for x in (position, cache.clock.next[:, None]))
    q = q.reshape(-1, *q.shape[2:])
    part = _held(cache, units.reshape(-1), q, position, latest, limits, together=heads)
    return Partial(part.y.reshape(*lead, -1), part.lse.reshape(lead))


def _held_by_one(context, layer, q, position, limits) -> Partial:
    """Attention of queries [B, K, T, D] at positions [B, T] over one context, which is read once."""
    requests, heads, size, head_dim = q.shape
    q = jnp.swapaxes(q, 0, 1).reshape(heads, -1, head_dim)
    position = None if position is None else position.reshape(-1)
    part = held_attention(context, 0, layer, q, position, limits)
    if context.recent_tokens:
        part = merge(part, recent_attention(context, 0, layer, q, position, limits))
    y = jnp.swapaxes(part.y.reshape(heads, requests, size, head_dim), 0, 1)
    return Partial(y, jnp.swapaxes(part.lse.reshape(heads, requests, size), 0, 1))


def _held(cache, units, q, position, latest, limits, together=None) -> Partial:
    """Attention of queries [N, T, D] over the arenas and centroids of their units [N]."""
    basis = _channels.of_units(cache, units)
    shift = _product("ktd,kd->kt", q, basis.mean) / math.sqrt(q.shape[-1])
    q = basis.asked(q)
    sight = Sight(limits, bias=None if limits.soft_cap is None else shift)
    if limits.window is not None:
        assert position is not None
        # What is only read is not purged: beyond its last window nothing of it is seen, at any age.
        nearest = jnp.minimum(position, latest + limits.window)
        sight = dataclasses.replace(sight, position=jnp.broadcast_to(nearest, q.shape[:2]))
    part = attend_pages(q, cache.arena, units, sight=sight, together=together)
    if limits.window is None:
        part = merge(part, _centroids.attend(q, cache.centroids, units, sight))
    part = part._replace(y=basis.answered(part.y))
    return part if limits.soft_cap is not None else part._replace(lse=part.lse + shift)


def _recent_seen(cache, request, energy, position, limits):
    """Which recent tokens of a request queries at positions [T] see, by their energies [K, R].

    Returns:
      [K, T, R] bool; T is 1 without a window.
    """
    age = (jnp.arange(cache.recent_tokens) - cache.recent_start[request]) % cache.recent_tokens
    seen = ((age < cache.recent_count[request]) & (energy >= 0))[:, None]
    if limits.window is not None:
        seen &= position[:, None] - cache.clock.recent[request] < limits.window
    return seen


def recent_attention(
    cache: KVCache,
    request: jax.Array | int,
    layer: jax.Array | int,
    q: jax.Array,
    position: jax.Array | None = None,
    limits: Limits = FULL,
) -> Partial:
    """Attention of queries [K, T, D] at positions [T] over a request's recent tokens."""
    units = cache.units(request, layer)
    buffers = cache.recent_keys, cache.recent_values, cache.recent_energy
    keys, values, energy = (x.at[units].get(mode="clip") for x in buffers)
    here = (units < cache.key_mean.shape[0])[:, None, None]
    seen = here & _recent_seen(cache, request, energy, position, limits)
    return _dense(q, of_bits(keys), of_bits(values), seen, limits)[0]


def _attend_recent(q, keys, values, valid, held, limits):
    """Attention of q [K, G, D] over the recent tokens and the rest, and the former's weights."""
    part, logits = _dense(q, keys, values, valid, limits)
    total = merge(held, part)
    return total.y, jnp.exp(logits - total.lse[..., None])


def _dense(q, keys, values, valid, limits):
    """Dense attention of q [K, T, D] over keys [K, R, D] where valid, and its logits [K, T, R]."""
    logits = capped(_product("ktd,krd->ktr", q, keys) / math.sqrt(q.shape[-1]), limits)
    logits = jnp.where(valid, logits, EMPTY)
    some = jnp.any(jnp.broadcast_to(valid, logits.shape), axis=-1)
    lse = jnp.where(some, jax.nn.logsumexp(logits, axis=-1), EMPTY)
    weight = jnp.where(valid, jnp.exp(logits - lse[..., None]), 0)
    return Partial(_product("ktr,krd->ktd", weight, values), lse), logits


def scaled(q: jax.Array, scale: float | None) -> jax.Array:
    """Queries in float32 whose logits over sqrt(D) are those of this scale."""
    q = jnp.asarray(q).astype(jnp.float32)
    if scale is None:
        return q
    scale = checks.static_float("scale", scale, -checks.SCALE_MAX, checks.SCALE_MAX)
    return q * np.float32(scale * math.sqrt(q.shape[-1]))


def _product(spec, x, y):
    """einsum in full float32."""
    return jnp.einsum(spec, x, y.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def check_without_windows(cache: KVCache) -> None:
    """ValueError for a cache whose layers have windows."""
    if cache.clock is not None:
        raise ValueError("cache was made with windows: decode a model with them by jbalance.decode")


def check_growing(cache: KVCache) -> None:
    """ValueError for a cache that is only read."""
    if cache.recent_tokens == 0:
        raise ValueError(
            "cache has no recent buffer: it is a context or an encoder's frames, which are only read"
        )


def _checked(cache, q, k, v, context):
    """q, k and v; ValueError for shapes that do not fit, or a cache that is only read."""
    checks.instance("cache", cache, KVCache)
    check_without_windows(cache)
    requests, heads, head_dim = cache.num_requests, cache.num_kv_heads, cache.head_dim
    check_growing(cache)
    _axes.unsplit(q=q, k=k, v=v)
    q, k, v = (
        checks.floats(name, x, 3, "[B, H or K, D]") for name, x in (("q", q), ("k", k), ("v", v))
    )
    if q.shape[0] != requests or 0 in q.shape or q.shape[1] % heads or q.shape[2] != head_dim:
        raise ValueError(
            f"q has shape {q.shape}: it must be [B, H, D] = ({requests}, a multiple of {heads}, "
            f"{head_dim})"
        )
    for name, x in (("k", k), ("v", v)):
        if np.shape(x) != (requests, heads, head_dim):
            raise ValueError(
                f"{name} has shape {np.shape(x)}: it must be [B, K, D] = "
                f"{(requests, heads, head_dim)}"
            )
    if context is not None:
        own, got = (1, *cache.slots.shape, head_dim), (context.num_requests, *context.slots.shape)
        if (*got, context.head_dim) != own:
            raise ValueError(
                f"context is of B, L, K, D = {(*got, context.head_dim)}: it must be of {own}"
            )
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.largest_finite(name, x, _codec.MOST)
    return q, k, v
