"""One answer on 1, 2, 4 and 8 devices: bit for bit where it is whole numbers."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from experiments.harness.collectives import kinds, traffic
from jbalance import _search as search
from jbalance import allocate, sharded
from tests.support.sharded_cases import CASES, COMMON, UNITS, U, assert_same

AXIS = "units"


def over_mesh(size, function, in_specs, out_specs):
    """`function` split over `size` devices, with the replication of its results checked."""
    auto, devices = (AxisType.Auto,), jax.devices()[:size]
    mesh = jax.make_mesh((size,), (AXIS,), axis_types=auto, devices=devices)
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


@cache
def on_one_device(name):
    return jax.jit(partial(CASES[name], axis=None))


@pytest.mark.parametrize("size", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4)), 8])
@pytest.mark.parametrize("name", CASES)
def test_the_same_on_any_number_of_devices(name, size):
    want = on_one_device(name)(UNITS, COMMON)
    split = jax.tree.map(lambda x: jax.P(AXIS) if x.shape[:1] == (U,) else jax.P(), want)
    run = over_mesh(size, partial(CASES[name], axis=AXIS), (jax.P(AXIS), jax.P()), split)
    assert_same(jax.jit(run)(UNITS, COMMON), want)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_a_problem_of_its_own_on_each_device(name):
    """Without axis_name a shard's data is its whole problem: as many answers as devices."""

    def alone(units, common):
        return jax.tree.map(jnp.atleast_1d, CASES[name](units, common, None))

    reversed_units = jax.tree.map(lambda x: x[::-1], UNITS)
    both = jax.tree.map(lambda *x: np.concatenate(x), UNITS, reversed_units)
    run = over_mesh(2, alone, (jax.P(AXIS), jax.P()), jax.P(AXIS))
    got = jax.jit(run)(both, COMMON)
    first, second = (jax.tree.map(lambda x, d=d: jnp.split(x, 2)[d], got) for d in (0, 1))
    for units, part in ((UNITS, first), (reversed_units, second)):
        assert_same(part, jax.tree.map(jnp.atleast_1d, on_one_device(name)(units, COMMON)))


@pytest.mark.parametrize("num_units", [800, 80_000])
def test_the_ladder_exchanges_a_few_scalars(num_units):
    """The budgets of G devices, wherever their units lie, cost G numbers a pass, of any units."""
    num_budgets, levels = 8, 4

    def climb(values, costs, budgets, device_of, total):
        out = allocate.ladder(values, costs, budgets, device_of, total_budget=total, axis_name=AXIS)
        return out.level, out.price

    arguments = (
        jax.ShapeDtypeStruct((num_units, levels), jnp.float32),
        jax.ShapeDtypeStruct((levels,), jnp.int32),
        jax.ShapeDtypeStruct((num_budgets,), jnp.int32),
        jax.ShapeDtypeStruct((num_units,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    in_specs = (jax.P(AXIS), jax.P(), jax.P(), jax.P(AXIS), jax.P())
    run = over_mesh(4, climb, in_specs, (jax.P(AXIS), jax.P()))
    program = jax.jit(run).lower(*arguments).compile().as_text()
    assert kinds(program) == {"all-reduce", "collective-permute"}
    once = traffic(program, passes=1, branches=False).numbers
    assert once == traffic(program, passes=2, branches=False).numbers - num_budgets - 1
    assert once <= 12 * num_budgets


@pytest.mark.parametrize("num_units", [800, 80_000])
def test_a_ladder_of_own_budgets_exchanges_64_scalars_at_most(num_units):
    """Each device has a budget of its own, and only that of all together is searched over the mesh."""
    mesh = jax.make_mesh((8,), (AXIS,), axis_types=(AxisType.Auto,))

    def climb(values, budgets, total):
        costs = np.array([0, 2, 4, 8], np.int32)
        return sharded.ladder(values, costs, budgets, total_budget=total, mesh=mesh, axis_name=AXIS)

    split = NamedSharding(mesh, jax.P(AXIS))
    arguments = (
        jax.ShapeDtypeStruct((num_units, 4), jnp.float32, sharding=split),
        jax.ShapeDtypeStruct((8,), jnp.int32, sharding=split),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    program = jax.jit(climb).lower(*arguments).compile().as_text()
    most = traffic(program, passes=search.MOST_PASSES, branches=False)
    assert 0 < most.numbers <= 64
    near_wrap = traffic(program, passes=search.MOST_PASSES)
    assert near_wrap.numbers - most.numbers == search.MOST_PASSES + 1  # two numbers a pass


@pytest.mark.parametrize(
    "keys",
    [
        np.array([1e-30, 1e30]),
        1 + np.arange(50) * 2.0**-23,
        np.arange(9.0),
        np.array([1.0]),
        np.geomspace(1e-38, 3e38, 200),
    ],
    ids=("far apart", "next to each other", "few", "one", "everywhere"),
)
def test_a_search_ends_within_its_passes(keys):
    """Steps, which interpolation likes least."""
    keys = np.sort(search.to_key(jnp.asarray(keys, jnp.float32)))
    calls = 0

    def over(key):
        nonlocal calls
        calls += 1
        return (jnp.searchsorted(keys, key) - room).astype(jnp.float32)

    for room in {0, len(keys) // 3, len(keys) - 1}:
        calls = 0
        with jax.disable_jit():
            at = search.largest(over, search.INF_KEY, ())
        assert np.searchsorted(keys, at) <= room
        assert np.searchsorted(keys, at + 1) > room or np.searchsorted(keys, at) == room
        assert calls <= search.MOST_PASSES + 1
