"""Energies of attention: squares received from the last queries, and from a repetition, sketched."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import importance

T, S, H, K, D = 48, 48, 6, 2, 8
BASE = 10_000.0
FREQUENCIES = BASE ** (-np.arange(0, D, 2) / D)


def draw(dtype=jnp.float32, size=S, seed=0):
    q, k, v = (
        jax.random.normal(key, (size, heads, D))
        for key, heads in zip(jax.random.split(jax.random.key(seed), 3), (H, K, K), strict=True)
    )
    return q.astype(dtype), k.astype(dtype), v.astype(dtype)


def turned(q, positions):
    """q [T, H, D] in float64, turned by so many positions: an oracle of its own."""
    frequency = BASE ** (-np.arange(0, D, 2) / D)
    angle = positions * frequency
    first, second = np.split(np.asarray(q, np.float64), 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def dense(q, k):
    """Logits [K, G, T, S] in float64."""
    q = np.asarray(q, np.float64).reshape(q.shape[0], K, H // K, D)
    return np.einsum("tkgd,skd->kgts", q, np.asarray(k, np.float64)) / np.sqrt(D)


def softmax(logits):
    weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weight / weight.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(("queries", "min_distance"), [(5, 0), (20, 3), (S, 16)])
def test_energy_is_the_sum_of_squares(queries, min_distance):
    q, k, v = draw()
    causal = np.where(np.tril(np.ones((S, S), bool)), dense(q, k), -np.inf)
    attention = softmax(causal)[:, :, -queries:]
    distance = np.arange(S)[-queries:, None] - np.arange(S)
    want = np.where(distance >= min_distance, attention**2, 0).sum(axis=(1, 2))
    got = importance.attention_energy(q, k, v, queries=queries, min_distance=min_distance)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reach", [0, 2, 5])
@pytest.mark.parametrize("shift", [None, 100])
def test_reconstruction_with_all_keys_is_its_definition(reach, shift):
    q, k, v = draw()
    attention = softmax(dense(turned(q, S if shift is None else shift), k))
    near = np.abs(np.arange(S)[:, None] - np.arange(S)) <= reach
    want = np.where(near, attention**2, 0).sum(axis=(1, 2))
    options = {"shift": shift, "reach": reach, "samples": S}
    got = importance.reconstruction(q, k, v, frequencies=FREQUENCIES, **options)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-7)


@pytest.mark.slow
def test_reconstruction_from_samples_is_close_to_that_from_all_keys():
    q, k, v = draw(size=512)
    few, every = (
        importance.reconstruction(q, k, v, frequencies=FREQUENCIES, samples=n) for n in (128, 512)
    )
    assert np.median(np.abs(np.log(few / every))) < 0.2


def test_reconstruction_remembers_what_no_query_asked_for():
    """A token that only its own kind would look for: nobody asks, but a repetition would."""
    q, k, v = (np.array(x) for x in draw(size=256))
    needle = 100
    q *= 0.1
    q[needle] = np.repeat(4 * k[needle], H // K, axis=0)
    q = jnp.asarray(turned(q, -256), jnp.float32)  # the repetition turns it back
    k, v = jnp.asarray(k), jnp.asarray(v)
    w = importance.reconstruction(q, k, v, frequencies=FREQUENCIES)
    assert (np.argmax(w, axis=1) == needle).all()
    energy = importance.attention_energy(q, k, v, queries=64)
    assert (np.argmax(energy, axis=1) != needle).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_other_dtypes(dtype):
    q, k, v = draw(dtype)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    for scorer in (
        importance.reconstruction,
        lambda *x: importance.attention_energy(*x, queries=9),
    ):
        np.testing.assert_allclose(scorer(q, k, v), scorer(*wide), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda q, k, v: importance.reconstruction(q[1:], k, v), "q has 47 queries"),
        (lambda q, k, v: importance.reconstruction(q, k, v, reach=-1), "reach"),
        (lambda q, k, v: importance.reconstruction(q, k, v, samples=0), "samples"),
        (lambda q, k, v: importance.reconstruction(q, k, v, num_sinks=S), "num_sinks"),
        (lambda q, k, v: importance.reconstruction(q, k, v, frequencies=np.ones(3)), "frequencies"),
        (lambda q, k, v: importance.attention_energy(q, k, v, queries=S + 1), "queries"),
        (
            lambda q, k, v: importance.attention_energy(q, k, v, queries=1, min_distance=-1),
            "min_di",
        ),
        (lambda q, k, v: importance.attention_energy(q, k[:, :, :4], v), "k"),
    ],
)
def test_bad_input_is_named(call, names):
    with pytest.raises(ValueError, match=names):
        call(*draw())
