"""Attention over tiles under JAX's transformations, and what it leaves out: work and memory."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jbalance import attention
from tests.support.attention_cases import Case, loss, problem
from tests.support.versions import NEWER_JAX

CASE = Case(128, 128, 8, 8, batch=1, block_k=16, bias=(1, 1, 1, None))


def total(floats, rest, **options):
    return loss(floats, rest, causal=True, **options)[0]


gradients = jax.jit(jax.grad(total))


def square(q, k, v, bias, plan, **options):
    """A loss without random numbers, which devices would draw for their own part."""
    out = attention.attend(q, k, v, plan, bias=bias, causal=True, **options)
    return jnp.sum(out.y**2) + jnp.sum(jnp.where(out.lse == attention.EMPTY, 0, jnp.sin(out.lse)))


def assert_near(got, want, atol=1e-4):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol), got, want)


def stacked(num):
    """Problems of one shape, one after the other and stacked."""
    single = [problem(CASE, seed) for seed in range(num)]
    return single, jax.tree.map(lambda *xs: jnp.stack(xs), *single)


def test_vmap_and_its_gradient():
    single, (floats, rest) = stacked(3)
    got = jax.jit(jax.vmap(jax.grad(total)))(floats, rest)
    want = [gradients(*one) for one in single]
    assert_near(got, jax.tree.map(lambda *xs: jnp.stack(xs), *want))
    # Over plans alone: one set of operands gets the sum of the gradients.
    floats = single[0][0]
    each = jax.vmap(total, in_axes=(None, 0))
    got = jax.jit(jax.grad(lambda floats: jnp.sum(each(floats, rest))))(floats)
    want = [gradients(floats, one) for _, one in single]
    assert_near(got, jax.tree.map(lambda *xs: sum(xs), *want))


@pytest.mark.parametrize("block_k", [16, 128])
def test_64_bit_numbers_elsewhere_change_nothing(block_k):
    floats, rest = problem(dataclasses.replace(CASE, keys=300, block_k=block_k), 0)
    floats = floats.values()
    function = jax.grad(square, argnums=(0, 1, 2, 3))
    want = jax.jit(function)(*floats, rest["plan"])
    with jax.enable_x64(True):
        got = jax.jit(function)(*floats, rest["plan"])
    assert [x.dtype for x in got] == [x.dtype for x in want]
    assert_near(got, want, atol=1e-5)


def test_vmap_runs_one_tile_after_the_other():
    # A batched loop would run all examples for as long as the longest.
    _, (floats, rest) = stacked(2)
    text = str(jax.make_jaxpr(jax.vmap(jax.grad(total)))(floats, rest))
    products = re.findall(r"f32\[([\d,]+)\] = dot_general", text)
    assert len(products) >= 7
    assert {x.count(",") for x in products} == {1}


def test_scan_over_layers_and_remat():
    single, (layers, rest) = stacked(2)

    def layer(x, one):
        floats, rest = one
        x = x + attention.attend(**(floats | {"q": x}), **rest, causal=True).y
        return x, None

    def by_scan(x, layers, rest):
        step = jax.checkpoint(layer)
        return jnp.sum(jax.lax.scan(step, x, (layers, rest))[0] ** 2)

    def by_loop(x, single):
        for one in single:
            x = layer(x, one)[0]
        return jnp.sum(x**2)

    x = single[0][0]["q"]
    got = jax.jit(jax.grad(by_scan))(x, layers, rest)
    want = jax.jit(jax.grad(by_loop))(x, single)
    assert_near(got, want, 1e-3)


@pytest.mark.parametrize("size", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4)), 8])
def test_heads_or_query_blocks_split_over_devices(size):
    floats, rest = problem(CASE, 0)
    args = *(floats[name] for name in ("q", "k", "v", "bias")), rest["plan"]
    want = on_one_device()(*args)
    mesh = jax.make_mesh((size,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size])

    def heads(*args):
        return jax.lax.psum(square(*args), "d")

    def queries(q, k, v, bias, plan):
        plan = dataclasses.replace(plan, num_queries=q.shape[1])
        offset = jax.lax.axis_index("d") * q.shape[1]
        return jax.lax.psum(square(q, k, v, bias, plan, offset=offset), "d")

    by_head, by_query, whole = jax.P(None, None, "d"), jax.P(None, "d"), jax.P()
    for function, specs in (
        (heads, (by_head, by_head, by_head, whole, by_query)),
        (queries, (by_query, whole, whole, whole, by_head)),
    ):
        split = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=whole)
        got = jax.jit(jax.value_and_grad(split, argnums=(0, 1, 2, 3)))(*args)
        assert_near(got, want, 1e-3)


@functools.cache
def on_one_device():
    return jax.jit(jax.value_and_grad(square, argnums=(0, 1, 2, 3)))


def test_new_plans_and_masks_compile_nothing_anew():
    @jax.jit
    @chex.assert_max_traces(1)
    def traced(floats, rest, offset):
        return jax.grad(total)(floats, rest, offset=offset)

    for seed in range(3):
        traced(*problem(CASE, seed), seed)


def test_tiles_that_are_left_out_are_not_read():
    floats, _ = problem(CASE, 0)
    kept = jnp.zeros((1, 1, 8, 8), bool).at[..., 2:5].set(True)
    plan = attention.from_mask(kept, attention.Tiling(128, 128, 16, 16, causal=False))
    there = jnp.repeat(kept[0, 0, 0], 16)[None, :, None, None]
    planted = floats | {name: jnp.where(there, floats[name], jnp.nan) for name in "kv"}
    got, want = (gradients(x, {"plan": plan}) for x in (planted, floats))
    assert_near(got, want, 0)


@pytest.mark.parametrize("tokens", [1024, pytest.param(8192, marks=NEWER_JAX)])
def test_temporary_memory_is_that_of_a_few_copies_of_q(tokens):
    q = jnp.zeros((1, tokens, 2, 64))
    k, bias = q[:, :, :1], jnp.zeros((1, 1, 1, tokens))
    plan = attention.dense(attention.Tiling(tokens, tokens))
    compiled = jax.jit(square).lower(q, k, k, bias, plan).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < q.nbytes + 2**20
    compiled = jax.jit(jax.grad(square, argnums=(0, 1, 2, 3))).lower(q, k, k, bias, plan).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * q.nbytes + 2**20
