"""Tasks of one step: exact sums, what is used and needed stays, starting and ending is data."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jbalance as jb
from jbalance import shares, tasks
from jbalance.types import Status
from tests.support.examples import few

N, G = 4, 2
# METHOD's two tasks and two more, on two devices.
W = jnp.array([0.42, 0.38, 0.2, 0.5])
CAPACITY = np.array([200, 60])
DEMAND = np.array([[50, 30, 100, 90], [20, 20, 20, 20]])
USED = np.array([[20, 15, 120, 0], [10, 25, 0, 0]])
GIVEN = {"batch": 16, "tokens": 1000, "capacity": CAPACITY, "demand": DEMAND, "used": USED}


@jax.jit
def divided(w, active, capacity, demand, used):
    given = {"capacity": capacity, "demand": demand, "used": used}
    return tasks.divide(w, active, batch=9, tokens=70, floor=0.05, **given)


def test_the_methods_example():
    out = tasks.divide(
        jnp.array([0.42, 0.38]),
        jnp.ones(2, bool),
        batch=40,
        tokens=400,
        capacity=np.array([200]),
        demand=np.array([[50, 30]]),
        used=np.array([[20, 15]]),
    )
    np.testing.assert_allclose(out.alpha, [0.525, 0.475], rtol=1e-6)
    assert out.examples.tolist() == [21, 19]
    assert out.tokens.tolist() == [210, 190]
    assert out.cache.tolist() == [[50, 30]]  # 165 remain: both get what they need
    left = tasks.remaining(np.array([200]), np.array([[50, 30]]), np.array([[20, 15]]))
    assert left.total_remaining == 165


def test_what_is_used_and_needed_stays_and_the_rest_goes_by_shares():
    out = tasks.divide(W, jnp.ones(N, bool), **GIVEN)
    kept = np.minimum(DEMAND, USED)
    assert (np.asarray(out.cache) >= kept).all()
    assert (np.asarray(out.cache) <= DEMAND).all()
    assert out.cache.sum(axis=1).tolist() == [200, 60]
    assert out.examples.sum() == 16
    assert out.tokens.sum() == 1000


def test_tasks_that_end_and_start_do_not_compile_anew():
    @jax.jit
    @chex.assert_max_traces(1)
    def step(w, active):
        out = tasks.divide(w, active, **GIVEN)
        return out, tasks.task_of(out.examples, 16)

    for active in ([1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]):
        active = np.array(active, bool)
        out, whose = step(W, active)
        for amount in (out.alpha, out.examples, out.tokens, *out.cache):
            assert (np.asarray(amount)[~active] == 0).all()
        there = bool(active.any())
        assert out.examples.sum() == 16 * there
        assert out.tokens.sum() == 1000 * there
        counted = np.bincount(whose, minlength=N + 1)
        assert counted[:N].tolist() == out.examples.tolist()
        assert out.status == Status.OK


@few(40)
@given(st.integers(0, 2**31))
def test_no_device_gives_more_than_it_has(seed):
    rng = np.random.default_rng(seed)
    demand, used = rng.integers(0, 60, (2, G, N))
    capacity = rng.integers(1, 200, G)
    active = rng.random(N) < 0.7
    out = divided(rng.random(N).astype(np.float32), active, capacity, demand, used)
    cache, need = np.asarray(out.cache), demand * active
    assert (cache.sum(axis=1) <= capacity).all()
    kept = np.minimum(need, used)
    fits = kept.sum(axis=1) <= capacity
    assert (cache[fits] >= kept[fits]).all()
    assert (cache <= need).all()
    assert (cache.sum(axis=1)[fits] == np.minimum(capacity, need.sum(axis=1))[fits]).all()
    assert (out.status == Status.INFEASIBLE) == (not fits.all())
    if active.any():
        assert (np.asarray(out.alpha)[active] >= 0.05 - 1e-6).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"demand": DEMAND[:1]}, r"demand has shape \(1, 4\)"),
        ({"used": USED - 500}, "used"),
        ({"capacity": 200}, "demand has shape|capacity"),
        ({"floor": 0.3}, "floor"),
    ],
)
def test_bad_input_names_itself(change, message):
    with pytest.raises(ValueError, match=message):
        tasks.divide(W, jnp.ones(N, bool), **(GIVEN | change))


def test_an_audit_finds_the_group_that_is_left_out_and_floors_mend_it():
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1, 2], [6, 3, 1])
    w = rng.random(10) * np.array([1.0, 1.0, 0.05])[group]
    alpha = jb.shares.proportional(w)
    error = np.where(group == 2, 0.8, 0.2)
    seen = jb.audit.by_group(alpha, group, 3, error)
    assert seen.count.tolist() == [6, 3, 1]
    np.testing.assert_allclose(seen.attention.sum(), 1, rtol=1e-6)
    assert seen.least_parity == seen.parity[2] < 0.2
    np.testing.assert_allclose(seen.error_gap, 0.6, rtol=1e-5)
    floors = np.array([0.0, 0.0, 0.1])
    fair = jb.shares.constrained(alpha, group_of=group, group_floor=floors)
    assert jb.audit.by_group(fair, group, 3).parity[2] >= 1 - 1e-5


def test_an_audit_of_empty_groups_and_bad_input():
    seen = jb.audit.by_group(jnp.ones(4), jnp.array([0, 0, 2, 2]), 3)
    assert seen.parity.tolist() == [1, 0, 1]
    assert seen.least_parity == 1
    assert seen.error_gap == 0
    for call, message in (
        (lambda: jb.audit.by_group(-jnp.ones(2), jnp.zeros(2, int), 1), "attention"),
        (lambda: jb.audit.by_group(jnp.ones(2), jnp.array([0, 3]), 3), "group_of"),
        (lambda: jb.audit.by_group(jnp.ones(2), jnp.zeros(2, int), 1, jnp.ones(3)), "error"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_what_is_in_use_does_not_wrap():
    """Five times 10^9 blocks on a device of 2 10^9: scaled down to what there is."""
    most = np.full((1, 5), 10**9)
    out = tasks.divide(
        np.ones(5),
        np.ones(5, bool),
        batch=1,
        tokens=1,
        capacity=[2 * 10**9],
        demand=most,
        used=most,
    )
    assert out.status == Status.INFEASIBLE
    np.testing.assert_array_equal(out.cache, np.full((1, 5), 4 * 10**8))


@pytest.mark.parametrize("bad", [np.nan, -np.inf, -1.0])
def test_no_importance_is_not_the_same_for_all(bad):
    w = np.array([0, 0, 0, bad], np.float32)
    assert divided(w, np.ones(N, bool), CAPACITY, DEMAND, USED).status == Status.INVALID
    assert np.isnan(jax.jit(shares.proportional)(w)).all()
