"""The cache of a decoder: bytes fixed once, any number of tokens, one price for all layers and heads.

The newest tokens lie dense in a ring; the arena holds what is left of all others, each at the precision
that it is worth, and a few entries stand for those that it lost (`remainder`). While tokens are in the
ring, the attention that they get is measured; when it is full, the older half of it enters the arena by
`rebalance.admit`, within the pages allowed to its request. Keys are stored in both less the mean key of
their unit, which shifts all their logits by the same; attention adds that to the log-sum-exp: exact, and
the codec spends its bits on what differs.

A unit is a request's layer and key/value head, unit = (b L + layer) K + head.

    cache = live.create(budget_bytes, num_layers=L, num_kv_heads=K, head_dim=D)
    cache, report = live.admit_layer(cache, b, layer, k, v, w, pages)      # each layer of a prompt
    y, ring = live.attend_step(cache, ring, layer, q, k, v)                # in a scan over layers
    cache, report = live.end_step(cache, rings, pages)                     # once a token
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance import checks
from jbalance.attention import EMPTY, Partial, merge
from jbalance.cache import pages, rebalance, remainder, worth
from jbalance.cache.paged_attention import attend_pages
from jbalance.cache.pages import Arena
from jbalance.cache.rebalance import Report
from jbalance.cache.remainder import Remainder
from jbalance.importance.token_worth import decoded_worth

GROUP_PAGES = 20  # about so many pages per unit
LEAST_PAGE_BYTES, MOST_PAGE_BYTES = 512, 16384
_ALIGN_BYTES = 64


class Ring(NamedTuple):
    """The newest tokens; leading axes [B, K] of one layer, [L, B, K] of all."""

    keys: jax.Array  # [..., R, D] bfloat16
    values: jax.Array  # [..., R, D] bfloat16
    worth: jax.Array  # [..., R] float32, sum over later queries and the group's heads of attention²


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The cache of B requests on one device; U = B L K units."""

    arena: Arena
    remainder: Remainder  # of tokens that left the arena or did not enter it
    key_mean: jax.Array  # [U, D] bfloat16, what the keys of both are stored less of
    ring_keys: jax.Array  # [U, R, D] bfloat16
    ring_values: jax.Array  # [U, R, D] bfloat16
    ring_worth: jax.Array  # [U, R] float32
    ring_start: jax.Array  # [B] int32, place of the oldest token
    ring_count: jax.Array  # [B] int32, below R between steps
    num_layers: int = dataclasses.field(metadata={"static": True})

    @property
    def num_requests(self) -> int:
        """B."""
        return self.ring_count.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return self.units_per_request // self.num_layers

    @property
    def units_per_request(self) -> int:
        """L K."""
        return self.key_mean.shape[0] // self.num_requests

    @property
    def ring_tokens(self) -> int:
        """R."""
        return self.ring_keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that stay resident: all of it."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    @property
    def held_pages(self) -> jax.Array:
        """[B] int32 pages that each request has."""
        return jnp.sum(self.arena.pages.reshape(self.num_requests, -1), axis=1)

    @property
    def rings(self) -> Ring:
        """The rings of all layers, to scan over."""
        return Ring(
            *(
                jnp.moveaxis(
                    x.reshape(self.num_requests, self.num_layers, self.num_kv_heads, *x.shape[1:]),
                    1,
                    0,
                )
                for x in (self.ring_keys, self.ring_values, self.ring_worth)
            )
        )


