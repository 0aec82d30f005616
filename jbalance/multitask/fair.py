"""α-fair weights: from the mean over Nash bargaining to the smallest gradient in the hull."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jbalance import checks
from jbalance.multitask._complementarity import minimize
from jbalance.multitask.gramian import unit_diagonal
from jbalance.multitask.types import TaskStats, TaskWeighting, of_finite

_NEWTON_STEPS = 40
_TINY = jnp.finfo(jnp.float32).tiny
_LEAST_LOG, _MOST_LOG = -60.0, 70.0  # of weights, and of products of two


def fair(alpha: float = 1.0, *, ridge: float = 1e-6) -> TaskWeighting:
    """Weights w > 0 with G w = w^(-1/α): of most α-fair utility of what the step gains for each task.

    α = 0 is the mean, 1 Nash bargaining, and infinity MGDA's point of least length in the convex hull of
    the gradients. Weights sum to one; where a positive sum of the gradients is zero, a Pareto-stationary
    point, they tend to its. Ban and Ji (2024), Fair Resource Allocation in Multi-Task
    Learning, arXiv:2402.15638, eq. 8; Désidéri (2012), MGDA, doi:10.1016/j.crma.2012.03.014.

    Args:
      alpha: in [0, infinity].
      ridge: added to the diagonal of the directions' Gramian; > 0. Where the Gramian is singular, as at
        Pareto-stationary points, the equation has no solution without it.

    Raises:
      ValueError: a number outside its range; from update, gradients that are not finite.
    """
    alpha = checks.static_float("alpha", alpha, 0, math.inf)
    ridge = checks.static_float("ridge", ridge, checks.FLOAT32_TINY)

    def weigh(stats: TaskStats, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        return fair_weights(stats.gram, alpha, ridge), state

    return TaskWeighting(lambda tasks: (), of_finite(weigh), needs_gram=True)


def fair_weights(gram: jax.Array, alpha: float, ridge: float = 1e-6) -> jax.Array:
    """Weights [K] of `fair` for a Gramian [K, K], sum 1."""
    if alpha == 0:
        return jnp.full(gram.shape[0], 1 / gram.shape[0], jnp.float32)
    if math.isinf(alpha):
        return _least_length(gram, ridge)
    return _alpha_fair(gram, alpha, ridge)


def _least_length(gram, ridge):
    """The minimizer of w G w on the simplex: a multiple of that of w G w / 2 - sum(w) over w >= 0.

    With w = u / |g|: the directions' Gramian, and 1 / |g| in place of ones.
    """
    direction, inverse = unit_diagonal(gram)
    zero = (inverse == 0).astype(jnp.float32)
    target = inverse / jnp.maximum(jnp.max(inverse), _TINY)
    u = minimize(direction + jnp.diag(zero), -target[None], ridge)[0]
    # A gradient of zero is the least there is.
    return _over_sum(jnp.where(jnp.any(zero > 0), zero, u * target))


@functools.partial(jax.jit, static_argnames=("alpha", "ridge"))  # once for all eager calls
def _alpha_fair(gram, alpha, ridge):
    """Newton's method on w G w / 2 - sum φ(w), φ' = w^(-1/α): convex, with one minimum.

    With w = u / |g|: G u = |g|^(1/α - 1) u^(-1/α) for the directions' Gramian. A gradient of zero has no
    part in it, unless all are zero: then they count alike.
    """
    direction, inverse = unit_diagonal(gram)
    power, positive = 1 / alpha, inverse > 0
    log_length = jnp.where(positive, -jnp.log(jnp.where(positive, inverse, 1)), 0)
    log_length -= jnp.mean(log_length)  # w changes by a factor only
    log_target = (power - 1) * log_length
    matrix = direction + jnp.diag(jnp.where(positive, ridge, 1 + ridge))

    def step(_, log_u):
        u = jnp.exp(log_u)
        gain = jnp.exp(jnp.clip(log_target + (1 - power) * log_u, -_MOST_LOG, _MOST_LOG))
        # For the relative move, whose matrix is u's on both sides, over its diagonal's root.
        scaled = matrix * u[:, None] * u + jnp.diag(power * gain)
        size = lax.rsqrt(jnp.diagonal(scaled))
        slope = (matrix @ u) * u - gain
        move = size * jnp.linalg.solve(scaled * size[:, None] * size, slope * size)
        # At most nine tenths of the way to zero, or ten times as far from it; each on its own, or those
        # that go to zero would hold up all others.
        return jnp.clip(log_u + jnp.log1p(-jnp.clip(move, -9, 0.9)), _LEAST_LOG, _MOST_LOG / 2)

    log_u = lax.fori_loop(0, _NEWTON_STEPS, step, log_target / (1 + power))
    log_w = jnp.where(positive | ~jnp.any(positive), log_u - log_length, -jnp.inf)
    return jax.nn.softmax(log_w)


def _over_sum(w: jax.Array) -> jax.Array:
    """w [K] over its sum, equal ones where all have vanished."""
    total = jnp.sum(w)
    return jnp.where(total > 0, w / jnp.where(total > 0, total, 1), 1 / w.size)
