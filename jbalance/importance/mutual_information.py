"""Mutual information of a binned feature with the target: its relevance."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike

from jbalance.importance import _samples


def mutual_information(
    x: ArrayLike, y: ArrayLike, *, num_classes: int | None = None, bins: int = 16
) -> jax.Array:
    """Share of the target's entropy that each binned feature explains: I(bin(x); y) / H(y).

    I = H(bin) + H(y) - H(bin, y) over bins of equal width between the feature's extremes. The
    estimate is biased upwards by about (bins - 1)(C - 1) / 2B nats: keep bins · C well below B.

    Args:
      x: [B, N] features.
      y: [B] int labels in 0..C-1.
      num_classes: C, static; read from y where y is concrete.
      bins: static.

    Returns:
      [N] float32 in 0..1; 0 for a constant feature or a single class.

    Raises:
      ValueError: shapes that do not fit, x not finite, y outside 0..C-1 or traced without C.

    Reference: Theil's uncertainty coefficient; Cover and Thomas, Elements of Information Theory.
    """
    x, y, num_classes = _samples.samples(x, y, num_classes)
    joint = _samples.histogram(x, y, bins=bins, num_classes=num_classes)
    h_bin = _samples.entropy_nats(joint.sum(axis=2))
    h_y = _samples.entropy_nats(joint.sum(axis=1))
    shared = h_bin + h_y - _samples.entropy_nats(joint, axis=(1, 2))
    return _samples.ratio(shared, h_y)
