"""METHOD section 3: every figure of the worked example, as printed and as the formulas give it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import entr

from jbalance import importance, rescale, resources, shares

CAPACITY = 200.0
DEMAND = jnp.array([50.0, 30.0])
USED = jnp.array([20.0, 15.0])
A = jnp.array([[0.6, 0.4], [0.4, 0.6]])
COMPLEXITY = jnp.array([0.5, 0.3])
PRINTED_ALPHA = jnp.array([0.5, 0.5])


def test_importance():
    np.testing.assert_allclose(importance.weighted(A, COMPLEXITY), [0.42, 0.38], rtol=1e-6)
    # Printed (0.54, 0.46): what complexities (0.7, 0.3) would give.
    printed = importance.weighted(A, jnp.array([0.7, 0.3]))
    np.testing.assert_allclose(printed, [0.54, 0.46], rtol=1e-6)
    # The table's (0.6, 0.4): the first column of a, the second indicator left out.
    first_column = importance.weighted(A, jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(first_column, [0.6, 0.4], rtol=1e-6)


def test_shares():
    alpha = shares.proportional(importance.weighted(A, COMPLEXITY))
    np.testing.assert_allclose(alpha, [0.525, 0.475], rtol=1e-6)
    # The printed w has the sum 1: its shares are itself.
    np.testing.assert_allclose(
        shares.proportional(jnp.array([0.54, 0.46])), [0.54, 0.46], rtol=1e-6
    )
    # Printed (0.5, 0.5): the uniform start, not shares of either w.
    np.testing.assert_allclose(shares.uniform(2), PRINTED_ALPHA)


def test_resources():
    left = resources.status(CAPACITY, DEMAND, USED)
    assert left.available == 165
    assert left.remaining == 165
    assert left.total_available == left.total_remaining == 165
    # Equal because both use less than they need; not where one uses more.
    more = resources.status(CAPACITY, DEMAND, jnp.array([60.0, 15.0]))
    assert (more.available, more.remaining) == (125, 135)


# Unit i: the denominator and A~_i / A_i as printed, what was put in for a_ik, and what that gives.
PRINTED = {
    "1": (0, 0.75, 2 / 3, [0.5, 0.3], 0.40, 1.25),
    "2": (1, 0.90, 5 / 9, [0.3, 0.6], 0.45, 1 / 0.9),
}


@pytest.mark.parametrize("unit", PRINTED)
def test_rescaling_as_printed(unit):
    """For a_1k the text takes both complexities, for a_2k one of them and one association, and then
    adds the products wrongly: 0.25 + 0.15 is 0.40, not 0.75, and 0.15 + 0.30 is 0.45, not 0.9."""
    i, denominator, ratio, taken_for_a, corrected_denominator, corrected_ratio = PRINTED[unit]
    np.testing.assert_allclose(PRINTED_ALPHA[i] / denominator, ratio, rtol=1e-6)
    claim = PRINTED_ALPHA[i] * jnp.array(taken_for_a)
    np.testing.assert_allclose(claim.sum(), corrected_denominator, rtol=1e-6)
    a = A.at[i].set(jnp.array(taken_for_a))
    out = rescale.weights(PRINTED_ALPHA, a, jnp.ones(2), rule="literal")
    np.testing.assert_allclose(out[i], corrected_ratio, rtol=1e-6)


def test_rescaling_with_a():
    """With a itself the denominators are 0.5, and the literal rule changes nothing: alpha cancels."""
    np.testing.assert_allclose(PRINTED_ALPHA @ A.T, 0.5, rtol=1e-6)
    for alpha in (PRINTED_ALPHA, jnp.array([0.525, 0.475]), jnp.array([0.9, 0.1])):
        out = rescale.weights(alpha, A, jnp.array([3.0, 7.0]), rule="literal")
        # The free index k: A~ is [N, K]; the example takes k = i.
        assert out.shape == (2, 2)
        np.testing.assert_allclose(out, [[3, 7], [3, 7]], rtol=1e-6)


def test_softmax_maximises_the_objective_with_entropy():
    """alpha . w + tau H(alpha), and not y = alpha . w: a one-hot vector maximises that."""
    w = np.array([0.42, 0.38, 0.9])
    for tau in (0.1, 1.0, 5.0):
        best = minimize(
            lambda a, tau=tau: -(a @ w + tau * entr(a).sum()),
            np.full(3, 1 / 3),
            bounds=[(1e-12, 1)] * 3,
            constraints={"type": "eq", "fun": lambda a: a.sum() - 1},
            options={"ftol": 1e-14},
        )
        alpha = np.asarray(shares.softmax(w, tau))
        np.testing.assert_allclose(alpha, best.x, atol=1e-4)
        one_hot = np.eye(3)[2]
        assert one_hot @ w > alpha @ w


def test_softmax_of_no_temperature_is_one_hot():
    for tau in (1e-2, 1e-4, 1e-30):
        np.testing.assert_allclose(
            shares.softmax(jnp.array([0.42, 0.38, 0.9]), tau), [0, 0, 1], atol=1e-6
        )
