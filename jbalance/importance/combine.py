"""Weighted sum of several scorers, each normalized row by row."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbalance import checks
from jbalance.importance.tokens import TOKEN_SCORERS
from jbalance.types import TokenScorer

_ROWS = tuple(range(1, 9))


def _by_sum(w: jax.Array) -> jax.Array:
    w = _by_max(w)  # whose sum does not overflow
    total = w.sum(axis=-1, keepdims=True)
    return w / jnp.where(total > 0, total, 1.0)


def _by_max(w: jax.Array) -> jax.Array:
    largest = w.max(axis=-1, keepdims=True)
    return w / jnp.where(largest > 0, largest, 1.0)


def _by_rank(w: jax.Array) -> jax.Array:
    flat = w.reshape(-1, w.shape[-1])
    not_above = jax.vmap(
        lambda row: jnp.searchsorted(jnp.sort(row), row, side="right", method="sort")
    )(flat)
    rank = (1 + w.shape[-1] - not_above).astype(jnp.float32)
    return _by_sum(1.0 / rank.reshape(w.shape))


_NORMALIZERS = {"sum": _by_sum, "max": _by_max, "rank": _by_rank}


def _normalized(name: str, w: ArrayLike, normalize: str) -> jax.Array:
    """Scores [..., S] of different scales in one currency, row by row."""
    rows = checks.choice("normalize", normalize, _NORMALIZERS)
    checks.rank(name, w, _ROWS, "[..., S]")
    checks.non_empty(name, w)
    return rows(jnp.asarray(checks.non_negative(name, w)))


def combine(scores: ArrayLike, weights: ArrayLike, *, normalize: str = "sum") -> jax.Array:
    """Weighted sum of M normalized scores: w = Σ_m weights_m · normalize(scores_m).

    Args:
      scores: [M, ..., S], >= 0.
      weights: [M], >= 0.
      normalize: "sum": w / Σ w; "max": w / max w; "rank": 1/rank / Σ 1/rank, rank 1 the largest and
        equal scores sharing their best rank. A row of zeros stays 0 ("rank": uniform). Static; "rank"
        has gradient 0.

    Returns:
      w, [..., S] float32.

    Raises:
      ValueError: an unknown `normalize`; weights and scores that differ in M; scores that are empty,
        negative or not finite.
    """
    checks.rank("scores", scores, _ROWS[1:], "[M, ..., S]")
    checks.rank("weights", weights, 1, "[M]")
    checks.same_length("weights", weights, "scores", scores)
    weights = checks.non_negative("weights", weights)
    weights = jnp.asarray(weights, jnp.float32)
    normalized = _normalized("scores", scores, normalize)
    return jnp.einsum("m,m...->...", weights, normalized, precision=jax.lax.Precision.HIGHEST)


def combined(
    weights: Mapping[str, float],
    *,
    normalize: str | Mapping[str, str] = "sum",
    scorers: Mapping[str, TokenScorer] = TOKEN_SCORERS,
) -> TokenScorer:
    """A scorer that is the weighted sum of others, each normalized row by row.

    `combined({"window": 1.0, "leverage": 0.2}, normalize={"leverage": "rank"})`: what the last
    queries need, and some of what is unlike the rest.

    Args:
      weights: by name, >= 0.
      normalize: as for `combine`; one for all, or by name ("sum" where left out).
      scorers: what the names mean; give your own, say with `functools.partial`, for options.

    Returns:
      A TokenScorer.

    Raises:
      ValueError: no weights, a negative one, or an unknown name of a scorer or of `normalize`.
    """
    checks.mapping("weights", weights, "weights by name")
    checks.non_empty("weights", list(weights))
    if not isinstance(normalize, str):
        checks.mapping("normalize", normalize, "a name, or names by name")
    for name, weight in weights.items():
        checks.choice("a name in weights", name, scorers)
        checks.static_float(f"weights[{name!r}]", weight, 0, checks.FLOAT32_MAX)
    by_name = dict.fromkeys(weights, normalize) if isinstance(normalize, str) else dict(normalize)
    for name, how in by_name.items():
        checks.choice("a name in normalize", name, weights)
        checks.choice("normalize", how, _NORMALIZERS)

    def scored(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        terms = [
            weight * _normalized("w", scorers[name](q, k, v), by_name.get(name, "sum"))
            for name, weight in weights.items()
        ]
        return jnp.stack(terms).sum(axis=0)

    return scored
