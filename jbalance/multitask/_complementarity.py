"""Small linear complementarity problems, solved exactly: x >= 0, A x + q >= 0, x · (A x + q) = 0."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

_PATIENCE = 3  # exchanges of all at once that do not help, before one at a time
_TOLERANCE = 1e-6
_MOST_PER_UNKNOWN = 4
_PROXIMAL_STEPS = 4


@jax.jit  # once for all eager calls of equal shapes
def minimize(gram: jax.Array, q: jax.Array, ridge: float) -> jax.Array:
    """The minimizer x >= 0 of x G x / 2 + q · x for each row q, where G may be nearly singular.

    A ridge makes it definite, and holds x to what was found before (the proximal point method), so that
    it biases nothing in the end. Rockafellar (1976), doi:10.1137/0314056.

    Args:
      gram: [K, K] float32, positive semidefinite, diagonal near 1.
      q: [N, K] float32.
      ridge: > 0.

    Returns:
      x [N, K] >= 0.
    """
    matrix = gram + ridge * jnp.eye(gram.shape[0], dtype=jnp.float32)

    def nearer(_: jax.Array, x: jax.Array) -> jax.Array:
        return solve(matrix, q - ridge * x, x > 0)

    return lax.fori_loop(0, _PROXIMAL_STEPS, nearer, jnp.zeros_like(q))


def solve(matrix: jax.Array, q: jax.Array, guess: jax.Array) -> jax.Array:
    """The minimizer x >= 0 of x A x / 2 + q · x for each row q.

    Block principal pivoting: guess which x are positive, solve for them, exchange those that came out
    on the wrong side; one at a time, the last one, where exchanging all does not lead on, which
    ends for every positive definite A. Júdice and Pires (1994), doi:10.1016/0305-0548(94)90106-6.

    Args:
      matrix: [K, K] float32, positive definite, diagonal near 1.
      q: [N, K] float32.
      guess: [N, K] bool, which x are positive: any; the nearer the faster.

    Returns:
      x [N, K] >= 0.
    """
    size = q.shape[-1]
    eye = jnp.eye(size, dtype=jnp.float32)

    def candidate(positive: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x with A x + q = 0 where `positive` [N, K], and x = 0 elsewhere; and A x + q."""
        system = jnp.where(positive[:, :, None] & positive[:, None, :], matrix, eye)
        factor = jnp.linalg.cholesky(system)
        x = _cholesky_solve(factor, jnp.where(positive, -q, 0))
        rest = q + jnp.matmul(x, matrix, precision=lax.Precision.HIGHEST)
        # Once more for what rounding left.
        x = x - jnp.where(positive, _cholesky_solve(factor, jnp.where(positive, rest, 0)), 0)
        rest = q + jnp.matmul(x, matrix, precision=lax.Precision.HIGHEST)
        return x, jnp.where(positive, 0, rest)

    def wrong(positive: jax.Array) -> jax.Array:
        x, slope = candidate(positive)
        scale = jnp.maximum(jnp.max(jnp.abs(q), axis=-1, keepdims=True), 1e-30)
        return jnp.where(positive, x < -_TOLERANCE * scale, slope < -_TOLERANCE * scale)

    def step(carry):
        positive, off, least, patience, count = carry
        number = jnp.sum(off, axis=-1)
        better = number < least
        all_at_once = better | (patience > 0)
        patience = jnp.where(better, _PATIENCE, jnp.maximum(patience - 1, 0))
        last = jnp.arange(size) == jnp.max(jnp.where(off, jnp.arange(size), -1), -1, keepdims=True)
        positive = positive ^ jnp.where(all_at_once[:, None], off, off & last)
        return positive, wrong(positive), jnp.minimum(number, least), patience, count + 1

    def unfinished(carry):
        return jnp.any(carry[1]) & (carry[-1] < _MOST_PER_UNKNOWN * size + 8)

    rows = q.shape[:1]
    start = guess, wrong(guess), jnp.full(rows, size + 1), jnp.full(rows, _PATIENCE), 0
    positive, *_ = lax.while_loop(unfinished, step, start)
    return jnp.maximum(candidate(positive)[0], 0)


def _cholesky_solve(factor: jax.Array, b: jax.Array) -> jax.Array:
    return jax.scipy.linalg.cho_solve((factor, True), b[..., None])[..., 0]
