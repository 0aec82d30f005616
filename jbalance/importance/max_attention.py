"""Largest attention: tokens that at least one query needed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbalance import checks
from jbalance.importance import _tokens


def max_attention(q: ArrayLike, k: ArrayLike, v: ArrayLike, *, min_distance: int = 0) -> jax.Array:
    """Largest attention received from a query at least `min_distance` tokens later.

    w_s = max over t and the heads of the group of A_ts, position of t - s >= min_distance. One
    currency for all heads and layers: a threshold may be shared by them. The last min_distance
    tokens have no such query yet and get the row's largest w, so that they are kept until judged.

    Args:
      q: [T, H, D] the last T queries, after the rotary embedding.
      k: [S, K, D] all keys; T <= S, H a multiple of K.
      v: [S, K, D] values, only checked.
      min_distance: static, in 0..S-1.

    Returns:
      w, [K, S] float32 in 0..1.

    Raises:
      ValueError: shapes or dtypes that do not fit, T > S, min_distance outside 0..S-1, or a
        value that is not finite.

    Reference: Kim et al., KVzip, arXiv 2505.23416 (there from a reconstruction of the context).
    """
    q, k, _ = _tokens.tokens(q, k, v)
    key = jnp.arange(k.shape[0])
    min_distance = checks.static_int("min_distance", min_distance, 0, k.shape[0] - 1)
    _tokens.comparable(q=q, k=k)
    return _tokens.keep_first(_largest(q, k, min_distance), key >= len(key) - min_distance)


@functools.partial(jax.jit, static_argnames="min_distance")  # once for all eager calls
def _largest(q: jax.Array, k: jax.Array, min_distance: int) -> jax.Array:
    """The largest attention [K, S] from queries so far behind."""
    key = jnp.arange(k.shape[0])

    def step(w, attention, position):
        far = position[:, None] - key >= min_distance
        return jnp.maximum(w, jnp.where(far, attention, 0.0).max(axis=(1, 2)))

    return _tokens.fold_attention(step, q, k)
