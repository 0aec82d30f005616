"""Copies: every unit somewhere, never twice on a device, as balanced as any; re-placement."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jbalance import Status, place
from jbalance.place import Term
from jbalance.place.drift import moved_blocks


def check(out, loads, num_devices, num_slots):
    """What holds for the replicas of one layer."""
    out = jax.tree.map(np.asarray, out)
    num_units, places = len(loads), -(-num_slots // num_devices)
    assert out.unit_of.shape == (num_devices, places)
    assert ((out.unit_of >= 0) & (out.unit_of <= num_units)).all()
    for row in out.unit_of:
        held = row[row < num_units]
        assert len(set(held)) == len(held)
    counts = np.bincount(out.unit_of.ravel(), minlength=num_units + 1)[:num_units]
    np.testing.assert_array_equal(out.copies, counts)
    assert out.copies.min() >= 1
    assert out.copies.sum() == num_slots
    np.testing.assert_array_equal(out.count, (out.unit_of < num_units).sum(axis=1))
    shares = np.append(loads / counts, 0)
    np.testing.assert_allclose(out.load, shares[out.unit_of].sum(axis=1), rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(out.relative_load, out.load.max(), rtol=1e-6)
    assert out.bound <= out.relative_load * (1 + 1e-5)


def least_load(loads, num_devices, num_slots):
    """By trying every set of units on every device."""
    num_units, places = len(loads), -(-num_slots // num_devices)
    sets = np.array(
        [s for s in itertools.product([0, 1], repeat=num_units) if 1 <= sum(s) <= places]
    )
    rows = itertools.combinations_with_replacement(range(len(sets)), num_devices)
    held = sets[np.array(list(rows))]
    copies = held.sum(axis=1)
    held = held[(copies.min(axis=1) >= 1) & (copies.sum(axis=1) == num_slots)]
    return (held * (loads / held.sum(axis=1))[:, None]).sum(axis=2).max(axis=1).min()


def test_against_trying_everything():
    rng = np.random.default_rng(0)
    loads = rng.lognormal(0, 1, (25, 4)).astype(np.float32)
    out = jax.tree.map(np.asarray, jax.vmap(lambda x: place.replicate(x, 3, 6))(loads))
    ratios = []
    for i, row in enumerate(loads):
        check(jax.tree.map(lambda x, i=i: x[i], out), row, 3, 6)
        best = least_load(row, 3, 6)
        assert out.bound[i] <= best * (1 + 1e-6)
        assert out.relative_load[i] >= best * (1 - 1e-6)
        ratios.append(out.relative_load[i] / best)
    assert np.mean(ratios) < 1.02


@given(
    loads=arrays(np.float32, 5, elements=st.floats(0, 100, width=32, allow_subnormal=False)),
    slots=st.just(11),
)
def test_properties(loads, slots):
    check(place.replicate(loads, 4, slots, swaps=8), loads, 4, slots)


def test_experts():
    """256 units in 288 slots, three a device: the hard zone."""
    rng, devices = np.random.default_rng(1), 96
    ranks = np.arange(1, 257) ** -0.6
    loads = (rng.permuted(np.tile(ranks, (2, 1)), axis=1)).astype(np.float32)
    loads *= rng.lognormal(0, 0.05, loads.shape).astype(np.float32)
    out = jax.tree.map(np.asarray, jax.vmap(lambda x: place.replicate(x, devices, 288))(loads))
    for i, row in enumerate(loads):
        check(jax.tree.map(lambda x, i=i: x[i], out), row, devices, 288)
    assert np.mean(out.relative_load / out.bound) <= 1.06


def test_longest_first_in_a_corner_deals_in_turn():
    """Zero loads leave the last copies of a unit only devices that have it."""
    for loads in (np.zeros(3, np.float32), np.array([100, 1, 0], np.float32)):
        check(place.replicate(loads, 3, 9, swaps=0), loads, 3, 9)
    loads = np.array([50, 0, 0, 0], np.float32)
    check(place.replicate(loads, 3, 9, swaps=0), loads, 3, 9)


def test_layers_compilation_and_new_values_change_nothing():
    loads = np.random.default_rng(2).lognormal(0, 1, (4, 12)).astype(np.float32)
    traces = 0

    def run(x):
        nonlocal traces
        traces += 1
        return place.replicate(x, 4, 16, swaps=8)

    compiled = jax.jit(run)
    batched = jax.tree.map(np.asarray, jax.jit(jax.vmap(run))(loads))
    for i, row in enumerate(loads):
        np.testing.assert_array_equal(batched.unit_of[i], compiled(row).unit_of)
    assert traces == 2
    assert compiled(loads[0] * np.nan).status == Status.INVALID


def test_units_move_where_it_pays():
    rng = np.random.default_rng(5)
    loads = rng.lognormal(0, 1, 24).astype(np.float32)
    size = rng.integers(1, 9, 24)
    now = place.pack(loads, 4, max_count=6)
    drifted = loads * rng.lognormal(0, 0.5, 24).astype(np.float32)
    before = np.bincount(now.device_of, drifted, 4).max()
    moved = []
    for cost in (0.0, 0.01, 1e3):
        out = place.rebalance(
            now.device_of, drifted, size, 4, max_count=6, cost=cost, threshold=0.0
        )
        np.testing.assert_allclose(out.load_before, before, rtol=1e-6)
        out = jax.tree.map(np.asarray, out)
        new = out.placement.device_of
        changed = new != np.asarray(now.device_of)
        np.testing.assert_array_equal(out.moved.any(axis=1), changed)
        assert out.moved[np.arange(24), new].sum() == changed.sum()
        assert out.moved_blocks == size[changed].sum()
        assert (out.placement.count <= 6).all()
        assert out.placement.relative_load + cost * out.moved_blocks <= before * (1 + 1e-6)
        moved.append(int(out.moved_blocks))
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > 0
    assert moved[-1] == 0
    most = place.rebalance(now.device_of, drifted, size, 4, max_count=6, threshold=0.0)
    gain = 1 - most.placement.relative_load / before
    kept = place.rebalance(now.device_of, drifted, size, 4, max_count=6, threshold=gain + 0.1)
    assert not kept.moved.any()


def test_what_does_not_fit_moves_at_any_cost():
    out = place.rebalance(
        *(jnp.array([0, 0]), jnp.ones(2), jnp.array([4, 4]), 2),
        memory_capacity=jnp.array([4, 4]),
        cost=1e6,
    )
    np.testing.assert_array_equal(np.sort(out.placement.device_of), [0, 1])
    assert out.moved_blocks == 4
    assert out.placement.status == Status.OK
    assert int(moved_blocks(np.ones((1, 3), bool), [2**31 - 1])) == 2**32 - 1  # saturates


@pytest.mark.parametrize(
    ("loads", "term", "more"),
    [
        ([1, 1, 1, 1], Term.MEAN, {}),
        ([9, 1, 1, 1], Term.LARGEST, {}),
        ([3, 3, 3], Term.PIGEON_HOLE, {}),
        ([9, 2, 2, 2], Term.COUNT, {"max_count": 2}),
        ([6, 1, 1, 1], Term.MEAN, {"num_slots": 5}),
        ([2, 2, 1, 1], Term.GROUP, {"group_of": np.array([0, 0, 1, 1]), "num_nodes": 2}),
    ],
)
def test_what_binds(loads, term, more):
    assert place.bound(np.array(loads, float), 2, **more).term == term


def test_bounds_are_bounds():
    """Of capacities, counts and groups, against trying everything."""
    rng = np.random.default_rng(6)
    loads = rng.lognormal(0, 1, (20, 7)).astype(np.float32)
    capacity = np.array([1, 1, 2, 1], np.float32)
    group_of = np.array([0, 0, 1, 1, 2, 2, 3])
    choices = np.array(list(itertools.product(range(4), repeat=7)))
    held = choices[..., None] == np.arange(4)
    even = (held.sum(axis=1) <= 2).all(axis=1)
    nodes = choices // 2
    together = (nodes == nodes[:, np.array([0, 0, 2, 2, 4, 4, 6])]).all(axis=1)
    for row in loads:
        load = np.stack([np.where(choices == d, row, 0).sum(axis=1) for d in range(4)], axis=1)
        for allowed, on, more in (
            (even, np.ones(4), {"max_count": 2}),
            (even, capacity, {"max_count": 2, "capacity": capacity}),
            (together, np.ones(4), {"group_of": group_of, "num_nodes": 2}),
        ):
            best = (load[allowed] / on).max(axis=1).min()
            assert place.bound(row, 4, **more).value <= best * (1 + 1e-6)
