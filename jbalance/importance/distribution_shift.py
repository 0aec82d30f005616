"""Jensen-Shannon divergence: how far a unit's data have moved, as an indicator (METHOD step 1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbalance import checks


def distribution_shift(before: ArrayLike, after: ArrayLike) -> jax.Array:
    """Jensen-Shannon divergence of each unit's two distributions, in bits: 0 alike, 1 apart.

    The mean of both distributions' Kullback-Leibler divergence to their average. It is symmetric, and
    finite where an outcome occurs in one of them alone. Of samples it is above 0 by chance, the more the
    fewer there are.

    Args:
      before: [N, C] >= 0, how often each of C outcomes occurs in a unit's data: counts or probabilities.
      after: [N, C], the same of other data: a later time's, or those of all units together.

    Returns:
      [N] float32 in 0..1; under jit, 0 for a unit without data.

    Raises:
      ValueError: shapes that do not fit, an entry that is negative or not finite, a unit without data.

    Reference: Lin, Divergence Measures Based on the Shannon Entropy, 1991.

    >>> distribution_shift([[1, 1, 0], [4, 0, 0]], [[2, 2, 0], [0, 1, 0]])
    Array([0., 1.], dtype=float32)
    """
    given = {"before": before, "after": after}
    for name, x in given.items():
        checks.rank(name, x, 2, "[N, C]")
        checks.non_empty(name, x)
    for axis in range(2):
        checks.same_length("after", after, "before", before, axis=axis)
    both = []
    for name, x in given.items():
        x = jnp.asarray(checks.non_negative(name, x)).astype(jnp.float32)
        x *= 2**-8 / x.shape[1]  # neither the sum nor its inverse leaves float32's range
        total = jnp.sum(x, axis=1, keepdims=True)
        checks.positive(f"the least sum of {name}", jnp.min(total))
        both.append(x / jnp.where(total > 0, total, 1))
    middle = (both[0] + both[1]) / 2
    parts = [
        jnp.where(p > 0, p * jnp.log2(jnp.where(p > 0, p, 1) / jnp.where(p > 0, middle, 1)), 0)
        for p in both
    ]
    known = jnp.all(jnp.stack([jnp.any(p > 0, axis=1) for p in both]), axis=0)
    bits = jnp.sum(parts[0] + parts[1], axis=1) / 2
    return jnp.where(known, jnp.clip(bits, 0, 1), 0)
