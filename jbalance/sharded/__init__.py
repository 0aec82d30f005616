"""The stages over a mesh of devices, with `shard_map`; in one process or in many.

A stage here is the one of the same name, told which mesh axis carries what: units, examples, heads,
blocks of queries, tasks, requests. Mesh axes may be of type Auto or Explicit. Any number of units goes
over any number of devices: what does not divide is filled up with such as weigh and cost nothing, and
`padding` says how much of it that is.
"""

from jbalance.sharded import cache
from jbalance.sharded._layout import Padding, padding
from jbalance.sharded.attention import attend, block_order
from jbalance.sharded.cache import MeshCache
from jbalance.sharded.choose import choose
from jbalance.sharded.importance import tile_importance, token_importance
from jbalance.sharded.units import blend, ladder, shares, whole

__all__ = [  # noqa: RUF022  (pipeline order)
    "padding",
    "Padding",
    # w
    "blend",
    "token_importance",
    "tile_importance",
    # alpha, and amounts
    "shares",
    "whole",
    "ladder",
    # attention
    "choose",
    "block_order",
    "attend",
    # while decoding
    "cache",
    "MeshCache",
]
