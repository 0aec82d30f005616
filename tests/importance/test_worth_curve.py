"""How many units are worth how much: counts in half octaves, that add up and name one price."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jbalance import importance, shares
from tests.support.examples import few


@few(30)
@given(st.integers(0, 2**31), st.integers(1, 4))
def test_counts_are_those_of_a_histogram_of_half_octaves(seed, examples):
    rng = np.random.default_rng(seed)
    value = np.exp(rng.normal(size=(examples, 300)) * 20).astype(np.float32)
    value[:, :5] = 0
    where = rng.random(300) < 0.7
    got = np.asarray(importance.worth_curve(value, where))
    ends = (np.arange(importance.CURVE_BINS + 1, dtype=np.int64) << 22).astype(np.int32)
    edges = ends.view(np.float32)[:-1].astype(np.float64)
    want = np.histogram(value[:, where], np.append(edges, np.inf))[0] / examples
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(got.sum(), where.sum(), rtol=1e-5)


@few(30)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_shares_by_one_price(seed, part):
    rng = np.random.default_rng(seed)
    curves = jnp.asarray(rng.random((5, 40)) * (rng.random((5, 40)) < 0.5), jnp.float32)
    amount = part * float(curves.sum())
    alpha = np.asarray(shares.priced(curves, amount))
    np.testing.assert_allclose(alpha.sum(), 1, rtol=1e-5)
    if amount < 1e-3:
        return
    taken = alpha * amount
    assert (taken <= np.asarray(curves.sum(axis=1)) * (1 + 1e-4) + 1e-4).all()
    # More for all together is less for nobody.
    more = min(1.1 * amount, float(curves.sum()))
    assert (np.asarray(shares.priced(curves, more)) * more >= taken * (1 - 1e-4) - 1e-4).all()
    # Owners in another order get the same.
    order = rng.permutation(5)
    np.testing.assert_allclose(shares.priced(curves[order], amount), alpha[order], rtol=1e-4)


def test_nothing_known_is_equal():
    np.testing.assert_allclose(shares.priced(jnp.zeros((4, 8)), 10), 0.25)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: importance.worth_curve(jnp.array([-1.0])), "value"),
        (
            lambda: importance.worth_curve(jnp.ones(3), jnp.ones(2, bool)),
            r"where has .*shape \(2,\)",
        ),
        (lambda: shares.priced(jnp.ones(3), 1), "curves"),
        (lambda: shares.priced(jnp.ones((3, 2)), -1), "amount"),
    ],
)
def test_bad_input_names_itself(call, message):
    with pytest.raises(ValueError, match=message):
        call()
