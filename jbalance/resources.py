"""C: what attention costs, and what each device has left (METHOD step 2).

Bytes are Python or NumPy integers on the host, where they are exact at any size. Inside jit they are
counted in blocks (entries, pages): `blocks` converts, and says what the rounding leaves over.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbalance import checks
from jbalance.types import Resources

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}
_UNITS |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}


def status(
    capacity: ArrayLike,
    demand: ArrayLike,
    used: ArrayLike,
    device_of: ArrayLike | None = None,
) -> Resources:
    """Resources available and remaining, per device and in total.

    C_avail = C - sum_i c'_i and C_remain = C - sum_i min(c_i, c'_i), over the units on each device.

    Args:
      capacity: [] or [G], what each device has, in any unit.
      demand: [N] c, what each unit needs, in the same unit.
      used: [N] c', what each unit uses now. Available may be negative: units may use too much.
      device_of: [N] int, the device of each unit; None with one device.

    Returns:
      `Resources` of the shape of capacity, and the totals.

    Raises:
      ValueError: capacity <= 0, demand or used negative or NaN, wrong shapes.
    """
    checks.rank("capacity", capacity, (0, 1), "[] or [G]")
    checks.positive("capacity", capacity)
    for name, x in (("demand", demand), ("used", used)):
        checks.rank(name, x, 1, "[N]")
        checks.non_negative(name, x)
    checks.same_length("used", used, "demand", demand)
    capacity, demand, used = (jnp.asarray(x, jnp.float32) for x in (capacity, demand, used))
    if device_of is None:
        if capacity.ndim:
            raise ValueError(
                f"device_of is None, but capacity has {capacity.shape[0]} devices: say which unit "
                f"is where, or give one capacity"
            )
        taken, needed = jnp.sum(used), jnp.sum(jnp.minimum(demand, used))
    else:
        num_devices = capacity.shape[0] if capacity.ndim else 1
        checks.same_length("device_of", device_of, "demand", demand)
        checks.index_below("device_of", device_of, num_devices)
        device_of = jnp.asarray(device_of)
        taken, needed = (
            jax.ops.segment_sum(x, device_of, num_devices).reshape(capacity.shape)
            for x in (used, jnp.minimum(demand, used))
        )
    available, remaining = capacity - taken, capacity - needed
    return Resources(available, remaining, jnp.sum(available), jnp.sum(remaining))


@dataclasses.dataclass(frozen=True)
class AttentionDims:
    """The dimensions of a decoder that attention's costs depend on (static, hashable)."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name} is {value!r}: it must be a whole number >= 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}: it must be a multiple of num_kv_heads = "
                f"{self.num_kv_heads}"
            )

    @property
    def num_units(self) -> int:
        """Pairs of layer and key/value head: the units that a cache is divided among."""
        return self.num_layers * self.num_kv_heads


def kv_entry_bytes(head_dim: int, bits: int = 16, scale_bits: int = 0) -> int:
    """Bytes of one cached token of one layer and key/value head: a key, a value, and their scales.

    Args:
      head_dim: D.
      bits: per number; 2 D numbers.
      scale_bits: per vector, of the norms or scales that a quantized code needs; two vectors.

    Raises:
      ValueError: if the entry is not a whole number of bytes.
    """
    total_bits = 2 * (head_dim * bits + scale_bits)
    if total_bits % 8:
        raise ValueError(
            f"bits is {bits}: {total_bits} bits for an entry of head_dim {head_dim} are no whole bytes"
        )
    return total_bits // 8


def kv_cache_bytes(dims: AttentionDims, entries: Any, bits: Any = 16, scale_bits: int = 0) -> int:
    """Exact bytes of the cached keys and values, tables not included.

    Args:
      dims: of the model.
      entries: cached tokens: one number for all units, or [L, K] of them.
      bits: per number: one, or [L, K].
      scale_bits: per vector.

    Returns:
      Bytes as a Python int, exact at any size.
    """
    shape = (dims.num_layers, dims.num_kv_heads)
    entries = np.broadcast_to(np.asarray(entries), shape)
    bits = np.broadcast_to(np.asarray(bits), shape)
    checks.non_negative("entries", entries)
    return sum(
        int(n) * kv_entry_bytes(dims.head_dim, int(b), scale_bits)
        for n, b in zip(entries.flat, bits.flat, strict=True)
    )


