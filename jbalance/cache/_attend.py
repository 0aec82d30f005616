"""Attention over the tokens of an arena: what the cache calls, and which back end runs it."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jbalance import _fallback, checks
from jbalance.attention.partial import EMPTY, Partial
from jbalance.cache._pages import Arena
from jbalance.cache._rotation import rotate_keys, unrotate
from jbalance.cache._sight import FULL, Sight
from jbalance.cache.backends import gpu, tpu, xla

_KERNELS = {"gpu": gpu, "tpu": tpu}
_PLATFORMS = {"gpu": "cuda", "tpu": "tpu"}  # of a kernel


def attend_pages(
    q: jax.Array,
    arena: Arena,
    units: jax.Array,
    *,
    sight: Sight | None = None,
    together: int | None = None,
    backend: str | None = None,
) -> Partial:
    """Paged attention: queries over all tokens of their units, whatever their precisions.

    y_u = softmax(q_u k_u^T / sqrt(D)) v_u over the tokens of unit u that a query sees: all of them, or
    those of its window. A soft cap bounds the logits before the softmax.
    Counts and pages are data: changed, they do not compile anew.

    Args:
      q: [N, T, D] float queries of N units (a unit's T holds its group of heads and its tokens).
      arena: where the units are.
      units: [N] int32, indices into the arena's units; an index that is none of them, such as -1, has
        no tokens.
      sight: what the queries [N, T] see; None for all tokens, without a cap.
      together: of N, a divisor: so many units share XLA's loops, which join the tiles of different
        units, and the next follow after them; kernels compute each by itself. None for all. Units that
        are not together do not change each other's results by a bit.
      backend: "gpu", "tpu" or "xla", static; None for the platform's kernel where it can read the
        arena, else XLA; a warning says once why it cannot. The kernels run on their own platform only,
        so export for several platforms at once needs "xla". Windows and caps are read by "xla" only.

    Returns:
      `Partial` with y [N, T, D] and lse [N, T], float32; a unit without tokens has y = 0.

    Raises:
      ValueError: shapes that do not fit; an unknown back end, or one that cannot read this arena.
    """
    check_queries(q, arena, units)
    if sight is not None and sight.limits == FULL:
        sight = None
    _check_backend(backend, arena, sight)
    if 0 in q.shape:
        return Partial(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:2], EMPTY))
    units = jnp.asarray(units, jnp.int32)
    known = (units >= 0) & (units < arena.count.shape[0])
    turned = rotate_keys(q) / math.sqrt(arena.head_dim)
    total = _by_backend(turned, arena, jnp.where(known, units, 0), sight, together, backend)
    y = jnp.where(known[:, None, None], unrotate(total.y), 0)
    return Partial(y, jnp.where(known[:, None], total.lse, EMPTY))


def check_queries(q: jax.Array, arena: Arena, units: jax.Array) -> None:
    """ValueError for shapes that do not fit."""
    checks.rank("q", q, 3, "[N, T, D]")
    checks.rank("units", units, 1, "[N]")
    checks.same_length("units", units, "q", q)
    if q.shape[-1] != arena.head_dim:
        raise ValueError(f"q has shape {q.shape}: its last axis must be D = {arena.head_dim}")


def _check_backend(backend: str | None, arena: Arena, sight: Sight | None) -> None:
    """ValueError for a back end that is unknown or cannot read the arena."""
    if backend not in (None, "xla", *_KERNELS):
        raise ValueError(f"backend is {backend!r}: it must be 'gpu', 'tpu', 'xla' or None")
    if backend in _KERNELS and (reason := _KERNELS[backend].unsupported(arena)):
        raise ValueError(f"backend is {backend!r}, which cannot read this arena: {reason}")
    if sight is not None:
        if backend in _KERNELS:
            raise ValueError(f"backend is {backend!r}: windows and soft caps need 'xla' or None")
        if sight.limits.window is not None and not arena.timed:
            raise ValueError(
                f"sight has a window of {sight.limits.window}: the arena was made without its tokens' "
                f"positions, create it with timed=True"
            )


def _by_backend(q, arena, units, sight, together, backend) -> Partial:
    """Attention of rotated and scaled queries by one back end."""
    if backend in _KERNELS:
        return _KERNELS[backend].attend_rotated(q, arena, units)
    attend = functools.partial(_by_xla, sight=sight, together=together or q.shape[0])
    if backend == "xla":
        return attend(q, arena, units)
    why = "windows and soft caps are read by XLA" if sight is not None else None
    reasons = {name: why or kernel.unsupported(arena) for name, kernel in _KERNELS.items()}
    if reason := reasons.get(jax.default_backend()):
        _fallback.say("attention over the cache's pages", reason)
    kernels = {
        _PLATFORMS[name]: _KERNELS[name].attend_rotated
        for name, reason in reasons.items()
        if reason is None
    }
    if not kernels:
        return attend(q, arena, units)
    return lax.platform_dependent(q, arena, units, **kernels, default=attend)


def _by_xla(q, arena, units, *, sight, together) -> Partial:
    """XLA's loops over some units, then over the next."""
    if together == q.shape[0]:
        return xla.attend_rotated(q, arena, units, sight)
    rows = jax.tree.map(lambda x: x.reshape(-1, together, *x.shape[1:]), (q, units, sight))
    out = lax.map(lambda row: xla.attend_rotated(row[0], arena, *row[1:]), rows)
    return Partial(*(x.reshape(-1, *x.shape[2:]) for x in out))
