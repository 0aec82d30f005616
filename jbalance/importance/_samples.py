"""What the feature scores share: checked samples and labels, bins and counts."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbalance import _axes, checks

# That labels are taken to mean by themselves: names of classes in their place would fill the memory.
_MOST_CLASSES = 2**20
Samples = tuple[Any, jax.Array, int]


def samples(x: ArrayLike, y: ArrayLike, num_classes: int | None) -> Samples:
    """Checked x [B, N], y [B] int32 and the number of classes C.

    Features of the host stay there as int64 or float64 until they are moved and scaled: timestamps
    differ by less than float32 can tell.
    C is read from y where it has a value, up to 2^20; under jit it is a shape, and must be said.
    """
    _axes.unsplit(x=x, y=y)
    checks.rank("x", x, 2, "[B, N]")
    checks.rank("y", y, 1, "[B]")
    checks.same_length("y", y, "x", x)
    checks.non_empty("x", x)
    if checks.is_concrete(x) and not isinstance(x, jax.Array):
        x = checks.host_numbers("x", x)
    else:
        x = jnp.asarray(checks.finite("x", x))
    if num_classes is None:
        if not checks.is_concrete(y):
            raise ValueError("num_classes is None but y is traced: give the number of classes")
        num_classes = int(np.max(checks.index_below("y", y, _MOST_CLASSES))) + 1
    num_classes = checks.static_int("num_classes", num_classes, 1)
    y = checks.index_below("y", y, num_classes)
    return x, jnp.asarray(y, jnp.int32), num_classes


def unit_interval(x: Any) -> jax.Array:
    """x [B, N] with every feature moved and scaled to 0..1, float32; a constant feature to 0."""
    if isinstance(x, np.ndarray) and x.dtype == np.int64:  # differences below 2^64 are exact
        x = (x.view(np.uint64) - x.min(axis=0).view(np.uint64)).astype(np.float64)
    np_: Any = np if isinstance(x, np.ndarray) else jnp
    half = 0.5 * x  # whose span is finite too
    low = half.min(axis=0)
    span = half.max(axis=0) - low
    unit = np_.where(span > 0, (half - low) / np_.where(span > 0, span, 1.0), 0.0)
    return jnp.asarray(unit, jnp.float32)


def centered(x: Any) -> jax.Array:
    """x [B, N] scaled to a span of 1 per feature and moved to mean 0; a constant feature is 0."""
    unit = unit_interval(x)
    return unit - unit.mean(axis=0)


def per_class(values: jax.Array, y: jax.Array, num_classes: int) -> jax.Array:
    """Sums of values [B, ...] over the samples of each class, [C, ...]."""
    return jax.ops.segment_sum(values, y, num_segments=num_classes)


def histogram(x: Any, y: jax.Array, *, bins: int, num_classes: int) -> jax.Array:
    """Samples by feature, bin of equal width and class, [N, bins, C] float32."""
    bins = checks.static_int("bins", bins, 1)
    return _counted(unit_interval(x), y, bins, num_classes)


@functools.partial(jax.jit, static_argnames=("bins", "num_classes"))
def _counted(unit, y, bins, num_classes):
    """`histogram` of features within 0..1."""
    index = jnp.minimum(jnp.floor(unit * bins).astype(jnp.int32), bins - 1)
    feature = jnp.arange(unit.shape[1])
    counts = jnp.zeros((unit.shape[1], bins, num_classes), jnp.float32)
    return counts.at[feature, index, y[:, None]].add(1.0, mode="drop")


@functools.partial(jax.jit, static_argnames="axis")
def entropy_nats(counts: jax.Array, axis: int | tuple[int, ...] = -1) -> jax.Array:
    """-Σ p log p of counts along `axis`, with 0 log 0 = 0; 0 where all counts are 0."""
    total = counts.sum(axis=axis, keepdims=True)
    p = counts / jnp.where(total > 0, total, 1.0)
    return -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1.0)), axis=axis)


@jax.jit
def ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """numerator / denominator within 0..1, and 0 where the denominator is 0."""
    safe = jnp.where(denominator > 0, denominator, 1.0)
    return jnp.where(denominator > 0, jnp.clip(numerator / safe, 0.0, 1.0), 0.0)
