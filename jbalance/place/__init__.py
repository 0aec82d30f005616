"""Which device holds which unit: one file per method, from loads to a `Placement` or `Replicas`."""

import functools

from jbalance.place.bound import bound
from jbalance.place.causal import causal_tiles, visible_keys
from jbalance.place.contiguous import contiguous
from jbalance.place.drift import rebalance
from jbalance.place.over_layers import over_layers, over_layers_bound
from jbalance.place.pack import pack
from jbalance.place.replicate import replicate
from jbalance.place.step_time import step_time
from jbalance.place.types import (
    Bound,
    Placement,
    Placer,
    Rebalanced,
    Replicas,
    StepTime,
    Term,
)

PLACERS: dict[str, Placer] = {
    "exchange": pack,
    "longest_first": functools.partial(pack, swaps=0),
    "contiguous": contiguous,
}

__all__ = [
    "PLACERS",
    "Bound",
    "Placement",
    "Placer",
    "Rebalanced",
    "Replicas",
    "StepTime",
    "Term",
    "bound",
    "causal_tiles",
    "contiguous",
    "over_layers",
    "over_layers_bound",
    "pack",
    "rebalance",
    "replicate",
    "step_time",
    "visible_keys",
]
