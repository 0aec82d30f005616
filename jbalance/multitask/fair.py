"""α-fair weights: from the mean over Nash bargaining to the smallest gradient in the hull."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from jbalance.multitask._complementarity import minimize
from jbalance.multitask.gramian import unit_diagonal
from jbalance.multitask.types import TaskStats, TaskWeighting

_NEWTON_STEPS = 40


def fair(alpha: float = 1.0, *, ridge: float = 1e-6) -> TaskWeighting:
    """Weights w > 0 with G w = w^(-1/α): of most α-fair utility of what the step gains for each task.

    α = 0 is the mean, 1 Nash bargaining, and infinity MGDA's point of least length in the convex hull of
    the gradients. Weights sum to one. Ban and Ji (2024), Fair Resource Allocation in Multi-Task
    Learning, arXiv:2402.15638, eq. 8; Désidéri (2012), MGDA, doi:10.1016/j.crma.2012.03.014.

    Args:
      alpha: in [0, infinity].
      ridge: added to the diagonal of the directions' Gramian while MGDA's point is sought; > 0.

    Raises:
      ValueError: a number outside its range.
    """
    if not alpha >= 0:
        raise ValueError(f"alpha is {alpha}: it must be in [0, infinity]")
    if not ridge > 0:
        raise ValueError(f"ridge is {ridge}: it must be above 0")

    def weigh(stats: TaskStats, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        return fair_weights(stats.gram, alpha, ridge), state

    return TaskWeighting(lambda tasks: (), weigh, needs_gram=True)


def fair_weights(gram: jax.Array, alpha: float, ridge: float = 1e-6) -> jax.Array:
    """Weights [K] of `fair` for a Gramian [K, K], sum 1."""
    size = gram.shape[0]
    if alpha == 0:
        return jnp.full(size, 1 / size, jnp.float32)
    w = _least_length(gram, ridge) if math.isinf(alpha) else _alpha_fair(gram, alpha)
    return w / jnp.maximum(jnp.sum(w), jnp.finfo(jnp.float32).tiny)


def _least_length(gram, ridge):
    """A multiple of the minimizer of w G w on the simplex: min w G w / 2 - sum(w) over w >= 0.

    With w = u / |g|: the directions' Gramian, and 1 / |g| in place of ones.
    """
    direction, inverse = unit_diagonal(gram)
    zero = inverse == 0
    target = inverse / jnp.maximum(jnp.max(inverse), jnp.finfo(jnp.float32).tiny)
    u = minimize(direction + jnp.diag(1.0 * zero), -target[None], ridge)[0]
    # A gradient of zero is the least there is.
    return jnp.where(jnp.any(zero), zero.astype(jnp.float32), u * inverse)


def _alpha_fair(gram, alpha):
    """Newton's method on w G w / 2 - sum φ(w), φ' = w^(-1/α): convex, with one minimum.

    With w = u / |g|: G u = |g|^(1/α - 1) u^(-1/α) for the directions' Gramian. A gradient of zero has no
    part in it.
    """
    direction, inverse = unit_diagonal(gram)
    power, positive = 1 / alpha, inverse > 0
    length = jnp.where(positive, 1 / jnp.where(positive, inverse, 1), 1)
    length = length / jnp.exp(jnp.mean(jnp.log(length)))  # w changes by a factor only
    target = length ** (power - 1)
    matrix = direction + jnp.diag(1.0 - positive)

    def step(_, u):
        pull = target * u**-power
        move = jnp.linalg.solve(matrix + jnp.diag(power * pull / u), matrix @ u - pull)
        # At most nine tenths of the way to zero, or ten times as far from it.
        reach = jnp.maximum(jnp.max(move / u) / 0.9, jnp.max(-move / u) / 9)
        return u - move / jnp.maximum(reach, 1)

    u = lax.fori_loop(0, _NEWTON_STEPS, step, target ** (1 / (1 + power)))
    return jnp.where(positive, u * inverse, 0)
