"""Partial attention with its log-sum-exp, and the exact merge of two parts (as in flash decoding)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jbalance import checks

EMPTY = -1e30  # log-sum-exp of attention over nothing; finite, so that merging gives no NaN
NO_TOP = 0.5 * EMPTY  # the largest of no logits, so that the weight of nothing is 0


class Partial(NamedTuple):
    """Attention over some of the keys: y = softmax(logits) v, and the logits' log-sum-exp."""

    y: jax.Array  # [..., D] normalized over these keys; 0 where there are none
    lse: jax.Array  # [...] float32, log-sum-exp of the logits; `EMPTY` where there are none


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over both sets of keys: exact, whatever the order."""
    for name, x in (("a", a), ("b", b)):
        checks.instance(name, x, Partial)
    lse = jnp.logaddexp(a.lse, b.lse)
    part = jnp.exp(a.lse - lse)[..., None], jnp.exp(b.lse - lse)[..., None]
    return Partial(a.y * part[0] + b.y * part[1], lse)
