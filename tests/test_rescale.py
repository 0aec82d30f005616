"""The three rules for A~: what each conserves, and the bias that equals one of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jbalance import rescale

N, K = 4, 6
_rng = np.random.default_rng(0)
ALPHA = _rng.dirichlet(np.ones(N)).astype(np.float32)
A = (_rng.random((N, K)) * (_rng.random((N, K)) < 0.7)).astype(np.float32)
A[:, 2] = 0  # a key that nobody claims
A[0, 0] = 0.5
ATTENTION = _rng.dirichlet(np.ones(K), 3).astype(np.float32)


# Sizes whose products, over the largest ones, float32 still holds.
sizes = st.just(0.0) | st.floats(2.0**-15, 2.0**15, width=32)
all_rules = jax.jit(lambda *given: [rescale.weights(*given, rule=x) for x in sorted(rescale.RULES)])


@given(alpha=arrays(np.float32, 3, elements=sizes), data=st.data())
def test_every_rule_is_its_sum_key_by_key(alpha, data):
    a = data.draw(arrays(np.float32, (3, 5), elements=sizes))
    attention = data.draw(arrays(np.float32, 5, elements=sizes))
    literal, renormalized, split = all_rules(alpha, a, attention)
    alpha, a, attention = (x.astype(np.float64) for x in (alpha, a, attention))
    gain = [sum(alpha[i] * a[i, k] for i in range(3)) for k in range(5)]
    whole = sum(attention[k] * gain[k] for k in range(5))
    for k in range(5):
        want = attention[k] * gain[k] / whole if whole else 0
        np.testing.assert_allclose(renormalized[k], want, rtol=1e-5, atol=0)
        for i in range(3):
            row = a[i].sum() if alpha[i] else 0
            want = attention[k] / row if row else 0
            np.testing.assert_allclose(literal[i, k], want, rtol=1e-5, atol=0)
            want = alpha[i] * a[i, k] / gain[k] * attention[k] if gain[k] else 0
            np.testing.assert_allclose(split[i, k], want, rtol=1e-5, atol=0)


def test_split_conserves_every_claimed_key():
    out = rescale.weights(ALPHA, A, ATTENTION, rule="split")
    assert out.shape == (3, N, K)
    unclaimed = np.arange(K) == 2
    np.testing.assert_array_equal(rescale.unclaimed(ALPHA, A), unclaimed)
    np.testing.assert_allclose(out.sum(1), np.where(unclaimed, 0, ATTENTION), rtol=1e-5)
    claim = ALPHA[:, None] * A
    want = claim[:, ~unclaimed] / claim.sum(0)[~unclaimed] * ATTENTION[:, None, ~unclaimed]
    np.testing.assert_allclose(out[..., ~unclaimed], want, rtol=1e-5)


def test_units_without_a_share_claim_nothing():
    alpha = jnp.array([0.0, 1.0, 0.0, 0.0])
    np.testing.assert_array_equal(rescale.unclaimed(alpha, A), A[1] == 0)
    out = rescale.weights(alpha, A, ATTENTION[0], rule="split")
    np.testing.assert_array_equal(out[jnp.array([0, 2, 3])], 0)


def test_literal_is_attention_over_the_row_sums():
    out = rescale.weights(ALPHA, A, ATTENTION, rule="literal")
    np.testing.assert_allclose(out, ATTENTION[:, None] / A.sum(1)[:, None], rtol=1e-5)
    without = rescale.weights(ALPHA, np.zeros_like(A), ATTENTION, rule="literal")
    np.testing.assert_array_equal(without, 0)


def test_renormalize_is_a_bias_on_the_logits():
    logits = np.log(ATTENTION)
    want = jax.nn.softmax(logits + rescale.logit_bias(ALPHA, A))
    got = rescale.weights(ALPHA, A, ATTENTION, rule="renormalize")
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-6)
    gain = ALPHA @ A
    np.testing.assert_allclose(got, ATTENTION * gain / (ATTENTION @ gain)[:, None], rtol=1e-5)


def test_no_key_with_a_gain_gives_zero_and_no_nan():
    np.testing.assert_array_equal(rescale.weights(ALPHA, 0 * A, ATTENTION, rule="renormalize"), 0)
    assert np.isfinite(rescale.logit_bias(ALPHA, 0 * A)).all()


def test_the_bias_has_a_gradient():
    mix = jnp.asarray(_rng.normal(size=K), jnp.float32) * (np.arange(K) != 2)

    def f(alpha):
        return mix @ rescale.logit_bias(alpha, A)

    alpha, step = jnp.array([0.3, 0.4, 0.2, 0.6]), 0.01
    numeric = [(f(alpha + d) - f(alpha - d)) / (2 * step) for d in step * jnp.eye(N)]
    np.testing.assert_allclose(jax.grad(f)(alpha), numeric, rtol=5e-3, atol=5e-3)
    all_gradients = jax.jacobian(rescale.logit_bias)(alpha, A)
    assert np.isfinite(all_gradients).all()
    np.testing.assert_array_equal(all_gradients[2], 0)


@pytest.mark.parametrize("rule", rescale.RULES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_rules_under_transformations(rule, dtype):
    arrays = [jnp.asarray(x, dtype) for x in (ALPHA, A, ATTENTION)]

    def run(alpha, association, attention):
        return rescale.weights(alpha, association, attention, rule=rule)

    whole = run(*arrays)
    assert whole.dtype == jnp.float32
    rows = jax.jit(jax.vmap(run, in_axes=(None, None, 0)))(*arrays)
    np.testing.assert_allclose(rows, whole, rtol=1e-5, atol=1e-7)
    gradient = jax.grad(lambda *xs: (run(*xs) ** 2).sum(), argnums=(0, 1, 2))(
        *(x.astype(jnp.float32) for x in arrays)
    )
    assert all(np.isfinite(g).all() for g in gradient)


@pytest.mark.parametrize("rule", list(rescale.RULES))
@pytest.mark.parametrize(
    "factors",
    [(1e30, 1e30), (1e-30, 1e-30), (1.0, 1e37), (1e-33, 1.0), (3.4e38, 1.0), (1.0, 3.4e38)],
)
def test_sizes_of_shares_and_associations_do_not_matter(rule, factors):
    of_alpha, of_association = map(np.float32, factors)
    got = rescale.weights(ALPHA * of_alpha, A * of_association, ATTENTION, rule=rule)
    want = rescale.weights(ALPHA, A, ATTENTION, rule=rule)
    if rule == "literal":  # alpha cancels, the association divides
        want = np.asarray(want, np.float64) / of_association
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-37)


def test_a_bias_of_large_and_small_gains_is_finite():
    for of_alpha, of_association in ((1e30, 1e30), (1e-30, 1e-30)):
        got = rescale.logit_bias(ALPHA * np.float32(of_alpha), A * np.float32(of_association))
        gain = (ALPHA.astype(float) * of_alpha) @ (A.astype(float) * of_association)
        some = gain > 0
        np.testing.assert_allclose(got[some], np.log(gain[some]), rtol=1e-5)
        np.testing.assert_array_equal(got[~some], -1e9)


@pytest.mark.parametrize("rule", rescale.RULES)
def test_attention_of_more_axes_than_eight_is_refused(rule):
    with pytest.raises(ValueError, match="attention must have shape"):
        rescale.weights(ALPHA, A, np.ones((1,) * 8 + (K,)), rule=rule)
