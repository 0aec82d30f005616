"""Sampling: its distribution, its limits, and a seed of its own for each request."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance.decode import Sampling
from jbalance.decode.sampling import Samplers, sample

LOGITS = jnp.array([2.0, 1.0, 0.0, -1.0, -2.0])
draw = jax.jit(jax.vmap(sample, in_axes=(None, None, 0)))


def samplers(*each):
    out = Samplers.greedy(len(each))
    for i, one in enumerate(each):
        out = out.replaced(i, one)
    return out


def drawn(one, number=4000):
    return np.asarray(draw(LOGITS[None], samplers(one), jnp.arange(number)[:, None]))[:, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_have_the_probabilities_of_the_softmax(temperature):
    want = np.asarray(jax.nn.softmax(LOGITS / temperature))
    got = np.bincount(drawn(Sampling(temperature)), minlength=5) / 4000
    np.testing.assert_allclose(got, want, atol=4 * np.sqrt(0.25 / 4000))


def test_top_k_and_top_p_leave_the_most_likely_tokens():
    assert set(drawn(Sampling(5.0, top_k=2))) == {0, 1}
    assert set(drawn(Sampling(5.0, top_k=1))) == {0}
    mass = np.cumsum(np.asarray(jax.nn.softmax(LOGITS)))
    assert set(drawn(Sampling(1.0, top_p=float(mass[1]) - 1e-3))) == {0, 1}
    assert set(drawn(Sampling(1.0, top_p=1e-6))) == {0}


def test_each_request_draws_by_its_own_seed():
    logits = jnp.tile(LOGITS, (3, 1))
    own = samplers(Sampling(1.0, seed=7), Sampling(0.0), Sampling(1.0, seed=7))
    positions = jnp.tile(jnp.arange(50)[:, None], (1, 3))
    got = np.asarray(draw(logits, own, positions))
    assert (got[:, 1] == 0).all()
    np.testing.assert_array_equal(got[:, 0], got[:, 2])
    np.testing.assert_array_equal(got[:, 0], drawn(Sampling(1.0, seed=7), 50))


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"seed": -1}]
)
def test_bad_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
