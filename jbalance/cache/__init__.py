"""The key/value cache that stores only what was allocated, and attention over it."""

from jbalance.cache.attend import Partial, attend, merge
from jbalance.cache.ragged import RaggedCache, entries_within, pack, table_bytes

__all__ = [
    "Partial",
    "RaggedCache",
    "attend",
    "entries_within",
    "merge",
    "pack",
    "table_bytes",
]
