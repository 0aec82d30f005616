"""A cache whose heads keep different numbers of tokens, in arrays of exactly that size.

All (layer, key/value head) units of one device lie one after the other in one pair of arrays; a table
of offsets says where each begins. Nothing is padded: what was evicted takes no memory. Keys are stored
as attention reads them (after the rotary embedding), so a token's position need not be.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbalance import checks
from jbalance.resources import kv_entry_bytes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RaggedCache:
    """The kept keys and values of the units on one device; E entries over U units."""

    keys: jax.Array  # [E, D]
    values: jax.Array  # [E, D]
    offsets: jax.Array  # [U + 1] int32, unit u holds entries offsets[u] .. offsets[u + 1] - 1

    @property
    def num_entries(self) -> int:
        """E, over all units."""
        return self.keys.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that stay resident: keys, values and the table."""
        return sum(x.nbytes for x in (self.keys, self.values, self.offsets))


def table_bytes(num_units: int) -> int:
    """Bytes of the table of a cache of so many units."""
    return 4 * (num_units + 1)


def entries_within(budget_bytes: int, num_units: int, head_dim: int, bits: int = 16) -> int:
    """Entries that fit into a budget beside the table.

    Raises:
      ValueError: if the budget does not even hold the table and one entry, with the least that does.
    """
    least = table_bytes(num_units) + kv_entry_bytes(head_dim, bits)
    if budget_bytes < least:
        raise ValueError(
            f"budget_bytes is {budget_bytes}: the table of {num_units} units and one entry take {least}"
        )
    return (budget_bytes - table_bytes(num_units)) // kv_entry_bytes(head_dim, bits)


def pack(
    k: jax.Array,
    v: jax.Array,
    kept: np.ndarray,
    units: ArrayLike | None = None,
    *,
    dtype: jnp.dtype = jnp.bfloat16,
) -> RaggedCache:
    """Gather the kept tokens of some units into a cache.

    Args:
      k: [L, S, K, D] keys of all layers.
      v: [L, S, K, D] values.
      kept: [L, K, S] bool on the host: its sums are the sizes of the arrays.
      units: indices l K + h of the units that this cache holds, in its order; None for all.
      dtype: to store in.

    Returns:
      `RaggedCache` with sum(kept) entries, in order of position within a unit.

    Raises:
      ValueError: shapes that do not fit, or a unit outside 0..L K - 1.
    """
    checks.rank("k", k, 4, "[L, S, K, D]")
    layers, tokens, heads, _ = k.shape
    if v.shape != k.shape:
        raise ValueError(f"v has shape {v.shape}: it must be that of k, {k.shape}")
    if np.shape(kept) != (layers, heads, tokens):
        raise ValueError(
            f"kept has shape {np.shape(kept)}: it must be [L, K, S] = {(layers, heads, tokens)}"
        )
    held = np.arange(layers * heads) if units is None else np.asarray(units, np.int32)
    if held.size:
        checks.index_below("units", held, layers * heads)
    rows = np.asarray(kept).reshape(layers * heads, tokens)[held]
    index, position = np.nonzero(rows)
    unit = held[index]
    at = (unit // heads, position, unit % heads)
    offsets = np.concatenate([[0], np.cumsum(rows.sum(axis=1))]).astype(np.int32)
    keys, values = _gather(k, v, *(jnp.asarray(i, jnp.int32) for i in at), dtype=dtype)
    return RaggedCache(keys, values, jnp.asarray(offsets))


@functools.partial(jax.jit, static_argnames="dtype")
def _gather(k, v, layer, position, head, dtype):
    return tuple(x[layer, position, head].astype(dtype) for x in (k, v))
