"""Leverage: tokens whose keys are unlike the rest."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbalance import checks
from jbalance.importance import _rotary, _tokens


def leverage(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    ridge: float = 1e-2,
    frequencies: ArrayLike | None = None,
) -> jax.Array:
    """Ridge leverage scores of the keys: w_s = x_sᵀ (XᵀX + λI)⁻¹ x_s, x_s = k_s - mean of k.

    λ = ridge · tr(XᵀX) / D, so that w is the same for keys in any unit. The scores ask no query,
    which is why they remember what nobody has asked for yet.

    Args:
      q: [T, H, D] queries, only checked.
      k: [S, K, D] keys, after the rotary embedding.
      v: [S, K, D] values, only checked.
      ridge: > 0.
      frequencies: [D/2] of the model's rotary embedding, which is undone first, as the reference does;
        None leaves the keys as they are.

    Returns:
      w, [K, S] float32 in 0..1; a row sums to at most D, and to 0 where all keys are equal.

    Raises:
      ValueError: shapes or dtypes that do not fit, T > S, D odd with a rotary embedding,
        ridge <= 0, or a value that is not finite.

    Reference: Chari and Van Durme, Compactor, arXiv 2507.08143 (there with a random sketch).
    """
    _, k, _ = _tokens.tokens(q, k, v)
    checks.rank("ridge", ridge, 0, "[]")
    ridge = checks.positive("ridge", ridge)
    frequencies = _rotary.check(frequencies, k.shape[-1])
    k = _tokens.unit_scale(k.transpose(1, 0, 2)).transpose(1, 0, 2)
    if frequencies is not None:
        k = _rotary.unrotate(k, frequencies, start=0)
    k = k.transpose(1, 0, 2)
    x = _tokens.unit_scale(k - k.mean(axis=1, keepdims=True))
    gram = jnp.einsum("ksd,kse->kde", x, x, precision=_tokens.HIGHEST)
    strength = ridge * jnp.trace(gram, axis1=1, axis2=2)[:, None, None] / k.shape[-1]
    eye = jnp.eye(k.shape[-1], dtype=jnp.float32)
    factor = jnp.linalg.cholesky(gram + jnp.where(strength > 0, strength, 1.0) * eye)
    solved = jax.scipy.linalg.solve_triangular(factor, x.transpose(0, 2, 1), lower=True)
    return jnp.minimum(jnp.sum(solved**2, axis=1), 1.0)
