"""Prior knowledge and feedback: log-linear opinion pooling of importance (METHOD section 4)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbalance import checks

_LARGEST = float(jnp.finfo(jnp.float32).max)


def blend(
    w: ArrayLike,
    prior: ArrayLike | None = None,
    beta: ArrayLike = 0.0,
    feedback: ArrayLike | None = None,
    eta: ArrayLike = 0.0,
    *,
    axis_name: str | None = None,
) -> jax.Array:
    """Importance blended with prior and feedback: w'_i ∝ w_i^(1-β) p_i^β exp(η f_i), Σ w' = Σ w.

    0^0 = 1: β = 0 ignores the prior, and β = 1 ignores w but for its sum. β = 0, η = 0 gives w back
    bit for bit. A unit whose w or p is exactly 0 has gradient 0 through it (the true one may be
    infinite). Under jit, w and a prior that share no unit give w back.

    Args:
      w: [..., U], >= 0.
      prior: p, [U] or w's shape, >= 0, in any unit.
      beta: β, [] in 0..1; more than 0 needs a prior.
      feedback: f, [U] or w's shape, in -1..1.
      eta: η, [] >= 0; more than 0 needs feedback.
      axis_name: mesh axis over which the units are split, or None.

    Returns:
      w', [..., U] float32.

    Raises:
      ValueError: shapes or ranges as above, or w and the prior share no unit.
    """
    checks.rank("w", w, tuple(range(1, 9)), "[..., U]")
    w = jnp.asarray(checks.non_negative("w", w))
    beta = _strength("beta", beta, "prior", prior, high=1.0)
    eta = _strength("eta", eta, "feedback", feedback, high=_LARGEST)
    if prior is None and feedback is None:
        return w
    logits = _log_power(w, 1.0 - beta)
    if prior is not None:
        logits += _log_power(_fit("prior", prior, w, 0.0, _LARGEST), beta)
    if feedback is not None:
        logits += eta * _fit("feedback", feedback, w, -1.0, 1.0)
    return _keep_sum(logits, w, (beta == 0) & (eta == 0), axis_name)


def decay_feedback(
    feedback: ArrayLike, decay: ArrayLike, new: ArrayLike | None = None
) -> jax.Array:
    """Feedback one step later: f' = clip(decay · f + new, -1, 1).

    Args:
      feedback: f, [..., U] in -1..1.
      decay: [] in 0..1; 0 forgets at once, 1 never.
      new: [..., U] in -1..1, what was said in this step; None for nothing.

    Returns:
      f', [..., U] float32 in -1..1.

    Raises:
      ValueError: a value outside its range.
    """
    checks.rank("feedback", feedback, tuple(range(1, 9)), "[..., U]")
    feedback = checks.in_range("feedback", feedback, -1.0, 1.0)
    checks.rank("decay", decay, 0, "[]")
    decay = checks.in_range("decay", decay, 0.0, 1.0)
    later = jnp.asarray(decay, jnp.float32) * jnp.asarray(feedback, jnp.float32)
    if new is None:
        return later
    checks.rank("new", new, np.ndim(feedback), "that of feedback")
    if np.shape(new) != np.shape(feedback):
        raise ValueError(
            f"new has shape {np.shape(new)}: it must be that of feedback, {np.shape(feedback)}"
        )
    new = checks.in_range("new", new, -1.0, 1.0)
    return jnp.clip(later + jnp.asarray(new, jnp.float32), -1.0, 1.0)


def _strength(name: str, x: Any, of: str, array: ArrayLike | None, high: float) -> jax.Array:
    """beta or eta, checked; only 0 where what it weighs is not given."""
    checks.rank(name, x, 0, "[]")
    x = checks.in_range(name, x, 0.0, high)
    if array is None and not (checks.is_concrete(x) and float(x) == 0):
        raise ValueError(f"{name} is {x} but {of} is None: give {of}, or {name}=0")
    return jnp.asarray(x, jnp.float32)


def _fit(name: str, x: ArrayLike, w: jax.Array, low: float, high: float) -> jax.Array:
    """prior or feedback, checked against w's shape and its own range."""
    checks.rank(name, x, (1, w.ndim), "[U] or w's shape")
    if np.shape(x) not in (w.shape, w.shape[-1:]):
        raise ValueError(f"{name} has shape {np.shape(x)}: w needs {w.shape} or {w.shape[-1:]}")
    return jnp.asarray(checks.in_range(name, x, low, high))


def _log_power(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """log x^exponent with 0^0 = 1, and without NaN in the gradient at 0."""
    at_zero = jnp.where(exponent > 0, -jnp.inf, 0.0)
    return jnp.where(x > 0, exponent * jnp.log(jnp.where(x > 0, x, 1.0)), at_zero)


def _keep_sum(
    logits: jax.Array, w: jax.Array, unchanged: jax.Array, axis_name: str | None
) -> jax.Array:
    """exp(logits) scaled to the sum of w along the last axis; w where `unchanged`."""
    top = jax.lax.stop_gradient(logits).max(axis=-1, keepdims=True)
    top = top if axis_name is None else jax.lax.pmax(top, axis_name)
    raw = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0.0))
    sums = jnp.stack([w.sum(axis=-1, keepdims=True), raw.sum(axis=-1, keepdims=True)])
    sum_w, sum_raw = sums if axis_name is None else jax.lax.psum(sums, axis_name)
    checks.finite("the sum of w", sum_w)
    if checks.is_concrete(sum_raw) and bool(jnp.any((sum_raw == 0) & (sum_w > 0))):
        raise ValueError("w and prior share no unit where both are > 0: there is nothing to blend")
    blended = raw * (sum_w / jnp.where(sum_raw > 0, sum_raw, 1.0))
    blended = jnp.where(sum_raw > 0, blended, w)
    return _with_gradient_of(jnp.where(unchanged, w, blended), blended)


@jax.custom_jvp
def _with_gradient_of(value: jax.Array, path: jax.Array) -> jax.Array:
    """value, bit for bit, with the gradient of `path`: beta and eta can be learned from 0."""
    return value


@_with_gradient_of.defjvp
def _with_gradient_of_jvp(primals, tangents):
    return _with_gradient_of(*primals), tangents[1]
