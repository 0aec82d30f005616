"""Real amounts against float64 bisection, the proportionally fair programme and finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import Binding, Status
from jbalance.allocate import water_fill
from tests.support.allocation_oracles import proportionally_fair, water_level


@pytest.mark.parametrize("with_caps", [False, True])
@pytest.mark.parametrize("num_units", [1, 7, 3000])
def test_the_level_of_bisection(num_units, with_caps):
    rng = np.random.default_rng(num_units)
    for spread in (0.1, 1, 4):
        w = rng.lognormal(0, spread, num_units).astype(np.float32)
        floor = (rng.random(num_units) * (rng.random(num_units) < 0.4)).astype(np.float32)
        cap = floor + rng.uniform(1, 9, num_units).astype(np.float32) if with_caps else np.inf
        budget = np.float32(floor.sum() + 0.7 * num_units)
        got = water_fill(w, budget, floor, cap)
        want = water_level(w, float(budget), floor, cap)
        np.testing.assert_allclose(got.amount, want, rtol=2e-5, atol=1e-5)
        np.testing.assert_allclose(got.amount.sum(), budget, rtol=1e-6)
        assert got.slack == 0
        np.testing.assert_allclose(
            got.amount, np.clip(w * float(got.level), floor, cap), rtol=1e-5, atol=1e-6
        )


def test_segments_solve_the_fair_programme():
    """Maximise sum w_i log b_i under floors and caps of units and of segments."""
    rng = np.random.default_rng(12)
    segment_of = np.arange(9).astype(np.int32) % 3
    lifted_or_held = 0
    for _ in range(15):
        w = rng.lognormal(0, 1, 9).astype(np.float32)
        floor = (0.2 * rng.random(9)).astype(np.float32)
        cap = (floor + rng.uniform(2, 6, 9)).astype(np.float32)
        segment_floor = rng.uniform(1, 3, 3).astype(np.float32)
        segment_cap = segment_floor + rng.uniform(1, 4, 3).astype(np.float32)
        budget = np.float32(rng.uniform(segment_floor.sum(), 0.95 * segment_cap.sum()))
        bounds = {"segment_floor": segment_floor, "segment_cap": segment_cap}
        got = water_fill(w, budget, floor, cap, segment_of=segment_of, **bounds)
        want = proportionally_fair(w, float(budget), floor, cap, segment_of, *bounds.values())
        np.testing.assert_allclose(got.amount, want, atol=2e-3)
        sums = np.bincount(segment_of, got.amount, 3)
        assert (sums >= segment_floor * (1 - 1e-5)).all()
        assert (sums <= segment_cap * (1 + 1e-5)).all()
        np.testing.assert_allclose(sums.sum(), budget, rtol=1e-6)
        lifted_or_held += np.sum(~np.isclose(got.segment_level, got.level))
    assert lifted_or_held > 10


def test_weights_that_span_all_of_float32():
    """Against the level in float64: the small ones' turn comes when all large ones are full."""
    rng = np.random.default_rng(40)
    w = (10.0 ** rng.uniform(-37, 37, (1000, 8))).astype(np.float32)
    floor = (10.0 ** rng.uniform(-3, 1, w.shape) * (rng.random(w.shape) < 0.5)).astype(np.float32)
    cap = floor + (10.0 ** rng.uniform(-3, 1, w.shape)).astype(np.float32)
    least, most = floor.sum(axis=1, dtype=float), cap.sum(axis=1, dtype=float)
    budget = (least + rng.uniform(0.001, 0.999, 1000) * (most - least)).astype(np.float32)
    out = jax.tree.map(np.asarray, jax.jit(jax.vmap(water_fill))(w, budget, floor, cap))
    assert (out.status == Status.OK).all()
    np.testing.assert_allclose(out.amount.sum(axis=1, dtype=float), budget, rtol=2e-6)
    for i in range(1000):
        # Bisection would take long over so many decades: between the levels at which a unit fills up.
        levels = np.unique(np.append(floor[i] / w[i].astype(float), cap[i] / w[i].astype(float)))
        poured = np.clip(levels[:, None] * w[i], floor[i], cap[i]).sum(axis=1)
        level = np.interp(budget[i], poured, levels)
        want = np.clip(level * w[i], floor[i], cap[i])
        np.testing.assert_allclose(out.amount[i], want, atol=2e-5 * budget[i])
    smallest = np.argmin(w, axis=1)[:, None]
    more = np.take_along_axis(out.amount - floor, smallest, 1)
    assert (more > 0).sum() > 5


def test_segments_too_far_apart_are_refused():
    segments = {"segment_of": jnp.array([0, 0, 1, 1]), "segment_floor": jnp.array([0.0, 3.0])}
    near, far = jnp.array([1e10, 2e10, 1e-10, 2e-10]), jnp.array([1e20, 2e20, 1e-20, 2e-20])
    got = water_fill(near, 10.0, **segments)
    np.testing.assert_allclose(got.amount, [7 / 3, 14 / 3, 1, 2], rtol=1e-5)
    with pytest.raises(ValueError, match="w spans 1e-20 to 2e"):
        water_fill(far, 10.0, **segments)
    assert jax.jit(lambda w: water_fill(w, 10.0, **segments).status)(far) == Status.INVALID


