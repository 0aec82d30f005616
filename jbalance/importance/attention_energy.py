"""Squared attention received from the last queries: tokens whose loss those queries would feel."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbalance import checks
from jbalance.importance import _tokens


def attention_energy(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    queries: int = 64,
    min_distance: int = 32,
    num_tokens: jax.Array | int | None = None,
) -> jax.Array:
    """Sum of the squared attention received from the last queries.

    w_s = Σ over the last `queries` t, and the heads of the group, of A_ts² where the position of
    t - s >= min_distance. If token s is stored with an independent relative error ε, the squared error
    of the outputs is Σ_t A_ts² ε² ‖v_s‖²: one currency for all heads and layers, in which bits and
    evictions compare. The root of w is an amplitude, on the scale of the attention itself.

    Args:
      q: [T, H, D] the last T queries, after the rotary embedding.
      k: [S, K, D] all keys; T <= S, H a multiple of K.
      v: [S, K, D] values, only checked.
      queries: how many of them to ask; static, in 1..T.
      min_distance: nearer tokens are seen by every query and judged later; static, >= 0.
      num_tokens: [] int32 <= S, how many of the S tokens there are, the others being padding behind
        them; q is then that of positions max(num_tokens - T, 0) and on. None for S.

    Returns:
      w, [K, S] float32 >= 0; 0 for the tokens that no asked query is far enough from.

    Raises:
      ValueError: shapes or dtypes that do not fit, T > S, queries outside 1..T, min_distance < 0, or a
        value that is not finite.
    """
    q, k, _ = _tokens.tokens(q, k, v)
    queries = checks.static_int("queries", queries, 1, q.shape[0])
    min_distance = checks.static_int("min_distance", min_distance)
    given = k.shape[0] if num_tokens is None else num_tokens
    number = jnp.asarray(checks.one_int("num_tokens", given, 0, k.shape[0]))
    start = None if num_tokens is None else jnp.maximum(number - q.shape[0], 0)
    if start is None:
        q = q[-queries:]
    _tokens.comparable(q=q, k=k)
    return _received(q, k, number, start, queries, min_distance)


@functools.partial(jax.jit, static_argnums=(4, 5))  # once for all eager calls of equal shapes
def _received(
    q: jax.Array,
    k: jax.Array,
    number: jax.Array,
    start: jax.Array | None,
    queries: int,
    min_distance: int,
) -> jax.Array:
    """The squared attention [K, S] from the last queries of so many tokens."""
    key = jnp.arange(k.shape[0])

    def step(w: jax.Array, attention: jax.Array, position: jax.Array) -> jax.Array:
        asked = (position >= number - queries) & (position < number)
        far = (position[:, None] - key >= min_distance) & asked[:, None]
        return w + _tokens.sum_queries(jnp.where(far, attention, 0.0) ** 2)

    return _tokens.fold_attention(step, q, k, start=start)