def page_bytes_for(budget_bytes: int, num_units: int, head_dim: int, bits: Sequence[int]) -> int:
    """A size of pages: about 20 per unit, within 512 bytes to 16 KiB, that wastes little at every level.

    >>> page_bytes_for(10**7, 90, 64, (8, 4, 3))
    6784

    Args:
      budget_bytes: of the arena.
      num_units: U.
      head_dim: D.
      bits: of each level.

    Returns:
      Bytes, a multiple of 64.
    """
    sizes = np.array([pages.token_bytes(head_dim, b) for b in bits])
    about = budget_bytes / (GROUP_PAGES * num_units)
    about = min(
        max(about, LEAST_PAGE_BYTES, 4 * sizes.max()), max(MOST_PAGE_BYTES, 4 * sizes.max())
    )
    low = max(math.ceil(0.8 * about / _ALIGN_BYTES), LEAST_PAGE_BYTES // _ALIGN_BYTES)
    page = np.arange(low, math.floor(1.25 * about / _ALIGN_BYTES) + 1) * _ALIGN_BYTES
    page = page[page <= max(about, MOST_PAGE_BYTES)]
    waste = np.mean(page[:, None] % sizes / page[:, None], axis=1)
    return int(page[np.argmin(waste)])


def create(
    budget_bytes: int,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    num_requests: int = 1,
    bits: Sequence[int] = (8, 4, 3),
    page_bytes: int | None = None,
    ring_tokens: int | None = None,
) -> KVCache:
    """An empty cache: rings, remainders and tables, and an arena of what is left of the budget.

    Args:
      budget_bytes: never exceeded by `KVCache.nbytes`.
      num_layers: L.
      num_kv_heads: K.
      head_dim: D.
      num_requests: B.
      bits: of each level, descending.
      page_bytes: of one page; None for `page_bytes_for`.
      ring_tokens: R, even; half of them enter the arena at a time. None for an eighth of the budget,
        4 to 512: the more enter at once, the less it costs.

    Returns:
      `KVCache`.

    Raises:
      ValueError: values that do not fit, with what would.
    """
    sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "num_requests": num_requests}
    for name, x in sizes.items():
        if x < 1:
            raise ValueError(f"{name} is {x}: it must be at least 1")
    units = num_requests * num_layers * num_kv_heads
    if ring_tokens is None:
        share = budget_bytes // (8 * units * (4 * head_dim + 4))
        ring_tokens = min(max(share - share % 2, 4), 512)
    if ring_tokens < 2 or ring_tokens % 2:
        raise ValueError(f"ring_tokens is {ring_tokens}: it must be even and at least 2")
    bits = tuple(bits)
    worth.steps(head_dim, bits)
    ring = {
        "key_mean": jnp.zeros((units, head_dim), jnp.bfloat16),
        "ring_keys": jnp.zeros((units, ring_tokens, head_dim), jnp.bfloat16),
        "ring_values": jnp.zeros((units, ring_tokens, head_dim), jnp.bfloat16),
        "ring_worth": jnp.zeros((units, ring_tokens), jnp.float32),
        "ring_start": jnp.zeros(num_requests, jnp.int32),
        "ring_count": jnp.zeros(num_requests, jnp.int32),
    }
    rest = remainder.create(units, head_dim)
    fixed = sum(x.nbytes for x in ring.values()) + rest.nbytes
    left = budget_bytes - fixed
    page_bytes = page_bytes or page_bytes_for(max(left, 0), units, head_dim, bits)
    tables = 4 * (2 * units * len(bits) + 1)
    if left < tables + page_bytes + 4:
        raise ValueError(
            f"budget_bytes is {budget_bytes}: rings of {ring_tokens} tokens and remainders for {units} "
            f"units take {fixed}, tables and one page {tables + page_bytes + 4} more"
        )
    arena = pages.create(left, units, head_dim, bits, page_bytes)
    return KVCache(arena=arena, remainder=rest, num_layers=num_layers, **ring)


