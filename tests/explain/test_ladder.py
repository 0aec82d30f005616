"""Reasons of a ladder's levels: duality by a linear programme, budgets by solving again."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jbalance import Binding, allocate, explain
from tests.support.allocation_oracles import best_ladder_values, relaxed_ladder_value

U, M, G = 12, 4, 3
ladders = arrays(np.float32, (U, M), elements=st.integers(-5, 20).map(np.float32))
costs_up = arrays(np.int32, (U, M), elements=st.integers(1, 9)).map(
    lambda x: np.cumsum(x, 1, np.int32)
)
even_costs = st.integers(1, 5).map(
    lambda c: np.broadcast_to(c * np.arange(M, dtype=np.int32), (U, M))
)
concave = arrays(np.float32, (U, M), elements=st.integers(-5, 20).map(np.float32)).map(
    lambda x: np.cumsum(-np.sort(-x, 1), 1)
)
owners = arrays(np.int32, U, elements=st.integers(0, G - 1))
spare = arrays(np.int32, G, elements=st.integers(0, 60))
spare_total = st.one_of(st.none(), st.integers(0, 120))


def problem(v, costs, device_of, spare, total):
    budgets = np.bincount(device_of, costs[:, 0], G).astype(np.int32) + spare
    total = None if total is None else int(costs[:, 0].sum()) + total
    return v, costs, budgets, device_of, total


def explained(v, costs, budgets, device_of, total):
    return explain.ladder(v, costs, budgets, device_of, total_budget=total)


def levels(v, costs, budgets, device_of, total):
    return np.asarray(allocate.ladder(v, costs, budgets, device_of, total_budget=total).level)


@given(v=ladders, costs=costs_up, device_of=owners, spare=spare, total=spare_total)
def test_the_duality_gap_is_certified(v, costs, device_of, spare, total):
    v, costs, budgets, device_of, total = problem(v, costs, device_of, spare, total)
    why = explained(v, costs, budgets, device_of, total)
    best = relaxed_ladder_value(v, costs, budgets, device_of, total)
    assert why.value <= best + 1e-6 <= why.bound + 1e-3
    np.testing.assert_allclose(why.bound - why.value, why.allocation.gap, rtol=1e-4, atol=1e-3)


@given(v=concave, costs=even_costs, device_of=owners, spare=spare, total=spare_total)
def test_complementary_slackness_where_steps_cost_the_same(v, costs, device_of, spare, total):
    """No step that is left out is worth more than the price, none that was taken less, and a price is
    paid for budgets that are spent alone: what fits no whole step is not spent."""
    v, costs, budgets, device_of, total = problem(v, costs, device_of, spare, total)
    why = explained(v, costs, budgets, device_of, total)
    out = jax.tree.map(np.asarray, why.allocation)
    price, step = out.price[device_of], costs[0, 1] - costs[0, 0]
    assert (why.marginal <= price).all()
    assert (why.last >= price).all()
    full = out.price > out.total_price
    assert (out.slack[full] < step).all()
    assert total is None or out.total_price == 0 or out.total_slack < step
    assert (why.marginal[out.binding == Binding.PRICE] <= out.total_price).all()
    assert (full[device_of] | (out.binding != Binding.DEVICE)).all()
    assert ((out.binding == Binding.CAP) == (why.marginal == 0)).all()


def test_small_problems_are_solved_as_by_trying_all():
    rng = np.random.default_rng(0)
    number, units = 40, 4
    v = np.cumsum(rng.integers(0, 9, (number, units, 3)), 2).astype(np.float32)
    costs = np.broadcast_to(np.arange(3), v.shape)
    device_of = rng.integers(0, 2, (number, units))
    budgets, total = rng.integers(0, 5, (number, 2)), rng.integers(0, 9, number)
    best = best_ladder_values(v, costs, budgets, device_of, total)
    for i in range(number):
        why = explain.ladder(v[i], costs[i], budgets[i], device_of[i], total_budget=total[i])
        assert why.value <= best[i] <= why.bound + 1e-4


@given(v=ladders, costs=costs_up, device_of=owners, spare=spare, total=spare_total)
def test_the_next_step_comes_at_its_budgets_and_not_before(v, costs, device_of, spare, total):
    v, costs, budgets, device_of, total = problem(v, costs, device_of, spare, total)
    why = explained(v, costs, budgets, device_of, total)
    level = np.asarray(why.allocation.level)
    lacking = np.flatnonzero(why.next_budget > 0)
    for u in lacking[:3]:
        d, need = device_of[u], int(why.next_budget[u])
        whole = None if total is None else max(total, int(why.next_total[u]))
        enough = budgets.copy()
        enough[d] = max(need, budgets[d])
        assert levels(v, costs, enough, device_of, whole)[u] > level[u]
        if need > budgets[d]:
            less = budgets.copy()
            less[d] = need - 1
            assert levels(v, costs, less, device_of, whole)[u] == level[u]
        if total is not None and whole > total:
            assert levels(v, costs, enough, device_of, whole - 1)[u] == level[u]
        # As it is, something is missing.
        assert need > budgets[d] or (total is not None and whole > total)


@given(v=ladders, costs=costs_up, device_of=owners, spare=spare, total=spare_total)
def test_what_was_asked_is_what_ample_budgets_give(v, costs, device_of, spare, total):
    v, costs, budgets, device_of, total = problem(v, costs, device_of, spare, total)
    why = explained(v, costs, budgets, device_of, total)
    units = np.arange(U)
    ample = levels(v, costs, np.full(G, 2**30), device_of, None if total is None else 2**30)
    np.testing.assert_array_equal(why.asked, costs[units, ample])
    np.testing.assert_array_equal(why.got, costs[units, np.asarray(why.allocation.level)])
    assert (why.next_cost[why.asked == why.got] == 0).all()
    assert (why.next_cost[why.asked > why.got] > 0).all()
    assert (why.next_cost <= why.asked - why.got).all()


changes = arrays(np.int32, G, elements=st.integers(-20, 40))


@given(
    v=ladders, costs=costs_up, device_of=owners, spare=spare, total=spare_total,
    change=changes, total_change=st.integers(-40, 40),
)  # fmt: skip
def test_what_if_is_solving_again(v, costs, device_of, spare, total, change, total_change):
    v, costs, budgets, device_of, total = problem(v, costs, device_of, spare, total)
    change = np.maximum(change, -spare)
    least = int(costs[:, 0].sum())
    total_change = 0 if total is None else max(total_change, least - total)
    found = explain.what_if(
        v, costs, budgets, change, device_of, total_budget=total, total_change=total_change
    )
    more = None if total is None else total + total_change
    before, after = (
        levels(v, costs, b, device_of, t) for b, t in ((budgets, total), (budgets + change, more))
    )
    np.testing.assert_array_equal(found.before.level, before)
    np.testing.assert_array_equal(found.after.level, after)
    units = np.arange(U)
    np.testing.assert_allclose(found.change, (v[units, after] - v[units, before]).sum(), atol=1e-4)
    # Concave: the prices promise no less than the budgets then give, up to the gap.
    assert found.change <= found.first_order + found.before.gap + 1e-3


def test_one_step_more_is_worth_its_price():
    """With steps of equal cost the first order is exact as far as the price holds."""
    gains = -np.sort(-np.random.default_rng(0).integers(1, 30, (U, M)), axis=1)
    v = np.cumsum(gains, 1).astype(np.float32)
    costs, device_of = np.arange(M), np.arange(U) % G
    budgets = np.array([3, 5, 4])
    found = explain.what_if(v, costs, budgets, [1, 0, 1], device_of)
    price = np.asarray(found.before.price)
    assert found.change == found.first_order == price[0] + price[2]


def test_what_if_runs_under_vmap():
    v = np.cumsum(np.random.default_rng(1).integers(1, 30, (U, M)), 1).astype(np.float32)
    costs, budgets, device_of = np.arange(M), np.array([3, 5, 4]), np.arange(U) % G
    many = np.array([[1, 0, 0], [0, 2, 0], [0, 0, -1]])
    found = jax.jit(jax.vmap(lambda change: explain.what_if(v, costs, budgets, change, device_of)))(
        many
    )
    for i, change in enumerate(many):
        alone = explain.what_if(v, costs, budgets, change, device_of)
        np.testing.assert_array_equal(found.change[i], alone.change)
        np.testing.assert_array_equal(found.first_order[i], alone.first_order)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: explain.what_if([[0.0, 1.0]], [0, 1], 1, -2), r"budgets \+ change is -1"),
        (lambda: explain.what_if([[0.0, 1.0]], [0, 1], 1, [1]), r"change has shape \(1,\)"),
        (
            lambda: explain.what_if([[0.0, 1.0]], [0, 1], 1, 1, total_change=1),
            "total_change is 1",
        ),
        (
            lambda: jax.jit(lambda v: explain.ladder(v, [0, 1], 1))(np.ones((1, 2))),
            "values is traced",
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
