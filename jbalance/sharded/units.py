"""Importance, shares and amounts of units that are split over one axis of a mesh.

Each is the function of one device inside `shard_map`, on units that were filled up to a number that
divides by the devices with such as weigh and cost nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jbalance import allocate, checks, importance
from jbalance import shares as share_rules
from jbalance.allocate import _checks
from jbalance.sharded._layout import axis_size, cut, lay_out, padded, padding
from jbalance.types import Allocation, IntegerAllocation

# What the leaves of a result are: one entry a unit, one a device, or the same on all devices.
_UNIT, _DEVICE, _ALL = "unit", "device", "all"


def blend(
    w: ArrayLike,
    prior: ArrayLike | None = None,
    beta: ArrayLike = 0.0,
    feedback: ArrayLike | None = None,
    eta: ArrayLike = 0.0,
    *,
    mesh: Mesh,
    axis_name: str,
) -> jax.Array:
    """`importance.blend` of units [U] over a mesh axis: a maximum and two sums are exchanged.

    Args:
      w: [U] importance, >= 0.
      prior: p, [U] >= 0.
      beta: β, [] in 0..1.
      feedback: f, [U] in -1..1.
      eta: η, [] >= 0.
      mesh: of the devices.
      axis_name: the mesh axis that the units are split over.

    Returns:
      w' [U] float32.

    Raises:
      ValueError: shapes; a w that is concrete and negative or NaN; beta without a prior, eta without
        feedback.
    """
    given = {"w": w, "prior": prior, "feedback": feedback}
    units = {name: x for name, x in given.items() if x is not None}
    for name, x in units.items():
        checks.rank(name, x, 1, "[U]")
        checks.same_length(name, x, "w", w)
    units["w"] = checks.non_negative("w", w)
    if prior is not None:
        units["prior"] = checks.non_negative("prior", prior)
    if feedback is not None:
        units["feedback"] = checks.in_range("feedback", feedback, -1, 1)
    common = {}
    for name, x, of in (("beta", beta, "prior"), ("eta", eta, "feedback")):
        checks.rank(name, x, 0, "[]")
        x = checks.in_range(name, x, 0, 1 if name == "beta" else checks.FLOAT32_MAX)
        if of in units:
            common[name] = x
        elif not (checks.is_concrete(x) and float(x) == 0):
            raise ValueError(f"{name} is {x} but {of} is None: give {of}, or {name}=0")
    return _over_units(_blend, units, common, {}, mesh, axis_name, _UNIT)


def _blend(arguments, where, axis_name):
    del where  # padding weighs nothing
    return importance.blend(**arguments, axis_name=axis_name)


def shares(
    w: ArrayLike, rule: str = "proportional", *, mesh: Mesh, axis_name: str, **options: Any
) -> jax.Array:
    """alpha [U] by a rule of `shares.SHARE_RULES` over a mesh axis: a maximum and a sum are exchanged.

    Args:
      w: [U] importance.
      rule: its name.
      mesh: of the devices.
      axis_name: the mesh axis that the units are split over.
      **options: of the rule, such as the temperature of "softmax".

    Returns:
      alpha [U] float32.

    Raises:
      ValueError: an unknown rule or axis; a concrete w that the rule refuses.
    """
    run = checks.choice("rule", rule, _SHARES)
    checks.rank("w", w, 1, "[U]")
    w = (checks.finite if rule == "softmax" else checks.non_negative)("w", w)
    return _over_units(run, {"w": w}, options, {}, mesh, axis_name, _UNIT)


def _shares(rule, arguments, where, axis_name):
    return rule(**arguments, where=where, axis_name=axis_name)


_SHARES = {name: functools.partial(_shares, f) for name, f in share_rules.SHARE_RULES.items()}


def whole(
    w: ArrayLike,
    budget: ArrayLike,
    floor: ArrayLike = 0,
    cap: ArrayLike = checks.INT32_MAX,
    device_of: ArrayLike | None = None,
    *,
    mesh: Mesh,
    axis_name: str,
) -> IntegerAllocation:
    """`allocate.whole` of units [U] over a mesh axis: the result of one device, bit for bit.

    Args, Returns, Raises: those of `allocate.whole`; values are checked where they are concrete.
    """
    w, budget, floor, cap, device_of = _checks.whole_inputs(w, budget, floor, cap, device_of)
    units, common = {"w": w}, {"budget": budget}
    units |= {} if device_of is None else {"device_of": device_of}
    for name, x in (("floor", floor), ("cap", cap)):
        (units if np.ndim(x) else common)[name] = x
    kinds = _kinds(
        IntegerAllocation, amount=_UNIT, price=_ALL, binding=_UNIT, slack=_ALL, status=_ALL
    )
    out = _over_units(_whole, units, common, {}, mesh, axis_name, kinds)
    _checks.whole_feasible(out, w, budget, floor, device_of)
    return out


def _whole(arguments, where, axis_name):
    if where is not None:
        arguments |= {name: jnp.where(where, arguments[name], 0) for name in ("floor", "cap")}
    return allocate.whole(**arguments, axis_name=axis_name)


def ladder(
    values: ArrayLike,
    costs: ArrayLike,
    budgets: ArrayLike,
    device_of: ArrayLike | None = None,
    *,
    total_budget: ArrayLike | None = None,
    mesh: Mesh,
    axis_name: str,
) -> Allocation:
    """`allocate.ladder` of units [U] over a mesh axis.

    Without `device_of` a unit belongs to the device on which it lies, unit i to device
    i // ceil(U / G), and each device spends its own budget by itself. Only `total_budget` couples
    them: at most 43 passes of one scalar and fifteen more (twice as many where costs sum to nearly
    2^32), whatever the number of units. With `device_of` any unit may count against any budget, and a
    pass exchanges all of them.

    Args:
      values: [U, M] worth of each level.
      costs: [M] or [U, M] whole costs in blocks.
      budgets: [G], one of each device along the axis; with `device_of` any number of them.
      device_of: [U] int32, whose budget each unit counts against.
      total_budget: [] of all together.
      mesh: of the devices.
      axis_name: the mesh axis that the units are split over.

    Returns:
      The `Allocation` of one device, whole numbers bit for bit.

    Raises:
      ValueError: those of `allocate.ladder`; budgets that are not one of each device.
    """
    num_devices = axis_size(mesh, "axis_name", axis_name)
    checks.rank("budgets", budgets, (0, 1), "[G]")
    checks.rank("values", values, 2, "[U, M]")
    checks.non_empty("values", values)
    num_units, levels = np.shape(values)
    each = padding(num_units, num_devices).size // num_devices
    by_shard = device_of is None
    if by_shard and np.shape(budgets) != (num_devices,):
        raise ValueError(
            f"budgets has shape {np.shape(budgets)}: without device_of it must be one of each of the "
            f"{num_devices} devices along {axis_name!r}"
        )
    owner = np.arange(num_units, dtype=np.int32) // each if by_shard else device_of
    values, costs, budgets, owner, total_budget = _checks.ladder_inputs(
        values, costs, budgets, owner, total_budget
    )
    units: dict[str, Any] = {"values": values} | ({} if by_shard else {"device_of": owner})
    common: dict[str, Any] = {} if total_budget is None else {"total_budget": total_budget}
    if np.ndim(costs) == 1 and each * num_devices == num_units:
        common["costs"] = costs
    else:
        units["costs"] = jnp.broadcast_to(jnp.asarray(costs, jnp.int32), (num_units, levels))
    split = {"budgets": budgets} if by_shard else {}
    common |= {} if by_shard else {"budgets": budgets}
    by_device = _DEVICE if by_shard else _ALL
    kinds = _kinds(
        Allocation,
        level=_UNIT,
        spent=by_device,
        price=by_device,
        total_price=_ALL,
        slack=by_device,
        total_slack=_ALL,
        gap=_ALL,
        binding=_UNIT,
        status=_ALL,
    )
    run = _ladder_of_own if by_shard else _ladder
    out = _over_units(run, units, common, split, mesh, axis_name, kinds)
    _checks.ladder_feasible(out, values, costs, budgets, owner, total_budget)
    return out


def _ladder(arguments, where, axis_name, **options):
    if where is not None:  # of no value, and for nothing
        free = np.arange(arguments["values"].shape[1])
        arguments["costs"] = jnp.where(where[:, None], arguments["costs"], free)
    return allocate.ladder(**arguments, axis_name=axis_name, **options)


def _ladder_of_own(arguments, where, axis_name):
    (budget,) = arguments.pop("budgets")
    return _ladder(arguments | {"budgets": budget}, where, axis_name, split_budgets=True)


def _kinds(container: Any, **leaves: str) -> Any:
    """A container whose leaves are kinds."""
    return container(**leaves)


def _over_units(run, units, common, split, mesh, axis_name, kinds):
    """`_run` with the kinds of its results as something that can be a key."""
    axis_size(mesh, "axis_name", axis_name)
    leaves, tree = jax.tree.flatten(kinds)
    units, common, split = (
        {name: jnp.asarray(x) for name, x in arrays.items()} for arrays in (units, common, split)
    )
    return _run(run, units, common, split, mesh, axis_name, tuple(leaves), tree)


@functools.partial(jax.jit, static_argnames=("run", "mesh", "axis_name", "kinds", "tree"))
def _run(run, units, common, split, mesh, axis_name, kinds, tree):
    """run(arguments, where, axis_name) on every device's part of the units.

    Args:
      run: of the device's arguments and which of its units there are, None for all.
      units: arrays by name, the first axis of each that of the units.
      common: arrays by name that every device has.
      split: arrays by name with one entry for each device.
      mesh: of the devices.
      axis_name: along which they are split.
      kinds: what the leaves of the result are.
      tree: of the result.
    """
    num_units = len(next(iter(units.values())))
    size = padding(num_units, mesh.shape[axis_name]).size
    where = jnp.arange(size) < num_units if size > num_units else None
    units = {name: padded(x, {0: size}) for name, x in units.items()}

    def spread(x, first):
        return lay_out(x, mesh, ([first] + [None] * (x.ndim - 1))[: x.ndim])

    def spec(kind):
        return jax.P() if kind == _ALL else jax.P(axis_name)

    parts = jax.tree.map(lambda x: spread(x, axis_name), (units, split, where))
    out = jax.shard_map(
        lambda parts, common: run(parts[0] | parts[1] | common, parts[2], axis_name),
        mesh=mesh,
        in_specs=(jax.P(axis_name), jax.P()),
        out_specs=jax.tree.unflatten(tree, [spec(kind) for kind in kinds]),
    )(parts, jax.tree.map(lambda x: spread(x, None), common))
    leaves = [
        cut(x, mesh, (axis_name,), {0: num_units}) if kind == _UNIT else x
        for kind, x in zip(kinds, jax.tree.leaves(out), strict=True)
    ]
    return jax.tree.unflatten(tree, leaves)
