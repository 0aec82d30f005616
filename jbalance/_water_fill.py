"""Water-filling: proportional sharing with floors and caps (weighted max-min fairness)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jbalance import _axes, checks
from jbalance import _search as search
from jbalance.types import Binding, Fill, Status

# Weight of units that are at their caps whatever the level, the open ones' being 1.
_FULL = 2.0**100
_LAST = 2.0**-60  # of the largest weight: what the weightless of a segment count
_MISSED = 1e-4  # relative: sums that are further off their budget are no rounding
_ROUNDING = 1e-6  # relative: floors whose float32 sum meets the budget are not above it


def water_fill(
    w: ArrayLike,
    budget: ArrayLike,
    floor: ArrayLike = 0.0,
    cap: ArrayLike = jnp.inf,
    *,
    segment_of: ArrayLike | None = None,
    segment_floor: ArrayLike | None = None,
    segment_cap: ArrayLike | None = None,
    axis_name: str | None = None,
) -> Fill:
    """Share a budget in proportion to w, within floor and cap: b_i = clip(mu w_i, floor_i, cap_i).

    The one water level mu with sum b_i = budget is found by a search on its bits (METHOD section 4).
    Segments (groups of units, devices) may have a floor and a cap on their sum: one that would fall
    below its floor is lifted to the level that reaches it, one that would exceed its cap is held down,
    and the rest share what remains at the common level. A unit of zero weight gets its floor, unless all
    weights are zero, or all of a segment that has a floor: then all count alike. A weight below 2^-90 of
    the largest counts as zero, until all larger ones are at their caps. Differentiable in w, budget,
    floor and cap.

    Args:
      w: [U] importance, >= 0.
      budget: [] amount to share, > 0, in any unit.
      floor: [U] or [] least amount of a unit, in the budget's unit.
      cap: [U] or [] greatest amount of a unit.
      segment_of: [U] int in 0..P-1, the segment of each unit.
      segment_floor: [P] least sum of a segment.
      segment_cap: [P] greatest sum of a segment; this or segment_floor must be given with segment_of.
      axis_name: mesh axis that the units are split over; the sums become psum.

    Returns:
      A `Fill`; its sum meets the budget to float32 rounding. Under jit, floors that do not fit give
      status INFEASIBLE, and are themselves scaled down to fit; bad values give INVALID, and so do
      segments whose weights are so far apart that a sum misses its bound.

    Raises:
      ValueError: wrong shapes; w, budget, floor or cap negative or NaN; a floor above its cap; floors
        that exceed the budget or a segment's cap, with the amount missing; weights of segments too far
        apart.

    Reference: Bertsekas and Gallager, Data Networks (1992), section 6.5.2 (max-min fairness).
    """
    w, budget, floor, cap, segment_of, segment_floor, segment_cap = _checked(
        w, budget, floor, cap, segment_of, segment_floor, segment_cap
    )
    bounds = segment_cap if segment_floor is None else segment_floor
    num_segments = 1 if bounds is None else np.shape(bounds)[0]
    out = _solve(
        w, budget, floor, cap, segment_of, segment_floor, segment_cap, num_segments, axis_name
    )
    if checks.is_concrete(out.status) and out.status == Status.INVALID:
        raise ValueError(
            f"w spans {np.min(w, initial=np.inf, where=np.asarray(w) > 0):g} to {np.max(w):g} over "
            f"segments with bounds: weights must be within 2^90 of each other there"
        )
    if checks.is_concrete(out.status) and out.status != Status.OK:
        _raise_infeasible(w, budget, floor, cap, segment_of, segment_floor, segment_cap)
    return out


def _checked(w, budget, floor, cap, segment_of, segment_floor, segment_cap):
    """The arguments in float32 and int32; ValueError for what does not fit."""
    _axes.unsplit_otherwise(w=w, floor=floor, cap=cap, segment_of=segment_of)
    checks.rank("w", w, 1, "[U]")
    checks.non_empty("w", w)
    w = checks.non_negative("w", w)
    checks.rank("budget", budget, 0, "[]")
    budget = checks.positive("budget", budget)
    for name, x in (("floor", floor), ("cap", cap)):
        checks.rank(name, x, (0, 1), "[] or [U]")
        if np.ndim(x):
            checks.same_length(name, x, "w", w)
    low, high = checks.non_negative("floor", floor), checks.in_range("cap", cap, 0, np.inf)
    checks.not_above("floor", floor, "cap", cap)
    floor, cap = low, high
    if segment_of is None:
        if segment_floor is not None or segment_cap is not None:
            raise ValueError("segment_floor and segment_cap need segment_of, which is None")
        return w, budget, floor, cap, None, None, None
    checks.rank("segment_of", segment_of, 1, "[U]")
    checks.same_length("segment_of", segment_of, "w", w)
    bounds = [("segment_floor", segment_floor), ("segment_cap", segment_cap)]
    given = {name: x for name, x in bounds if x is not None}
    if not given:
        raise ValueError("segment_of is given, but neither segment_floor nor segment_cap: give one")
    for name, x in given.items():
        checks.rank(name, x, 1, "[P]")
        given[name] = checks.in_range(name, x, 0, np.inf)
        segment_of = checks.index_below("segment_of", segment_of, np.shape(x)[0])
    if len(given) == 2:
        checks.same_length("segment_floor", segment_floor, "segment_cap", segment_cap)
        checks.not_above("segment_floor", segment_floor, "segment_cap", segment_cap)
    return w, budget, floor, cap, segment_of, *(given.get(name) for name, _ in bounds)


@functools.partial(jax.jit, static_argnames=("num_segments", "axis_name"))
def _solve(w, budget, floor, cap, segment_of, segment_floor, segment_cap, num_segments, axis_name):
    w, budget = jnp.asarray(w, jnp.float32), jnp.asarray(budget, jnp.float32)
    segment_of = None if segment_of is None else jnp.asarray(segment_of)
    # Scalars stay scalars: the passes then read w alone. Behind a barrier, or XLA would spend seconds
    # on folding sums of constants as long as w.
    floor, cap = lax.optimization_barrier(tuple(jnp.asarray(x, jnp.float32) for x in (floor, cap)))

    def bound(x, default):
        return jnp.full((num_segments,), default) if x is None else jnp.asarray(x, jnp.float32)

    seg_floor, seg_cap = bound(segment_floor, 0.0), bound(segment_cap, jnp.inf)

    def sums(x: jax.Array) -> jax.Array:
        x = jnp.broadcast_to(x, w.shape)
        return search.psum(search.segment_total(x, segment_of, num_segments), axis_name)

    # No comparison holds of NaN; what is negative or infinite fails one of these.
    valid = jnp.all((w >= 0) & (w < jnp.inf) & (floor >= 0) & (floor < jnp.inf) & (cap >= floor))
    valid = search.psum((~valid).astype(jnp.int32), axis_name) == 0
    valid &= (budget > 0) & (budget < jnp.inf)
    infeasible = (
        (jnp.sum(jnp.maximum(sums(floor), seg_floor)) > budget * (1 + _ROUNDING))
        | jnp.any(sums(floor) > seg_cap * (1 + _ROUNDING))
        | jnp.any(sums(cap) < seg_floor * (1 - _ROUNDING))
    )
    # Floors that do not fit are shared out like a demand: in proportion, never more than asked.
    w, floor, cap = (
        jnp.where(infeasible, floor, w),
        jnp.where(infeasible, 0.0, floor),
        jnp.where(infeasible, floor, cap),
    )
    seg_floor = jnp.where(infeasible, 0.0, seg_floor)

    def short(threshold: jax.Array) -> jax.Array:
        full = sums(jnp.where(fixed >= threshold, lax.stop_gradient(cap), lax.stop_gradient(floor)))
        return jnp.sum(jnp.clip(full, *map(lax.stop_gradient, (seg_floor, seg_cap)))) < budget

    fixed = lax.stop_gradient(w)
    top = search.open_top(
        fixed, short, lambda x: search.segment_most(x, None, 1, axis_name)[0], lambda x: x
    )
    w, exponent = search.normalize(w, top)
    w = jnp.minimum(w, _FULL)
    if segment_of is not None:
        # Units of a segment without any weight count alike where the segment must have something.
        weightless = search.per_unit((sums(fixed) == 0) & (seg_floor > 0), segment_of)
        w = jnp.where(weightless, _LAST, w)
    problem = (w, budget, floor, cap, seg_floor, seg_cap)
    level, low, high = _levels(jax.tree.map(lax.stop_gradient, problem), sums, segment_of)
    out = _exact(problem, level, low, high, sums, segment_of)
    valid &= out.pop("met") | infeasible
    status = jnp.where(infeasible, Status.INFEASIBLE, Status.OK).astype(jnp.int32)
    for name in ("level", "segment_level"):
        out[name] = search.scale(out[name], exponent)
    return Fill(**out, status=jnp.where(valid, status, jnp.int32(Status.INVALID)))


def _levels(problem, sums, segment_of):
    """Common water level [], and the levels [P] between which each segment must stay."""
    w, budget, floor, cap, seg_floor, seg_cap = problem

    def poured(key: jax.Array) -> jax.Array:
        level = search.per_unit(search.from_key(key), segment_of)
        return sums(jnp.clip(w * level, floor, cap))

    def reach(target: jax.Array) -> jax.Array:
        return search.largest(lambda key: poured(key) - target, search.INF_KEY, target.shape)

    if segment_of is None:
        key = reach(budget[None])[0]
        zero = jnp.zeros(seg_floor.shape, jnp.uint32)
        return tuple(map(search.from_key, (key, zero, zero + search.INF_KEY)))
    low = jnp.where(seg_floor > 0, reach(seg_floor), 0)
    high = jnp.where(seg_cap < jnp.inf, jnp.maximum(low, reach(seg_cap)), search.INF_KEY)

    def over(key: jax.Array) -> jax.Array:
        return jnp.sum(poured(jnp.clip(key, low, high))) - budget

    return tuple(map(search.from_key, (search.largest(over, search.INF_KEY, ()), low, high)))


def _exact(problem, level, low, high, sums, segment_of):
    """Amounts that meet the budget: which bounds bind is known now, so the level is a quotient.

    This is also what carries the gradient: the search fixes the set of free units, on which the
    solution is a smooth function of the input.
    """
    w, budget, floor, cap, seg_floor, seg_cap = problem
    seg_level = jnp.clip(level, low, high)
    poured = w * search.per_unit(seg_level, segment_of)
    free = (poured > floor) & (poured < cap)
    at_cap = ~free & (poured >= cap)
    clipped = sums(jnp.where(free, 0.0, jnp.where(at_cap, cap, floor)))
    free_weight = sums(jnp.where(free, w, 0.0))

    lifted, capped = level < low, level > high
    bounded = lifted | capped
    target = jnp.where(lifted, seg_floor, jnp.where(capped, seg_cap, 0.0))
    rest = budget - jnp.sum(jnp.where(bounded, target, clipped))
    common_weight = jnp.sum(jnp.where(bounded, 0.0, free_weight))
    common = jnp.where(
        common_weight > 0, rest / jnp.where(common_weight > 0, common_weight, 1), level
    )
    alone = (target - clipped) / jnp.where(free_weight > 0, free_weight, 1)
    seg_level = jnp.where(bounded & (free_weight > 0), alone, jnp.where(bounded, seg_level, common))

    unit_level = search.per_unit(seg_level, segment_of)
    amount = jnp.where(free, w * unit_level, jnp.where(at_cap, cap, floor))
    amount = jnp.clip(amount, floor, cap)
    by_segment = sums(amount)
    given = jnp.sum(by_segment)
    stuck = search.per_unit(capped, segment_of)
    binding = jnp.where(
        free,
        jnp.where(stuck, Binding.DEVICE, Binding.PRICE),
        jnp.where(at_cap, Binding.CAP, Binding.FLOOR),
    )
    none_free = jnp.sum(free_weight) == 0
    slack = jnp.where(none_free, jnp.maximum(budget - given, 0.0), 0.0)
    met = jnp.abs(given + slack - budget) <= _MISSED * budget
    met &= jnp.all(by_segment >= seg_floor * (1 - _MISSED))
    return {
        "met": met,
        "amount": amount,
        "level": common,
        "segment_level": seg_level,
        "binding": binding.astype(jnp.int32),
        "slack": slack,
    }


def _raise_infeasible(w, budget, floor, cap, segment_of, segment_floor, segment_cap) -> None:
    """The message for concrete floors that do not fit: which bound, and by how much."""
    floor, cap = (np.broadcast_to(np.asarray(x, np.float64), np.shape(w)) for x in (floor, cap))
    segment_of = np.zeros(floor.shape, int) if segment_of is None else np.asarray(segment_of)
    size = segment_of.max() + 1
    if segment_floor is not None or segment_cap is not None:
        size = np.shape(segment_cap if segment_floor is None else segment_floor)[0]
    least, most = (np.bincount(segment_of, x, size) for x in (floor, cap))
    required = least if segment_floor is None else np.maximum(least, segment_floor)
    budget = float(budget)
    for p in range(size):
        if segment_cap is not None and least[p] > segment_cap[p]:
            raise ValueError(
                f"floor: the floors of segment {p} sum to {least[p]:g}, above segment_cap[{p}] = "
                f"{float(segment_cap[p]):g}: {least[p] - float(segment_cap[p]):g} is missing"
            )
        if segment_floor is not None and most[p] < segment_floor[p]:
            raise ValueError(
                f"segment_floor[{p}] is {float(segment_floor[p]):g}, but the caps of its units sum "
                f"to {most[p]:g}: lower it by {float(segment_floor[p]) - most[p]:g} or raise cap"
            )
    raise ValueError(
        f"floor: the floors sum to {required.sum():g}, above budget = {budget:g}: "
        f"{required.sum() - budget:g} is missing"
    )
