"""Weights of tasks from their Gramian: oracles, and the properties that the methods are chosen for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from jbalance import multitask
from jbalance.multitask.fair import fair_weights
from jbalance.multitask.pcgrad import pcgrad_weights
from jbalance.multitask.types import TaskStats
from jbalance.multitask.upgrad import upgrad_weights
from tests.support.gradients import bounded_minimiser, conflicting, least_cosine

GRAM = {
    "upgrad": multitask.upgrad(),
    "mgda": multitask.fair(np.inf),
    "nash": multitask.fair(1.0),
    "fair2": multitask.fair(2.0),
    "fair0": multitask.fair(0.0),
    "pcgrad": multitask.pcgrad(jax.random.key(0)),
}
NO_HARM = ("upgrad", "mgda", "nash", "fair2")


def weights(name, gradients):
    """Weights [K] by a method that needs the Gramian alone."""
    method = GRAM[name]
    gram = multitask.gramian(jnp.asarray(gradients))
    return np.asarray(jax.jit(method.weigh)(TaskStats(gram, None), method.init(len(gradients)))[0])


@pytest.mark.parametrize("name", NO_HARM)
@pytest.mark.parametrize("tasks", [2, 8, 32])
@pytest.mark.parametrize(("condition", "lengths"), [(1e2, 10.0), (3e4, 1.0), (1e5, 1.0)])
def test_no_task_is_harmed(name, tasks, condition, lengths):
    for seed in range(8):
        gradients = conflicting(tasks, 500, condition, seed, lengths)
        assert least_cosine(gradients, np.ones(tasks)) < 0.1
        assert least_cosine(gradients, weights(name, gradients)) >= -1e-6


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_upgrad_is_the_mean_of_the_projections(tasks, seed):
    gradients = np.random.default_rng(seed).normal(size=(tasks, 4)).astype(np.float32)
    gram = gradients.astype(float) @ gradients.T.astype(float)
    want = sum(bounded_minimiser(gram, unit) for unit in np.eye(tasks)) / tasks
    # More tasks than dimensions leave the weights open, but not what they give.
    np.testing.assert_allclose(
        weights("upgrad", gradients) @ gradients, want @ gradients, rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize("seed", range(6))
def test_mgda_is_the_point_of_least_length(seed):
    gradients = np.random.default_rng(seed).normal(size=(4, 6)).astype(np.float32)
    gram = gradients.astype(float) @ gradients.T.astype(float)
    want = minimize(
        lambda w: w @ gram @ w,
        np.full(4, 0.25),
        jac=lambda w: 2 * gram @ w,
        bounds=[(0, 1)] * 4,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    got = weights("mgda", gradients).astype(float)
    assert got.sum() == pytest.approx(1, abs=1e-6)
    assert got @ gram @ got <= want.fun * (1 + 1e-4) + 1e-9


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("tasks", [2, 8])
def test_fair_weights_solve_their_equation(alpha, tasks):
    gradients = conflicting(tasks, 100, 100.0)
    gram = gradients.astype(float) @ gradients.T.astype(float)
    w = np.asarray(fair_weights(jnp.asarray(gram, jnp.float32), alpha), float)
    both = (gram @ w) * w ** (
        1 / alpha
    )  # equal for all tasks; the common factor is the step's length
    np.testing.assert_allclose(both / both.mean(), 1, rtol=1e-3)


def test_fairness_goes_from_the_mean_to_the_least_length():
    gradients = conflicting(4, 100, 30.0, lengths=3.0)
    gram = gradients @ gradients.T
    assert weights("fair0", gradients).tolist() == [0.25] * 4
    length = [
        float(w @ gram @ w) / float(w.sum()) ** 2
        for alpha in (0.0, 0.5, 1.0, 4.0, 50.0, np.inf)
        for w in [np.asarray(fair_weights(jnp.asarray(gram), alpha))]
    ]
    assert length == sorted(length, reverse=True)
    assert length[-2] == pytest.approx(length[-1], rel=0.05)


@pytest.mark.parametrize("seed", range(4))
def test_of_two_tasks_pcgrad_is_upgrad(seed):
    gradients = np.random.default_rng(seed).normal(size=(2, 3)).astype(np.float32)
    want = weights("upgrad", gradients)
    np.testing.assert_allclose(weights("pcgrad", gradients), want, rtol=1e-3, atol=1e-5)


def test_pcgrad_is_its_algorithm():
    gradients = np.random.default_rng(3).normal(size=(5, 4)).astype(np.float32)
    key = jax.random.key(7)
    want = np.zeros(4)
    for i, own in enumerate(jax.random.split(key, 5)):
        g = gradients[i].astype(float)
        for j in np.asarray(jax.random.permutation(own, 5)):
            if j != i and g @ gradients[j] < 0:
                g = g - (g @ gradients[j]) / (gradients[j] @ gradients[j]) * gradients[j]
        want += g / 5
    got = pcgrad_weights(jnp.asarray(gradients @ gradients.T), key)
    np.testing.assert_allclose(got @ gradients, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["upgrad", "mgda", "nash", "fair2"])
def test_tasks_may_come_in_any_order(name):
    gradients = conflicting(6, 50, 50.0)
    order = np.random.default_rng(0).permutation(6)
    np.testing.assert_allclose(
        weights(name, gradients[order]), weights(name, gradients)[order], rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("name", NO_HARM)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_scale_of_all_gradients_changes_no_direction(name, scale):
    gradients = conflicting(4, 50, 100.0)
    got, want = weights(name, gradients * np.float32(scale)), weights(name, gradients)
    np.testing.assert_allclose(got / got.sum(), want / want.sum(), rtol=2e-3)


def test_upgrad_is_linear_in_the_length_of_each_gradient():
    # Its projections are: row i times c adds c times as much of the projection of g_i.
    gradients = conflicting(3, 20, 20.0)
    stretch = np.array([1.0, 7.0, 0.2], np.float32)[:, None]
    alone = []
    for i in range(3):
        lifted = gradients.copy()
        lifted[i] *= 2
        alone.append(weights("upgrad", lifted) @ lifted - weights("upgrad", gradients) @ gradients)
    want = (stretch * np.array(alone)).sum(axis=0)
    got = weights("upgrad", gradients * stretch) @ (gradients * stretch)
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-4 * np.abs(want).max())


@pytest.mark.parametrize("name", GRAM)
def test_without_conflict_nothing_is_taken_away(name):
    gradients = np.abs(np.random.default_rng(0).normal(size=(4, 30))).astype(np.float32)
    got = weights(name, gradients)
    assert (got >= 0).all()
    if name in ("upgrad", "pcgrad", "fair0"):
        np.testing.assert_allclose(got, 0.25, rtol=1e-5)


@pytest.mark.parametrize("name", GRAM)
@pytest.mark.parametrize("zeros", [1, 3])
def test_gradients_of_zero_are_no_trouble(name, zeros):
    gradients = conflicting(3, 20, 10.0)
    gradients[:zeros] = 0
    got = weights(name, gradients)
    assert np.isfinite(got).all()
    if name == "mgda":  # there is no shorter point than zero
        assert np.abs(got @ gradients).max() == 0


def test_the_same_task_twice_counts_as_one_direction():
    gradients = conflicting(2, 20, 100.0)
    got = upgrad_weights(multitask.gramian(jnp.asarray(gradients[[0, 0, 1]])))
    assert least_cosine(gradients[[0, 0, 1]], got) >= -1e-6


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: multitask.upgrad(0.0), ("ridge is 0.0", "it must be in [1.17")),
        (lambda: multitask.fair(-1.0), ("alpha is -1.0",)),
        (lambda: multitask.fair(1.0, ridge=-1.0), ("ridge is -1.0",)),
        (lambda: multitask.dwa(0.0), ("temperature",)),
        (lambda: multitask.gradnorm(-1.0), ("asymmetry",)),
        (lambda: multitask.gradnorm(learning_rate=0.0), ("learning_rate",)),
        (lambda: multitask.famo(decay=-1.0), ("decay",)),
        (lambda: multitask.uncertainty(0.0), ("learning_rate",)),
        (
            lambda: multitask.by_importance(np.eye(2), rule="best"),
            ("rule is 'best'", "proportional"),
        ),
    ],
)
def test_bad_input_is_named(build, names):
    with pytest.raises(ValueError, match=r"is|must") as error:
        build()
    for name in names:
        assert name in str(error.value)
