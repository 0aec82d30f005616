"""The key/value cache that stores only what was allocated, and attention over it."""

from jbalance.cache.attend import Partial, attend, merge
from jbalance.cache.codec import Codes, codes_bytes, decode, dequantise, encode, rotate, unrotate
from jbalance.cache.ragged import RaggedCache, entries_within, pack, table_bytes

__all__ = [
    "Codes",
    "Partial",
    "RaggedCache",
    "attend",
    "codes_bytes",
    "decode",
    "dequantise",
    "encode",
    "entries_within",
    "merge",
    "pack",
    "rotate",
    "table_bytes",
    "unrotate",
]
