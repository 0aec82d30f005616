"""The gated MLP, and a mixture of several of which every token takes a few."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Gated(NamedTuple):
    """Matrices of a gated MLP, or of X of them on a leading axis.

    Attributes:
      gate: [E, F].
      up: [E, F].
      down: [F, E].
    """

    gate: Array
    up: Array
    down: Array


def gated(h: Array, mlp: Gated, activation: Callable[[Array], Array]) -> Array:
    """(activation(h gate) * h up) down, h [B, T, E]."""
    return (activation(h @ mlp.gate) * (h @ mlp.up)) @ mlp.down


def mixture(
    h: Array,
    router: Array,
    experts: Gated,
    activation: Callable[[Array], Array],
    *,
    per_token: int,
    normalized: bool,
) -> Array:
    """Sparse mixture of experts: the likeliest ones of each token, weighted by their probabilities.

    Experts come one after the other, over all tokens, so that [B, T, F] is held once, not X times.

    Args:
      h: [B, T, E].
      router: [E, X].
      experts: X of them.
      activation: of the gates.
      per_token: how many experts a token takes.
      normalized: whether their probabilities are made to sum to 1.

    Source: Shazeer et al. 2017, arXiv 1701.06538; Jiang et al. 2024, arXiv 2401.04088.
    """
    probability = jax.nn.softmax((h @ router).astype(jnp.float32))
    chosen, index = jax.lax.top_k(probability, per_token)
    if normalized:
        chosen = chosen / chosen.sum(axis=-1, keepdims=True)
    number = router.shape[-1]
    weight = jnp.sum(jax.nn.one_hot(index, number) * chosen[..., None], axis=-2)  # [B, T, X]

    @jax.checkpoint
    def add(total: Array, one: tuple[Gated, Array]) -> tuple[Array, None]:
        expert, weight = one
        return total + weight[..., None].astype(h.dtype) * gated(h, expert, activation), None

    return jax.lax.scan(add, jnp.zeros_like(h), (experts, jnp.moveaxis(weight, -1, 0)))[0]
