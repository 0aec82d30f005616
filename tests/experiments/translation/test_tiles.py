"""Tiles of short sentences: budgets met exactly, the library's attention, nothing seen too early."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.translation import tiles
from jbalance import attention, importance

P, T, H, D = 6, 16, 2, 8
LENGTHS = jnp.array([13, 16, 9, 12, 3, 16])
OTHERS = jnp.array([8, 11, 9, 16, 4, 6])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


Q, K, V = normal(0, P, T, H, D), *normal(1, 2, P, T, H, D)


tile_values = jax.jit(tiles.tile_values)
arms = {name: jax.jit(arm) for name, arm in tiles.ARMS.items()}


@functools.cache
def problem(causal):
    keys = LENGTHS if causal else OTHERS
    seen = tiles.seen_by(LENGTHS, keys, T, T, causal)
    values = tile_values(Q[:, :: tiles.BLOCK], K, V, seen.keys)
    visible = (jnp.arange(T) < keys[:, None])[:, None]
    if causal:
        visible = visible & jnp.tril(jnp.ones((T, T), bool))
    return seen, values, visible


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", list(tiles.ARMS))
def test_every_arm_spends_the_same(name, causal):
    seen, values, _ = problem(causal)
    candidates = H * int(seen.tiles.sum())
    total = int(tiles.part_of(name) * candidates)
    choice = arms[name](values, seen, jnp.asarray(total))
    assert int(choice.tiles.sum()) == total
    assert not (choice.tiles & ~seen.tiles).any()
    lists = jnp.any(seen.tiles, axis=-1)
    assert (jnp.any(choice.tiles, axis=-1) == lists).all()  # each list has one
    assert (choice.tiles | ~(seen.own & seen.tiles)).all()  # its own one under the causal mask


@pytest.mark.parametrize("name", ["proportional", "ladder"])
def test_the_level_gives_the_same_tiles_again(name):
    seen, values, _ = problem(True)
    total = jnp.asarray(H * int(seen.tiles.sum()) // 2)
    choice = arms[name](values, seen, total)
    again = arms[name](values, seen, None, choice.level)
    assert abs(int(again.tiles.sum()) - int(total)) <= 1  # ties and the step at the price itself


def test_the_ladder_takes_what_is_worth_most():
    seen, values, _ = problem(False)
    total = jnp.asarray(H * int(seen.tiles.sum()) // 2)
    worth = {
        name: float(jnp.sum(jnp.where(arms[name](values, seen, total).tiles, values, 0)))
        for name in ("uniform", "proportional", "ladder")
    }
    assert worth["ladder"] > worth["proportional"]
    assert worth["ladder"] > worth["uniform"]


@pytest.mark.parametrize(("name", "causal"), [("ladder", False), ("full", True)])
def test_attention_and_gradient_are_the_librarys(name, causal):
    seen, values, visible = problem(causal)
    total = int(tiles.part_of(name) * H * int(seen.tiles.sum()))
    plan = tiles.plan_of(arms[name](values, seen, jnp.asarray(total)).tiles, T, T)
    bias = jnp.where(visible, 0.0, -jnp.inf)[:, None]

    def ours(q, k, v):
        return tiles.attend(q, k, v, plan, visible, total)

    def librarys(q, k, v):
        return attention.attend(q, k, v, plan, bias=bias).y

    def both(f):
        def loss(*x):
            y = f(*x)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(Q, K, V)

    got, want = both(ours), both(librarys)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_as_many_tiles_are_computed_as_the_budget_holds():
    seen, values, visible = problem(False)
    total = int(H * int(seen.tiles.sum()) // 2)
    plan = tiles.plan_of(arms["ladder"](values, seen, jnp.asarray(total)).tiles, T, T)
    compiled = jax.jit(functools.partial(tiles.attend, most=total)).lower(Q, K, V, plan, visible)
    products = compiled.as_text().count(f"tensor<{total}x{tiles.BLOCK}x{tiles.BLOCK}xf32>")
    assert int(plan.num_tiles) == total
    assert products  # logits of these tiles, of no square
    assert f"tensor<{P}x{H}x{T}x{T}xf32>" not in compiled.as_text()


def test_values_are_the_librarys_where_nothing_is_masked():
    every = jnp.full((P, T // tiles.BLOCK, T), True)
    got = tile_values(Q[:, tiles.BLOCK - 1 :: tiles.BLOCK], K, V, every)
    tiling = attention.Tiling(Q.shape[1], K.shape[1], tiles.BLOCK, tiles.BLOCK, causal=False)
    want = importance.tile_error(Q, K, V, tiling, rows=1)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_a_decoders_tiles_do_not_know_what_comes_later():
    seen, values, _ = problem(True)
    block = 2
    later = jnp.arange(T) > block * tiles.BLOCK  # all but the first query of that block
    q, k, v = (jnp.where(later[:, None, None], 9.0, x) for x in (Q, K, V))
    changed = tile_values(q[:, :: tiles.BLOCK], k, v, seen.keys)
    np.testing.assert_allclose(
        changed[:, :, : block + 1, :block], values[:, :, : block + 1, :block], rtol=1e-5
    )
