"""The scales of a unit's key channels: by half of the best exponent, and by all of it for outliers."""

import jax.numpy as jnp
import numpy as np
import pytest

from jbalance.cache import _channels

S, D = 300, 16
RNG = np.random.default_rng(0)
KEYS = RNG.normal(size=(1, S, D)).astype(np.float32)
WORTH = np.ones((1, S), np.float32)


def with_outlier(scale):
    """Keys and energy of queries whose logits are those of scale 1."""
    k, energy = KEYS.copy(), np.full((1, D), 50.0, np.float32)
    k[..., 3] *= scale
    energy[:, 3] /= scale**2
    return k, energy


def codes(scale):
    k, energy = with_outlier(scale)
    return (
        np.asarray(
            _channels.measured(jnp.asarray(k), jnp.asarray(WORTH), S, jnp.asarray(energy)).channels[
                0
            ],
            int,
        )
        >> 1
    )


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_moderate_channels_are_scaled_by_half_of_the_exponent(scale):
    """In codes of an eighth of an octave, against the formula in float64."""
    k, energy = with_outlier(scale)
    own = k[0, 4:].astype(np.float64)
    ratio = np.log2(energy[0]) - np.log2(((own - own.mean(axis=0)) ** 2).sum(axis=0))
    ratio -= ratio.mean()
    assert abs(ratio).max() < 8
    np.testing.assert_allclose(codes(scale), 8 * ratio / 8, atol=0.6)


@pytest.mark.parametrize("scale", [8, 30, 200])
def test_an_outlier_channel_is_stored_within_a_factor_of_the_others(scale):
    k, energy = with_outlier(scale)
    basis = _channels.measured(jnp.asarray(k), jnp.asarray(WORTH), S, jnp.asarray(energy))
    size = np.asarray(basis.stored(jnp.asarray(k)))[0, 4:].std(axis=0)
    most = 2.4 if scale < 100 else 15  # scales end at four octaves
    assert size.max() / np.median(size) < most
    assert scale / (size.max() / np.median(size)) > 3  # it would have been as many times larger

    q = RNG.normal(size=(1, 5, D)).astype(np.float32)
    q[..., 3] /= scale
    logits = np.einsum("nsd,ntd->nts", k - k[:, 4:].mean(axis=1, keepdims=True), q)
    mean = np.asarray(basis.mean, np.float32)
    got = np.einsum("nsd,ntd->nts", basis.stored(jnp.asarray(k)), basis.asked(jnp.asarray(q)))
    want = np.einsum("nsd,ntd->nts", k - mean[:, None], q)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * np.abs(logits).max())
