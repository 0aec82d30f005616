"""Placement: every unit once, no device over its count, against trying everything."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import Bounds, LinearConstraint, milp

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
    relative = (out.load / capacity).max()
    np.testing.assert_allclose(out.relative_load, relative, rtol=1e-6, atol=1e-37)
    assert out.bound <= out.relative_load * (1 + 1e-6) + 1e-37


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

    plain = jax.tree.map(np.asarray, jax.vmap(lambda x: run(x, 0))(loads))
    refined = jax.tree.map(np.asarray, jax.vmap(lambda x: run(x, 100))(loads))
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


def least_makespan(loads, num_devices, memory=None, room=None):
    """By an integer programme: x [U, G] in {0, 1}, least t with every device's load <= t."""
    num_units = loads.size
    size = num_units * num_devices
    once = np.kron(np.eye(num_units), np.ones(num_devices))
    on = np.kron(np.ones(num_units), np.eye(num_devices))
    rows = [
        LinearConstraint(np.c_[once, np.zeros(num_units)], 1, 1),
        LinearConstraint(np.c_[on * np.repeat(loads, num_devices), -np.ones(num_devices)], ub=0),
    ]
    if memory is not None:
        held = np.c_[on * np.repeat(memory, num_devices), np.zeros(num_devices)]
        rows.append(LinearConstraint(held, ub=room))
    upper = np.append(np.ones(size), np.inf)
    whole = np.append(np.ones(size), 0)
    found = milp(np.eye(size + 1)[-1], constraints=rows, bounds=Bounds(0, upper), integrality=whole)
    return found.fun if found.success else None


def test_memory_and_compute_at_once_against_an_integer_programme():
    rng = np.random.default_rng(3)
    loads = rng.lognormal(0, 1, (12, 9)).astype(np.float32)
    memory = rng.integers(1, 9, loads.shape).astype(np.float32)
    room = np.array([0.45, 0.4, 0.3], np.float32) * memory.sum(axis=1, keepdims=True)
    room = np.floor(room)

    def run(loads, memory, room):
        return place.pack(loads, 3, memory=memory, memory_capacity=room)

    out = jax.tree.map(np.asarray, jax.vmap(run)(loads, memory, room))
    ratios = []
    for i in range(len(loads)):
        best = least_makespan(loads[i], 3, memory[i], room[i])
        held = np.bincount(out.device_of[i], memory[i], 3)
        assert (out.status[i] == Status.OK) == (held <= room[i]).all()
        assert out.bound[i] <= best * (1 + 1e-6)
        if out.status[i] == Status.OK:
            assert out.relative_load[i] >= best * (1 - 1e-6)
            ratios.append(out.relative_load[i] / best)
    assert len(ratios) >= 11
    assert np.mean(ratios) < 1.02


@pytest.mark.parametrize("max_count", [None, 3])
@pytest.mark.parametrize("limited", [False, True])
def test_what_fits_is_found(limited, max_count):
    """Memory, capacity and counts with little or no room to spare, against trying everything."""
    rng = np.random.default_rng(20 + limited)
    number, num_units, num_devices = 400, 7, 3
    choices = np.array(list(itertools.product(range(num_devices), repeat=num_units)))
    held = (choices[..., None] == np.arange(num_devices)).astype(np.float32)
    held = held[(held.sum(1) <= (max_count or num_units)).all(1)]
    loads, memory = rng.integers(0, 9, (2, number, num_units)).astype(np.float32)
    some = held[rng.integers(0, len(held), number)]  # fits, but for what is taken away below
    room, capacity = (np.einsum("nu,nug->ng", x, some) for x in (memory, loads))
    room = np.maximum(room + rng.integers(-1, 2, room.shape), 1).astype(np.float32)
    capacity = np.maximum(capacity + rng.integers(0, 3, room.shape), 1).astype(np.float32)

    def run(loads, memory, room, capacity):
        return place.pack(
            loads,
            num_devices,
            capacity if limited else None,
            max_count=max_count,
            memory=memory,
            memory_capacity=room,
        )

    out = jax.tree.map(np.asarray, jax.vmap(run)(loads, memory, room, capacity))
    fits = (np.einsum("nu,cug->ncg", memory, held) <= room[:, None]).all(2)
    if limited:
        fits &= (np.einsum("nu,cug->ncg", loads, held) <= capacity[:, None]).all(2)
    np.testing.assert_array_equal(out.status == Status.OK, fits.any(1))
    assert 0.3 < fits.any(1).mean() < 0.99
    for i in range(number):
        used = np.bincount(out.device_of[i], memory[i], num_devices)
        assert (used <= room[i]).all() or out.status[i] == Status.INFEASIBLE
        assert (out.count[i] <= (max_count or num_units)).all()


def test_memory_over_by_one_is_infeasible():
    ones = jnp.ones(2)
    for memory, want in (([3.0, 3.0], Status.OK), ([3.0, 4.0], Status.INFEASIBLE)):
        for swaps in (0, 16):
            out = place.pack(
                ones, 1, memory=jnp.array(memory), memory_capacity=jnp.array([6.0]), swaps=swaps
            )
            assert out.status == want


@given(
    loads=arrays(np.float32, 12, elements=st.floats(0, 100, width=32, allow_subnormal=False)),
    limited=st.booleans(),
)
def test_properties(loads, limited):
    capacity = np.array([1, 2, 5, 0.5] if limited else [1, 1, 1, 1], np.float32)
    max_count = 3 if limited else None
    out = place.pack(loads, 4, capacity, max_count=max_count, swaps=16)
    check(out, loads, capacity, max_count or 12)


