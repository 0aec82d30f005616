"""Placement: every unit once, no device over its count, against trying everything."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import Status, place


def best_relative_load(loads, capacity, max_count):
    """By trying all placements."""
    devices = range(len(capacity))
    choices = np.array(list(itertools.product(devices, repeat=len(loads))))
    held = choices[..., None] == np.arange(len(capacity))
    relative = ((held * loads[:, None]).sum(1) / capacity).max(1)
    return relative[(held.sum(1) <= max_count).all(1)].min()


def check(out, loads, capacity, max_count):
    """What holds for every placement of one layer."""
    out = jax.tree.map(np.asarray, out)
    size = len(capacity)
    assert out.device_of.shape == loads.shape
    assert ((out.device_of >= 0) & (out.device_of < size)).all()
    np.testing.assert_array_equal(out.count, np.bincount(out.device_of, minlength=size))
    np.testing.assert_allclose(out.load, np.bincount(out.device_of, loads, size), rtol=1e-5)
    assert (out.count <= max_count).all()
    np.testing.assert_allclose(out.relative_load, (out.load / capacity).max(), rtol=1e-6)
    assert out.bound <= out.relative_load * (1 + 1e-6)


@pytest.mark.parametrize("limited", [False, True])
def test_against_trying_everything(limited):
    rng = np.random.default_rng(0)
    num_units, num_devices, layers = 7, 3, 40
    loads = rng.lognormal(0, 1, (layers, num_units)).astype(np.float32)
    capacity = np.array([1, 1, 2], np.float32) if limited else np.ones(3, np.float32)
    max_count = 3 if limited else num_units

    def run(loads, swaps):
        return place.pack(
            loads,
            num_devices,
            jnp.asarray(capacity),
            max_count=max_count if limited else None,
            swaps=swaps,
        )

    plain = jax.vmap(lambda x: run(x, 0))(loads)
    refined = jax.vmap(lambda x: run(x, 100))(loads)
    assert (refined.relative_load <= plain.relative_load * (1 + 1e-6)).all()
    ratios = []
    for i in range(layers):
        for out in (plain, refined):
            check(jax.tree.map(lambda x, i=i: x[i], out), loads[i], capacity, max_count)
        best = best_relative_load(loads[i], capacity, max_count)
        assert refined.bound[i] <= best * (1 + 1e-6)
        assert refined.relative_load[i] >= best * (1 - 1e-6)
        if not limited:  # Graham's bound for longest first
            assert plain.relative_load[i] <= (4 / 3 - 1 / (3 * num_devices)) * best * (1 + 1e-6)
        ratios.append(refined.relative_load[i] / best)
    assert np.mean(ratios) < 1.05


@pytest.mark.parametrize("max_count", [None, 8])
def test_many_units(max_count):
    rng = np.random.default_rng(1)
    loads = rng.lognormal(0, 1, 64).astype(np.float32)
    out = place.pack(loads, 8, max_count=max_count)
    check(out, loads, np.ones(8), max_count or 64)
    assert out.relative_load <= out.bound * 1.02


def test_equal_counts_when_there_is_no_room():
    out = place.pack(jnp.arange(12.0), 4, max_count=3)
    np.testing.assert_array_equal(out.count, 3)


def test_capacity():
    loads = jnp.array([6.0, 3.0, 3.0])
    fits = place.pack(loads, 2, jnp.array([9.0, 3.0]))
    np.testing.assert_array_equal(fits.load, [9, 3])
    assert fits.status == Status.OK
    assert fits.relative_load == 1
    assert place.pack(loads, 2, jnp.array([9.0, 2.0])).status == Status.INFEASIBLE


def test_degenerate_loads():
    assert place.pack(jnp.zeros(5), 2).relative_load == 0
    one = place.pack(jnp.array([4.0]), 3)
    np.testing.assert_array_equal(np.sort(one.load), [0, 0, 4])
    np.testing.assert_array_equal(place.pack(jnp.arange(4.0), 1).device_of, 0)


def test_layers_and_compilation_change_nothing():
    loads = np.random.default_rng(2).random((5, 16)).astype(np.float32)
    batched = jax.jit(jax.vmap(lambda x: place.pack(x, 4, max_count=4)))(loads)
    for i, row in enumerate(loads):
        alone = place.pack(row, 4, max_count=4)
        np.testing.assert_array_equal(batched.device_of[i], alone.device_of)
        np.testing.assert_allclose(batched.load[i], alone.load, rtol=1e-6)