def test_what_limits_each_unit():
    got = water_fill(
        jnp.array([8.0, 1.0, 0.0, 2.0]),
        10.0,
        jnp.array([0, 2.0, 1.0, 0.0]),
        jnp.array([3.0, 9, 9, 9]),
    )
    np.testing.assert_allclose(got.amount, [3, 2, 1, 4], rtol=1e-6)
    want = [Binding.CAP, Binding.FLOOR, Binding.FLOOR, Binding.PRICE]
    np.testing.assert_array_equal(got.binding, want)
    held = water_fill(
        jnp.ones(4), 10.0, segment_of=jnp.array([0, 0, 1, 1]), segment_cap=jnp.array([2.0, 99.0])
    )
    np.testing.assert_allclose(held.amount, [1, 1, 4, 4], rtol=1e-6)
    np.testing.assert_array_equal(held.binding, [Binding.DEVICE] * 2 + [Binding.PRICE] * 2)


def test_degenerate_weights():
    np.testing.assert_allclose(water_fill(jnp.zeros(4), 10.0).amount, 2.5)
    np.testing.assert_allclose(water_fill(jnp.array([0.0, 3.0]), 10.0).amount, [0, 10])
    np.testing.assert_allclose(water_fill(jnp.array([1e-30, 3e-30]), 10.0).amount, [2.5, 7.5])
    np.testing.assert_allclose(water_fill(jnp.array([1e38, 3e38]), 10.0).amount, [2.5, 7.5])


def test_budget_beyond_all_caps_is_slack():
    got = water_fill(jnp.array([1.0, 2.0]), 10.0, cap=jnp.array([2.0, 3.0]))
    np.testing.assert_allclose(got.amount, [2, 3])
    np.testing.assert_allclose(got.slack, 5)
    np.testing.assert_array_equal(got.binding, Binding.CAP)


def test_floors_that_do_not_fit_are_scaled_down_under_jit():
    got = jax.jit(water_fill)(jnp.ones(3), 6.0, jnp.array([6.0, 4.0, 2.0]))
    assert got.status == Status.INFEASIBLE
    np.testing.assert_allclose(got.amount, [3, 2, 1], rtol=1e-6)


@pytest.mark.parametrize(
    ("w", "budget"), [(np.nan, 6.0), (np.inf, 6.0), (-1.0, 6.0), (1.0, 0.0), (1.0, np.nan)]
)
def test_bad_values_have_a_status_under_jit(w, budget):
    assert jax.jit(water_fill)(jnp.array([1.0, w]), budget).status == Status.INVALID


ARGUMENTS = ("w", "budget", "floor", "cap")


@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize("argument", range(4), ids=ARGUMENTS)
def test_gradients_are_finite_differences(argument, with_segments):
    problem = [
        jnp.array([1.0, 4.0, 2.0, 0.2, 3.0, 1.5]),
        jnp.float32(10.0),
        jnp.array([0.1, 0.1, 0.1, 0.5, 0.1, 0.1]),
        jnp.array([9.0, 2.5, 9.0, 9.0, 9.0, 9.0]),
    ]
    segments = {
        "segment_of": jnp.array([0, 0, 1, 1, 2, 2]),
        "segment_floor": jnp.array([0.0, 0.0, 5.0]),
        "segment_cap": jnp.array([99.0, 2.0, 99.0]),
    }
    mix = jnp.array([1.0, -2.0, 0.5, 3.0, -1.0, 2.0])

    def f(x):
        changed = [*problem[:argument], x, *problem[argument + 1 :]]
        return mix @ water_fill(*changed, **segments if with_segments else {}).amount

    x, step = problem[argument], 0.03
    gradient = jax.grad(f)(x)
    directions = np.eye(np.size(x), dtype=np.float32).reshape(-1, *np.shape(x)) * step
    numeric = [(f(x + d) - f(x - d)) / (2 * step) for d in directions]
    np.testing.assert_allclose(np.ravel(gradient), numeric, atol=3e-3)


def test_gradients_are_finite_in_degenerate_cases():
    for w in (jnp.zeros(3), jnp.array([0.0, 0.0, 5.0]), jnp.ones(3)):
        gradient = jax.grad(lambda w: water_fill(w, 3.0, 0.5, 1.0).amount[0])(w)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.int32])
def test_other_dtypes(dtype):
    w = jnp.asarray([1, 2, 3, 0], dtype)
    got = water_fill(w, 12, jnp.asarray(1, dtype), jnp.asarray(5, dtype))
    assert got.amount.dtype == jnp.float32
    np.testing.assert_allclose(got.amount, [2, 4, 5, 1], rtol=1e-6)


def test_batches_and_compilation_change_nothing():
    rng = np.random.default_rng(13)
    w = rng.random((5, 20)).astype(np.float32)
    budget = rng.uniform(5, 30, 5).astype(np.float32)
    floor = 0.1 * rng.random((5, 20)).astype(np.float32)
    segments = {"segment_of": np.arange(20) % 4, "segment_floor": np.full(4, 1.0, np.float32)}

    def run(w, budget, floor):
        return water_fill(w, budget, floor, 4.0, **segments)

    batched = jax.jit(jax.vmap(run))(w, budget, floor)
    for i in range(5):
        eager = run(w[i], budget[i], floor[i])
        for got, want in zip(jax.tree.leaves(batched), jax.tree.leaves(eager), strict=True):
            np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-6)
