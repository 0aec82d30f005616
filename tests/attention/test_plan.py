"""Plans against masks that NumPy builds element by element."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify

from jbalance import attention

SIZES = st.tuples(*(st.integers(1, n) for n in (40, 40, 12, 12)))  # T, S, block_q, block_k


def tiles_of(elements, block_q, block_k):
    """[I, J] bool: the tiles with some True element of [T, S]."""
    queries, keys = elements.shape
    starts = np.arange(0, queries, block_q), np.arange(0, keys, block_k)
    rows = np.logical_or.reduceat(elements, starts[0], axis=0)
    return np.logical_or.reduceat(rows, starts[1], axis=1)


def distance(queries, keys):
    """How far each key [S] lies behind each query [T]; the last query is at the last key."""
    return np.arange(queries)[:, None] + keys - queries - np.arange(keys)


def assert_tiles(plan, mask):
    blocks, count = np.asarray(plan.blocks)[0, 0], np.asarray(plan.count)[0, 0]
    assert (plan.num_query_blocks, plan.num_key_blocks) == mask.shape
    for row, listed, n in zip(mask, blocks, count, strict=True):
        np.testing.assert_array_equal(listed[:n], np.flatnonzero(row))


def random_mask(seed, shape=(2, 3, 5, 7)):
    return jnp.asarray(np.random.default_rng(seed).random(shape) < 0.4)


@settings(max_examples=20)
@given(SIZES)
def test_causal_and_full(sizes):
    seen = distance(*sizes[:2]) >= 0
    assert_tiles(attention.causal(*sizes), tiles_of(seen, *sizes[2:]))
    assert_tiles(attention.full(*sizes), tiles_of(np.ones(sizes[:2], bool), *sizes[2:]))


@settings(max_examples=20)
@given(SIZES, st.integers(1, 50), st.integers(0, 20))
def test_window_with_sinks(sizes, size, num_sinks):
    behind = distance(*sizes[:2])
    near = (behind < size) | (np.arange(sizes[1]) < num_sinks)
    want = tiles_of((behind >= 0) & near, *sizes[2:])
    assert_tiles(attention.window(size, *sizes, num_sinks=num_sinks), want)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("sizes", [(40, 33, 8, 4), (7, 50, 16, 16)])
def test_segments(sizes, packed):
    rng = np.random.default_rng(0)
    ids = [rng.integers(-2, 5, (3, n)) for n in sizes[:2]]
    ids = [np.sort(x) for x in ids] if packed else ids
    plan = attention.segments(*ids, *sizes[2:])
    for row, (q_ids, k_ids) in enumerate(zip(*ids, strict=True)):
        want = tiles_of(q_ids[:, None] == k_ids, *sizes[2:])
        np.testing.assert_array_equal(attention.to_mask(plan)[row, 0], want)


def test_lists_ascend_and_hold_the_mask():
    mask = random_mask(0)
    plan = attention.from_mask(mask, 20, 27, 4, 4)
    assert (plan.num_query_blocks, plan.num_key_blocks, plan.capacity) == (5, 7, 7)
    for index in np.ndindex(mask.shape[:3]):
        count = plan.count[index]
        np.testing.assert_array_equal(plan.blocks[index][:count], np.flatnonzero(mask[index]))
    assert plan.blocks.max() < 7
    assert not plan.dropped.any()
    np.testing.assert_array_equal(attention.to_mask(plan), mask)
    np.testing.assert_array_equal(
        jax.jit(attention.from_mask, static_argnums=range(1, 5))(mask, 20, 27, 4, 4).count,
        plan.count,
    )
    assert plan.num_tiles == mask.sum()
    np.testing.assert_allclose(plan.density, mask.mean(), rtol=1e-6)


def test_set_operations_are_those_of_masks():
    a, b = random_mask(1), random_mask(2, (1, 3, 5, 7))
    plans = [attention.from_mask(x, 20, 27, 4, 4) for x in (a, b)]
    for operation, want in (
        (attention.union, a | b),
        (attention.intersection, a & b),
        (attention.difference, a & ~b),
    ):
        got = jax.jit(operation)(*plans)
        np.testing.assert_array_equal(attention.to_mask(got), want)
        assert not got.dropped.any()


def test_small_capacities_are_enough_for_set_operations():
    a, b = (attention.from_mask(random_mask(i), 20, 27, 4, 4, capacity=6) for i in (1, 2))
    assert attention.union(a, b).capacity == 7
    assert attention.intersection(a, b).capacity == 6
    assert attention.difference(a, b).capacity == 6


def test_transposed_lists_the_query_blocks_of_every_key_block():
    mask = random_mask(3)
    plan = attention.from_mask(mask, 20, 27, 4, 4)
    turned = attention.transposed(plan)
    assert (turned.num_queries, turned.num_keys, turned.capacity) == (27, 20, 5)
    np.testing.assert_array_equal(attention.to_mask(turned), jnp.swapaxes(mask, 2, 3))
    again = attention.transposed(turned)
    np.testing.assert_array_equal(again.blocks, plan.blocks)
    np.testing.assert_array_equal(again.count, plan.count)


def test_a_traced_mask_that_does_not_fit_keeps_the_newest_keys_and_says_so():
    mask = random_mask(4)

    @jax.jit
    def planned(mask):
        return attention.from_mask(mask, 20, 27, 4, 4, capacity=2)

    plan = planned(mask)
    found = np.asarray(mask).sum(-1)
    np.testing.assert_array_equal(plan.dropped, np.maximum(found - 2, 0))
    np.testing.assert_array_equal(plan.count, np.minimum(found, 2))
    newest = np.asarray(mask) & (np.cumsum(mask[..., ::-1], axis=-1)[..., ::-1] <= 2)
    np.testing.assert_array_equal(attention.to_mask(plan), newest)
    error, _ = checkify.checkify(planned)(mask)
    with pytest.raises(checkify.JaxRuntimeError, match="capacity 2"):
        error.throw()


def test_a_plan_is_a_pytree_of_arrays():
    plan = attention.causal(300, 500)
    leaves, tree = jax.tree.flatten(plan)
    assert all(leaf.dtype == jnp.int32 for leaf in leaves)
    assert jax.tree.unflatten(tree, leaves) == dataclasses.replace(plan)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: attention.causal(0, 4), ("num_queries is 0", "at least 1")),
        (lambda: attention.full(4, 4, block_k=-1), ("block_k is -1", "at least 1")),
        (lambda: attention.window(0, 4, 4), ("size is 0", ">= 1")),
        (lambda: attention.from_mask(random_mask(0), 20, 20, 4, 4), ("(2, 3, 5, 7)", "(5, 5)")),
        (
            lambda: attention.from_mask(random_mask(0)[0], 20, 27, 4, 4),
            ("mask", "[B|1, H|1, I, J]"),
        ),
        (lambda: attention.from_mask(jnp.ones((1, 1, 1, 1)), 4, 4), ("float32", "bool")),
        (
            lambda: attention.from_mask(jnp.ones((1, 1, 5, 7), bool), 20, 27, 4, 4, capacity=3),
            ("capacity is 3", "7 blocks"),
        ),
        (
            lambda: attention.from_mask(random_mask(0), 20, 27, 4, 4, capacity=-1),
            ("capacity is -1", ">= 0"),
        ),
        (lambda: attention.union(attention.full(4, 4), attention.full(4, 5)), ("(4, 5", "(4, 4")),
        (
            lambda: attention.segments(jnp.zeros((2, 4), int), jnp.zeros((3, 4), int)),
            ("k_ids has 3", "2"),
        ),
    ],
)
def test_bad_input_is_named(call, names):
    with pytest.raises(ValueError, match=r"must|give|need|at least") as error:
        call()
    for name in names:
        assert name in str(error.value), error.value