def attend_step(
    cache: KVCache,
    ring: Ring,
    layer: jax.Array | int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    active: jax.Array | None = None,
    attend: Callable[[jax.Array, Arena, jax.Array], Partial] = attend_pages,
) -> tuple[jax.Array, Ring]:
    """One layer's attention for one new token of each request, which sees itself and all before it.

    Each request is computed by itself: what others hold does not change a bit of its result.

    Args:
      cache: as it was before the token; it is only read, so that a scan over layers can close over it.
      ring: this layer's part of `cache.rings`.
      layer: [] int32.
      q: [B, H, D] float queries, H a multiple of K, after the rotary embedding.
      k: [B, K, D] float keys, after the rotary embedding.
      v: [B, K, D] float values.
      active: [B] bool, requests that have a token now; the results of others mean nothing.
      attend: over the arena: queries [N, T, D], arena, units [N] -> `Partial`.

    Returns:
      y [B, H, D] float32, and the layer's ring with the token in it.

    Raises:
      ValueError: shapes that do not fit.
    """
    requests, heads = cache.num_requests, cache.num_kv_heads
    head_dim = cache.arena.head_dim
    checks.rank("q", q, 3, "[B, H, D]")
    if q.shape[0] != requests or q.shape[1] % heads or q.shape[2] != head_dim:
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
    if ring.keys.shape != (requests, heads, cache.ring_tokens, head_dim):
        raise ValueError(
            f"ring.keys has shape {ring.keys.shape}: it must be one layer of cache.rings, "
            f"{(requests, heads, cache.ring_tokens, head_dim)}"
        )
    active = jnp.ones(requests, bool) if active is None else jnp.asarray(active)

    def one_request(at):
        request, q, k, v, ring, start, count, active = at
        first = (request * cache.num_layers + layer) * heads
        mean = lax.dynamic_slice_in_dim(cache.key_mean, first, heads)
        grouped = q.astype(jnp.float32).reshape(heads, -1, head_dim)
        units = first + jnp.arange(heads)
        held = merge(
            attend(grouped, cache.arena, units), remainder.attend(grouped, cache.remainder, units)
        )
        shift = _product("kgd,kd->kg", grouped, mean) / math.sqrt(head_dim)
        place = (start + count) % cache.ring_tokens
        ring = Ring(
            ring.keys.at[:, place].set(k.astype(jnp.bfloat16)),
            ring.values.at[:, place].set(v.astype(jnp.bfloat16)),
            ring.worth.at[:, place].set(0),
        )
        age = (jnp.arange(cache.ring_tokens) - start) % cache.ring_tokens
        y, attention = _attend_ring(
            grouped, ring, age <= count, held._replace(lse=held.lse + shift)
        )
        gained = jnp.where((age < count) & active, jnp.sum(jnp.square(attention), axis=1), 0)
        return y.reshape(-1, head_dim), ring._replace(worth=ring.worth + gained)

    which = jnp.arange(requests)
    return lax.map(one_request, (which, q, k, v, ring, cache.ring_start, cache.ring_count, active))


def _attend_ring(q, ring, there, held):
    """Attention of q [K, G, D] over the ring and the rest, and the weights of the ring's tokens."""
    logits = _product("kgd,krd->kgr", q, ring.keys) / math.sqrt(q.shape[-1])
    logits = jnp.where(there, logits, EMPTY)
    lse = jax.nn.logsumexp(logits, axis=-1)
    y = _product("kgr,krd->kgd", jnp.exp(logits - lse[..., None]), ring.values)
    total = merge(held, Partial(y, lse))
    return total.y, jnp.exp(logits - total.lse[..., None])


def _product(spec, x, y):
    """einsum in full float32."""
    return jnp.einsum(spec, x, y.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def end_step(
    cache: KVCache,
    rings: Ring,
    allowance_pages: jax.Array,
    *,
    active: jax.Array | None = None,
) -> tuple[KVCache, Report]:
    """Put the rings of all layers back, and let the older half of each full one enter the arena.

    Args:
      cache: before; donate it.
      rings: [L, ...] as `attend_step` returned them for each layer.
      allowance_pages: [B] int32, for each request, as of `allowance`.
      active: [B] bool, requests that had a token in this step.

    Returns:
      The cache, and a `Report` of [B, ...]: zeros for requests whose ring was not full. The ring's
      tokens that did not enter are counted as rejected; after a shortfall, which only an allowance
      below the protected tokens gives, these are all of them.

    Raises:
      ValueError: shapes that do not fit.
    """
    requests, size = cache.num_requests, cache.ring_tokens
    if np.shape(allowance_pages) != (requests,):
        raise ValueError(
            f"allowance_pages has shape {np.shape(allowance_pages)}: it must be [B] = ({requests},)"
        )
    shapes = [tuple(x.shape) for x in (cache.rings)]
    if [tuple(x.shape) for x in rings] != shapes:
        raise ValueError(
            f"rings has shapes {[tuple(x.shape) for x in rings]}: they must be those of cache.rings, "
            f"{shapes}"
        )
    keys, values, gained = (
        jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[3:]).astype(old.dtype)
        for x, old in zip(rings, cache.rings, strict=True)
    )
    active = jnp.ones(requests, bool) if active is None else jnp.asarray(active)
    cache = dataclasses.replace(
        cache,
        ring_keys=keys,
        ring_values=values,
        ring_worth=gained,
        ring_count=cache.ring_count + active,
    )
    allowance_pages = jnp.asarray(allowance_pages, jnp.int32)
    _, shapes = jax.eval_shape(_flush, cache, 0, allowance_pages)
    reports = jax.tree.map(lambda x: jnp.zeros((requests, *x.shape), x.dtype), shapes)

    def flush(carry):
        cache, reports = carry
        request = jnp.argmax(cache.ring_count)
        cache, report = _flush(cache, request, allowance_pages)
        return cache, jax.tree.map(lambda all_, x: all_.at[request].set(x), reports, report)

    return lax.while_loop(
        lambda carry: jnp.any(carry[0].ring_count >= size), flush, (cache, reports)
    )


