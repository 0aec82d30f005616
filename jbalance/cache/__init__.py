"""A key/value cache of fixed bytes, each token at the precision that it is worth."""

from jbalance.cache._cache import KVCache, create
from jbalance.cache._codec import Codes, dequantize, quantize
from jbalance.cache._memory import attend, write
from jbalance.cache._prefill import prefill
from jbalance.cache._requests import allowance, release
from jbalance.cache._step import step

__all__ = [  # noqa: RUF022  (the order is the pipeline's)
    "KVCache",
    "create",
    "prefill",
    "step",
    # cross-attention
    "write",
    "attend",
    # requests that share a cache
    "allowance",
    "release",
    # vectors in few bits
    "Codes",
    "quantize",
    "dequantize",
]
