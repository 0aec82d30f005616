"""Operands on a mesh, under plain jit: as on one device, or the error that names jbalance.sharded.

Values are small whole numbers, whose sums are the same in any order. How arrays lie is one of a few
layouts a function, so that examples share their programs.
"""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from jbalance import (
    allocate,
    attention,
    audit,
    cache,
    explain,
    importance,
    place,
    rescale,
    sharded,
    shares,
    tasks,
)
from jbalance.attention import Tiling
from tests.support.examples import few

U, G, LAYOUTS = 8, 2, 8
TILING = Tiling(8, 8, 4, 4)
PLAN = attention.dense(TILING)
CACHE = cache.create(40_000, 1, 2, 8, num_requests=8, recent_tokens=4)
# Names of operands: their shapes, and what is below the numbers in them.
SHAPES = {
    "w": ((U,), 9),
    "x": ((U, 2), 9),
    "memory": ((U,), 9),
    "floor": ((U,), 3),
    "room": ((U,), 40),
    "of": ((U,), G),
    "values": ((U, 4), 9),
    "costs": ((U, 4), 9),
    "budgets": ((G,), 60),
    "demand": ((G, U), 30),
    "used": ((G, U), 30),
    "q": ((U, U, 2, 8), 3),
    "k": ((U, U, 2, 8), 3),
    "v": ((U, U, 2, 8), 3),
    **dict.fromkeys(("q1", "k1", "v1"), ((U, 2, 8), 3)),
    "score": ((U, 2, 2, 2), 9),
    "some": ((U,), 2),
}
FLOATS = ("w", "x", "memory", "values", "q", "k", "v", "q1", "k1", "v1", "score")


def _whole(w, floor, room, of, budgets):
    return allocate.whole(w, budgets + 60, floor, floor + room, of)


def _ladder(values, costs, of, budgets):
    out = allocate.ladder(values, costs, 100 + budgets, of)
    return out.level, out.spent


def _step(q1, k1, v1):
    return cache.step(CACHE, 0, q1, k1, v1)[0]


def _attend(q, k, v):
    return attention.attend(q, k, v, PLAN, causal=True)


def _divide(w, some, demand, used, budgets):
    return tasks.divide(
        w, some > 0, batch=64, tokens=512, capacity=budgets + 300, demand=demand, used=used
    )


def _constrained(w, of):
    share = shares.proportional(w)
    return shares.constrained(share, group_of=of, group_floor=np.array([0.25, 0.5], np.float32))


CALLS = {
    "whole": _whole,
    "ladder": _ladder,
    "water_fill": lambda w, floor, room: allocate.water_fill(w, 90.0, floor, floor + room),
    "softmax": lambda w, some: shares.softmax(w, where=some > 0),
    "constrained": _constrained,
    "pack": lambda w, memory: place.pack(w, G, memory=memory, memory_capacity=np.full(G, 99.0)),
    "contiguous": lambda w: place.contiguous(w, G),
    "replicate": lambda w: place.replicate(w, G, 10, swaps=8),
    "over_layers": lambda x: place.over_layers(x, x + 1, np.full(G, 99.0), swaps=8),
    "worth_curve": importance.worth_curve,
    "combine": lambda values: importance.combine(values, np.ones(U)),
    "anova": lambda x, of: importance.anova(x, of, num_classes=G),
    "mutual_information": lambda x, of: importance.mutual_information(x, of, num_classes=G),
    "token_worth": lambda q1, k1, v1: importance.token_worth(q1, k1, v1, frequencies=None),
    "expected_attention": lambda q1, k1, v1: importance.expected_attention(
        q1, k1, v1, future=4, frequencies=None, num_sinks=1
    ),
    "tile_error": lambda q, k, v: importance.tile_error(q, k, v, TILING, rows=2),
    "choose": lambda score: attention.to_mask(attention.choose(score, 8, TILING)),
    "attend": _attend,
    "step": _step,
    "by_group": lambda w, of: audit.by_group(w, of, G),
    "rescale": lambda w, x: rescale.weights(w, x, np.ones(2, np.float32)),
    "divide": _divide,
}
NAMES = {
    "worth_curve": ["w"],
    **{
        name: list(call.__code__.co_varnames[: call.__code__.co_argcount])
        for name, call in CALLS.items()
        if name != "worth_curve"
    },
}


@functools.cache
def jitted(name):
    return jax.jit(CALLS[name])


