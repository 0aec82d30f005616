"""Attention mass (H2O's heavy hitters): tokens that many queries attended to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbalance.importance import _tokens


def attention_mass(q: ArrayLike, k: ArrayLike, v: ArrayLike) -> jax.Array:
    """Mean attention that a token received from the queries that can see it.

    w_s = Σ_t A_ts / #{t: position of t >= s}, averaged over the query heads of the group. H2O
    sums; the division takes away the head start of early tokens, which more queries can see.

    Args:
      q: [T, H, D] the last T queries, after the rotary embedding.
      k: [S, K, D] all keys; T <= S, H a multiple of K.
      v: [S, K, D] values, only checked.

    Returns:
      w, [K, S] float32 in 0..1.

    Raises:
      ValueError: shapes or dtypes that do not fit, T > S, or a value that is not finite.

    Reference: Zhang et al., H2O: Heavy-Hitter Oracle, arXiv 2306.14048.
    """
    q, k, _ = _tokens.tokens(q, k, v)
    _tokens.comparable(q=q, k=k)
    total = _tokens.received(q, k)
    seen_by = jnp.minimum(q.shape[0], k.shape[0] - jnp.arange(k.shape[0]))
    return total / seen_by
