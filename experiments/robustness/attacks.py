"""Perturbations of embedded tokens that raise a classifier's loss, through the tokens that are kept."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

STEPS, PACE = 8, 0.25  # of the iterated attack, and its step as a part of the radius


def sign_gradient(loss: Callable[[Array], Array], x: Array, radius: float | Array) -> Array:
    """One step to a corner of the box around x: FGSM (Goodfellow et al., arXiv:1412.6572).

    Args:
      loss: of perturbed x.
      x: [...] what is perturbed.
      radius: of the box, by the largest change of an entry.

    Returns:
      The perturbation, of x's shape.
    """
    return radius * jnp.sign(jax.grad(loss)(x))


def projected_gradient(loss: Callable[[Array], Array], x: Array, radius: float | Array) -> Array:
    """`STEPS` steps of `PACE` of the radius, each back into the box: PGD (Madry, arXiv:1706.06083)."""

    def step(shift: Array, _: None) -> tuple[Array, None]:
        shift += PACE * sign_gradient(loss, x + shift, radius)
        return jnp.clip(shift, -radius, radius), None

    return jax.lax.scan(step, jnp.zeros_like(x), None, length=STEPS)[0]
