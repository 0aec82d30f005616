"""Key norm: tokens with short keys tend to be attended to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbalance.importance import _tokens


def key_norm(q: ArrayLike, k: ArrayLike, v: ArrayLike) -> jax.Array:
    """Low-norm keys matter: w_s = m / (m + ‖k_s‖), m the head's mean norm.

    In 0..1, falling with the norm, 1/2 at the mean, and the same for keys in any unit.

    Args:
      q: [T, H, D] queries, only checked.
      k: [S, K, D] keys.
      v: [S, K, D] values, only checked.

    Returns:
      w, [K, S] float32 in 0..1.

    Raises:
      ValueError: shapes or dtypes that do not fit, T > S, or a value that is not finite.

    Reference: Devoto et al., A Simple and Effective L2 Norm-Based Strategy, arXiv 2406.11430.
    """
    _, k, _ = _tokens.tokens(q, k, v)
    norm = _tokens.norm(_tokens.unit_scale(k.transpose(1, 0, 2)))
    mean = jnp.maximum(norm.mean(axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return mean / (mean + norm)
