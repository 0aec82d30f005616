"""`jbalance.sharded`: any number of units, heads, blocks or requests on 1 to 8 devices, as on one."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jbalance import attention, importance, sharded
from tests.support import sharded_stages as stages
from tests.support.sharded_cases import assert_same
from tests.support.sharded_stages import AXIS, STAGES
from tests.support.versions import NEWER_JAX

KINDS = AxisType.Auto, AxisType.Explicit
MESHES = [(8, AxisType.Explicit)]
MORE_MESHES = [
    (1, AxisType.Auto),
    *((n, kind) for n in (2, 4) for kind in KINDS),
    (8, AxisType.Auto),
]
CACHES = [name for name in STAGES if name.startswith("cache")]


def mesh_of(size, kind):
    return jax.make_mesh((size,), (AXIS,), axis_types=(kind,), devices=jax.devices()[:size])


@cache
def alone(name, size):
    return jax.jit(lambda: STAGES[name].alone(size))()


def assert_as_on_one_device(name, size, kind):
    got = jax.jit(lambda: STAGES[name].over(mesh_of(size, kind)))()
    assert_same(got, alone(name, size), rtol=1e-5)


@pytest.mark.parametrize(("size", "kind"), MESHES, ids=str)
@pytest.mark.parametrize("name", [name for name in STAGES if name not in CACHES])
def test_as_on_one_device(name, size, kind):
    assert_as_on_one_device(name, size, kind)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "kind"), MORE_MESHES, ids=str)
@pytest.mark.parametrize("name", [name for name in STAGES if name not in CACHES])
def test_as_on_one_device_on_more_meshes(name, size, kind):
    assert_as_on_one_device(name, size, kind)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "kind"), [(2, AxisType.Auto), *MESHES], ids=str)
@pytest.mark.parametrize("name", CACHES)
def test_caches_as_on_one_device(name, size, kind):
    assert_as_on_one_device(name, size, kind)


# The gradient of jnp.repeat over explicit axes is the newer jax's.
@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=NEWER_JAX)], ids=str
)
def test_gradients_over_three_axes(kind):
    """Examples, heads and queries at once, in a mesh that is the context's too."""
    mesh = jax.make_mesh((2, 2, 2), ("b", "h", "q"), axis_types=(kind,) * 3)
    plan = stages._plan()
    weight = np.sin(np.arange(stages.Q.size)).reshape(stages.Q.shape).astype(np.float32)
    rules = {"causal": True, "segment_ids": (stages.SEGMENTS, stages.SEGMENTS)}

    def loss(attend, q, k, v, relative, bias):
        out = attend(q, k, v, plan, relative_bias=relative, bias=bias, **rules)
        return jnp.sum(out.y * weight) + jnp.sum(out.lse * weight[..., 0])

    def gradient(attend):
        return jax.jit(jax.grad(partial(loss, attend), argnums=(0, 1, 2, 3, 4)))

    operands = stages.Q, stages.KEYS, stages.V, stages.RELATIVE, stages.BIAS
    want = gradient(attention.attend)(*operands)
    over = partial(sharded.attend, mesh=mesh, batch="b", heads="h", queries="q")
    with jax.set_mesh(mesh):
        got = gradient(over)(*operands)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, want)


def test_gradients_of_documents_out_of_order():
    mesh = mesh_of(4, AxisType.Auto)
    operands = stages.LONG_Q, stages.LONG_K, stages.LONG_V
    block_at, token = stages.in_rank_order(4)
    assert not (np.diff(block_at) > 0).all()  # they are out of order
    weight = np.sin(np.arange(stages.LONG_Q.size)).reshape(stages.LONG_Q.shape)
    plan = stages._long_plan()

    def alone(q, k, v):
        return jnp.sum(attention.attend(q, k, v, plan, causal=True).y * weight)

    def over(q, k, v):
        q, k, v = (x[:, token] for x in (q, k, v))
        out = sharded.attend(q, k, v, plan, mesh=mesh, queries=AXIS, block_at=block_at, causal=True)
        return jnp.sum(out.y * weight[:, token])

    got, want = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*operands) for f in (over, alone))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, want)