def layout(name, number, axis_type):
    """A mesh or None, and how each operand lies: on the host, on one device, on all, or split."""
    rng = np.random.default_rng(number)
    if number == 0:
        return None, [SingleDeviceSharding(jax.devices()[3])] * len(NAMES[name])
    size = int(rng.choice([1, 2, 4, 8]))
    mesh = jax.make_mesh((size,), ("x",), axis_types=(axis_type,), devices=jax.devices()[:size])
    out = []
    for operand in NAMES[name]:
        shape = SHAPES[operand][0]
        axes = [None, *(i for i, n in enumerate(shape) if n % size == 0)]
        axis = axes[rng.integers(len(axes))]
        spec = PartitionSpec(*("x" if i == axis else None for i in range(len(shape))))
        out.append(None if rng.integers(5) == 0 else NamedSharding(mesh, spec))
    return mesh, out


def drawn(name, seed):
    """Operands of random whole numbers, many of them alike."""
    rng = np.random.default_rng(seed)
    out = []
    for operand in NAMES[name]:
        shape, below = SHAPES[operand]
        x = rng.integers(0, below, shape) * rng.integers(0, 2, shape if seed % 2 else ())
        x = np.cumsum(x + 1, axis=1) if operand == "costs" else x
        out.append(x.astype(np.float32 if operand in FLOATS else np.int32))
    return out


# Compiling takes the time: of the quick profile's examples a few.


@few(12)
@given(
    name=st.sampled_from(list(CALLS)),
    number=st.integers(0, LAYOUTS - 1),
    explicit=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@example(name="attend", number=1, explicit=True, seed=0)
def test_where_operands_lie_changes_nothing_or_is_named(name, number, explicit, seed):
    operands = drawn(name, seed)
    want = jitted(name)(*operands)
    mesh, shardings = layout(name, number, AxisType.Explicit if explicit else AxisType.Auto)
    placed = [
        x if s is None else jax.device_put(x, s) for x, s in zip(operands, shardings, strict=True)
    ]
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        try:
            got = jitted(name)(*placed)
        except ValueError as error:
            split = any(s is not None and any(getattr(s, "spec", ())) for s in shardings)
            named = "split over explicit mesh axes" in str(error) and "jbalance.sharded" in str(
                error
            )
            if not (explicit and split and named):
                raise
            return
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if jnp.issubdtype(y.dtype, jnp.floating):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(x, y)


SPLIT = {
    "the order of units": (explain.rank_correlation, {"x": (8,), "y": (8,)}),
    "frequencies": (
        lambda x: importance.leverage(*[np.ones((8, 2, 8), np.float32)] * 3, frequencies=x),
        {"frequencies": (4,)},
    ),
    "budgets": (
        lambda x: allocate.whole(np.ones(3), x, device_of=np.array([0, 1, 1])),
        {"budget": (2,)},
    ),
    "budgets of a ladder": (
        lambda x: allocate.ladder(np.ones((3, 2)), np.array([1, 2]), x, np.array([0, 1, 1])),
        {"budgets": (2,)},
    ),
    "capacities": (lambda x: place.pack(np.ones(3), 2, x), {"capacity": (2,)}),
    "floors of groups": (
        lambda x: shares.constrained(np.ones(3) / 3, group_of=np.array([0, 1, 1]), group_floor=x),
        {"group_floor": (2,)},
    ),
    "curves": (lambda x: shares.priced(x, 9.0), {"curves": (2, importance.CURVE_BINS)}),
    "documents": (
        lambda x: attention.segments(x, np.ones((1, 8), int), TILING),
        {"q_ids": (1, 8)},
    ),
    "parts of tasks": (
        lambda x: attention.attend(*[np.ones((1, 8, 2, 8), np.float32)] * 3, PLAN, task_shares=x),
        {"task_shares": (2, 8)},
    ),
    "ranks": (lambda x: sharded.block_order(x, 2), {"device_of": (4,)}),
}


@pytest.mark.parametrize("case", SPLIT)
def test_what_goes_beside_the_units_is_named_too(case):
    """Before anything of it is computed; split over axes of type Auto it works."""
    call, shapes = SPLIT[case]
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    arrays = []
    for name, shape in shapes.items():
        axis = max(i for i, n in enumerate(shape) if n % 2 == 0)
        spec = PartitionSpec(*("x" if i == axis else None for i in range(len(shape))))
        whole = name in ("budget", "budgets", "q_ids", "device_of")
        x = np.zeros(shape, np.int32 if whole else np.float32)
        arrays.append(jax.device_put(x, NamedSharding(mesh, spec)))
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match=f"{next(iter(shapes))} is split over explicit mesh axes"),
    ):
        call(*arrays)
