"""Attention that computes only what was allocated."""

from jbalance.tiling import Tiling  # noqa: I001  (pipeline order)
from jbalance.attention.partial import EMPTY, Partial, merge
from jbalance.attention.plan import (
    TilePlan,
    dense,
    from_mask,
    intersection,
    segments,
    to_mask,
    transposed,
    union,
    window,
)
from jbalance.attention.choose import candidates, choose
from jbalance.attention.balanced_plan import balanced_plan
from jbalance.attention.attend import attend
from jbalance.attention.tile_budget import TileBalancer, TileBudget

__all__ = [  # noqa: RUF022  (pipeline order)
    "EMPTY",
    "Partial",
    "merge",
    # tiles
    "Tiling",
    "TilePlan",
    "from_mask",
    "to_mask",
    "dense",
    "window",
    "segments",
    "union",
    "intersection",
    "transposed",
    "candidates",
    "choose",
    "balanced_plan",
    # attention over them
    "attend",
    # a number of them for each layer of a model
    "TileBudget",
    "TileBalancer",
]
