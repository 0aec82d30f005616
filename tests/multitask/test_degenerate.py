"""Aggregators given zero, opposed, huge, tiny, complex and NaN input: finite, or an error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jbalance import multitask
from jbalance.multitask.types import TaskStats
from tests.support.gradients import bounded_minimiser, least_cosine
from tests.support.versions import NEWER_JAX

BY_LOSSES = {
    "dwa": multitask.dwa(),
    "famo": multitask.famo(),
    "gradnorm": multitask.gradnorm(),
    "uncertainty": multitask.uncertainty(),
    "importance": multitask.by_importance(np.eye(2)),
}
BY_GRAM = {
    "upgrad": multitask.upgrad(),
    "mgda": multitask.fair(np.inf),
    "nash": multitask.fair(1.0),
    "fair2": multitask.fair(2.0),
    "fair50": multitask.fair(50.0),
    "fair0.1": multitask.fair(0.1),
    "pcgrad": multitask.pcgrad(jax.random.key(0)),
}


def run(weighting, losses, jit=True):
    """Weights of each step, for losses [steps, 2] and orthogonal gradients of length 1."""
    weigh = jax.jit(weighting.weigh) if jit else weighting.weigh
    state, out = weighting.init(2), []
    for row in losses:
        weights, state = weigh(TaskStats(jnp.eye(2), jnp.asarray(row, jnp.float32)), state)
        out.append(np.asarray(weights))
    return np.array(out)


@functools.cache
def updating(name, tasks):
    made = multitask.aggregator(BY_GRAM[name], tasks)
    return jax.jit(lambda gradients: made.update(gradients, made.init(None)))


def update(name, gradients):
    """Of one step, the update [N] and the weights [K]."""
    out, state = updating(name, len(gradients))(np.asarray(gradients, np.float32))
    return np.asarray(out, float), np.asarray(state.weights, float)


def test_dwa_of_a_loss_that_rises_from_zero():
    got = run(multitask.dwa(), [[1, 0], [1, 5], [1, 5], [1, 5], [1, 0], [1, 0], [1, 0]])
    even = [0.5, 0.5]
    risen = np.exp([0.5, 0.0]) / (1 + np.exp(0.5))  # to 0 again: ratios 1 and 0
    np.testing.assert_allclose(got, [even, even, [0, 1], even, even, risen, even], rtol=1e-6)


def test_gradnorm_of_a_loss_that_begins_with_zero():
    got = run(multitask.gradnorm(), [[1, 0], [1, 5], [1, 5], [1, 5]])
    # What is left: all and nothing; then both have all of theirs, and the weights come together again.
    np.testing.assert_allclose(got, [[1, 1], [1.025, 0.975], [1, 1], [1, 1]], rtol=1e-6)


def test_uncertainty_never_goes_beyond_its_rest():
    got = run(multitask.uncertainty(1.0), np.tile([1e30, 0.0], (200, 1)))
    np.testing.assert_allclose(got[1], [np.exp(-46), np.e], rtol=1e-4)
    np.testing.assert_allclose(got[-1], [np.exp(-46), np.exp(46)], rtol=1e-4)
    np.testing.assert_allclose(run(multitask.uncertainty(1.0), [[5, 1]] * 9)[1:, 0], 0.2, rtol=1e-5)


@pytest.mark.parametrize("name", BY_LOSSES)
def test_weights_from_losses_are_finite(name):
    far = [0.0, 1e-38, 1e-30, 1.0, 1e30, 3e38]
    losses = [[a, b] for a in far for b in far]
    for order in (losses, losses[::-1]):
        got = run(BY_LOSSES[name], order)
        assert np.isfinite(got).all()
        assert (got >= 0).all()
        if name != "uncertainty":
            total = 2 if name == "gradnorm" else 1
            np.testing.assert_allclose(got.sum(axis=1), total, rtol=1e-5)


@pytest.mark.parametrize("name", BY_LOSSES)
def test_one_bad_loss_is_an_error_or_one_step(name):
    rows = [[1.0, 2.0], [3.0, 1.0], [2.0, 2.0]]
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match=rf"losses\[1\] is {bad}"):
            run(BY_LOSSES[name], [[1, bad]], jit=False)
        spoiled = run(BY_LOSSES[name], [rows[0], [1.0, bad], *rows[1:]])
        assert np.isnan(spoiled[1]).all()
        # The state is as if that step had not been.
        np.testing.assert_array_equal(spoiled[[0, 2, 3]], run(BY_LOSSES[name], rows))
    with pytest.raises(ValueError, match=r"losses\[0\] is -2.0"):
        run(BY_LOSSES[name], [[-2, 1]], jit=False)
    rows = np.array([[-1.0, 2.0], [3.0, -1.0], [2.0, 2.0], [1.0, 1.0]])
    np.testing.assert_array_equal(
        run(BY_LOSSES[name], rows), run(BY_LOSSES[name], np.maximum(rows, 0))
    )


@pytest.mark.parametrize("name", BY_GRAM)
def test_training_ends_at_a_pareto_stationary_point(name):
    """Two tasks (p - a)² and (p - b)²: every point between a and b is one, where the Gramian is
    singular."""
    chain = optax.chain(multitask.aggregator(BY_GRAM[name], 2), optax.sgd(0.05))
    a, b = -1.0, 2.0

    def step(carry, _):
        p, state = carry
        updates, state = chain.update(jnp.stack([2 * (p - a), 2 * (p - b)]), state)
        p = optax.apply_updates(p, updates)
        return (p, state), p

    def train(p):
        return jax.lax.scan(step, (p, chain.init(p)), None, length=2000)[1]

    path = np.asarray(jax.jit(jax.vmap(train))(jnp.array([5.0, -7.0, 0.3, a])))
    assert np.isfinite(path).all()
    assert (path[:, -1] >= a - 1e-5).all()
    assert (path[:, -1] <= b + 1e-5).all()
    assert path[2, -1] == pytest.approx(0.3, abs=1e-3)  # it is there from the start


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e20, 1e30])
def test_upgrad_scales_before_it_squares(scale):
    # g1 less its part against g2, and g2 less its part against g1, over 2.
    got, _ = update("upgrad", np.array([[1, 0], [-1, 1]]) * scale)
    np.testing.assert_allclose(got, np.array([0.25, 0.75]) * scale, rtol=1e-4)


def test_upgrad_of_one_huge_gradient():
    got, weights = update("upgrad", [[1e20, 0], [-1, 1]])
    np.testing.assert_allclose(got, [0.25e20, 0.25e20], rtol=1e-4)
    np.testing.assert_allclose(weights, [0.5, 0.25e20], rtol=1e-4)


@pytest.mark.parametrize(
    "lengths", [(1, 1e-20, 1), (1e20, 1, 1e-5), (1e30, 1, 1e25), (1e-30, 1, 1)]
)
def test_no_task_is_harmed_however_short_its_gradient(lengths):
    stretch = np.float32(lengths)[:, None]
    directions = np.array([[1, 0, 0], [-2, 1, 0], [0, -1, 0.5]], np.float32)
    assert least_cosine(directions, np.ones(3)) < 0
    for name in ("upgrad", "mgda", "nash", "fair2"):
        got, weights = update(name, directions * stretch)
        assert np.isfinite(got).all()
        assert least_cosine(directions, weights * np.float64(lengths)) > -1e-5
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    gram = unit.astype(float) @ unit.T.astype(float)
    parts = [bounded_minimiser(gram, e) for e in np.eye(3)]
    norm = np.linalg.norm(directions * np.float64(stretch), axis=1)
    want = sum(length * w for length, w in zip(norm, parts, strict=True)) @ unit / 3
    got = update("upgrad", directions * stretch)[0]
    np.testing.assert_allclose(got / abs(want).max(), want / abs(want).max(), atol=1e-5)


@pytest.mark.parametrize("name", BY_GRAM)
def test_hostile_gradients_give_finite_updates_no_longer_than_the_longest(name):
    one = np.array([3.0, -4.0])
    for scale in (0, 1e-38, 1e-30, 1, 1e30):
        for rows in ([one, one, one], [one, -one, one], [one, -1e-6 * one, 0 * one], [0 * one] * 3):
            gradients = np.array(rows) * scale
            got, weights = update(name, gradients)
            assert np.isfinite(weights).all()
            assert np.linalg.norm(got) <= np.linalg.norm(gradients, axis=1).max() * (1 + 1e-5)


@pytest.mark.parametrize("name", BY_GRAM)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradients_that_are_not_finite(name, bad):
    gradients = jnp.array([[1.0, bad], [1.0, 2.0]])
    made = multitask.aggregator(BY_GRAM[name], 2)
    with pytest.raises(ValueError, match=rf"the largest \|task_grads\['a'\]\| is {bad}"):
        made.update({"a": gradients}, made.init(None))
    assert np.isnan(update(name, gradients)[1]).all()  # under jit: to be seen, and not for ever
    with pytest.raises(ValueError, match=r"gram\[\(0, 0\)\] is"):
        BY_GRAM[name].weigh(TaskStats(gradients * 0 + bad, None), made.init(None).inner)


def test_the_gramian_and_the_sum_refuse_what_is_not_real_and_finite():
    good = jnp.ones((2, 3))
    for grads, message in (
        (good.at[0, 1].set(jnp.nan), "is nan"),
        (good.at[0, 1].set(-jnp.inf), "is inf"),
        (good + 1j, "dtype complex64"),
        (good.astype(int), "dtype int32"),
    ):
        for call in (multitask.gramian, lambda g: multitask.combine(jnp.ones(2), g)):
            with pytest.raises(ValueError, match=message):
                call({"x": grads})
    for weights, message in (
        (jnp.array([1.0, jnp.nan]), r"weights\[1\] is nan"),
        (jnp.ones(3), "weights has 3 entries for K, the tasks of task_grads, = 2"),
        (1.0, r"weights must have shape \[K\]"),
    ):
        with pytest.raises(ValueError, match=message):
            multitask.combine(weights, good)


@NEWER_JAX  # jax 0.8 sums in another order: 1.01e-5
def test_the_gramian_is_one_of_products():
    rng = np.random.default_rng(0)
    leaves = {"a": rng.normal(size=(3, 2, 10000)), "b": rng.normal(size=(3,)), "c": np.ones((3, 0))}
    stretch = np.array([1e-3, 1, 1e3])
    leaves = {k: (v.T * stretch).T.astype(np.float32) for k, v in leaves.items()}
    rows = np.concatenate([v.reshape(3, -1) for v in leaves.values()], axis=1).astype(float)
    np.testing.assert_allclose(multitask.gramian(leaves), rows @ rows.T, rtol=1e-5, atol=1e-9)
    # Of gradients that are far too long, in a unit of length of its own.
    got = np.asarray(multitask.gramian(jax.tree.map(lambda x: x * np.float32(1e30), leaves)), float)
    want = rows @ rows.T
    np.testing.assert_allclose(got / got[0, 0], want / want[0, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BY_GRAM | BY_LOSSES)
def test_doubles_may_be_on(name):
    weighting = (BY_GRAM | BY_LOSSES)[name]
    stats = TaskStats(jnp.array([[1.0, -0.5], [-0.5, 2.0]]), jnp.array([1.0, 2.0]))
    want, _ = weighting.weigh(stats, weighting.init(2))
    with jax.enable_x64(True):
        made = multitask.aggregator(weighting, 2)
        start = made.init(None)

        def step(state, _):
            grads = jnp.array([[1.0, 0.0], [-0.5, np.sqrt(1.75)]])
            out, state = made.update(grads, state, losses=jnp.array([1.0, 2.0]))
            return state, (out, state.weights)

        _, (out, weights) = jax.lax.scan(step, start, None, length=3)
    assert out.dtype == np.float64
    np.testing.assert_allclose(weights[0], want, rtol=1e-5)
