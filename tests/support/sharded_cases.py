"""Calls of the core on one problem, shared by the tests on many devices and in many processes.

Each takes arrays that are split over the units (`UNITS`) and arrays that every device has (`COMMON`),
and returns a pytree.
"""

from __future__ import annotations

import jax
import numpy as np

import jbalance as jb
from jbalance import allocate, importance, shares
from jbalance.balance import BalanceState

U, M, G = 240, 4, 3
_rng = np.random.default_rng(7)

UNITS = {
    # Whole numbers: many ties, and float32 sums that are exact in any order.
    "w": _rng.integers(0, 9, U).astype(np.float32),
    "prior": _rng.integers(0, 4, U).astype(np.float32),
    "feedback": _rng.uniform(-1, 1, U).astype(np.float32),
    "floor": _rng.integers(0, 3, U).astype(np.int32),
    "cap": _rng.integers(3, 40, U).astype(np.int32),
    "device_of": _rng.integers(0, G, U).astype(np.int32),
    "values": np.cumsum(_rng.integers(0, 5, (U, M)), axis=1).astype(np.float32),
    "unit_costs": np.cumsum(_rng.integers(1, 7, (U, M)), axis=1).astype(np.int32),
    "average": _rng.integers(0, 9, U).astype(np.float32) / 8,
}
COMMON = {
    "costs": np.array([0, 2, 3, 7], np.int32),
    "budget": np.int32(3000),
    "budgets": np.array([700, 1000, 1201], np.int32),
    "total_budget": np.int32(2600),
    "segment_floor": np.array([100.0, 0.0, 2200.0], np.float32),
    "segment_cap": np.array([400.0, np.inf, np.inf], np.float32),
    "step": np.int32(3),
}


def _balance(u, c, axis):
    balance = jb.balancer(
        prior=u["prior"], beta=0.5, eta=0.3, floor=1, cap=u["cap"], axis_name=axis
    )
    state = BalanceState(u["average"], c["step"])
    return balance.update(u["w"], state, c["budgets"], u["device_of"], u["feedback"])


CASES = {
    "water_fill": lambda u, c, axis: allocate.water_fill(
        u["w"], 3000.0, u["floor"], u["cap"], axis_name=axis
    ),
    "water_fill with segments": lambda u, c, axis: allocate.water_fill(
        u["w"],
        c["budget"],
        u["floor"],
        segment_of=u["device_of"],
        segment_floor=c["segment_floor"],
        segment_cap=c["segment_cap"],
        axis_name=axis,
    ),
    "webster": lambda u, c, axis: allocate.whole(
        u["w"], c["budget"], u["floor"], u["cap"], axis_name=axis
    ),
    "webster on devices": lambda u, c, axis: allocate.whole(
        u["w"], c["budgets"], u["floor"], u["cap"], u["device_of"], axis_name=axis
    ),
    "webster, huge": lambda u, c, axis: allocate.whole(u["w"], 2**31 - 1, axis_name=axis),
    "largest remainder": lambda u, c, axis: allocate.whole(
        u["w"], c["budget"], u["floor"], method="largest_remainder", axis_name=axis
    ),
    "largest remainder on devices": lambda u, c, axis: allocate.whole(
        u["w"],
        c["budgets"],
        device_of=u["device_of"],
        method="largest_remainder",
        axis_name=axis,
    ),
    "ladder": lambda u, c, axis: allocate.ladder(
        u["values"], c["costs"], c["budget"] // 4, axis_name=axis
    ),
    "ladder on devices": lambda u, c, axis: allocate.ladder(
        u["values"], u["unit_costs"], c["budgets"], u["device_of"], axis_name=axis
    ),
    "ladder, devices and total": lambda u, c, axis: allocate.ladder(
        u["values"],
        u["unit_costs"],
        c["budgets"],
        u["device_of"],
        total_budget=c["total_budget"],
        axis_name=axis,
    ),
    "ladder, total alone": lambda u, c, axis: allocate.ladder(
        u["values"],
        c["costs"],
        c["budgets"],
        u["device_of"],
        total_budget=c["total_budget"] // 5,
        axis_name=axis,
    ),
    "proportional": lambda u, c, axis: shares.proportional(u["w"], axis_name=axis),
    "softmax": lambda u, c, axis: shares.softmax(u["w"], 0.5, axis_name=axis),
    "uniform": lambda u, c, axis: shares.SHARE_RULES["uniform"](u["w"], axis_name=axis),
    "constrained": lambda u, c, axis: shares.constrained(
        u["w"],
        cap=0.02,
        group_of=u["device_of"],
        group_floor=np.array([0.2, 0.0, 0.5], np.float32),
        axis_name=axis,
    ),
    "pool": lambda u, c, axis: importance.blend(
        u["w"], u["prior"], 0.4, u["feedback"], 0.2, axis_name=axis
    ),
    "balancer": _balance,
}


def assert_same(got, want, rtol=2e-6):
    """Whole numbers bit for bit, real ones up to the rounding of sums taken in another order."""

    def same(x, y):
        x, y = np.asarray(x), np.asarray(y)
        if np.issubdtype(y.dtype, np.integer):
            np.testing.assert_array_equal(x, y)
        else:
            np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)

    jax.tree.map(same, got, want)
