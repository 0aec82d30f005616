"""The worth of cached tokens: one recipe, whatever the chunks, the padding and the model's rotation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import importance
from jbalance.importance.token_worth import decoded_worth, repeated_energy, worth_of
from tests.support import dense_oracles as dense

S, H, K, D = 160, 6, 2, 8
FREQUENCIES = 100.0 ** (-np.arange(0, D, 2) / D)


def draw(size=S, seed=0):
    return tuple(
        jax.random.normal(key, (size, heads, D))
        for key, heads in zip(jax.random.split(jax.random.key(seed), 3), (H, K, K), strict=True)
    )


def padded(x, size):
    return jnp.concatenate([x, 7 * jnp.ones((size - len(x), *x.shape[1:]))])


def test_it_is_the_root_of_both_energies():
    q, k, v = draw()
    repeated = importance.reconstruction(q, k, v, frequencies=FREQUENCIES)
    later = importance.attention_energy(q, k, v, queries=64, min_distance=8)
    want = np.sqrt(repeated + 0.02 * later)
    got = importance.token_worth(q, k, v, frequencies=FREQUENCIES)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("number", [1, 3, 40, 64, 130, S])
def test_padding_changes_nothing(number):
    q, k, v = draw(number)
    want = importance.token_worth(q, k, v, frequencies=FREQUENCIES) if number > 4 else None
    full = [padded(x, S) for x in (q, k, v)]
    got = jax.jit(importance.token_worth)(*full, frequencies=FREQUENCIES, num_tokens=number)
    assert got.shape == (K, S)
    assert (got[:, number:] == 0).all()
    assert np.isfinite(got).all()
    if want is not None:
        np.testing.assert_allclose(got[:, :number], want, rtol=2e-4, atol=1e-6)


def test_chunks_add_up():
    q, k, v = draw()
    options = {"frequencies": FREQUENCIES, "num_tokens": 150}
    whole = repeated_energy(q, k, v, 0, **options)
    parts = [repeated_energy(q[i : i + 32], k, v, i, **options) for i in range(0, S, 32)]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-4, atol=1e-7)


def test_a_model_is_scored_by_its_own_rotation():
    """Queries that a scaled model asks about a token again: found by its frequencies, not by others'."""
    q, k, v = (np.array(x) for x in draw())
    scaled, needle = FREQUENCIES / 8, 100
    q *= 0.1
    turn = dense.rotation(-S * scaled)
    q[needle] = np.repeat(4 * k[needle], H // K, axis=0) @ turn.T  # the repetition turns it back
    w = importance.token_worth(q, k, v, frequencies=scaled)
    assert (np.argmax(w, axis=1) == needle).all()
    other = importance.token_worth(q, k, v, frequencies=FREQUENCIES)
    assert (other[:, needle] < 0.5 * w[:, needle]).all()


def test_a_decoded_token_weighs_as_a_prompt_token_of_equal_attention():
    """Attention a by each of the last 64 queries is worth the same, asked in a prompt or measured."""
    a = 0.3
    asked = worth_of(jnp.zeros(()), jnp.float32(64 * a**2))
    for queries in (1, 10, 1000):
        measured = decoded_worth(jnp.float32(queries * a**2), jnp.int32(queries))
        np.testing.assert_allclose(measured, asked, rtol=1e-6)


def test_bad_frequencies_are_named():
    with pytest.raises(ValueError, match=r"frequencies has shape \(3,\).*\(4,\)"):
        importance.token_worth(*draw(), frequencies=np.ones(3))
