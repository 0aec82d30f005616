"""Requests that share a cache: what each may hold, and what it gives back."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbalance import checks
from jbalance._bits import in_32_bits
from jbalance.cache import _admit, _pages
from jbalance.cache._admit import Report
from jbalance.cache._cache import KVCache


def shrink(
    cache: KVCache, request: jax.Array | int, allowance_pages: jax.Array | int
) -> tuple[KVCache, Report]:
    """Weigh a request's tokens anew, without new ones, so that others get the rest of its pages."""
    request = checks.one_int("request", request, 0, cache.num_requests - 1)
    n, head_dim = cache.units_per_request, cache.head_dim
    none = jnp.zeros((0, 0, head_dim))
    time, ages = None, None
    if cache.clock is not None:
        time = jnp.zeros((0, 0), jnp.int32)
        ages = cache.clock.ages(request)
    arena, centroids, report = _admit.admit(
        cache.arena,
        cache.centroids,
        request * n,
        n,
        jnp.zeros(0, jnp.int32),
        none,
        none,
        jnp.zeros((0, 0), jnp.uint8),
        allowance_pages,
        certain=cache.certain,
        time=time,
        ages=ages,
    )
    return dataclasses.replace(cache, arena=arena, centroids=centroids), report


@in_32_bits
def release(cache: KVCache, request: jax.Array | int) -> KVCache:
    """Forget a request: its pages are free, its recent buffer is empty, another may take its place."""
    checks.instance("cache", cache, KVCache)
    request = checks.one_int("request", request, 0, cache.num_requests - 1)
    n = cache.units_per_request
    mine = jnp.arange(cache.key_mean.shape[0])[:, None] // n == request
    arena, _ = _pages.reallocate(cache.arena, jnp.where(mine, 0, cache.arena.pages))

    def cleared(x):
        return jax.vmap(lambda mine, x: jnp.where(mine, jnp.zeros_like(x), x))(mine[:, 0], x)

    return dataclasses.replace(
        cache,
        arena=arena,
        centroids=jax.tree.map(cleared, cache.centroids),
        key_mean=cleared(cache.key_mean),
        key_channels=cleared(cache.key_channels),
        value_scale=cleared(cache.value_scale),
        # Values that are not finite would show through a weight of 0.
        recent_keys=cleared(cache.recent_keys),
        recent_values=cleared(cache.recent_values),
        recent_energy=cleared(cache.recent_energy),
        recent_start=cache.recent_start.at[request].set(0),
        recent_count=cache.recent_count.at[request].set(0),
        clock=cache.clock
        and dataclasses.replace(cache.clock, next=cache.clock.next.at[request].set(0)),
    )


@in_32_bits
def allowance(
    cache: KVCache,
    weights: jax.Array,
    active: jax.Array,
    *,
    floors_pages: jax.Array | None = None,
) -> jax.Array:
    """Weighted max-min sharing of the arena: pages that each request may hold, at least its floor.

    What other requests hold, or need for their floors, is left to them. While the floors fit the arena
    and every request keeps to its allowance, each can have its floor at any time after the others
    have been through one admission.

    Args:
      cache: whose pages are shared.
      weights: [B] float, >= 0.
      active: [B] bool; the others have neither floor nor share, but keep what they hold.
      floors_pages: [B] int32, >= 0; None for `KVCache.floor_pages` each.

    Returns:
      [B] int32.

    Raises:
      ValueError: shapes; values that are negative; floors that do not fit the arena.
    """
    checks.instance("cache", cache, KVCache)
    shape = (cache.num_requests,)
    floors: ArrayLike = np.full(shape, cache.floor_pages) if floors_pages is None else floors_pages
    checks.booleans("active", active, shape, "[B]")
    for name, x in (("floors_pages", floors), ("weights", weights)):
        checks.rank(name, x, 1, "[B]")
        if np.shape(x) != shape:
            raise ValueError(f"{name} has shape {np.shape(x)}: it must be [B] = {shape}")
    floors = checks.whole("floors_pages", floors)
    weights = checks.non_negative("weights", weights)
    total = cache.arena.num_pages
    if checks.is_concrete(floors) and np.sum(floors, dtype=np.int64) > total:
        raise ValueError(
            f"floors_pages sum to {np.sum(floors, dtype=np.int64)}: the arena has {total} pages"
        )
    floor = jnp.where(active, jnp.asarray(floors, jnp.int32), 0)
    weight = jnp.where(active, jnp.asarray(weights, jnp.float32), 0)
    weight /= jnp.maximum(jnp.sum(weight), jnp.finfo(jnp.float32).tiny)
    share = jnp.floor(weight * total).astype(jnp.int32)
    needed = jnp.maximum(floor, cache.held_pages)
    room = total - (jnp.sum(needed) - needed)
    return jnp.clip(jnp.maximum(floor, share), 0, jnp.maximum(room, 0))
