"""Expected attention: tokens that queries yet to come will attend to."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbalance import checks
from jbalance.importance import _rotary, _tokens


def expected_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    frequencies: ArrayLike | None = None,
    future: int = 512,
    num_sinks: int = 4,
    use_covariance: bool = True,
    epsilon: float = 0.0,
) -> jax.Array:
    """Attention expected from the next `future` queries if they are Gaussian as the past ones were.

    With μ, Σ the mean and covariance of the queries before the rotary embedding, R̄ the mean
    rotation to the next `future` positions, μ̄ = R̄ μ and Σ̄ = R̄ Σ R̄ᵀ:
    w_s = (mean over the group of softmax_s(μ̄ᵀk_s / √D + k_sᵀ Σ̄ k_s / 2D) + ε) ‖v_s‖.
    The first num_sinks tokens count neither as queries nor in the softmax and get the row's largest w.

    Args:
      q: [T, H, D] the last T queries, after the rotary embedding.
      k: [S, K, D] all keys, after it; T <= S, S > num_sinks, H a multiple of K.
      v: [S, K, D] values.
      frequencies: [D/2] of the model's rotary embedding, radians per position of each pair of
        features (half-split convention); None for no rotary embedding.
      future: number of positions ahead, static.
      num_sinks: number of first tokens that are always kept, static.
      use_covariance: False leaves Σ out, static.
      epsilon: ε, >= 0; lets tokens with large values in although nothing attends to them.

    Returns:
      w, [K, S] float32 >= 0.

    Raises:
      ValueError: shapes or dtypes that do not fit, T > S, D odd with a rotary embedding, num_sinks
        that leaves no query, future < 1, epsilon < 0, or a value that is not finite.

    Reference: Devoto, Jeblick and Jégou, Expected Attention, arXiv 2510.00636.
    """
    q, k, v = _tokens.tokens(q, k, v)
    _tokens.comparable(q=q, k=k, v=v)
    future = checks.static_int("future", future, 1)
    num_sinks = checks.static_int("num_sinks", num_sinks, 0, k.shape[0] - 1)
    checks.rank("epsilon", epsilon, 0, "[]")
    epsilon = checks.non_negative("epsilon", epsilon)
    start = max(0, num_sinks - (k.shape[0] - q.shape[0]))  # queries that are sinks themselves
    z = q[start:]
    frequencies = _rotary.check(frequencies, q.shape[-1])
    if frequencies is not None:
        z = _rotary.unrotate(z, frequencies, start=k.shape[0] - z.shape[0])
        z = _rotary.rotate_to_mean(z, frequencies, start=k.shape[0], count=future)
    logits = _logits(_tokens.by_group(z, k.shape[1]), k, use_covariance)
    sink = jnp.arange(k.shape[0]) < num_sinks
    share = jax.nn.softmax(jnp.where(sink, _tokens.HIDDEN, logits), axis=-1).mean(axis=1)
    return _tokens.keep_first((share + epsilon) * _tokens.norm(v).T, sink)


def _logits(z: jax.Array, k: jax.Array, use_covariance: bool) -> jax.Array:
    """log E[exp(z·k / √D)], [K, G, S], for Gaussian z with the moments of z [T, K, G, D]."""
    count, dim = z.shape[0], z.shape[-1]
    mean = z.mean(axis=0)
    logits = jnp.einsum("kgd,skd->kgs", mean, k, precision=_tokens.HIGHEST) / math.sqrt(dim)
    if not use_covariance:
        return logits
    z = z - mean
    covariance = jnp.einsum("tkgd,tkge->kgde", z, z, precision=_tokens.HIGHEST) / count
    seen = jnp.einsum("kgde,ske->kgsd", covariance, k, precision=_tokens.HIGHEST)
    return logits + jnp.einsum("kgsd,skd->kgs", seen, k, precision=_tokens.HIGHEST) / (2 * dim)
