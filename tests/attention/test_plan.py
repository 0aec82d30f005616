"""Plans against masks that NumPy builds element by element."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import checkify

from jbalance import attention
from jbalance.attention import Tiling
from tests.support.examples import few

GRID = Tiling(20, 27, 4, 4, causal=False)
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


@few(20)
@given(SIZES)
def test_dense_plans_hold_every_visible_tile(sizes):
    for causal in (True, False):
        seen = (distance(*sizes[:2]) >= 0) | (not causal)
        tiling, want = Tiling(*sizes, causal), tiles_of(seen, *sizes[2:])
        assert_tiles(attention.dense(tiling), want)
        assert tiling.num_tiles == want.sum()


def test_a_tiling_is_static():
    tiling = Tiling(100, 120, 16, 8)
    assert len({tiling, Tiling(100, 120, 16, 8), Tiling(100, 120, 16, 8, causal=False)}) == 2
    plan = jax.jit(attention.window, static_argnums=0)(3, tiling)
    np.testing.assert_array_equal(plan.count, attention.window(3, tiling).count)


@few(20)
@given(SIZES, st.integers(1, 50), st.integers(0, 20))
def test_window_with_sinks(sizes, size, num_sinks):
    behind = distance(*sizes[:2])
    sinks = np.arange(sizes[1]) < num_sinks
    want = tiles_of((behind >= 0) & ((behind < size) | sinks), *sizes[2:])
    assert_tiles(attention.window(size, Tiling(*sizes), num_sinks), want)
    want = tiles_of((np.abs(behind) < size) | sinks, *sizes[2:])
    assert_tiles(attention.window(size, Tiling(*sizes, causal=False), num_sinks), want)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("sizes", [(40, 33, 8, 4), (7, 50, 16, 16)])
def test_segments(sizes, packed):
    rng = np.random.default_rng(0)
    ids = [rng.integers(-2, 5, (3, n)) for n in sizes[:2]]
    ids = [np.sort(x) for x in ids] if packed else ids
    for causal in (True, False):
        tiling = Tiling(*sizes, causal)
        plan = attention.segments(*ids, tiling)
        for row, (q_ids, k_ids) in enumerate(zip(*ids, strict=True)):
            want = tiles_of(q_ids[:, None] == k_ids, *sizes[2:]) & tiling.visible()
            np.testing.assert_array_equal(attention.to_mask(plan)[row, 0], want)


def test_lists_ascend_and_hold_the_mask():
    mask = random_mask(0)
    plan = attention.from_mask(mask, GRID)
    assert (plan.num_query_blocks, plan.num_key_blocks, plan.capacity) == (5, 7, 7)
    for index in np.ndindex(mask.shape[:3]):
        count = plan.count[index]
        np.testing.assert_array_equal(plan.blocks[index][:count], np.flatnonzero(mask[index]))
    assert plan.blocks.max() < 7
    assert not plan.dropped.any()
    np.testing.assert_array_equal(attention.to_mask(plan), mask)
    np.testing.assert_array_equal(
        jax.jit(attention.from_mask)(mask, GRID).count,
        plan.count,
    )
    assert plan.num_tiles == mask.sum()
    np.testing.assert_allclose(plan.density, mask.mean(), rtol=1e-6)


def test_set_operations_are_those_of_masks():
    a, b = random_mask(1), random_mask(2, (1, 3, 5, 7))
    plans = [attention.from_mask(x, GRID) for x in (a, b)]
    for operation, want in (
        (attention.union, a | b),
        (attention.intersection, a & b),
    ):
        got = jax.jit(operation)(*plans)
        np.testing.assert_array_equal(attention.to_mask(got), want)
        assert not got.dropped.any()


def test_small_capacities_are_enough_for_set_operations():
    a, b = (attention.from_mask(random_mask(i), GRID, capacity=6) for i in (1, 2))
    assert attention.union(a, b).capacity == 7
    assert attention.intersection(a, b).capacity == 6


def test_transposed_lists_the_query_blocks_of_every_key_block():
    mask = random_mask(3)
    plan = attention.from_mask(mask, GRID)
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
        return attention.from_mask(mask, GRID, capacity=2)

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
    plan = attention.dense(Tiling(300, 500))
    leaves, tree = jax.tree.flatten(plan)
    assert all(leaf.dtype == jnp.int32 for leaf in leaves)
    again = jax.tree.unflatten(tree, leaves)
    for field in dataclasses.fields(plan):
        assert getattr(again, field.name) is getattr(plan, field.name)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: Tiling(0, 4), ("num_queries is 0", "at least 1")),
        (lambda: Tiling(4, 4, block_k=-1), ("block_k is -1", "at least 1")),
        (lambda: attention.window(0, Tiling(4, 4)), ("size is 0", "at least 1")),
        (
            lambda: attention.from_mask(random_mask(0), Tiling(20, 20, 4, 4)),
            ("(2, 3, 5, 7)", "(5, 5)"),
        ),
        (
            lambda: attention.from_mask(random_mask(0)[0], GRID),
            ("mask", "[B|1, H|1, I, J]"),
        ),
        (lambda: attention.from_mask(jnp.ones((1, 1, 1, 1)), Tiling(4, 4)), ("float32", "bool")),
        (
            lambda: attention.from_mask(jnp.ones((1, 1, 5, 7), bool), GRID, capacity=3),
            ("capacity is 3", "7 blocks"),
        ),
        (
            lambda: attention.from_mask(random_mask(0), GRID, capacity=-1),
            ("capacity is -1", "at least 0"),
        ),
        (
            lambda: attention.from_mask(jnp.ones((1, 1, 2, 2), bool), Tiling(8, 8, 4, 4)),
            ("no query sees", "causal=False"),
        ),
        (
            lambda: attention.union(*(attention.dense(Tiling(4, n)) for n in (4, 5))),
            ("(4, 5", "(4, 4"),
        ),
        (
            lambda: attention.segments(jnp.zeros((2, 4), int), jnp.zeros((3, 4), int), GRID),
            ("k_ids has 3", "2"),
        ),
        (
            lambda: attention.segments(jnp.zeros((2, 4), int), jnp.zeros((2, 5), int), GRID),
            ("4 and 5 tokens", "num_queries=20"),
        ),
    ],
)
def test_bad_input_is_named(call, names):
    with pytest.raises(ValueError, match=r"must|give|need|at least|not those") as error:
        call()
    for name in names:
        assert name in str(error.value), error.value


def made_by_hand(lists, counts):
    """A plan of one head, two blocks of 8 queries and four blocks of 4 keys."""
    blocks = jnp.asarray(lists, jnp.int32)[None, None]
    return attention.TilePlan(blocks, jnp.asarray(counts, jnp.int32)[None, None], 16, 16, 8, 4)


HAND = {
    "descending": ([[1, 0, 0, 0], [3, 2, 1, 0]], [2, 4], [[0, 1], [0, 1, 2, 3]]),
    "repeated": ([[0, 0, 1, 0], [2, 2, 2, 3]], [3, 4], [[0, 1], [2, 3]]),
    "outside": ([[0, 9, -1, 0], [1, 4, 3, 0]], [3, 3], [[0], [1, 3]]),
    "count above": ([[0, 1, 2, 3], [0, 1, 2, 3]], [9, 1], [[0, 1, 2, 3], [0]]),
}


@pytest.mark.parametrize("case", HAND)
def test_plans_made_by_hand_are_refused_or_read_alike_by_all_back_ends(case):
    lists, counts, tiles = HAND[case]
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 16, 1, 8), jnp.float32) for i in range(3))
    with pytest.raises(ValueError, match=r"plan\.(blocks|count)"):
        attention.attend(q, k, v, made_by_hand(lists, counts))
    mask = np.zeros((16, 16), bool)
    for i, row in enumerate(tiles):
        for j in row:
            mask[8 * i : 8 * i + 8, 4 * j : 4 * j + 4] = True
    logits = np.where(
        mask, np.asarray(q[0, :, 0], float) @ np.asarray(k[0, :, 0], float).T, -np.inf
    )
    weight = np.exp(logits / np.sqrt(8))
    want = weight / weight.sum(-1, keepdims=True) @ np.asarray(v[0, :, 0], float)
    for backend in ("xla", "reference"):
        got = jax.jit(lambda plan, b=backend: attention.attend(q, k, v, plan, backend=b).y)(
            made_by_hand(lists, counts)
        )
        np.testing.assert_allclose(got[0, :, 0], want, atol=1e-5)
