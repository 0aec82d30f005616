"""Attention over an arena by its definition: decode everything, then dense attention."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jbalance.attention.partial import EMPTY, Partial
from jbalance.cache import _pages
from jbalance.cache._pages import Arena


def attend(q: jax.Array, arena: Arena, units: jax.Array) -> Partial:
    """What `attend_pages` computes, for queries [N, T, D] of units [N] that exist."""

    def one_unit(q, unit):
        held = [_pages.read(arena, unit, level) for level in range(len(arena.bits))]
        k, v, valid = (jnp.concatenate([h[i] for h in held]) for i in range(3))
        logits = jnp.matmul(q.astype(jnp.float32), k.T, precision="highest")
        logits = jnp.where(valid, logits / math.sqrt(arena.head_dim), -jnp.inf)
        lse = jnp.where(jnp.any(valid), jax.nn.logsumexp(logits, axis=-1), EMPTY)
        weight = jnp.exp(logits - lse[:, None])
        return Partial(jnp.matmul(weight, v, precision="highest"), lse)

    return jax.vmap(one_unit)(q, jnp.asarray(units, jnp.int32))
