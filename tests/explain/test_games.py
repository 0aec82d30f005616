"""Ablation and Shapley values of games whose values are known."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import explain

GAMES, UNITS = 20, 7


def tables():
    """[GAMES, 2^U] the worth of every coalition."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(GAMES, 2**UNITS)) * rng.lognormal(size=(GAMES, 1))


def game_of(table):
    bits = 1 << np.arange(UNITS)
    return lambda kept: jnp.asarray(table, jnp.float32)[(kept * bits).sum(axis=1)]


def by_all_orders(worth, units):
    """The definition: the mean over all orders of what a unit adds to those before it."""
    value = np.zeros(units)
    for order in itertools.permutations(range(units)):
        before = frozenset()
        for unit in order:
            value[unit] += worth(before | {unit}) - worth(before)
            before |= {unit}
    return value / math.factorial(units)


def test_exact_values_are_those_of_all_orders():
    for table in tables()[:3]:
        want = by_all_orders(lambda s, t=table: t[sum(1 << i for i in s)], UNITS)
        got = explain.exact_shapley(game_of(table), UNITS)
        np.testing.assert_allclose(got.value, want, atol=1e-4)
        assert not got.error.any()


def test_samples_are_within_two_standard_errors_of_exact():
    """Of 140 values 95 % should be; the sums are exact in every sample."""
    near = []
    for number, table in enumerate(tables()):
        game = game_of(table)
        exact = np.asarray(explain.exact_shapley(game, UNITS).value)
        found = explain.shapley(game, UNITS, jax.random.key(number), num_permutations=200)
        near += (abs(found.value - exact) <= 2 * found.error).tolist()
        np.testing.assert_allclose(found.value.sum(), table[-1] - table[0], atol=1e-3)
        assert (found.error > 0).all()
        assert (abs(found.value - exact) <= 4.5 * found.error).all()
    assert len(near) == GAMES * UNITS
    assert np.mean(near) > 0.9


def test_units_that_add_nothing_and_units_that_are_alike():
    found = explain.exact_shapley(lambda kept: 3.0 * (kept[:, 0] & kept[:, 1]), 3)
    np.testing.assert_allclose(found.value, [1.5, 1.5, 0], atol=1e-6)
    # Either of two suffices: leaving one out shows nothing, though together they are worth 2.
    either = explain.leave_one_out(lambda kept: 2.0 * (kept[:, 0] | kept[:, 1]), 3)
    np.testing.assert_array_equal(either, [0, 0, 0])
    np.testing.assert_allclose(
        explain.exact_shapley(lambda kept: 2.0 * (kept[:, 0] | kept[:, 1]), 3).value, [1, 1, 0]
    )


def test_leaving_one_out_of_a_sum_gives_its_terms():
    terms = np.arange(1.0, 6.0)
    np.testing.assert_allclose(explain.leave_one_out(lambda kept: kept @ terms, 5), terms)


def test_sampling_is_one_program_under_jit():
    table = tables()[0]
    run = jax.jit(
        lambda key: explain.shapley(
            jax.vmap(lambda kept: game_of(table)(kept[None])[0]), UNITS, key, num_permutations=8
        )
    )
    alone = explain.shapley(game_of(table), UNITS, jax.random.key(3), num_permutations=8)
    np.testing.assert_allclose(run(jax.random.key(3)).value, alone.value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: explain.exact_shapley(lambda kept: kept[:, 0], 11), "num_units is 11: at most 10"),
        (lambda: explain.leave_one_out(lambda kept: kept.sum(), 3), "worth gave shape"),
        (
            lambda: explain.shapley(
                lambda kept: kept[:, 0], 3, jax.random.key(0), num_permutations=1
            ),
            "num_permutations is 1",
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
