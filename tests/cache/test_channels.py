"""A few channels of other sizes, in keys and queries or in values, leave the errors what they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance.cache import _channels
from jbalance.cache._layout import PageLayout

N, S, D = 2, 256, 64


def errors(k, v, q, bits):
    """Mean squared errors of logits and values of stored tokens, of the channels' products alone."""
    energy = jnp.sum(jnp.square(q), axis=1)
    basis = _channels.measured(k, v, jnp.ones((N, S)), S, energy)
    layout = PageLayout(D, bits, 0)
    stored = basis.stored(jnp.asarray(k), jnp.asarray(v))
    rows = layout.encode(*stored, jnp.zeros((N, S), jnp.uint8))
    keys, values, _ = layout.decode(rows)
    got = jnp.einsum("ntd,nsd->nts", basis.asked(jnp.asarray(q)), keys)
    want = jnp.einsum("ntd,nsd->nts", q, k - basis.mean.astype(jnp.float32)[:, None])
    return jnp.mean((got - want) ** 2), jnp.mean((basis.answered(values) - v) ** 2, axis=(0, 1))


@pytest.fixture(scope="module")
def drawn():
    """Keys and queries whose channels differ as those of models do, and values."""
    rng = np.random.default_rng(0)
    k, v, q = rng.normal(size=(3, N, S, D)).astype(np.float32)
    spread = np.exp(rng.normal(size=(2, N, 1, D)) / 2).astype(np.float32)
    return k * spread[0] + 1.5, v, q * spread[1]


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("scale", [8.0, 32.0, 1000.0])
def test_loud_channels_do_not_drown_the_others(drawn, scale, bits):
    k, v, q = drawn
    loud = np.ones(D, np.float32)
    loud[[3, 35, 40, 8]] = scale
    of_value = np.ones(D, np.float32)
    of_value[7] = scale
    measure = jax.jit(errors, static_argnums=3)
    logits, values = measure(k, v, q, bits)
    scaled_logits, scaled_values = measure(k * loud, v * of_value, q / loud, bits)
    assert scaled_logits < 1.5 * logits
    # What reads the values is as much smaller where they are louder.
    assert np.mean(scaled_values / of_value**2) < 1.2 * np.mean(values)


@pytest.mark.parametrize("silent", ["keys", "queries", "both"])
def test_silent_channels_leave_the_others_what_they_were(drawn, silent):
    """Gemma 3 270M has some: norms of keys with scales of zero."""
    k, v, q = drawn
    some = np.ones(D, np.float32)
    some[[5, 33, 34]] = 0
    of_keys, of_queries = (some if silent in (name, "both") else 1 for name in ("keys", "queries"))
    measure = jax.jit(errors, static_argnums=3)
    logits, values = measure(k, v, q, 3)
    found_logits, found_values = measure(k * of_keys, v, q * of_queries, 3)
    assert found_logits < 1.05 * logits
    np.testing.assert_allclose(found_values, values, rtol=0.1)


def test_quiet_channels_are_scaled_up_by_16_at_most(drawn):
    """A later token may be loud there: its errors are then 16 times as large, not 2^12 times."""
    k, v, q = drawn
    quiet = np.ones(D, np.float32)
    quiet[7] = 2.0**-30
    energy = jnp.asarray(np.square(q / quiet).sum(axis=1))
    basis = _channels.measured(k * quiet, v * quiet, jnp.ones((N, S)), S, energy)
    np.testing.assert_array_equal(basis.value_scale[:, 7], 4 * 4)
    np.testing.assert_array_equal(basis.channels[:, 7] >> 1, 4 * 4)


def test_scales_are_ones_where_nothing_is_known(drawn):
    k, v, _ = drawn
    basis = _channels.measured(k, 0 * v, jnp.ones((N, S)), S)
    assert not np.any(basis.channels >> 1)
    assert not np.any(basis.value_scale)
    np.testing.assert_array_equal(np.sum(np.asarray(basis.channels) & 1, axis=1), D // 2)


def test_what_goes_in_comes_out_of_the_basis(drawn):
    k, v, q = drawn
    energy = jnp.asarray(np.square(q).sum(axis=1))
    basis = _channels.measured(k, v, jnp.ones((N, S)), S, energy)
    keys, values = basis.stored(jnp.asarray(k), jnp.asarray(v))
    logits = np.einsum("ntd,nsd->nts", basis.asked(jnp.asarray(q)), keys)
    mean = np.asarray(basis.mean, np.float64)[:, None]
    np.testing.assert_allclose(logits, np.einsum("ntd,nsd->nts", q, k - mean), atol=2e-3)
    np.testing.assert_allclose(basis.answered(values), v, rtol=1e-5)
