"""The ladder: equal to trying everything, within its own gap otherwise, with prices that certify it."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import Binding, Status
from jbalance.allocate import ladder
from tests.support.allocation_oracles import best_ladder_values, relaxed_ladder_value


@partial(jax.jit, static_argnames="with_total")
def solve(values, costs, budgets, device_of, total, with_total):
    """N problems at once."""

    def one(values, costs, budgets, device_of, total):
        total_budget = total if with_total else None
        return ladder(values, costs, budgets, device_of, total_budget=total_budget)

    out = jax.vmap(one)(values, costs, budgets, device_of, total)
    return out


def worth(out, values, costs, budgets, device_of, total):
    """Value [N] of the chosen levels, having checked the budgets of N problems."""
    out = jax.tree.map(np.asarray, out)
    value, cost = (np.take_along_axis(x, out.level[..., None], -1)[..., 0] for x in (values, costs))
    spent = np.stack([(cost * (device_of == d)).sum(-1) for d in range(budgets.shape[1])], -1)
    np.testing.assert_array_equal(out.spent, spent)
    np.testing.assert_array_equal(out.slack, budgets - spent)
    assert (spent <= budgets).all()
    assert (out.status == Status.OK).all()
    if total is not None:
        assert (spent.sum(-1) <= total).all()
        np.testing.assert_array_equal(out.total_slack, total - spent.sum(-1))
    return value.sum(-1)


def concave(rng, shape, most=5):
    """Whole values whose steps never rise."""
    steps = -np.sort(-rng.integers(0, most, (*shape[:-1], shape[-1] - 1)), axis=-1)
    first = np.zeros((*shape[:-1], 1), int)
    return np.concatenate([first, np.cumsum(steps, -1)], -1).astype(np.float32)


def problems(rng, number, num_units, num_levels, num_devices, equal_steps, concave_values=True):
    shape = (number, num_units, num_levels)
    values = concave(rng, shape) if concave_values else rng.integers(0, 9, shape).astype(np.float32)
    if equal_steps:
        first, step = rng.integers(0, 3), rng.integers(1, 4)
        costs = np.broadcast_to(first + step * np.arange(num_levels), shape)
    else:
        costs = np.cumsum(rng.integers(1, 6, shape), -1) - 1
    device_of = rng.integers(0, num_devices, (number, num_units))
    least = [(costs[..., 0] * (device_of == d)).sum(-1) for d in range(num_devices)]
    budgets = np.stack(least, -1) + rng.integers(0, 12, (number, num_devices))
    total = np.sum(least, 0) + rng.integers(0, 20, number)
    return values, *(x.astype(np.int32) for x in (costs, budgets, device_of, total))


def test_all_small_instances():
    """Three units with every concave ladder of two steps, on every split over two devices, under
    every pair of budgets, with and without every total: no better choice exists."""
    steps = [s for s in itertools.product(range(3), repeat=2) if s[0] >= s[1]]
    ladders = np.array([(0, a, a + b) for a, b in steps], np.float32)
    values = ladders[np.array(list(itertools.combinations_with_replacement(range(6), 3)))]
    splits = np.array([(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)])
    limits = np.array(list(itertools.product(range(5), range(3), range(0, 7, 2))))
    v, s, b = np.indices((len(values), len(splits), len(limits))).reshape(3, -1)
    values, device_of, budgets = values[v], splits[s], limits[b][:, :2].astype(np.int32)
    total = limits[b][:, 2].astype(np.int32)
    costs = np.broadcast_to(np.arange(3, dtype=np.int32), values.shape)
    for limit in (None, total):
        out = solve(values, costs, budgets, device_of, total, limit is not None)
        got = worth(out, values, costs, budgets, device_of, limit)
        np.testing.assert_array_equal(
            got, best_ladder_values(values, costs, budgets, device_of, limit)
        )


@pytest.mark.parametrize(
    ("num_units", "num_levels", "num_devices"), [(10, 2, 3), (6, 3, 2), (4, 4, 1), (1, 5, 1)]
)
@pytest.mark.parametrize("with_total", [False, True])
def test_random_small_instances(num_units, num_levels, num_devices, with_total):
    rng = np.random.default_rng(num_units)
    for equal_steps in (True, False):
        problem = problems(rng, 400, num_units, num_levels, num_devices, equal_steps)
        values, costs, budgets, device_of, total = problem
        out = solve(*problem, with_total)
        limit = total if with_total else None
        got = worth(out, values, costs, budgets, device_of, limit)
        best = best_ladder_values(values, costs, budgets, device_of, limit)
        assert (best - got <= np.asarray(out.gap) + 1e-4).all()
        if equal_steps:
            np.testing.assert_array_equal(got, best)


@pytest.mark.parametrize("concave_values", [True, False])
@pytest.mark.parametrize("with_total", [False, True])
def test_the_gap_bounds_the_relaxed_optimum(concave_values, with_total):
    """Within `gap` of the linear programme, and the gap within one step per budget."""
    rng = np.random.default_rng(8)
    problem = problems(rng, 60, 8, 4, 2, False, concave_values)
    values, costs, budgets, device_of, total = problem
    out = jax.tree.map(np.asarray, solve(*problem, with_total))
    got = worth(out, values, costs, budgets, device_of, total if with_total else None)
    for i in range(60):
        limit = total[i] if with_total else None
        relaxed = relaxed_ladder_value(values[i], costs[i], budgets[i], device_of[i], limit)
        assert got[i] - 1e-4 <= relaxed <= got[i] + out.gap[i] + 1e-3
        largest_step = np.ptp(values[i], axis=-1).max()
        assert out.gap[i] <= (2 + with_total) * largest_step + 1e-4


@pytest.mark.parametrize("with_total", [False, True])
def test_complementary_slackness(with_total):
    """Equal steps: a budget with a price is spent, and every unit takes what its price allows."""
    rng = np.random.default_rng(9)
    values = concave(rng, (300, 12, 4), most=60)
    costs = np.broadcast_to(np.arange(4, dtype=np.int32), values.shape)
    device_of = rng.integers(0, 3, (300, 12)).astype(np.int32)
    budgets = rng.integers(0, 15, (300, 3)).astype(np.int32)
    total = rng.integers(0, 30, 300).astype(np.int32)
    out = jax.tree.map(np.asarray, solve(values, costs, budgets, device_of, total, with_total))
    above = out.price - out.total_price[:, None]
    assert (above >= 0).all()
    np.testing.assert_array_equal(above * out.slack, 0)
    np.testing.assert_array_equal(out.gap, 0)
    np.testing.assert_array_equal(out.total_price * out.total_slack, 0)
    steps = np.diff(values, axis=-1)
    price = np.take_along_axis(out.price, device_of, 1)[..., None]
    taken = np.arange(3) < out.level[..., None]
    assert (steps >= price)[taken].all()
    assert (steps <= price)[~taken].all()
    full, limited = out.binding == Binding.DEVICE, out.binding == Binding.PRICE
    np.testing.assert_array_equal(out.binding == Binding.CAP, (steps * ~taken).max(-1) == 0)
    at_device, at_total = price[..., 0], out.total_price[:, None]
    assert (at_device > at_total)[full].all()
    assert limited.any() == with_total


@pytest.mark.parametrize("unit_costs", [False, True])
def test_a_larger_budget_only_adds(unit_costs):
    rng = np.random.default_rng(10)
    values = np.cumsum(rng.integers(0, 6, (15, 4)), axis=-1).astype(np.float32)
    costs = np.cumsum(rng.integers(1, 6, (15, 4)) if unit_costs else [1, 3, 2, 5], axis=-1)
    budgets = np.arange(costs[..., 0].sum() if unit_costs else 15, 260, dtype=np.int32)
    climb = jax.jit(jax.vmap(lambda b: ladder(values, costs.astype(np.int32), b).level))
    assert (np.diff(climb(budgets), axis=0) >= 0).all()


@pytest.mark.parametrize("equal_steps", [True, False])
def test_growing_device_budgets_under_a_total_cost_at_most_the_gap(equal_steps):
    """Unequal steps: what a device lets in may leave more of the total unspent; equal ones never do."""
    rng = np.random.default_rng(11)
    values, costs, budgets, device_of, total = problems(rng, 1500, 6, 4, 2, equal_steps)
    more = (budgets + rng.integers(0, 5, budgets.shape)).astype(np.int32)
    larger = (total + rng.integers(0, 5, total.shape)).astype(np.int32)

    def run(budgets, total):
        out = solve(values, costs, budgets, device_of, total, True)
        return worth(out, values, costs, budgets, device_of, total), np.asarray(out.gap)

    before, _ = run(budgets, total)
    assert (run(budgets, larger)[0] >= before).all()
    after, gap = run(more, total)
    assert (after >= before - gap - 1e-4).all()
    assert (after < before).any() != equal_steps


def test_many_levels_as_units_of_few():
    """A concave ladder of 31 steps climbs as far as 31 units of one step each do together."""
    rng = np.random.default_rng(14)
    steps = -np.sort(-rng.integers(1, 10**6, (5, 31)), axis=1).astype(np.float32)
    values = np.concatenate([np.zeros((5, 1)), np.cumsum(steps, 1)], 1).astype(np.float32)
    one_step = np.stack([np.zeros(155, np.float32), steps.ravel()], 1)
    device_of = np.array([0, 1, 0, 1, 1], np.int32)
    for budgets in ([20, 60], [0, 3], [62, 93]):
        whole = ladder(values, np.arange(32), np.array(budgets), device_of, total_budget=70)
        parts = ladder(
            one_step, np.arange(2), np.array(budgets), device_of.repeat(31), total_budget=70
        )
        np.testing.assert_array_equal(whole.level, parts.level.reshape(5, 31).sum(1))
        np.testing.assert_allclose(whole.price, parts.price, rtol=1e-6)


def test_only_corners_of_the_hull_are_chosen():
    """(2, 1) lies below the line from (0, 0) to (3, 6): the unit climbs it in one step or not."""
    values, costs = jnp.array([[0.0, 1.0, 6.0, 7.0]]), jnp.array([0, 2, 3, 5])
    levels = [int(ladder(values, costs, b).level[0]) for b in range(7)]
    assert levels == [0, 0, 0, 2, 2, 3, 3]
    assert ladder(values, costs, 2).price[0] == 2.0


def test_steps_of_no_value_are_not_taken():
    out = ladder(jnp.array([[0.0, -1.0], [3.0, 3.0], [1.0, 2.0]]), jnp.array([1, 2]), 100)
    np.testing.assert_array_equal(out.level, [0, 0, 1])
    assert (out.binding == Binding.CAP).all()
    assert out.price[0] == 0
    assert out.slack[0] == 96


def test_ties_go_by_index():
    out = ladder(jnp.tile(jnp.array([0.0, 1.0]), (9, 1)), jnp.array([0, 1]), 4)
    np.testing.assert_array_equal(out.level, [1, 1, 1, 1, 0, 0, 0, 0, 0])


def test_a_device_without_units_keeps_its_budget():
    out = ladder(jnp.array([[0.0, 1.0]]), jnp.array([0, 1]), jnp.array([0, 5, 7]), jnp.array([0]))
    np.testing.assert_array_equal(out.slack, [0, 5, 7])
    np.testing.assert_array_equal(out.price, [1, 0, 0])


def test_a_status_for_what_cannot_raise_under_jit():
    run = jax.jit(lambda v, c, b, t: ladder(v, c, b, total_budget=t))
    values, costs = jnp.array([[0.0, 1.0]] * 3), jnp.array([2, 3])
    assert run(values, costs, 6, 6).status == Status.OK
    for budget, total in ((5, 9), (9, 5)):
        out = run(values, costs, budget, total)
        assert out.status == Status.INFEASIBLE
        assert np.isinf(out.gap)
        np.testing.assert_array_equal(out.level, 0)
    assert run(values.at[1, 0].set(jnp.nan), costs, 6, 6).status == Status.INVALID
    assert run(values, costs[::-1], 9, 9).status == Status.INVALID


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.int32])
def test_other_dtypes(dtype):
    values = jnp.asarray([[0, 4, 6], [0, 1, 2], [0, 5, 5]], dtype)
    out = ladder(values, np.array([0, 1, 2], np.uint8), np.int16(4))
    np.testing.assert_array_equal(out.level, [2, 1, 1])


def test_compilation_changes_nothing():
    rng = np.random.default_rng(11)
    problem = problems(rng, 5, 20, 4, 3, False)
    batched = solve(*problem, True)
    for i in range(5):
        values, costs, budgets, device_of, total = (x[i] for x in problem)
        eager = ladder(values, costs, budgets, device_of, total_budget=total)
        of_batch = jax.tree.map(lambda x, i=i: x[i], batched)
        jax.tree.map(np.testing.assert_array_equal, of_batch, eager)
