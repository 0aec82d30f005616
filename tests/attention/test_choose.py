"""Tiles of most value: exactly as many as allowed, none better left out, floors kept."""

import functools

import chex
import jax
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jbalance import importance
from jbalance.attention import Tiling, balanced_plan, candidates, choose, to_mask
from tests.support.examples import few

H, T, S, BQ, BK = 3, 100, 120, 16, 8
TILING = Tiling(T, S, BQ, BK)
ROWS, COLUMNS = 7, 15


def structure(causal=True, keys=S):
    """[rows, columns]: candidates, those that are always there, and those that come first."""
    t, s = np.arange(T)[:, None] + keys - T, np.arange(keys)
    seen = s <= t if causal else np.ones((T, keys), bool)
    own = (s == t) | (s < BK) & seen
    before = (s == t - 1) & seen & causal
    tiles = np.zeros((3, ROWS, -(-keys // BK)), bool)
    for which, i, j in np.ndindex(tiles.shape):
        mask = (seen, own, before)[which]
        tiles[which, i, j] = mask[i * BQ : (i + 1) * BQ, j * BK : (j + 1) * BK].any()
    return tiles


@functools.cache
def chosen(causal):
    tiling = Tiling(T, S, BQ, BK, causal)
    return jax.jit(lambda value, number, floor: choose(value, number, tiling, floor=floor))


@few(15)
@given(st.integers(0, 10**6), st.floats(0.2, 1.2), st.booleans(), st.sampled_from([0.0, 0.5, 1.0]))
@example(
    0, 0.4375, True, 1.0
)  # first blocks with more than their share: the others' floors give way
def test_the_best_tiles_are_chosen_and_no_other(seed, part, causal, floor):
    rng = np.random.default_rng(seed)
    value = rng.choice([0, 1, 2.5, 1e-20, 3e10], (1, H, ROWS, COLUMNS)).astype(np.float32)
    value = np.where(rng.random(value.shape) < 0.7, rng.exponential(size=value.shape), value)
    value = value.astype(np.float32)
    seen, own, before = structure(causal)
    number = max(int(part * H * seen.sum()), H * own.sum())
    plan = chosen(causal)(value, number, floor)
    mask = np.asarray(to_mask(plan))[0]
    assert mask.sum() == min(number, H * seen.sum())
    assert not (mask & ~seen).any()
    assert mask[:, own].all()
    even = np.floor(np.float32(floor * number / (H * seen.sum())) * seen.sum(axis=1))
    over = np.maximum(np.minimum(even, seen.sum(axis=1)) - own.sum(axis=1), 0)
    part = min(1, (number - H * own.sum()) / max(H * over.sum(), 1))
    assert (mask.sum(axis=2) >= own.sum(axis=1) + np.floor(over * part * (1 - 1e-5))).all()
    value = np.where(before, np.inf, value)
    # Of those above its floor, none that is out is worth more than one that is in.
    left = value[0][seen & ~mask]
    for h, i in np.ndindex(H, ROWS):
        free = mask[h, i] & ~own[i]
        if mask[h, i].sum() > max(even[i], own[i].sum()) and free.any() and left.size:
            assert value[0, h, i][free].min() >= left.max()


def test_of_equal_values_the_first_tiles_are_taken():
    seen, own, before = structure()
    value = np.ones((1, H, ROWS, COLUMNS), np.float32)
    own |= before
    plan = choose(value, H * own.sum() + 10, TILING, floor=0.0)
    taken = (np.asarray(to_mask(plan))[0] & ~own).reshape(-1)
    candidates = np.flatnonzero(np.broadcast_to(seen & ~own, (H, ROWS, COLUMNS)).reshape(-1))
    np.testing.assert_array_equal(np.flatnonzero(taken), candidates[:10])


def test_examples_have_budgets_of_their_own_and_new_ones_compile_nothing():
    value = np.random.default_rng(0).random((2, H, ROWS, COLUMNS)).astype(np.float32)

    @jax.jit
    @chex.assert_max_traces(1)
    def chosen(value, number):
        return choose(value, number, TILING)

    for numbers in ([150, 90], [100, 200]):
        plan = chosen(value, np.array(numbers))
        np.testing.assert_array_equal(np.asarray(plan.count).sum(axis=(1, 2)), numbers)


@pytest.mark.parametrize("scorer", [importance.tile_error, importance.tile_sketch])
def test_a_balanced_plan_is_the_choice_by_the_scores_and_has_no_gradient(scorer):
    q = jax.random.normal(jax.random.key(0), (2, T, 4, 8))
    k, v = jax.random.normal(jax.random.key(1), (2, 2, S, 2, 8))
    want = choose(scorer(q, k, v, TILING, rows=4), 200, TILING, floor=0.2)

    def density(q):
        plan = balanced_plan(q, k, v, 200, TILING, scorer=scorer, rows=4, floor=0.2)
        return plan.density, plan

    (_, got), gradient = jax.value_and_grad(density, has_aux=True)(q)
    np.testing.assert_array_equal(got.count, want.count)
    np.testing.assert_array_equal(to_mask(got), to_mask(want))
    assert got.num_tiles == 2 * 200
    assert (gradient == 0).all()


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"num_tiles": 5}, ("num_tiles is 5", "take")),
        ({"num_tiles": -1}, ("num_tiles is -1",)),
        ({"floor": 1.5}, ("floor is 1.5",)),
        ({"score": -np.ones((1, H, ROWS, COLUMNS))}, ("score[(0, 0, 0, 0)] is -1.0", ">= 0")),
        ({"score": np.ones((1, H, ROWS, 9))}, ("(1, 3, 7, 9)", "(7, 15)")),
    ],
)
def test_bad_input_is_named(changes, names):
    call = {"score": np.ones((1, H, ROWS, COLUMNS), np.float32), "num_tiles": 200} | changes
    with pytest.raises(ValueError, match=r"is|has") as error:
        choose(**call, tiling=TILING)
    for name in names:
        assert name in str(error.value)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keys", range(T, T + BK))
def test_candidates_are_what_is_seen_and_always_the_own_and_the_first_keys(keys, causal):
    """At every offset of the queries among the keys: blocks meet at their first and last ones."""
    found = candidates(Tiling(T, keys, BQ, BK, causal))
    for got, want in zip(found, structure(causal, keys)[:2], strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("call", [candidates, lambda x: choose(np.ones((1, 1, 2, 2)), 4, x)])
def test_what_is_no_tiling_is_named(call):
    with pytest.raises(ValueError, match=r"^tiling is "):
        call((T, S))


@pytest.mark.parametrize("devices", [2, 4])
def test_heads_of_several_devices_are_chosen_as_those_of_one(devices):
    value = np.random.default_rng(0).exponential(size=(1, 4, ROWS, COLUMNS)).astype(np.float32)
    value[:, 0] *= 100  # one head would have most but for the others' floors
    number = 4 * structure()[1].sum() + 60
    mesh = jax.make_mesh((devices,), ("h",), axis_types=(jax.sharding.AxisType.Auto,))
    heads = jax.sharding.PartitionSpec(None, "h")

    def own(value):
        return to_mask(choose(value, number, TILING, floor=0.9, axis_name="h"))

    split = jax.shard_map(own, mesh=mesh, in_specs=heads, out_specs=heads)
    np.testing.assert_array_equal(
        jax.jit(split)(value), to_mask(choose(value, number, TILING, floor=0.9))
    )
