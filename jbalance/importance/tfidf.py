"""TF-IDF: importance of terms in documents."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbalance import checks


def tfidf(counts: ArrayLike) -> jax.Array:
    """Weights of terms in documents: tf · idf, each document of length 1.

    idf_n = log((1 + B) / (1 + df_n)) + 1 with df_n the documents that hold term n; every row is
    then divided by its Euclidean norm (TfidfTransformer with smooth_idf and norm "l2").

    Args:
      counts: [B, N], >= 0: how often document b holds term n.

    Returns:
      [B, N] float32 in 0..1; a document without terms is 0.

    Raises:
      ValueError: counts is not [B, N], is empty, or holds something negative or not finite.

    Reference: Manning, Raghavan and Schütze, Introduction to Information Retrieval, 2008.
    """
    checks.rank("counts", counts, 2, "[B, N]")
    checks.non_empty("counts", counts)
    tf = jnp.asarray(checks.non_negative("counts", counts))
    df = jnp.sum(tf > 0, axis=0, dtype=jnp.float32)
    largest = jnp.max(tf, axis=1, keepdims=True)
    tf = tf / jnp.where(largest > 0, largest, 1.0)  # the length is 1 in the end, squares overflow
    raw = tf * (jnp.log((1 + tf.shape[0]) / (1 + df)) + 1)
    squared = jnp.sum(raw**2, axis=1, keepdims=True)
    return raw / jnp.sqrt(jnp.where(squared > 0, squared, 1.0))
