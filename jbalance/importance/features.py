"""Importance of features: relevance, discrimination and complexity, weighted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbalance import checks
from jbalance.importance.anova import anova
from jbalance.importance.chi_squared import chi_squared
from jbalance.importance.correlation import correlation
from jbalance.importance.entropy import entropy
from jbalance.importance.mutual_information import mutual_information
from jbalance.importance.weighted import weighted
from jbalance.types import FeatureScorer

FEATURE_SCORERS: dict[str, FeatureScorer] = {
    "mutual_information": mutual_information,  # relevance
    "correlation": correlation,
    "anova": anova,  # discrimination
    "chi_squared": chi_squared,
    "entropy": entropy,  # complexity
}


def feature_association(
    x: ArrayLike,
    y: ArrayLike,
    *,
    relevance: str = "mutual_information",
    discrimination: str = "anova",
    complexity: str = "entropy",
    num_classes: int | None = None,
) -> jax.Array:
    """Association a [N, 3] of features with relevance, discrimination and complexity, in 0..1.

    Args:
      x: [B, N] features (>= 0 for "chi_squared").
      y: [B] int labels in 0..C-1.
      relevance, discrimination, complexity: names in FEATURE_SCORERS, static.
      num_classes: C, static; read from y where y is concrete.

    Returns:
      [N, 3] float32 in 0..1, the columns in that order.

    Raises:
      ValueError: an unknown name, or what the scorers themselves refuse.
    """
    names = {
        "relevance": relevance,
        "discrimination": discrimination,
        "complexity": complexity,
    }
    scorers = [checks.choice(role, name, FEATURE_SCORERS) for role, name in names.items()]
    return jnp.stack([scorer(x, y, num_classes=num_classes) for scorer in scorers], axis=1)


def feature_importance(
    x: ArrayLike,
    y: ArrayLike,
    weights: ArrayLike | Sequence[float] = (1 / 3, 1 / 3, 1 / 3),
    **options: Any,
) -> jax.Array:
    """Importance of features: w_i = Σ_k a_ik · weights_k over the three scores of METHOD section 1.

    Args:
      x: [B, N] features (>= 0 for "chi_squared").
      y: [B] int labels in 0..C-1.
      weights: [3], >= 0, of relevance, discrimination and complexity.
      **options: of `feature_association`: which scorer stands for each, and num_classes.

    Returns:
      w, [N] float32; in 0..1 if the weights sum to 1.

    Raises:
      ValueError: weights not [3], negative or with a sum beyond float32, an unknown name, or what the
        scorers refuse.
    """
    checks.rank("weights", weights, 1, "[3]")
    w = jnp.asarray(checks.non_negative("weights", weights))
    if w.size != 3:
        raise ValueError(
            f"weights has {w.size} entries: give 3, for relevance, discrimination and complexity"
        )
    checks.finite("the sum of weights", jnp.sum(w))  # no score is above 1
    return weighted(feature_association(x, y, **options), w)