def parse_bytes(text: str) -> int:
    """Bytes of a text such as "4MiB", "2.5 GB" or "4096".

    Raises:
      ValueError: if it is no positive whole number of bytes, naming the units that would fit.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = match and match.group(2).lower()
    if not match or unit not in _UNITS:
        raise ValueError(
            f"bytes: {text!r} is not an amount of memory: write a number and one of B, kB, MB, GB, "
            f"TB, KiB, MiB, GiB, TiB"
        )
    size = float(match.group(1)) * _UNITS[unit]
    if size < 1 or size != int(size):
        raise ValueError(f"bytes: {text!r} is {size:g} bytes: it must be a whole number >= 1")
    return int(size)


def device_budgets(
    devices: Sequence[jax.Device], fraction: float = 1.0, given_bytes: Sequence[int] | None = None
) -> list[int]:
    """Bytes that each device may use: given, or a fraction of what its backend reports as free.

    Args:
      devices: the devices, one budget each.
      fraction: in (0, 1], of what is free (`bytes_limit` - `bytes_in_use`).
      given_bytes: budgets for backends without memory statistics (CPU), or to override them.

    Raises:
      ValueError: fewer or more budgets than devices, a budget below 1, or a device without memory
        statistics and no budget given.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}: it must be in (0, 1]")
    if given_bytes is not None:
        if len(given_bytes) != len(devices):
            raise ValueError(
                f"given_bytes has {len(given_bytes)} budgets for {len(devices)} devices: give one each"
            )
        for d, size in enumerate(given_bytes):
            if int(size) < 1:
                raise ValueError(f"given_bytes[{d}] is {size}: it must be at least 1 byte")
        return [int(int(size) * fraction) for size in given_bytes]
    budgets = []
    for device in devices:
        stats = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            raise ValueError(
                f"given_bytes is None, and {device} reports no memory statistics: give its budget"
            )
        free = int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
        budgets.append(int(free * fraction))
    return budgets


def blocks(num_bytes: int | Sequence[int], block_bytes: int) -> np.ndarray:
    """Whole blocks that fit into each amount of bytes, as int32 for use inside jit.

    Raises:
      ValueError: block_bytes below 1, or more than 2^31-1 blocks: take larger ones.
    """
    if block_bytes < 1:
        raise ValueError(f"block_bytes is {block_bytes}: it must be at least 1")
    sizes = np.atleast_1d(np.asarray(num_bytes, dtype=object))
    counts = [int(size) // int(block_bytes) for size in sizes]
    if min(counts) < 0:
        raise ValueError(f"num_bytes is {min(sizes)}: it must be >= 0")
    if max(counts) > checks.INT32_MAX:
        least = -(-int(max(sizes)) // checks.INT32_MAX)
        raise ValueError(
            f"block_bytes is {block_bytes}: {max(counts)} blocks exceed 2^31-1, take at least {least}"
        )
    return np.asarray(counts, np.int32).reshape(np.shape(num_bytes))


def partition(
    capacity: float, attention: ArrayLike, level_of: ArrayLike, num_levels: int = 3
) -> jax.Array:
    """Divide a capacity over the model's levels (feature extraction, middle, output) by attention.

    Args:
      capacity: [] > 0, in any unit.
      attention: [L] importance of each layer, >= 0.
      level_of: [L] int in 0..num_levels-1, rising: the level that each layer belongs to.
      num_levels: 3 in the source.

    Returns:
      [num_levels] amounts that sum to capacity, in proportion to the levels' attention (METHOD
      section 1, second source); equal where there is none at all.
    """
    checks.positive("capacity", capacity)
    checks.rank("attention", attention, 1, "[L]")
    checks.non_empty("attention", attention)
    checks.non_negative("attention", attention)
    checks.same_length("level_of", level_of, "attention", attention)
    checks.index_below("level_of", level_of, num_levels)
    level_of = jnp.asarray(level_of)
    mass = jax.ops.segment_sum(jnp.asarray(attention, jnp.float32), level_of, num_levels)
    present = jax.ops.segment_sum(jnp.ones_like(level_of, jnp.float32), level_of, num_levels)
    mass = jnp.where(jnp.sum(mass) > 0, mass, present)
    return capacity * mass / jnp.sum(mass)


def thirds(num_layers: int) -> np.ndarray:
    """level_of [L] that cuts the layers into feature extraction, middle and output."""
    if num_layers < 3:
        raise ValueError(f"num_layers is {num_layers}: three levels need at least 3 layers")
    return (np.arange(num_layers) * 3 // num_layers).astype(np.int32)
