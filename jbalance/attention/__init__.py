"""Attention that computes only what was allocated."""

from jbalance.attention.partial import EMPTY, Partial, merge  # noqa: I001  (pipeline order)
from jbalance.attention.plan import (
    TilePlan,
    causal,
    difference,
    from_mask,
    full,
    intersection,
    segments,
    to_mask,
    transposed,
    union,
    window,
)
from jbalance.attention.choose import candidates, choose
from jbalance.attention.attend import attend

__all__ = [  # noqa: RUF022  (pipeline order)
    "EMPTY",
    "Partial",
    "merge",
    # tiles
    "TilePlan",
    "from_mask",
    "to_mask",
    "full",
    "causal",
    "window",
    "segments",
    "union",
    "intersection",
    "difference",
    "transposed",
    "candidates",
    "choose",
    # attention over them
    "attend",
]
