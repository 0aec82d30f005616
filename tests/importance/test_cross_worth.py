"""The worth of an encoder's frames: attention of sample queries, written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import importance

T, S, H, K, D = 150, 40, 4, 2, 8


def drawn(queries=T, size=S):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(queries, H, D)), rng.normal(size=(size, K, D))
    return 2 * q.astype(np.float32), k.astype(np.float32)


def by_definition(q, k, scale=D**-0.5):
    q, k = q.astype(np.float64), np.repeat(k.astype(np.float64), H // K, axis=1)
    energy = np.zeros((K, len(k)))
    for t in range(len(q)):
        for head in range(H):
            weight = np.exp(scale * k[:, head] @ q[t, head])
            energy[head // (H // K)] += np.square(weight / weight.sum())
    return np.sqrt(energy / len(q))


@pytest.mark.parametrize("queries", [1, 5, T])  # fewer than the frames, and more
def test_it_is_the_root_mean_squared_attention(queries):
    q, k = drawn(queries)
    np.testing.assert_allclose(importance.cross_worth(q, k), by_definition(q, k), rtol=1e-4)
    got = importance.cross_worth(q, k, scale=1.0)
    np.testing.assert_allclose(got, by_definition(q, k, 1.0), rtol=1e-4)


@pytest.mark.parametrize("number", [0, 1, 30, S])
def test_padding_changes_nothing(number):
    q, k = drawn()
    got = jax.jit(importance.cross_worth)(q, np.concatenate([k[:number], 9 + k]), num_frames=number)
    assert (got[:, number:] == 0).all()
    if number:
        np.testing.assert_allclose(got[:, :number], by_definition(q, k[:number]), rtol=1e-4)


def test_gradients_are_finite_where_nothing_is_asked():
    q, k = drawn()
    far = np.concatenate([k, -1e3 * np.ones((1, K, D), np.float32)])
    gradient = jax.grad(lambda k: jnp.sum(importance.cross_worth(np.abs(q), k)))(far)
    assert np.isfinite(gradient).all()
    assert gradient.any()