def test_very_uneven_counts():
    """One unit outweighs all others, which go to the other device: more than the search looks at."""
    loads = np.append(np.ones(200, np.float32), 1000)
    out = place.pack(loads, 2)
    np.testing.assert_array_equal(np.sort(out.count), [1, 200])


def test_units_in_another_order_go_where_they_went():
    rng = np.random.default_rng(5)
    loads = rng.lognormal(0, 1, 40).astype(np.float32)
    order = rng.permutation(40)
    straight, permuted = place.pack(loads, 5), place.pack(loads[order], 5)
    np.testing.assert_array_equal(permuted.device_of, straight.device_of[order])


def test_other_dtypes_are_placed_as_float32():
    loads = jnp.arange(1, 13).astype(jnp.bfloat16)
    out = place.pack(loads, 3)
    np.testing.assert_array_equal(out.load, [26, 26, 26])
    assert out.load.dtype == jnp.float32


def test_new_values_do_not_compile_again():
    traces = 0

    @jax.jit
    def run(loads, capacity):
        nonlocal traces
        traces += 1
        return place.pack(loads, 3, capacity).device_of

    for scale in (1.0, 2.0, 3.0):
        run(scale * jnp.arange(1.0, 8), scale * jnp.array([9.0, 20.0, 30.0]))
    assert traces == 1


def test_under_jit_bad_loads_are_invalid():
    run = jax.jit(lambda x: place.pack(x, 2).status)
    assert run(jnp.array([1.0, jnp.nan])) == Status.INVALID
    assert run(jnp.array([1.0, -1.0])) == Status.INVALID
    assert run(jnp.array([1.0, 0.0])) == Status.OK


@pytest.mark.parametrize("name", place.PLACERS)
def test_every_placer(name):
    loads = np.random.default_rng(6).random(10).astype(np.float32)
    out = place.PLACERS[name](loads, 3)
    check(out, loads, np.ones(3), 10)
    assert out.status == Status.OK


W = jnp.array([3.0, 2.0, 1.0])
BAD = {
    "memory alone": (
        lambda: place.pack(W, 2, memory=W),
        "memory_capacity is None",
        "memory is given",
    ),
    "memory's length": (
        lambda: place.pack(W, 2, memory=W[:2], memory_capacity=W[:2]),
        "memory has 2",
        "loads has 3",
    ),
    "room's length": (
        lambda: place.pack(W, 2, memory=W, memory_capacity=W),
        "memory_capacity has 3",
        "num_devices = 2",
    ),
    "part of a swap": (lambda: place.pack(W, 2, swaps=0.5), "swaps is 0.5", "whole"),
    "too few slots": (lambda: place.replicate(W, 2, 2), "num_slots is 2", "one slot each"),
    "too many slots": (lambda: place.replicate(W, 2, 7), "num_slots is 7", "6 at most"),
    "bound, slots": (lambda: place.bound(W, 2, num_slots=7), "num_slots is 7", "6 at most"),
    "bound, nodes": (
        lambda: place.bound(W, 4, group_of=jnp.arange(3), num_nodes=3),
        "num_nodes is 3",
        "num_devices = 4",
    ),
    "bound, no groups": (lambda: place.bound(W, 4, num_nodes=2), "group_of is None", "num_nodes"),
    "bound, capacity of groups": (
        lambda: place.bound(W, 2, jnp.ones(2), group_of=jnp.arange(3), num_nodes=2),
        "capacity is given",
        "group_of",
    ),
    "more stages than layers": (lambda: place.contiguous(W, 4), "num_devices is 4", "3 units"),
    "no tokens": (lambda: place.visible_keys(jnp.zeros(0, int), 4), "segment_ids is empty", "one"),
    "ids": (lambda: place.visible_keys(W, 4), "segment_ids has dtype", "whole numbers"),
    "block": (lambda: place.visible_keys(jnp.arange(3), 0), "block_q is 0", "at least 1"),
    "huge block": (
        lambda: place.visible_keys(jnp.arange(3), 2**30),
        f"block_q is {2**30}",
        "715827882",
    ),
    "ranks": (lambda: place.causal_tiles(jnp.arange(3), 0), "num_ranks is 0", "at least 1"),
    "moved, device": (
        lambda: place.rebalance(jnp.array([0, 1, 2]), W, jnp.arange(3), 2),
        "device_of[2] is 2",
        "0..1",
    ),
    "moved, size": (
        lambda: place.rebalance(jnp.array([0, 1, 1]), W, W, 2),
        "size has dtype",
        "blocks",
    ),
    "moved, cost": (
        lambda: place.rebalance(jnp.array([0, 1, 1]), W, jnp.arange(3), 2, cost=-1.0),
        "cost is -1.0",
        ">= 0",
    ),
    "seconds": (
        lambda: place.step_time(place.pack(W, 2, swaps=0), jnp.ones(3)),
        "seconds has shape (3,)",
        "layers ()",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, *words = BAD[case]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    for word in words:
        assert word in str(error.value)


def test_loads_past_32_bits_do_not_wrap():
    out = place.pack(np.array([2**32, 2**32, 1]), 2)
    assert out.device_of[0] != out.device_of[1]
    swapped = np.array([3.0, 1.0, 1.0]).astype(">f8")  # bytes in the other order
    for _ in range(2):
        np.testing.assert_array_equal(place.pack(swapped, 2).load, [3, 2])
