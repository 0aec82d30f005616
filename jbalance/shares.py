"""alpha: who gets which fraction (METHOD step 3). Shares are >= 0 and sum to one."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jbalance import _axes, checks
from jbalance import _search as search
from jbalance._water_fill import water_fill
from jbalance.types import ShareRule, Status

_ROUNDING = 1e-5  # of sums of shares


def uniform(num_units: int) -> jax.Array:
    """alpha_i = 1 / N: the start where nothing is known.

    Raises:
      ValueError: num_units below 1.
    """
    num_units = checks.static_int("num_units", num_units, 1)
    return jnp.full((num_units,), 1.0 / num_units, jnp.float32)


def proportional(
    w: ArrayLike, *, where: ArrayLike | None = None, axis_name: str | None = None
) -> jax.Array:
    """alpha_i = w_i / sum_j w_j; equal shares where all w are zero.

    Args:
      w: [U] importance, >= 0.
      where: [U] bool, the units that there are; the others get 0. None for all.
      axis_name: mesh axis that the units are split over.

    Returns:
      alpha [U] float32; NaN for a traced w that is negative or not finite.

    Raises:
      ValueError: w empty, not [U], negative or NaN.
    """
    _check(w)
    w = jnp.asarray(checks.non_negative("w", w))
    if where is not None:
        where = jnp.asarray(checks.booleans("where", where, w.shape, "[U]"))
    return _proportional(w, where, axis_name)


@functools.partial(jax.jit, static_argnames="axis_name")
def _proportional(w, where, axis_name):
    w = _only(where, jnp.where((w >= 0) & jnp.isfinite(w), w, jnp.nan), 0.0)
    w, _ = search.normalize(w, _max(lax.stop_gradient(w), axis_name))
    w = _only(where, w, 0.0)
    return w / search.psum(jnp.sum(w), axis_name)


def softmax(
    w: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    where: ArrayLike | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """alpha_i = exp(w_i / tau) / sum_j exp(w_j / tau): the maximizer of alpha . w + tau H(alpha).

    tau -> 0 recovers the one-hot vector that maximizes alpha . w alone (METHOD section 3).

    Args:
      w: [U] importance, finite, of any sign.
      temperature: tau > 0.
      where: [U] bool, the units that there are; the others get 0. None for all.
      axis_name: mesh axis that the units are split over.

    Returns:
      alpha [U] float32.

    Raises:
      ValueError: w empty, not [U] or not finite; temperature not above 0.
    """
    _check(w)
    w = checks.finite("w", w)
    checks.rank("temperature", temperature, 0, "[]")
    temperature = checks.positive("temperature", temperature)
    logits = _only(where, jnp.asarray(w, jnp.float32) / temperature, -jnp.inf)
    weight = jnp.exp(logits - _max(lax.stop_gradient(logits), axis_name))
    return weight / search.psum(jnp.sum(weight), axis_name)


def constrained(
    alpha: ArrayLike,
    *,
    floor: ArrayLike = 0.0,
    cap: ArrayLike = 1.0,
    group_of: ArrayLike | None = None,
    group_floor: ArrayLike | None = None,
    axis_name: str | None = None,
    with_status: bool = False,
) -> Any:
    """The shares in proportion to alpha that keep floors, caps and group floors.

    alpha'_i = clip(mu_g alpha_i, floor_i, cap_i) with sum 1 and sum over group g >= phi_g: groups that
    would get less than phi_g are lifted to it, the rest share what remains (METHOD section 4).

    Args:
      alpha: [U] >= 0, from any rule.
      floor: [U] or [] least share of a unit, in 0..1.
      cap: [U] or [] greatest share of a unit, in 0..1.
      group_of: [U] int, the group of each unit; a group of floor 0 for those in none.
      group_floor: [P] phi, least share of each group.
      axis_name: mesh axis that the units are split over.
      with_status: static; whether to return a `Status` too, which under jit says what cannot be raised.

    Returns:
      alpha' [U] float32; with a status, (alpha', [] int32). Traced floors that sum to more than 1 are
      INFEASIBLE and scaled down to fit, traced caps that sum to less are INFEASIBLE and leave shares of
      less than 1 in all, NaN is INVALID.

    Raises:
      ValueError: floors that sum to more than 1 or caps to less, each with the amount missing (also
        under jit, where they are no tracers); a group floor above what its units' caps allow.
    """
    _check(alpha, "alpha")
    alpha = checks.non_negative("alpha", alpha)
    for name, x in (("floor", floor), ("cap", cap)):
        checks.rank(name, x, (0, 1), "[] or [U]")
        if np.ndim(x):
            checks.same_length(name, x, "alpha", alpha)
    floor, cap = checks.in_range("floor", floor, 0, 1), checks.in_range("cap", cap, 0, 1)
    if (group_of is None) != (group_floor is None):
        missing, given = ("group_of", "group_floor")[:: 1 if group_of is None else -1]
        raise ValueError(f"{missing} is None, but {given} is given: give both")
    if group_floor is not None:
        _axes.unsplit(alpha=alpha, group_of=group_of, group_floor=group_floor)
        checks.rank("group_of", group_of, 1, "[U]")
        checks.same_length("group_of", group_of, "alpha", alpha)
        checks.rank("group_floor", group_floor, 1, "[P]")
        checks.non_empty("group_floor", group_floor)
        group_floor = checks.in_range("group_floor", group_floor, 0, 1)
        group_of = checks.index_below("group_of", group_of, np.shape(group_floor)[0])
    if axis_name is None:
        _check_sums(np.shape(alpha), floor, cap)
    groups = {"segment_of": group_of, "segment_floor": group_floor}
    try:
        out = water_fill(alpha, 1.0, floor, cap, **groups, axis_name=axis_name)
    except ValueError:
        if group_floor is not None and checks.is_concrete(floor, cap, group_of, group_floor):
            # In the caller's words.
            _check_group_floors(np.shape(alpha), floor, cap, group_of, group_floor)
        raise
    if not with_status:
        return out.amount
    short = (out.slack > _ROUNDING) & (out.status == Status.OK)
    return out.amount, jnp.where(short, jnp.int32(Status.INFEASIBLE), out.status)


def _check_sums(shape: tuple[int, ...], floor: Any, cap: Any) -> None:
    """ValueError for concrete floors [U] or [] that sum to more than 1, or caps to less."""
    if checks.is_concrete(floor):
        least = float(np.broadcast_to(np.asarray(floor, np.float64), shape).sum())
        if least > 1 + _ROUNDING:
            raise ValueError(
                f"floor: the floors sum to {least:g}, above budget = 1: {least - 1:g} is missing"
            )
    if checks.is_concrete(cap):
        most = float(np.broadcast_to(np.asarray(cap, np.float64), shape).sum())
        if most < 1 - _ROUNDING:
            raise ValueError(
                f"cap: the caps let only {most:g} of the whole be shared out: raise them by "
                f"{1 - most:g} in sum"
            )


def _check_group_floors(
    shape: tuple[int, ...], floor: Any, cap: Any, group_of: Any, group_floor: Any
) -> None:
    """ValueError for group floors [P] that their units' caps, or the whole, cannot hold."""
    wanted = np.asarray(group_floor, np.float64)
    least, most = (
        np.bincount(
            np.asarray(group_of), np.broadcast_to(np.asarray(x, np.float64), shape), wanted.size
        )
        for x in (floor, cap)
    )
    for group in np.flatnonzero(wanted > most):
        raise ValueError(
            f"group_floor[{group}] is {wanted[group]:g}, but the caps of its units (group_of == "
            f"{group}) sum to {most[group]:g}: lower it by {wanted[group] - most[group]:g} or raise cap"
        )
    required = np.maximum(least, wanted).sum()
    if required > 1:
        raise ValueError(
            f"group_floor: with those of units that ask for more, the floors sum to {required:g}, "
            f"above the whole: {required - 1:g} is missing"
        )


