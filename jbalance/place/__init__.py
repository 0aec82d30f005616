"""Which device holds which unit."""

from jbalance.place.bound import bound
from jbalance.place.causal import causal_tiles, visible_keys
from jbalance.place.pack import pack
from jbalance.place.replicate import replicate

__all__ = ["bound", "causal_tiles", "pack", "replicate", "visible_keys"]
