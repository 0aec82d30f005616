"""Attention sinks and recent tokens (StreamingLLM): position alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbalance import checks
from jbalance.importance import _tokens


def sinks_recent(q: ArrayLike, k: ArrayLike, v: ArrayLike, *, num_sinks: int = 4) -> jax.Array:
    """An order by position: the first `num_sinks` tokens, then the most recent ones.

    w_s = (S - s) / S for the sinks and (s + 1 - num_sinks) / S for the others: no ties.

    Args:
      q: [T, H, D] queries, only checked.
      k: [S, K, D] keys, only checked.
      v: [S, K, D] values, only checked.
      num_sinks: static, >= 0.

    Returns:
      w, [K, S] float32 in 0..1, the same in every row.

    Raises:
      ValueError: shapes or dtypes that do not fit, T > S, num_sinks < 0, or a value that is not
        finite.

    Reference: Xiao et al., StreamingLLM, arXiv 2309.17453.
    """
    _, k, _ = _tokens.tokens(q, k, v)
    num_sinks = checks.static_int("num_sinks", num_sinks)
    size = k.shape[0]
    position = jnp.arange(size)
    order = jnp.where(position < num_sinks, size - position, position + 1 - num_sinks)
    return jnp.broadcast_to(order.astype(jnp.float32) / size, (k.shape[1], size))