def priced(curves: ArrayLike, amount: ArrayLike, *, axis_name: str | None = None) -> jax.Array:
    """alpha of owners who all take what is worth at least one price, at which they take `amount`.

    The ladder (METHOD section 4) where the steps are many, alike in cost, and counted by what they
    are worth: a layer's tiles, a head's tokens. Within the half octave of the price each owner takes
    the same part of its own.

    Args:
      curves: [U, M] >= 0, `importance.worth_curve` of each owner.
      amount: [] >= 0, of all together; shares are as of all there is where there is less.
      axis_name: mesh axis that the owners are split over.

    Returns:
      alpha [U] float32; equal shares where the curves are empty.

    Raises:
      ValueError: curves not [U, M], negative or NaN; a negative amount.
    """
    _axes.unsplit(curves=curves)
    checks.rank("curves", curves, 2, "[U, M]")
    checks.non_empty("curves", curves)
    curves = checks.non_negative("curves", curves)
    checks.rank("amount", amount, 0, "[]")
    amount = checks.non_negative("amount", amount)
    return proportional(_taken(curves, amount, axis_name), axis_name=axis_name)


@functools.partial(jax.jit, static_argnames="axis_name")
def _taken(curves, amount, axis_name):
    """[U]: how many each owner takes at the price at which all together take `amount`."""
    # [U, M]: how many are worth at least each bin's lower end.
    above = jnp.cumsum(jnp.asarray(curves, jnp.float32)[:, ::-1], axis=1)[:, ::-1]
    above = jnp.pad(above, ((0, 0), (0, 1)))
    total = search.psum(jnp.sum(above, axis=0), axis_name)  # [M + 1], falling to 0
    last = total.size - 1
    price_bin = jnp.clip(jnp.sum(total > amount) - 1, 0, last - 1)  # the bin of the price
    in_bin = total[price_bin] - total[price_bin + 1]
    part = (amount - total[price_bin + 1]) / jnp.where(in_bin > 0, in_bin, 1)
    part = jnp.clip(part, 0, 1)
    return above[:, price_bin + 1] + part * (above[:, price_bin] - above[:, price_bin + 1])


def _uniform_like(
    w: jax.Array, *, where: ArrayLike | None = None, axis_name: str | None = None
) -> jax.Array:
    """The uniform start as a rule of w, of which it takes the number of units only."""
    ones = _only(where, jnp.ones(w.shape, jnp.float32), 0.0)
    if where is not None:
        return ones / search.psum(jnp.sum(ones), axis_name)
    return ones / (w.shape[0] * (1 if axis_name is None else lax.axis_size(axis_name)))


def _only(where: ArrayLike | None, x: jax.Array, other: float) -> jax.Array:
    """x where there is a unit, `other` elsewhere."""
    if where is None:
        return x
    return jnp.where(jnp.asarray(checks.booleans("where", where, x.shape, "[U]")), x, other)


def _check(w: Any, name: str = "w") -> None:
    checks.rank(name, w, 1, "[U]")
    checks.non_empty(name, w)


def _max(x: jax.Array, axis_name: str | None) -> jax.Array:
    top = jnp.max(x)
    return top if axis_name is None else lax.pmax(top, axis_name)


SHARE_RULES: dict[str, ShareRule] = {
    "proportional": proportional,
    "softmax": softmax,
    "uniform": _uniform_like,
}
