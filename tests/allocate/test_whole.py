"""Whole amounts: the heap greedy unit for unit, exact sums, quotas, and what limits each unit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import Binding, Status
from jbalance.allocate import ROUNDINGS, whole
from tests.support.allocation_oracles import heap_greedy, heap_greedy_on_devices

WEIGHTS = {
    "many ties": lambda rng, n: rng.integers(0, 4, n),
    "all alike": lambda rng, n: np.full(n, 0.3),
    "all zero": lambda rng, n: np.zeros(n),
    "half zero": lambda rng, n: rng.random(n) * (rng.random(n) < 0.5),
    "lognormal": lambda rng, n: rng.lognormal(0, 2, n),
    "thirty decades of two": lambda rng, n: 2.0 ** rng.integers(-30, 30, n),
    "tiny": lambda rng, n: rng.uniform(0.1, 1, n) * 3e-37,
    "huge": lambda rng, n: rng.random(n) * 3e38,
    "all of float32": lambda rng, n: 10.0 ** rng.uniform(-37, 37, n),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_heap_greedy_unit_for_unit(kind):
    rng = np.random.default_rng(1)
    num_units = 40
    for _ in range(12):
        w = WEIGHTS[kind](rng, num_units).astype(np.float32)
        floor = rng.integers(0, 5, num_units) * (rng.random(num_units) < 0.3)
        cap = floor + rng.integers(0, 60, num_units)
        budget = rng.integers(floor.sum(), cap.sum() + 50)
        got = whole(w, budget, floor.astype(np.int32), cap.astype(np.int32))
        np.testing.assert_array_equal(got.amount, heap_greedy(w, budget, floor, cap))
        assert int(got.amount.sum() + got.slack) == budget


@pytest.mark.parametrize(
    ("num_units", "budget"), [(1, 7), (2, 100_001), (1000, 64_000), (10_000, 30_000)]
)
def test_the_heap_greedy_on_many_units(num_units, budget):
    rng = np.random.default_rng(num_units)
    for w in (rng.lognormal(0, 1.5, num_units), rng.integers(0, 50, num_units)):
        w = w.astype(np.float32)
        np.testing.assert_array_equal(whole(w, budget).amount, heap_greedy(w, budget))


def test_the_heap_greedy_on_every_device():
    rng = np.random.default_rng(3)
    for _ in range(15):
        w = rng.choice([0, 1, 2, 3.5, 7], 60).astype(np.float32)
        device_of = rng.integers(0, 5, 60).astype(np.int32)
        w[device_of == 4] = 0
        floor = rng.integers(0, 3, 60).astype(np.int32)
        cap = floor + rng.integers(0, 40, 60).astype(np.int32)
        budgets = np.bincount(device_of, floor, 5).astype(np.int32) + rng.integers(0, 200, 5)
        got = whole(w, budgets, floor, cap, device_of)
        want = heap_greedy_on_devices(w, budgets, floor, cap, device_of)
        np.testing.assert_array_equal(got.amount, want)
        spent = np.bincount(device_of, got.amount, 5)
        np.testing.assert_array_equal(spent + np.asarray(got.slack), budgets)


def test_small_caps_on_heavy_units():
    """Far above its cap, a unit's claim once wrapped past 2^32 and left it with less."""
    w = np.array([0.10977527, 4.058713e-16, 3.2444240e-17, 5.2508836e-19], np.float32)
    cap = np.array([18, 3, 24, 7], np.int32)
    np.testing.assert_array_equal(whole(w, 37, 0, cap).amount, [18, 3, 16, 0])


@pytest.mark.parametrize("method", ROUNDINGS)
def test_the_sum_is_exact(method):
    """100 000 001 over three alike: a float32 share of it rounds up, and three are one too many."""
    budgets = [0, 1, 2, 5, 99_999, 2**22] + [100_000_001, 2**31 - 1] * (method == "webster")
    for budget in budgets:
        amount = np.asarray(whole(jnp.ones(3), budget, method=method).amount, np.int64)
        assert amount.sum() == budget
        assert amount.max() - amount.min() <= 1


def test_largest_remainder_stays_within_one_of_the_share():
    rng = np.random.default_rng(4)
    for _ in range(40):
        w = rng.lognormal(0, 1, 30).astype(np.float32)
        budget = int(rng.integers(0, 5000))
        share = w.astype(np.float64) / w.sum(dtype=np.float64) * budget
        amount = np.asarray(whole(w, budget, method="largest_remainder").amount)
        assert amount.sum() == budget
        assert np.abs(amount - share).max() < 1 + 1e-6
        order = np.lexsort((np.arange(30), -(share - np.floor(share))))
        want = np.floor(share).astype(int)
        want[order[: budget - want.sum()]] += 1
        np.testing.assert_array_equal(amount, want)


