"""C: what attention costs, and what each device has left (METHOD step 2).

Bytes are Python or NumPy integers on the host, where they are exact at any size. Inside jit they are
counted in blocks (entries, pages): `blocks` converts, and says what the rounding leaves over.
"""

from __future__ import annotations

import dataclasses
import fractions
import re
import reprlib
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
    Whole numbers of the host, such as bytes, stay whole: the sums are NumPy's int64, exact. Other
    numbers of the host are summed in float64, traced ones in float32.

    Args:
      capacity: [] or [G], what each device has, in any unit.
      demand: [N] c, what each unit needs, in the same unit.
      used: [N] c', what each unit uses now. Available may be negative: units may use too much.
      device_of: [N] int, the device of each unit; None with one device.

    Returns:
      `Resources` of the shape of capacity, and the totals.

    Raises:
      ValueError: capacity <= 0, demand or used negative or NaN, wrong shapes, whole numbers whose sum
        is above 2^62.
    """
    checks.rank("capacity", capacity, (0, 1), "[] or [G]")
    checks.non_empty("capacity", capacity)
    numbers = [checks.positive("capacity", capacity)]
    shape, given = np.shape(capacity), {"demand": demand, "used": used}
    for name, x in given.items():
        checks.rank(name, x, 1, "[N]")
    checks.same_length("used", used, "demand", demand)
    if device_of is None:
        if shape:
            raise ValueError(
                f"device_of is None, but capacity has {shape[0]} devices: say which unit is where, "
                f"or give one capacity"
            )
        device_of = np.zeros(np.shape(demand)[0], np.int32)
    checks.rank("device_of", device_of, 1, "[N]")
    checks.same_length("device_of", device_of, "demand", demand)
    device_of = checks.index_below("device_of", device_of, shape[0] if shape else 1)
    numbers += [checks.non_negative(name, x) for name, x in given.items()]
    if not checks.is_concrete(capacity, demand, used, device_of):
        return _left(jnp, [jnp.asarray(x) for x in numbers], device_of, shape)
    numbers = [checks.host_numbers(n, x) for n, x in ({"capacity": capacity} | given).items()]
    total = sum(np.sum(x, dtype=float) for x in numbers)
    if total > 2.0**62:
        raise ValueError(
            f"capacity, demand and used are {total:g} in sum: at most 2^62 are summed exactly, count in "
            f"larger units"
        )
    return _left(np, numbers, np.asarray(device_of), shape)


def _left(np_, numbers, device_of, shape) -> Resources:
    """`Resources` of capacity, demand and used, by NumPy or by jax.numpy."""
    capacity, demand, used = numbers

    def on_devices(x):
        if np_ is jnp:
            return jax.ops.segment_sum(x, device_of, capacity.size).reshape(shape)
        out = np.zeros(capacity.size, x.dtype)
        np.add.at(out, device_of, x)
        return out.reshape(shape)

    available = capacity - on_devices(used)
    remaining = capacity - on_devices(np_.minimum(demand, used))
    return Resources(available, remaining, np_.sum(available), np_.sum(remaining))


@dataclasses.dataclass(frozen=True)
class AttentionDims:
    """The dimensions of a decoder that attention's costs depend on (static, hashable)."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        checks.static_fields(self, *(field.name for field in dataclasses.fields(self)))
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

    >>> kv_entry_bytes(64, bits=4, scale_bits=16)
    68

    Args:
      head_dim: D.
      bits: per number; 2 D numbers.
      scale_bits: per vector, of the norms or scales that a quantized code needs; two vectors.

    Raises:
      ValueError: bits that are no whole number (codes of different widths have levels of their own), or
        an entry that is not a whole number of bytes.
    """
    head_dim = checks.static_int("head_dim", head_dim, 1)
    bits = checks.static_int("bits", bits, 1, 64)
    scale_bits = checks.static_int("scale_bits", scale_bits)
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
    checks.instance("dims", dims, AttentionDims)
    shape = (dims.num_layers, dims.num_kv_heads)
    given = {}
    for name, x in (("entries", entries), ("bits", bits)):
        checks.rank(name, x, (0, 2), "[] or [L, K]")
        if np.shape(x) not in ((), shape):
            raise ValueError(f"{name} has shape {np.shape(x)}: it must be [] or [L, K] = {shape}")
        number = dims.num_layers * dims.num_kv_heads
        given[name] = list(np.asarray(x, object).flat) if np.ndim(x) else [x] * number
    return sum(
        checks.static_int("entries", n, 0, None) * kv_entry_bytes(dims.head_dim, b, scale_bits)
        for n, b in zip(given["entries"], given["bits"], strict=True)
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
            f"bytes: {reprlib.repr(text)} is not an amount of memory: write a number and one of B, kB, "
            f"MB, GB, TB, KiB, MiB, GiB, TiB"
        )
    size = fractions.Fraction(match.group(1)) * _UNITS[unit]
    if size < 1 or size.denominator != 1:
        raise ValueError(
            f"bytes: {text!r} is {float(size):g} bytes: it must be a whole number >= 1"
        )
    return int(size)


def human_bytes(amount_bytes: float) -> str:
    """Bytes in the largest binary unit that keeps the figure at one or more: 1536 as `1.50 KiB`."""
    amount_bytes = checks.static_float("amount_bytes", amount_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount_bytes) < 1024 or unit == "GiB":
            break
        amount_bytes /= 1024
    return f"{amount_bytes:.2f}".removesuffix(".00") + f" {unit}"


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
    fraction = checks.static_float("fraction", fraction, 0, 1, open_low=True)
    part = fractions.Fraction(fraction)  # exact: bytes stay whole
    devices = checks.items("devices", devices, "devices")
    if given_bytes is not None:
        given_bytes = checks.items("given_bytes", given_bytes, "bytes of each device")
        if len(given_bytes) != len(devices):
            raise ValueError(
                f"given_bytes has {len(given_bytes)} budgets for {len(devices)} devices: give one each"
            )
        sizes = [
            checks.static_int(f"given_bytes[{d}]", size, 1, None)
            for d, size in enumerate(given_bytes)
        ]
        return [int(size * part) for size in sizes]
    budgets = []
    for d, device in enumerate(devices):
        checks.function(f"devices[{d}].memory_stats", getattr(device, "memory_stats", None))
        stats = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            raise ValueError(
                f"given_bytes is None, and {device} reports no memory statistics: give its budget"
            )
        free = int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
        budgets.append(int(free * part))
    return budgets


def blocks(num_bytes: int | Sequence[int], block_bytes: int) -> np.ndarray:
    """Whole blocks that fit into each amount of bytes, as int32 for use inside jit.

    Raises:
      ValueError: block_bytes below 1, or more than 2^31-1 blocks: take larger ones.
    """
    block_bytes = checks.static_int("block_bytes", block_bytes, 1, None)
    checks.rank("num_bytes", num_bytes, tuple(range(9)), "[] or [N]")
    checks.non_empty("num_bytes", num_bytes)
    sizes = [
        checks.static_int("num_bytes", size, 0, None)
        for size in checks.host_numbers("num_bytes", num_bytes).flat
    ]
    counts = [size // block_bytes for size in sizes]
    if max(counts) > checks.INT32_MAX:
        least = -(-max(sizes) // checks.INT32_MAX)
        raise ValueError(
            f"num_bytes is {max(sizes)}: {max(counts)} blocks of block_bytes = {block_bytes} exceed "
            f"2^31-1, take block_bytes of at least {least}"
        )
    return np.asarray(counts, np.int32).reshape(np.shape(num_bytes))


def partition(
    capacity: ArrayLike, attention: ArrayLike, level_of: ArrayLike, num_levels: int = 3
) -> jax.Array | np.ndarray:
    """Divide a capacity over the model's levels (feature extraction, middle, output) by attention.

    Args:
      capacity: [] > 0, in any unit.
      attention: [L] importance of each layer, >= 0.
      level_of: [L] int in 0..num_levels-1, rising: the level that each layer belongs to.
      num_levels: 3 in the source.

    Returns:
      [num_levels] amounts that sum to capacity, in proportion to the levels' attention (METHOD
      section 1, second source); equal where there is none at all. A capacity and attention of the host
      are divided in float64, by NumPy.
    """
    checks.rank("capacity", capacity, 0, "[]")
    checks.rank("attention", attention, 1, "[L]")
    checks.non_empty("attention", attention)
    checks.rank("level_of", level_of, 1, "[L]")
    checks.same_length("level_of", level_of, "attention", attention)
    num_levels = checks.static_int("num_levels", num_levels, 1)
    level_of = checks.index_below("level_of", level_of, num_levels)
    numbers = checks.positive("capacity", capacity), checks.non_negative("attention", attention)
    if not checks.is_concrete(capacity, attention, level_of):
        traced, present = (
            jax.ops.segment_sum(x, jnp.asarray(level_of), num_levels)
            for x in (jnp.asarray(numbers[1]), jnp.ones(np.shape(level_of)))
        )
        traced = jnp.where(jnp.sum(traced) > 0, traced, present)
        return numbers[0] * (traced / jnp.sum(traced))
    mass = np.bincount(np.asarray(level_of), np.asarray(attention, float), num_levels)
    if mass.sum() == 0:
        mass = np.bincount(np.asarray(level_of), minlength=num_levels).astype(float)
    return float(np.asarray(capacity)) * (mass / mass.sum())


def thirds(num_layers: int) -> np.ndarray:
    """level_of [L] that cuts the layers into feature extraction, middle and output."""
    hint = "three levels need at least 3 layers"
    num_layers = checks.static_int("num_layers", num_layers, 3, hint=hint)
    return (np.arange(num_layers) * 3 // num_layers).astype(np.int32)
