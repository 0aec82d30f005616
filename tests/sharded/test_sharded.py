"""One answer on 1, 2, 4 and 8 devices: bit for bit where it is whole numbers."""

from __future__ import annotations

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from sharded_cases import CASES, COMMON, UNITS, U, assert_same

from jbalance import allocate

AXIS = "units"
# Halves the time to compile; the test of two processes compiles with all effort.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def over_mesh(size, function, in_specs, out_specs):
    """`function` split over `size` devices, with the replication of its results checked."""
    auto, devices = (AxisType.Auto,), jax.devices()[:size]
    mesh = jax.make_mesh((size,), (AXIS,), axis_types=auto, devices=devices)
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


@cache
def on_one_device(name):
    return quick_jit(partial(CASES[name], axis=None))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", CASES)
def test_the_same_on_any_number_of_devices(name, size):
    want = on_one_device(name)(UNITS, COMMON)
    split = jax.tree.map(lambda x: jax.P(AXIS) if x.shape[:1] == (U,) else jax.P(), want)
    run = over_mesh(size, partial(CASES[name], axis=AXIS), (jax.P(AXIS), jax.P()), split)
    assert_same(quick_jit(run)(UNITS, COMMON), want)


@pytest.mark.parametrize("name", CASES)
def test_a_problem_of_its_own_on_each_device(name):
    """Without axis_name a shard's data is its whole problem: as many answers as devices."""

    def alone(units, common):
        return jax.tree.map(jnp.atleast_1d, CASES[name](units, common, None))

    reversed_units = jax.tree.map(lambda x: x[::-1], UNITS)
    both = jax.tree.map(lambda *x: np.concatenate(x), UNITS, reversed_units)
    run = over_mesh(2, alone, (jax.P(AXIS), jax.P()), jax.P(AXIS))
    got = quick_jit(run)(both, COMMON)
    first, second = (jax.tree.map(lambda x, d=d: jnp.split(x, 2)[d], got) for d in (0, 1))
    for units, part in ((UNITS, first), (reversed_units, second)):
        assert_same(part, jax.tree.map(jnp.atleast_1d, on_one_device(name)(units, COMMON)))


@pytest.mark.parametrize("num_units", [800, 80_000])
def test_the_ladder_exchanges_a_few_scalars(num_units):
    """Every collective of the compiled program moves O(G) numbers, however many units there are."""
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
    program = quick_jit(run).lower(*arguments).compile().as_text()
    collectives = re.findall(r"= (.+?) (all-[a-z]+|reduce-scatter|collective-permute)\(", program)
    assert {kind for _, kind in collectives} == {"all-reduce"}
    for result, _ in collectives:
        dims = re.findall(r"\w\d+\[([\d,]*)\]", result)
        sizes = [np.prod([int(n) for n in d.split(",") if n], dtype=int) for d in dims]
        assert 1 <= sum(sizes) <= 4 * num_budgets, result
