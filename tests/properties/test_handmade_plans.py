"""Plans made by hand: refused by name where they are concrete, read alike by all back ends where traced.

The oracle is dense attention in float64 over the tiles that lists name, whatever their order.
"""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jbalance import attention
from tests.support.attention_cases import DISPATCH, interpreted_kernels

T, S, H, D = 24, 56, 2, 4
BLOCK_Q, BLOCK_K = 16, 16  # of which the last ones are shorter
ROWS, COLUMNS, CAPACITY = 2, 4, 5  # more places than blocks
BACKENDS = ("reference", "xla", "gpu", "tpu")
Q, K, V, DY = (
    np.random.default_rng(i).normal(size=(1, n, H, D)).astype(np.float32)
    for i, n in enumerate((T, S, S, T))
)
lists = (1, H, ROWS, CAPACITY)
any_block = st.one_of(st.integers(0, COLUMNS - 1), st.integers(-2, COLUMNS + 1))
far = st.sampled_from([-(2**31), 2**31 - 1, 2**30, -1])
blocks = arrays(np.int32, lists, elements=st.one_of(any_block, any_block, far))
counts = arrays(np.int32, lists[:3], elements=st.one_of(st.integers(0, CAPACITY), far))


def plan_of(blocks: Any, count: Any) -> attention.TilePlan:
    return attention.TilePlan(blocks, count, T, S, BLOCK_Q, BLOCK_K)


def tiles_of(blocks, count):
    """[H, I, J] bool: every block in 0..J-1 among the first `count`, once."""
    tiles = np.zeros((H, ROWS, COLUMNS), bool)
    for at in np.ndindex(H, ROWS):
        for j in blocks[0][at][: max(0, count[0][at])]:
            if 0 <= j < COLUMNS:
                tiles[at][j] = True
    return tiles


def dense(tiles, causal):
    """y and the gradients of sum(y * DY), in float64."""
    seen = np.repeat(np.repeat(tiles, BLOCK_Q, 1), BLOCK_K, 2)[:, :T, :S]
    if causal:
        seen = seen & (np.arange(S) <= np.arange(T)[:, None] + S - T)
    q, k, v, dy = (np.moveaxis(x[0].astype(float), 1, 0) for x in (Q, K, V, DY))
    logits = np.where(seen, q @ k.transpose(0, 2, 1) / np.sqrt(D), -np.inf)
    top = np.max(logits, axis=2, keepdims=True)
    weight = np.exp(logits - np.where(np.isfinite(top), top, 0))
    mass = weight.sum(axis=2, keepdims=True)
    weight = weight / np.where(mass > 0, mass, 1)
    y = weight @ v
    slope = weight * (dy @ v.transpose(0, 2, 1) - np.sum(dy * y, axis=2, keepdims=True))
    slope = slope / np.sqrt(D)
    out = y, slope @ k, slope.transpose(0, 2, 1) @ q, weight.transpose(0, 2, 1) @ dy
    return [np.moveaxis(x, 0, 1)[None] for x in out]


@functools.cache
def compiled(backend):
    """Attention and its gradients, over lists that are traced."""

    def run(blocks, count, causal):
        def loss(q, k, v):
            pair = [
                attention.attend(q, k, v, plan_of(blocks, count), causal=c, backend=backend).y
                for c in (False, True)
            ]
            y = jnp.where(causal, pair[1], pair[0])
            return jnp.sum(y * DY), y

        gradients, y = jax.grad(loss, (0, 1, 2), has_aux=True)(Q, K, V)
        return y, *gradients

    table = interpreted_kernels() if backend in ("gpu", "tpu") else DISPATCH._TILED
    shapes = np.zeros(lists, np.int32), np.zeros(lists[:3], np.int32), np.array(False)
    with mock.patch.object(DISPATCH, "_TILED", table):
        return jax.jit(run).lower(*shapes).compile()


@given(blocks=blocks, count=counts, causal=st.booleans())
def test_traced_lists_are_read_alike_by_all_back_ends(blocks, count, causal):
    tiles = tiles_of(blocks, count)
    want = dense(tiles, causal)
    for backend in BACKENDS:
        got = compiled(backend)(blocks, count, np.array(causal))
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5, err_msg=backend)
    np.testing.assert_array_equal(attention.to_mask(plan_of(blocks, count))[0], tiles)


sane = st.builds(
    lambda rows, pad: np.array([[*sorted(row), *pad][:CAPACITY] for row in rows]).reshape(lists),
    st.lists(st.sets(st.integers(0, COLUMNS - 1)), min_size=H * ROWS, max_size=H * ROWS),
    st.lists(st.integers(0, COLUMNS - 1), min_size=CAPACITY, max_size=CAPACITY),
)
TYPES = ["int8", "int32", "int64", ">i4", ">i8", "object", "list", "jax"]
NO_COUNTS = ["float32", "float64", "bool", "complex64", "str"]


def typed(x, kind):
    """The same numbers in another type."""
    if kind == "list":
        return x.tolist()
    return jnp.asarray(x, jnp.int32) if kind == "jax" else x.astype(kind)


@given(
    blocks=st.one_of(sane, blocks),
    count=st.one_of(arrays(np.int32, lists[:3], elements=st.integers(0, 3)), counts),
    kinds=st.tuples(*[st.sampled_from(TYPES)] * 2),
)
def test_concrete_lists_are_refused_or_as_they_say(blocks, count, kinds):
    valid = ((blocks >= 0) & (blocks < COLUMNS)).all() and (
        (count >= 0) & (count <= CAPACITY)
    ).all()
    for at in np.ndindex(*lists[:3]):
        valid = valid and (np.diff(blocks[at][: max(0, count[at])].astype(int)) > 0).all()
    if "int8" in kinds and (
        abs(blocks.astype(float)).max() > 99 or abs(count.astype(float)).max() > 99
    ):
        return
    plan = plan_of(typed(blocks, kinds[0]), typed(count, kinds[1]))
    try:
        y = attention.attend(Q, K, V, plan, backend="reference").y
    except ValueError as error:
        message = str(error)
        if not ("plan.blocks" in message or "plan.count" in message):
            raise
        y = None
    assert (y is not None) == valid
    if valid:
        np.testing.assert_allclose(y, dense(tiles_of(blocks, count), False)[0], atol=1e-5)


@pytest.mark.parametrize("kind", NO_COUNTS)
@pytest.mark.parametrize("field", ["blocks", "count"])
def test_lists_of_no_whole_numbers_are_refused_by_name(kind, field):
    good = {"blocks": np.zeros(lists, np.int32), "count": np.zeros(lists[:3], np.int32)}
    bad = {field: good[field].astype(kind)}

    def run(blocks, count):
        return attention.attend(Q, K, V, plan_of(blocks, count)).y

    with pytest.raises(ValueError, match=rf"plan\.{field}"):
        run(**good | bad)
    if kind != "str":  # which are no arrays of JAX
        other = "count" if field == "blocks" else "blocks"
        with pytest.raises(ValueError, match=rf"plan\.{field}"):
            jax.jit(run)(**good | bad)
        with pytest.raises(ValueError, match=rf"plan\.{field}"):
            jax.jit(lambda x: run(**bad | {other: x}))(good[other])