def _flush(cache, request, allowance_pages):
    """Let the older half of a request's ring enter the arena."""
    n, half = cache.units_per_request, cache.ring_tokens // 2
    age = np.arange(half)
    first, start = request * n, cache.ring_start[request]
    place = (start + age) % cache.ring_tokens
    k, v, gained, mean = (
        lax.dynamic_slice_in_dim(x, first, n)
        for x in (cache.ring_keys, cache.ring_values, cache.ring_worth, cache.key_mean)
    )
    seen = cache.ring_count[request] - 1 - age
    w = decoded_worth(gained[:, place], seen)
    units = first + np.arange(n)
    k = k[:, place].astype(jnp.float32) - mean[:, None].astype(jnp.float32)
    v, code = v[:, place], worth.encode_worth(w)
    arena, rest, report = rebalance.admit(
        cache.arena, cache.remainder, first, n, units, k, v, code, allowance_pages[request]
    )

    def lose(rest):
        w = worth.decode_worth(code)
        return remainder.absorb(rest, units, k, v, w, jnp.ones(w.shape, bool))

    # The ring needs the room: what could not even be weighed does not enter.
    rest = lax.cond(report.shortfall > 0, lose, lambda rest: rest, rest)
    return dataclasses.replace(
        cache,
        arena=arena,
        remainder=rest,
        ring_start=cache.ring_start.at[request].set((start + half) % cache.ring_tokens),
        ring_count=cache.ring_count.at[request].add(-half),
    ), report


def admit_layer(
    cache: KVCache,
    request: jax.Array | int,
    layer: jax.Array | int,
    k: jax.Array,
    v: jax.Array,
    w: jax.Array,
    allowance_pages: jax.Array | int,
    *,
    num_sinks: jax.Array | int = 0,
    num_recent: jax.Array | int = 0,
    num_tokens: jax.Array | None = None,
) -> tuple[KVCache, Report]:
    """Let one layer's tokens of a prompt enter.

    A unit's mean key is taken from the first tokens that enter it, without the sinks, and stays until
    `release`.

    Args:
      cache: before; donate it.
      request: [] int32.
      layer: [] int32.
      k: [S, K, D] float keys, after the rotary embedding.
      v: [S, K, D] float values.
      w: [K, S] float worth, >= 0.
      allowance_pages: [] int32, for the whole request.
      num_sinks: [] int32, first tokens that are protected and not part of the mean.
      num_recent: [] int32, last tokens that are protected.
      num_tokens: [] int32, how many of the S there are; None for all.

    Returns:
      The cache, and the `Report` of `rebalance.admit`; with a shortfall arena and remainder are as
      before, and none of the tokens entered.

    Raises:
      ValueError: shapes that do not fit, or a request or layer that there is not.
    """
    heads, head_dim = cache.num_kv_heads, cache.arena.head_dim
    checks.rank("k", k, 3, "[S, K, D]")
    if np.shape(k)[1:] != (heads, head_dim) or np.shape(v) != np.shape(k):
        raise ValueError(
            f"k has shape {np.shape(k)} and v {np.shape(v)}: both must be [S, {heads}, {head_dim}]"
        )
    size = np.shape(k)[0]
    if np.shape(w) != (heads, size):
        raise ValueError(f"w has shape {np.shape(w)}: it must be [K, S] = {(heads, size)}")
    checks.in_range("request", request, 0, cache.num_requests - 1)
    checks.in_range("layer", layer, 0, cache.num_layers - 1)
    first = request * cache.units_per_request
    units = first + layer * heads + jnp.arange(heads)
    number = jnp.asarray(size if num_tokens is None else num_tokens, jnp.int32)
    token = np.arange(size)
    k, v = (jnp.swapaxes(jnp.asarray(x), 0, 1).astype(jnp.float32) for x in (k, v))
    counted = ((token >= num_sinks) & (token < number))[:, None]
    mean = jnp.sum(jnp.where(counted, k, 0), axis=1) / jnp.maximum(jnp.sum(counted), 1)
    known = cache.arena.count[units].sum(axis=1) + cache.remainder.count[units].sum(axis=1)
    mean = jnp.where(known[:, None] > 0, cache.key_mean[units], mean.astype(jnp.bfloat16))
    protected = (token < num_sinks) | (token >= number - num_recent)
    code = jnp.where(protected, np.uint8(worth.PROTECTED), worth.encode_worth(w))
    arena, rest, report = rebalance.admit(
        cache.arena,
        cache.remainder,
        first,
        cache.units_per_request,
        units,
        k - mean.astype(jnp.float32)[:, None],
        v,
        code,
        allowance_pages,
        num_tokens=jnp.broadcast_to(number, (heads,)),
    )
    means = cache.key_mean.at[units].set(mean)
    return dataclasses.replace(cache, arena=arena, remainder=rest, key_mean=means), report


