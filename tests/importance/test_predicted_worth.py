"""The log-linear prediction of worth: its formula, padding, and a fit as likely as the best."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from jbalance.importance.predicted_worth import (
    WorthWeights,
    fit_predicted_worth,
    followed_worth,
    normalized,
    predicted_worth,
    worth_features,
)

E, K, T = 12, 2, 40
RNG = np.random.default_rng(0)


def weights(scale=0.3):
    shapes = ((E, K), (5 + 2 * K, K), (K,))
    return WorthWeights(*(jnp.asarray(scale * RNG.normal(size=s), jnp.float32) for s in shapes))


def inputs(size=T):
    return RNG.normal(size=(size, E)).astype(np.float32), RNG.exponential(size=(K, size))


def test_it_is_the_formula():
    x, later = inputs()
    own = weights()
    got = predicted_worth(jnp.asarray(x), jnp.asarray(later), own, start=7, num_tokens=100)
    for t in (0, 3, T - 1):
        for head in range(K):
            position = 7 + t
            away = np.log(100 - position)
            asked = np.log(later[:, t] + 1e-8)
            sinks = [3.0 * (position == 0), 3.0 * (0 < position < 4)]
            f = np.concatenate(
                [[away, away**2 / 5, np.log(1 + position), *sinks], asked, asked**2 / 10]
            )
            unit = x[t] / np.sqrt(np.mean(x[t] ** 2) + 1e-6)
            log = unit @ own.hidden[:, head] + f @ own.features[:, head] + own.bias[head]
            np.testing.assert_allclose(got[head, t], np.exp(min(log, 5.0)), rtol=2e-4)


def test_chunks_and_padding_change_nothing():
    x, later = map(jnp.asarray, inputs())
    own = weights()
    whole = predicted_worth(x, later, own, num_tokens=33)
    part = predicted_worth(x[16:], later[:, 16:], own, start=16, num_tokens=33)
    np.testing.assert_allclose(part, whole[:, 16:], rtol=1e-6)
    assert (whole[:, 33:] == 0).all()
    alone = predicted_worth(x[:33], later[:, :33], own)
    np.testing.assert_allclose(whole[:, :33], alone, rtol=1e-6)


def test_the_first_token_and_the_three_after_it_have_features():
    f = np.asarray(worth_features(jnp.ones((K, 6))))
    assert f.shape == (6, 5 + 2 * K)
    assert f[:, 3].tolist() == [3, 0, 0, 0, 0, 0]
    assert f[:, 4].tolist() == [0, 3, 3, 3, 0, 0]


def test_worth_weighs_what_followed_and_a_repetition():
    got = followed_worth(jnp.float32(2.0), jnp.float32(5.0))
    np.testing.assert_allclose(got, np.sqrt(0.4 * 2 + 0.02 * 5), rtol=1e-6)


def test_the_fit_is_as_likely_as_that_of_scipy():
    """Poisson regression of one head by L-BFGS in float64."""
    number, true = 3000, weights(0.1)
    x = np.asarray(normalized(jnp.asarray(RNG.normal(size=(number, E)), jnp.float32)))
    features = RNG.normal(2.0, 1.5, size=(number, 5 + 2 * K)).astype(np.float32)
    log = x @ true.hidden + features @ true.features + true.bias - 1
    worth = np.exp(log) * RNG.gamma(2.0, 0.5, size=log.shape)
    got = fit_predicted_worth(*map(jnp.asarray, (x, features, worth)))
    assert jax.tree.map(np.shape, got) == jax.tree.map(np.shape, true)

    columns = np.concatenate([x, features, np.ones((number, 1))], axis=1).astype(np.float64)
    for head in range(K):

        def loss(w, y=worth[:, head]):
            log = columns @ w
            return np.mean(np.exp(log) - y * log), columns.T @ (np.exp(log) - y) / number

        best = scipy.optimize.minimize(loss, np.zeros(columns.shape[1]), jac=True).fun
        own = np.concatenate(
            [got.hidden[:, head], got.features[:, head], got.bias[head : head + 1]]
        )
        average = loss(np.r_[np.zeros(columns.shape[1] - 1), np.log(worth[:, head].mean())])[0]
        assert loss(own.astype(np.float64))[0] - best < 0.01 * (average - best)
