"""Observation window (SnapKV): tokens that the last queries attended to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbalance import checks
from jbalance.importance import _tokens

_POOLINGS = {"mean": (jax.lax.add, 0.0), "max": (jax.lax.max, -jnp.inf)}


def window(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    window: int = 32,
    kernel: int = 5,
    pooling: str = "mean",
) -> jax.Array:
    """Mean attention received from the last `window` queries, pooled over neighbors.

    w_s = pool over |s' - s| <= kernel // 2 of mean over t in the window and the heads of the group
    of A_ts', zeros beyond the ends. The window's own tokens get the row's largest w: they are kept.

    Args:
      q: [T, H, D] the last T queries, after the rotary embedding; T >= window.
      k: [S, K, D] all keys; T <= S, H a multiple of K.
      v: [S, K, D] values, only checked.
      window: static, in 1..T.
      kernel: tokens to pool over, static and odd; 1 for none.
      pooling: "mean" or "max", static.

    Returns:
      w, [K, S] float32 in 0..1; all 1/S where the window is the whole sequence.

    Raises:
      ValueError: shapes or dtypes that do not fit, T > S, window > T, an even kernel, an unknown
        pooling, or a value that is not finite.

    Reference: Li et al., SnapKV, arXiv 2404.14469.
    """
    q, k, _ = _tokens.tokens(q, k, v)
    window = checks.static_int("window", window, 1)
    kernel = checks.static_int("kernel", kernel, 1)
    checks.choice("pooling", pooling, _POOLINGS)
    if window > q.shape[0]:
        raise ValueError(f"window is {window} but q has {q.shape[0]} queries: give at most that")
    if kernel % 2 == 0:
        raise ValueError(f"kernel is {kernel}: it must be odd, say {kernel + 1}")
    if window == k.shape[0]:
        return jnp.full(k.shape[1::-1], 1.0 / window)
    q = q[-window:]
    _tokens.comparable(q=q, k=k)
    total = _tokens.received(q, k)
    recent = jnp.arange(k.shape[0]) >= k.shape[0] - window
    pooled = _pool(jnp.where(recent, 0.0, total / window), kernel, pooling)
    return _tokens.keep_first(pooled, recent)


def _pool(w: jax.Array, kernel: int, pooling: str) -> jax.Array:
    """Mean (or maximum) of w [K, S] over `kernel` neighbors, zeros beyond the ends."""
    combine, start = _POOLINGS[pooling]
    reach = kernel // 2
    padded = jnp.pad(w, ((0, 0), (reach, reach)))
    pooled = jax.lax.reduce_window(padded, start, combine, (1, kernel), (1, 1), "valid")
    return pooled / kernel if pooling == "mean" else pooled