def shrink(
    cache: KVCache, request: jax.Array | int, allowance_pages: jax.Array | int
) -> tuple[KVCache, Report]:
    """Weigh a request's tokens anew, without new ones, so that others get the rest of its pages."""
    checks.in_range("request", request, 0, cache.num_requests - 1)
    n, head_dim = cache.units_per_request, cache.arena.head_dim
    none = jnp.zeros((0, 0, head_dim))
    arena, rest, report = rebalance.admit(
        cache.arena,
        cache.remainder,
        request * n,
        n,
        jnp.zeros(0, jnp.int32),
        none,
        none,
        jnp.zeros((0, 0), jnp.uint8),
        allowance_pages,
    )
    return dataclasses.replace(cache, arena=arena, remainder=rest), report


def release(cache: KVCache, request: jax.Array | int) -> KVCache:
    """Forget a request: its pages are free, its ring is empty, another may take its place."""
    checks.in_range("request", request, 0, cache.num_requests - 1)
    n = cache.units_per_request
    mine = jnp.arange(cache.key_mean.shape[0])[:, None] // n == request
    arena, _ = pages.reallocate(cache.arena, jnp.where(mine, 0, cache.arena.pages))

    def cleared(x):
        return jax.vmap(lambda mine, x: jnp.where(mine, jnp.zeros_like(x), x))(mine[:, 0], x)

    return dataclasses.replace(
        cache,
        arena=arena,
        remainder=jax.tree.map(cleared, cache.remainder),
        key_mean=cleared(cache.key_mean),
        ring_start=cache.ring_start.at[request].set(0),
        ring_count=cache.ring_count.at[request].set(0),
    )


def allowance(
    cache: KVCache, floors_pages: jax.Array, weights: jax.Array, active: jax.Array
) -> jax.Array:
    """Pages that each request may hold: its share by weight, but at least its floor.

    What other requests hold, or need for their floors, is left to them. While the floors fit the arena
    and every request keeps to its allowance, each can have its floor at any time after the others
    have been through one admission (`shrink`).

    Args:
      cache: whose pages are shared.
      floors_pages: [B] int32, >= 0.
      weights: [B] float, >= 0.
      active: [B] bool; the others have neither floor nor share, but keep what they hold.

    Returns:
      [B] int32.

    Raises:
      ValueError: shapes; values that are negative; floors that do not fit the arena.
    """
    shape = (cache.num_requests,)
    for name, x in (("floors_pages", floors_pages), ("weights", weights), ("active", active)):
        if np.shape(x) != shape:
            raise ValueError(f"{name} has shape {np.shape(x)}: it must be [B] = {shape}")
    checks.whole("floors_pages", floors_pages)
    checks.non_negative("weights", weights)
    total = cache.arena.num_pages
    if checks.is_concrete(floors_pages) and np.sum(floors_pages, dtype=np.int64) > total:
        raise ValueError(
            f"floors_pages sum to {np.sum(floors_pages, dtype=np.int64)}: the arena has {total} pages"
        )
    floor = jnp.where(active, jnp.asarray(floors_pages, jnp.int32), 0)
    weight = jnp.where(active, jnp.asarray(weights, jnp.float32), 0)
    weight /= jnp.maximum(jnp.sum(weight), jnp.finfo(jnp.float32).tiny)
    share = jnp.floor(weight * total).astype(jnp.int32)
    needed = jnp.maximum(floor, cache.held_pages)
    room = total - (jnp.sum(needed) - needed)
    return jnp.clip(jnp.maximum(floor, share), 0, jnp.maximum(room, 0))
