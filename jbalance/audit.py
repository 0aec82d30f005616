"""Demographic parity of attention and errors over groups of units."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jbalance import _axes, checks
from jbalance.types import container


@container
class GroupAudit:
    """How P groups of units fare: attention, and errors where there are any."""

    count: jax.Array  # [P] units
    attention: jax.Array  # [P] float32 part of all attention
    parity: jax.Array  # [P] attention over the group's part of the units; 0 for empty groups
    least_parity: jax.Array  # [] of the groups that have units
    error: jax.Array  # [P] float32 mean error of a unit; 0 for empty groups or without errors
    error_gap: jax.Array  # [] between the groups of most and of least error


def by_group(
    attention: ArrayLike,
    group_of: ArrayLike,
    num_groups: int,
    error: ArrayLike | None = None,
    *,
    axis_name: str | None = None,
) -> GroupAudit:
    """Attention and error per group; `shares.constrained(group_floor=)` is the cure.

    Args:
      attention: [U] >= 0, what each unit got: shares, whole amounts, or attention weights.
      group_of: [U] int in 0..P-1.
      num_groups: P.
      error: [U] of each unit's predictions, finite; None where there are none.
      axis_name: mesh axis that the units are split over.

    Returns:
      `GroupAudit`. A parity of 1 is attention in proportion to the group's size; the ratio of the
      groups' is what demographic parity asks about.

    Raises:
      ValueError: shapes that do not fit, negative attention, an error that is not finite, a group that
        there is not.
    """
    _axes.unsplit(attention=attention, group_of=group_of, error=error)
    checks.rank("attention", attention, 1, "[U]")
    attention = checks.non_negative("attention", attention)
    checks.rank("group_of", group_of, 1, "[U]")
    checks.same_length("group_of", group_of, "attention", attention)
    num_groups = checks.static_int("num_groups", num_groups, 1)
    group_of = checks.index_below("group_of", group_of, num_groups)
    if error is not None:
        checks.rank("error", error, 1, "[U]")
        checks.same_length("error", error, "attention", attention)
        error = checks.finite("error", error)
    attention = jnp.asarray(attention, jnp.float32)
    error = jnp.zeros_like(attention) if error is None else jnp.asarray(error, jnp.float32)
    columns = jnp.stack([jnp.ones_like(attention), attention, error], axis=1)
    sums = jax.ops.segment_sum(columns, jnp.asarray(group_of), num_groups)
    sums = sums if axis_name is None else lax.psum(sums, axis_name)
    count, attended, errors = sums.T
    present, of_all = count > 0, jnp.maximum(jnp.sum(attended), jnp.finfo(jnp.float32).tiny)
    share = attended / of_all
    parity = jnp.where(present, share * jnp.sum(count) / jnp.maximum(count, 1), 0)
    mean = jnp.where(present, errors / jnp.maximum(count, 1), 0)
    largest, smallest = (
        jnp.max(jnp.where(present, mean, -jnp.inf)),
        jnp.min(jnp.where(present, mean, jnp.inf)),
    )
    return GroupAudit(
        count.astype(jnp.int32),
        share,
        parity,
        jnp.min(jnp.where(present, parity, jnp.inf)),
        mean,
        largest - smallest,
    )
