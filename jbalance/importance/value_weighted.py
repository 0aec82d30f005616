"""Value weighting: attention counts by what it brings in."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbalance import checks
from jbalance.importance import _tokens
from jbalance.types import TokenScorer


def value_weighted(scorer: TokenScorer, w_o: ArrayLike | None = None) -> TokenScorer:
    """A scorer times the size of the token's value: w_s ‖v_s‖, or w_s ‖v_s W_o‖ (group mean).

    What `scorer` promised to keep (sinks, a window) is no longer first if its values are small.

    Args:
      scorer: q, k, v -> w [K, S].
      w_o: [H, D, E] output projection of each query head; None for the values' own norm.

    Returns:
      A TokenScorer. It raises ValueError where w_o does not fit q's heads and v's head dim.

    Raises:
      ValueError: w_o is not [H, D, E].

    Reference: Feng et al., CriticalKV, arXiv 2502.03805 (output perturbation).
    """
    if w_o is not None:
        checks.rank("w_o", w_o, 3, "[H, D, E]")

    def scored(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        w = scorer(q, k, v)
        v = jnp.asarray(v, jnp.float32)
        return w * (_tokens.norm(v).T if w_o is None else _projected(q, v, w_o))

    return scored


def _projected(q: jax.Array, v: jax.Array, w_o: ArrayLike) -> jax.Array:
    """mean over the group of ‖v_s W_o‖, [K, S], as √(vᵀ M v) with M = W_o W_oᵀ: no [S, H, E]."""
    w_o = jnp.asarray(w_o, jnp.float32)
    want = (jnp.shape(q)[1], v.shape[2])
    if w_o.shape[:2] != want:
        raise ValueError(
            f"w_o has shape {w_o.shape}: q's heads and v's head dim need [{want[0]}, {want[1]}, E]"
        )
    gram = jnp.einsum("hde,hfe->hdf", w_o, w_o, precision=_tokens.HIGHEST)
    gram = gram.reshape(v.shape[1], -1, *gram.shape[1:])
    seen = jnp.einsum("kgdf,skf->kgsd", gram, v, precision=_tokens.HIGHEST)
    squared = jnp.einsum("kgsd,skd->kgs", seen, v, precision=_tokens.HIGHEST)
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0).mean(axis=1)
