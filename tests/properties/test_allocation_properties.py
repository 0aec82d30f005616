"""What holds for every allocation, over generated problems of one shape (so that they compile once)."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jbalance import Binding, Status
from jbalance.allocate import ROUNDINGS, ladder, water_fill, whole

U, M, G = 12, 4, 3
METHODS = pytest.mark.parametrize("method", ROUNDINGS)

small = st.integers(0, 6).map(np.float32)
real = st.floats(0, 2.0**20, width=32, allow_subnormal=False)
weights = arrays(np.float32, U, elements=st.one_of(small, real))
floors = arrays(np.int32, U, elements=st.integers(0, 5))
rooms = arrays(np.int32, U, elements=st.integers(0, 40))
owners = arrays(np.int32, U, elements=st.integers(0, G - 1))
spare = arrays(np.int32, G, elements=st.integers(0, 120))
order = st.permutations(range(U)).map(np.array)


@cache
def rounded(method):
    return jax.jit(lambda *args: whole(*args, method=method))


@cache
def climbed():
    def run(values, costs, budgets, device_of, total):
        return ladder(values, costs, budgets, device_of, total_budget=total)

    return jax.jit(run)


@METHODS
@given(w=weights, floor=floors, room=rooms, device_of=owners, spare=spare)
def test_whole_amounts_are_exact_and_within_bounds(method, w, floor, room, device_of, spare):
    cap = floor + room
    budgets = np.bincount(device_of, floor, G).astype(np.int32) + spare
    out = jax.tree.map(np.asarray, rounded(method)(w, budgets, floor, cap, device_of))
    assert out.status == Status.OK
    assert (floor <= out.amount).all()
    assert (out.amount <= cap).all()
    spent = np.bincount(device_of, out.amount, G)
    np.testing.assert_array_equal(spent + out.slack, budgets)
    # Slack only where every unit of any weight is full.
    has_room = (out.amount < cap) & (out.binding != Binding.CAP)
    assert not np.bincount(device_of, has_room, G)[out.slack > 0].any()


@given(w=weights, floor=floors, room=rooms, device_of=owners, spare=spare, more=spare)
def test_webster_is_monotone_in_the_budget(w, floor, room, device_of, spare, more):
    budgets = np.bincount(device_of, floor, G).astype(np.int32) + spare
    run = rounded("webster")
    before = run(w, budgets, floor, floor + room, device_of).amount
    after = run(w, budgets + more, floor, floor + room, device_of).amount
    assert (after >= before).all()


@given(w=weights, floor=floors, room=rooms, device_of=owners, spare=spare)
def test_webster_prices_certify_the_amounts(w, floor, room, device_of, spare):
    budgets = np.bincount(device_of, floor, G).astype(np.int32) + spare
    out = rounded("webster")(w, budgets, floor, floor + room, device_of)
    price = np.asarray(out.price)[device_of] * (1 + 1e-6)
    amount, binding = np.asarray(out.amount), np.asarray(out.binding)
    last, following = w / np.maximum(amount - 0.5, 0.5), w / (amount + 0.5)
    positive = np.bincount(device_of, w, G)[device_of] > 0
    # (XLA takes numbers below float32's smallest normal one for 0.)
    price_above = price + np.finfo(np.float32).tiny
    assert (following <= price_above)[(binding != Binding.CAP) & positive].all()
    given_by_price = (amount > floor) & positive
    assert (last * (1 + 2e-6) >= price / (1 + 1e-6))[given_by_price].all()


@METHODS
@given(w=weights, exponent=st.integers(-40, 40), budget=st.integers(0, 2000))
def test_the_scale_of_w_does_not_matter(method, w, exponent, budget):
    devices, budgets = np.arange(U) % G, np.full(G, budget)
    run = rounded(method)
    want = run(w, budgets, np.zeros(U, int), np.full(U, 900), devices)
    got = run(w * np.float32(2.0**exponent), budgets, np.zeros(U, int), np.full(U, 900), devices)
    if method == "webster" or exponent == 0:
        np.testing.assert_array_equal(got.amount, want.amount)
    assert (abs(got.amount - want.amount) <= 1).all()


@METHODS
@given(
    w=arrays(np.float32, U, elements=st.integers(1, 10**6), unique=True), order=order, room=rooms
)
def test_the_order_of_units_does_not_matter(method, w, order, room):
    w = np.sqrt(w)  # no two claims alike
    budgets, devices = np.array([90, 33, 250]), np.arange(U) % G
    run = rounded(method)
    want = run(w, budgets, np.zeros(U, int), room, devices).amount
    got = run(w[order], budgets, np.zeros(U, int), room[order], devices[order]).amount
    np.testing.assert_array_equal(got, want[order])


steps_up = st.integers(1, 9)
ladders = arrays(np.float32, (U, M), elements=st.integers(-5, 20).map(np.float32))
costs_up = arrays(np.int32, (U, M), elements=steps_up).map(lambda x: np.cumsum(x, 1, np.int32))


@given(v=ladders, costs=costs_up, device_of=owners, spare=spare, total=st.integers(0, 200))
def test_ladder_budgets_prices_and_gap(v, costs, device_of, spare, total):
    least = np.bincount(device_of, costs[:, 0], G).astype(np.int32)
    budgets, total = least + spare, int(least.sum()) + total
    out = jax.tree.map(np.asarray, climbed()(v, costs, budgets, device_of, total))
    assert out.status == Status.OK
    units = np.arange(U)
    cost, value = costs[units, out.level], v[units, out.level]
    np.testing.assert_array_equal(out.spent, np.bincount(device_of, cost, G))
    np.testing.assert_array_equal(out.spent + out.slack, budgets)
    assert out.spent.sum() + out.total_slack == total
    # The dual at these prices is what no choice exceeds: it certifies the gap.
    above = out.price - out.total_price
    dual = (v - out.price[device_of][:, None] * costs).max(1).sum()
    dual += above @ budgets + out.total_price * total
    np.testing.assert_allclose(value.sum() + out.gap, dual, rtol=1e-4, atol=1e-3)


@given(v=ladders, costs=costs_up, device_of=owners, spare=spare, more=spare)
def test_ladder_is_monotone_in_device_budgets(v, costs, device_of, spare, more):
    budgets = np.bincount(device_of, costs[:, 0], G).astype(np.int32) + spare
    unlimited = 2**31 - 1
    before = climbed()(v, costs, budgets, device_of, unlimited).level
    after = climbed()(v, costs, budgets + more, device_of, unlimited).level
    assert (after >= before).all()


@given(v=ladders, costs=costs_up, device_of=owners, spare=spare, total=st.integers(0, 150))
def test_ladder_is_monotone_in_the_total(v, costs, device_of, spare, total):
    budgets = np.bincount(device_of, costs[:, 0], G).astype(np.int32) + spare
    least = int(costs[:, 0].sum())
    levels = [
        climbed()(v, costs, budgets, device_of, least + b).level for b in (total, total + 1, 900)
    ]
    assert (np.diff(levels, axis=0) >= 0).all()


@given(v=ladders, costs=costs_up, device_of=owners, spare=spare, exponent=st.integers(-30, 30))
def test_the_currency_of_values_does_not_matter(v, costs, device_of, spare, exponent):
    budgets = np.bincount(device_of, costs[:, 0], G).astype(np.int32) + spare
    scale = np.float32(2.0**exponent)
    total = int(costs[:, 0].sum()) + 60
    want = climbed()(v, costs, budgets, device_of, total)
    got = climbed()(v * scale, costs, budgets, device_of, total)
    np.testing.assert_array_equal(got.level, want.level)
    np.testing.assert_allclose(got.price, want.price * scale, rtol=1e-6)


@given(data=st.data(), order=order, device_of=owners, spare=spare)
def test_the_order_of_ladders_does_not_matter(data, order, device_of, spare):
    elements = st.integers(1, 2**20).map(np.float32)
    v = data.draw(arrays(np.float32, (U, M), elements=elements, unique=True)) ** 0.5
    v, costs = np.cumsum(v, 1), np.cumsum(np.ones((U, M), np.int32), 1, np.int32)
    budgets = np.bincount(device_of, minlength=G).astype(np.int32) + spare % 9
    want = climbed()(v, costs, budgets, device_of, U + 15).level
    got = climbed()(v[order], costs, budgets, device_of[order], U + 15).level
    np.testing.assert_array_equal(got, want[order])


@given(w=weights, floor=floors, room=rooms, budget=st.integers(1, 400))
def test_water_meets_its_budget_and_bounds(w, floor, room, budget):
    cap = floor + room
    budget = np.float32(floor.sum() + budget)
    out = FILL(w, budget, floor, cap)
    amount = np.asarray(out.amount, np.float64)
    assert out.status == Status.OK
    assert (amount >= floor).all()
    assert (amount <= cap).all()
    np.testing.assert_allclose(amount.sum() + float(out.slack), budget, rtol=2e-6)
    free = np.asarray(out.binding) == Binding.PRICE
    w = w if w.any() else np.ones(U)  # nothing known: all alike
    np.testing.assert_allclose(amount[free], w[free] * np.float64(out.level), rtol=1e-5)


FILL = jax.jit(lambda w, budget, floor, cap: water_fill(w, jnp.float32(budget), floor, cap))