def test_largest_remainder_keeps_floors_caps_and_devices():
    rng = np.random.default_rng(5)
    device_of = rng.integers(0, 3, 50).astype(np.int32)
    floor = rng.integers(0, 4, 50).astype(np.int32)
    cap = floor + rng.integers(1, 30, 50).astype(np.int32)
    budgets = np.bincount(device_of, floor, 3).astype(np.int32) + np.array([0, 77, 5])
    got = whole(rng.random(50), budgets, floor, cap, device_of, method="largest_remainder")
    amount = np.asarray(got.amount)
    assert (amount >= floor).all()
    assert (amount <= cap).all()
    np.testing.assert_array_equal(np.bincount(device_of, amount, 3), budgets)


def test_largest_remainder_is_not_monotone_and_webster_is():
    """With one seat more to share out, the smallest loses one (the Alabama paradox)."""
    w = jnp.array([6.0, 6.0, 2.0])
    remainder = [whole(w, b, method="largest_remainder").amount for b in (10, 11)]
    np.testing.assert_array_equal(remainder, [[4, 4, 2], [5, 5, 1]])
    webster = [whole(w, b).amount for b in range(40)]
    assert (np.diff(webster, axis=0) >= 0).all()


@pytest.mark.parametrize("method", ROUNDINGS)
def test_what_limits_each_unit(method):
    got = whole(
        jnp.array([8.0, 8.0, 0.1, 0.0]),
        20,
        jnp.array([0, 0, 3, 0]),
        jnp.array([5, 99, 99, 99]),
        method=method,
    )
    np.testing.assert_array_equal(got.amount, [5, 12, 3, 0])
    np.testing.assert_array_equal(
        got.binding, [Binding.CAP, Binding.PRICE, Binding.FLOOR, Binding.CAP]
    )
    np.testing.assert_allclose(got.price, 8 / 12.5, rtol=1e-6)
    assert got.slack == 0


def test_the_price_is_that_of_the_next_unit():
    rng = np.random.default_rng(6)
    w = rng.lognormal(0, 1, 20).astype(np.float32)
    before, after = whole(w, 200), whole(w, 201)
    gets_it = int(np.argmax(np.asarray(after.amount - before.amount)))
    np.testing.assert_allclose(before.price, w[gets_it] / (before.amount[gets_it] + 0.5), rtol=1e-6)
    # No free unit's last step was worth less than the price, none's next step more.
    assert (w / (np.asarray(before.amount) - 0.5) >= float(before.price))[before.amount > 0].all()
    assert (w / (np.asarray(before.amount) + 0.5) <= float(before.price) * (1 + 1e-6)).all()


@pytest.mark.parametrize("method", ROUNDINGS)
def test_floors_that_do_not_fit_are_scaled_down_under_jit(method):
    run = jax.jit(lambda w, budgets, floor: whole(w, budgets, floor, 50, DEVICE_OF, method=method))
    got = run(jnp.ones(6), jnp.array([10, 20]), jnp.array([9, 6, 3, 4, 4, 4]))
    assert got.status == Status.INFEASIBLE
    np.testing.assert_array_equal(got.amount, [5, 3, 2, 7, 7, 6])


DEVICE_OF = np.array([0, 0, 0, 1, 1, 1], np.int32)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("method", ROUNDINGS)
def test_bad_weights_have_a_status_under_jit(method, bad):
    got = jax.jit(lambda w: whole(w, 7, method=method))(jnp.array([1.0, bad]))
    assert got.status == Status.INVALID


@pytest.mark.parametrize("method", ROUNDINGS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.int32])
def test_other_dtypes(method, dtype):
    w = jnp.asarray([3, 1, 2, 0], dtype)
    got = whole(w, jnp.int16(60), jnp.uint8(1), method=method)
    np.testing.assert_array_equal(got.amount, [29, 10, 20, 1])
    assert got.amount.dtype == jnp.int32


@pytest.mark.parametrize("method", ROUNDINGS)
def test_batches_and_compilation_change_nothing(method):
    rng = np.random.default_rng(7)
    w = rng.integers(0, 20, (6, 30)).astype(np.float32)
    budgets = rng.integers(0, 900, (6, 3)).astype(np.int32)
    device_of = rng.integers(0, 3, (6, 30)).astype(np.int32)

    def run(w, budgets, device_of):
        return whole(w, budgets, 0, 60, device_of, method=method)

    batched = jax.jit(jax.vmap(run))(w, budgets, device_of)
    for i in range(6):
        eager = run(w[i], budgets[i], device_of[i])
        jax.tree.map(
            np.testing.assert_array_equal, jax.tree.map(lambda x, i=i: x[i], batched), eager
        )


def test_a_rounding_of_ones_own_is_a_row_of_the_table(monkeypatch):
    def first_come(w, budgets, floor, cap, devices):
        return floor + devices.first(cap - floor, budgets - devices.total(floor))

    monkeypatch.setitem(ROUNDINGS, "first_come", first_come)
    device_of = np.array([0, 0, 1, 1, 1])
    out = whole(np.ones(5), np.array([6, 7]), 1, 4, device_of, method="first_come")
    assert out.amount.tolist() == [4, 2, 4, 2, 1]
    assert out.slack.tolist() == [0, 0]
