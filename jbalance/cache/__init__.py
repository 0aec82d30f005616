"""The key/value cache that stores only what was allocated, and attention over it.

`live` is the cache of a decoder; `pages`, `worth`, `remainder` and `rebalance` are what it is made of.
"""

from jbalance.cache import live, pages, rebalance, remainder, worth
from jbalance.cache.attend import attend
from jbalance.cache.codec import Codes, codes_bytes, decode, dequantise, encode, rotate, unrotate
from jbalance.cache.live import KVCache
from jbalance.cache.paged_attention import attend_decoded, attend_pages
from jbalance.cache.pages import Arena
from jbalance.cache.ragged import RaggedCache, entries_within, pack, table_bytes
from jbalance.cache.remainder import Remainder

__all__ = [  # noqa: RUF022  (the order is the pipeline's)
    # few bits
    "Codes",
    "codes_bytes",
    "encode",
    "decode",
    "dequantise",
    "rotate",
    "unrotate",
    # whole tokens of one precision
    "RaggedCache",
    "entries_within",
    "table_bytes",
    "pack",
    "attend",
    # pages of every precision
    "Arena",
    "pages",
    "worth",
    "Remainder",
    "remainder",
    "rebalance",
    "attend_pages",
    "attend_decoded",
    # while decoding
    "KVCache",
    "live",
]
