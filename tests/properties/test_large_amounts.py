"""A million units, budgets up to 2^31 - 1 blocks, bytes far past 2^31: sums stay exact."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import Status, resources
from jbalance.allocate import ladder, water_fill, whole

MILLION = 1_000_000
MOST = 2**31 - 1


@pytest.fixture(scope="module")
def w():
    return np.random.default_rng(0).lognormal(0, 2, MILLION).astype(np.float32)


@pytest.mark.parametrize("with_devices", [False, True])
def test_whole_amounts_of_a_million(w, with_devices):
    device_of = (np.arange(MILLION) % 3).astype(np.int32)
    run = jax.jit(
        lambda w, budget, cap: whole(w, budget, 1, cap, device_of if with_devices else None)
    )
    budgets = np.array([MOST, 5_000_000, MOST - 7] if with_devices else MOST)
    before = None
    for less in (1000, 1, 0):
        out = run(w, budgets - less, MOST)
        amount = np.asarray(out.amount, np.int64)
        sums = np.bincount(device_of, amount, 3) if with_devices else amount.sum()
        np.testing.assert_array_equal(sums, budgets - less)
        assert amount.min() >= 1
        # Not one unit loses when the budget grows.
        assert before is None or (amount >= before).all()
        before = amount
    # While searching, a million caps of 10^6 would sum to 10^12: no wrap may hide in it.
    capped = np.asarray(run(w, budgets, 1_000_000).amount, np.int64)
    np.testing.assert_array_equal(
        np.bincount(device_of, capped, 3) if with_devices else capped.sum(), budgets
    )


def test_two_units_share_the_largest_budget():
    out = whole(jnp.array([1.0, 2.0]), MOST)
    np.testing.assert_array_equal(out.amount, [715827882, 1431655765])


def test_ladder_of_a_million_takes_the_best_steps(w):
    """Equal steps of 2^16: all of them would cost 2^37, and the best that fit are what a sort says."""
    steps = np.stack([w, w / 2, w / 8], 1)
    values = np.concatenate([np.zeros((MILLION, 1), np.float32), np.cumsum(steps, 1)], 1)
    step_cost = 2**16
    for budget in (MOST, 12_345 * step_cost - 1, step_cost - 1):
        out = ladder(values, step_cost * np.arange(4, dtype=np.int32), budget)
        number = budget // step_cost
        assert out.status == Status.OK
        assert int(out.spent[0]) == number * step_cost
        assert int(out.slack[0]) == budget - number * step_cost
        assert int(out.level.sum()) == number
        taken = np.arange(3) < np.asarray(out.level)[:, None]
        best = np.sort(np.diff(values, axis=1).ravel())[::-1][:number].sum(dtype=np.float64)
        np.testing.assert_allclose(steps[taken].sum(dtype=np.float64), best, rtol=1e-6)


def test_device_budgets_in_bytes_past_32_bits(w):
    """Eight devices of tens of GiB: counted in blocks inside, checked in bytes outside."""
    block_bytes, levels = 4096, np.array([0, 3, 4, 8, 16]) * 1024  # blocks of each level
    budgets_bytes = [80 * 2**30, 40 * 2**30 + 1, 5 * 2**40, 4096, 0, 2**35, 2**31 + 4095, 2**33]
    device_of = np.random.default_rng(1).integers(0, 8, MILLION).astype(np.int32)
    values = w[:, None] * np.array([0, 0.5, 0.7, 0.9, 1], np.float32)
    total_bytes = 3 * 2**40
    out = ladder(
        values,
        levels.astype(np.int32),
        resources.blocks(budgets_bytes, block_bytes),
        device_of,
        total_budget=resources.blocks(total_bytes, block_bytes),
    )
    blocks = np.bincount(device_of, levels[np.asarray(out.level)], 8).astype(np.int64)
    np.testing.assert_array_equal(out.spent, blocks)
    spent_bytes = [int(n) * block_bytes for n in blocks]
    assert all(s <= b for s, b in zip(spent_bytes, budgets_bytes, strict=True))
    assert sum(spent_bytes) <= total_bytes
    # All but the small change of one level is used where there is demand.
    assert total_bytes - sum(spent_bytes) < block_bytes * levels[-1]
    assert spent_bytes[2] > 2**31


def test_water_of_a_million(w):
    out = jax.jit(water_fill)(w, 64e6, 4.0, 512.0)
    amount = np.asarray(out.amount, np.float64)
    np.testing.assert_allclose(amount.sum(), 64e6, rtol=1e-6)
    assert amount.min() >= 4
    assert amount.max() <= 512
