"""The end of a step: new tokens count, and full recent buffers let their older half enter the arena."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance import checks
from jbalance.cache import _admit, _centroids, _channels, _price
from jbalance.cache._admit import Report
from jbalance.cache._cache import KVCache, of_bits
from jbalance.cache._sight import NO_WINDOW
from jbalance.importance.token_worth import decoded_worth


def checked_allowance(cache: KVCache, pages: jax.Array | None) -> jax.Array:
    """[B] int32 pages of each request; ValueError for fewer than the tokens that always stay need."""
    requests = cache.num_requests
    if pages is None:
        return jnp.full(requests, cache.even_pages, jnp.int32)
    checks.rank("allowance_pages", pages, 1, "[B]")
    if np.shape(pages) != (requests,):
        raise ValueError(
            f"allowance_pages has shape {np.shape(pages)}: it must be [B] = ({requests},)"
        )
    return jnp.asarray(
        checks.int_in_range("allowance_pages", pages, cache.floor_pages, checks.INT32_MAX)
    )


def advanced(cache: KVCache, active: jax.Array) -> KVCache:
    """The tokens of active requests [B] in the recent buffers count now."""
    count, clock = cache.recent_count, cache.clock
    if clock is not None:
        row = jnp.arange(cache.num_requests)
        place = (cache.recent_start + count) % cache.recent_tokens
        recent = clock.recent.at[row, place].set(clock.next)
        clock = dataclasses.replace(clock, next=clock.next + active, recent=recent)
    return dataclasses.replace(cache, recent_count=count + active, clock=clock)


def settle(cache: KVCache, allowance_pages: jax.Array) -> tuple[KVCache, Report]:
    """Let the older half of every full recent buffer enter the arena.

    Args:
      cache: before.
      allowance_pages: [B] int32.

    Returns:
      The cache, and a `Report` of [B, ...]: zeros for requests whose buffer was not full. After a
      shortfall, which only an allowance below the protected tokens gives, all tokens that were to enter
      join the centroids.
    """
    _, shapes = jax.eval_shape(_flush, cache, 0, allowance_pages)
    requests, size = cache.num_requests, cache.recent_tokens
    reports = jax.tree.map(lambda x: jnp.zeros((requests, *x.shape), x.dtype), shapes)

    def flush(carry):
        cache, reports = carry
        request = jnp.argmax(cache.recent_count)
        cache, report = _flush(cache, request, allowance_pages)
        return cache, jax.tree.map(lambda all_, x: all_.at[request].set(x), reports, report)

    return lax.while_loop(
        lambda carry: jnp.any(carry[0].recent_count >= size), flush, (cache, reports)
    )


def _flush(cache, request, allowance_pages):
    """Let the older half of a request's recent tokens enter the arena."""
    n, half = cache.units_per_request, cache.recent_tokens // 2
    age = np.arange(half)
    first, start = request * n, cache.recent_start[request]
    place = (start + age) % cache.recent_tokens
    k, v, energy = (
        lax.dynamic_slice_in_dim(x, first, n)
        for x in (cache.recent_keys, cache.recent_values, cache.recent_energy)
    )
    energy = energy[:, place]
    there = energy >= 0
    w = decoded_worth(jnp.maximum(energy, 0), cache.recent_count[request] - 1 - age)
    units = first + np.arange(n)
    k, v = (of_bits(x[:, place]).astype(jnp.float32) for x in (k, v))
    k = jnp.where(there[..., None], k, jnp.nan)
    basis = _channels.entered(cache, units, k, v, w, half)
    cache = _channels.with_units(cache, units, basis)
    k, v = basis.stored(k, v)  # NaN where there is no token, which `admit` leaves out
    code = _price.encode_worth(w)
    time, ages = None, None
    if cache.clock is not None:
        time = jnp.broadcast_to(cache.clock.recent[request, place], code.shape)
        ages = cache.clock.ages(request)
    arena, centroids, report = _admit.admit(
        cache.arena,
        cache.centroids,
        first,
        n,
        units,
        k,
        v,
        code,
        allowance_pages[request],
        certain=cache.certain,
        time=time,
        ages=ages,
    )

    def lose(centroids):
        w = _price.decode_worth(code)
        lasting = there
        if ages is not None:
            lasting &= (ages.window == NO_WINDOW)[:, None]
        return _centroids.absorb(centroids, units, k, v, w, lasting)

    # The buffer needs the room: what could not even be weighed does not enter.
    centroids = lax.cond(report.shortfall > 0, lose, lambda x: x, centroids)
    return dataclasses.replace(
        cache,
        arena=arena,
        centroids=centroids,
        recent_start=cache.recent_start.at[request].set((start + half) % cache.recent_tokens),
        recent_count=cache.recent_count.at[request].add(-half),
    ), report