def test_one_key_value_head_is_shared_by_all_devices():
    mesh, (q, k, v) = (
        mesh_of(4, AxisType.Auto),
        (stages.Q, stages.KEYS[:, :, :1], stages.V[:, :, :1]),
    )
    plan, over = stages._plan(), {"mesh": mesh, "heads": AXIS}
    run = jax.jit(lambda: sharded.attend(q, k, v, plan, causal=True, **over))
    assert_same(run(), attention.attend(q, k, v, plan, causal=True), rtol=1e-5)
    w = sharded.token_importance(importance.window, q, k, v, **over)
    assert_same(w, jax.vmap(importance.window)(q, k, v), rtol=1e-5)


def test_what_divides_stays_where_it_is():
    mesh = mesh_of(4, AxisType.Auto)
    alpha = sharded.shares(np.ones(8, np.float32), mesh=mesh, axis_name=AXIS)
    assert {shard.data.shape for shard in alpha.addressable_shards} == {(2,)}
    out = sharded.attend(
        *(jnp.ones((4, 8, 2, 4)),) * 3,
        attention.dense(attention.Tiling(8, 8, 8, 8)),
        mesh=mesh,
        batch=AXIS,
    )
    assert {shard.data.shape for shard in out.y.addressable_shards} == {(1, 8, 2, 4)}


def test_padding_is_reported():
    assert sharded.padding(9, 8) == (16, 7 / 16)
    assert sharded.padding(8, 8) == (8, 0.0)
    mesh = mesh_of(4, AxisType.Auto)
    cache = sharded.cache.create(
        20_000, 1, 3, 16, mesh=mesh, axis_name=AXIS, split="heads", recent_tokens=2
    )
    assert cache.waste == 0.25
    assert cache.device_bytes <= 20_000
    shapes = {x.addressable_shards[0].data.shape[0] for x in jax.tree.leaves(cache.parts)}
    assert shapes == {1}, "every device has its own part"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: sharded.shares([1.0], mesh=m, axis_name="y"), "axis_name is 'y'.*'x'"),
        (lambda m: sharded.shares([1.0, -1.0], mesh=m, axis_name=AXIS), r"w\[1\] is -1"),
        (lambda m: sharded.blend([1.0], beta=0.5, mesh=m, axis_name=AXIS), "beta is 0.5 but prior"),
        (lambda m: sharded.shares([1.0], "best", mesh=m, axis_name=AXIS), "rule is 'best'"),
        (
            lambda m: sharded.ladder(stages.VALUES, stages.COSTS, [9], mesh=m, axis_name=AXIS),
            "budgets has shape.*each of the 2 devices",
        ),
        (
            lambda m: sharded.ladder(stages.VALUES, stages.COSTS, [9, 90], mesh=m, axis_name=AXIS),
            r"budgets\[0\] is 9, but level 0 of its units costs 15: 6 is missing",
        ),
        (
            lambda m: sharded.attend(
                *(jnp.ones((1, 8, 1, 4)),) * 3,
                attention.dense(attention.Tiling(8, 8, 4, 4)),
                mesh=m,
                queries=AXIS,
                block_at=np.arange(3),
            ),
            r"block_at has shape \(3,\): it must be \[I\] = \(2,\)",
        ),
        (lambda m: sharded.block_order(np.array([0, 0, 0, 1]), 2), r"the ranks \[3, 1\] blocks"),
        (lambda m: sharded.block_order(np.zeros(3, int), 2), "fill the sequence up to 4 blocks"),
        (
            lambda m: sharded.cache.create(9, 1, 1, 16, mesh=m, axis_name=AXIS, split="layers"),
            "split is 'layers'",
        ),
        (lambda m: sharded.padding(0, 2), "num_units is 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(mesh_of(2, AxisType.Auto))
