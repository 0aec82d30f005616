"""Attention from packed pages: equal to attention over what they decode to, and compiled once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance.cache import paged_attention, pages
from tests.support.paged_cases import assert_close, filled, queries

attend = jax.jit(paged_attention.attend_pages, static_argnames="key_gain")
reference = jax.jit(paged_attention.attend_decoded, static_argnames="key_gain")


@pytest.mark.parametrize(
    ("head_dim", "bits", "page_bytes", "rows"),
    [
        (64, (16, 8, 4, 3, 2), 1024, 3),
        (64, (2,), 16384, 1),
        (64, (4, 16), 5000, 9),
        pytest.param(16, (1, 3, 8), 256, 4, marks=pytest.mark.slow),
        pytest.param(128, (16, 8, 4, 3, 2), 2048, 2, marks=pytest.mark.slow),
        (24, (3, 2), 999, 5),
    ],
)
def test_attention_is_that_over_the_decoded_tokens(head_dim, bits, page_bytes, rows):
    units = jnp.array([2, 3, 0, 1, 0])
    for seed in range(4):
        at = filled(head_dim, bits, page_bytes, seed=seed)
        q = queries(5, rows, head_dim)
        got = attend(q, at, units)
        assert_close(got, reference(q, at, units))
        np.testing.assert_array_equal(got.y[1], 0)
        assert (got.lse[1] < -1e29).all()


def test_attention_is_softmax_over_what_was_written():
    # From the start: exact vectors in 8 and 16 bits, attention in float64.
    at = pages.create(100_000, 1, 64, (16, 8), 2048)
    at, _ = pages.reallocate(at, jnp.array([[10, 10]]))
    k, v = np.random.default_rng(0).normal(size=(2, 1, 90, 64)).astype(np.float32)
    one, zero = jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32)
    write = jax.jit(pages.write, static_argnums=2)
    worth = jnp.zeros((1, 90), jnp.uint8)
    at, _ = write(at, one, 0, zero, k[:, :30], v[:, :30], worth[:, :30])
    at, _ = write(at, one, 1, zero, k[:, 30:], v[:, 30:], worth[:, 30:])
    q = queries(1, 2, 64)
    logits = np.asarray(q[0], float) @ k[0].T.astype(float) / 8
    weight = np.exp(logits)
    got = attend(q, at, one)
    np.testing.assert_allclose(got.y[0], weight @ v[0] / weight.sum(-1)[:, None], atol=0.01)
    np.testing.assert_allclose(got.lse[0], np.log(weight.sum(-1)), atol=0.01)


def test_gain_multiplies_the_logits_of_its_level():
    at, gain = filled(64, (16, 4, 2), 1024), (1.0, 1.01, 1.125)
    q, units = queries(4, 3, 64), jnp.arange(4)
    got = attend(q, at, units, key_gain=gain)
    assert_close(got, reference(q, at, units, key_gain=gain))
    assert np.abs(got.lse[0] - attend(q, at, units).lse[0]).max() > 1e-3


def test_where_a_page_lies_does_not_matter():
    at = filled(64, (16, 8, 4, 3, 2), 1024)
    moved = np.random.default_rng(5).permutation(at.num_pages)
    there = dataclasses.replace(
        at, data=at.data[np.argsort(moved)], order=jnp.asarray(moved)[at.order]
    )
    q = queries(4, 3, 64)
    got, want = (attend(q, x, jnp.arange(4)) for x in (there, at))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_bytes_behind_the_last_token_do_not_matter():
    q, units = queries(4, 3, 64), jnp.arange(4)
    zeros, nans = (
        attend(q, filled(64, (16, 8, 4, 3, 2), 1024, behind=b), units) for b in (0, 0xFF)
    )
    jax.tree.map(np.testing.assert_array_equal, zeros, nans)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 300.0])
def test_any_size_of_queries(scale):
    at = filled(64, (16, 8, 4, 2), 1024)
    q, units = queries(4, 3, 64) * scale, jnp.arange(4)
    tolerance = 1e-5 * max(1, scale)
    assert_close(attend(q, at, units), reference(q, at, units), tolerance)


def test_new_contents_compile_nothing_anew_and_no_arena_is_copied():
    traces = []

    @jax.jit
    def traced(q, at, units):
        traces.append(1)
        return paged_attention.attend_pages(q, at, units)

    q, units = queries(4, 3, 64), jnp.arange(4)
    for seed in range(2):
        traced(q, filled(64, (16, 3), 1024, seed=seed), units)
    assert len(traces) == 1
    large = pages.create(2**26, 4, 64, (16, 8, 4, 3, 2), 16384)
    memory = traced.lower(q, large, units).compile().memory_analysis()
    assert memory.temp_size_in_bytes < large.nbytes / 8


def test_under_vmap():
    at = filled(64, (8, 3), 1024)
    q = queries(4, 3, 64)
    units = jnp.array([[0, 1], [2, 3]])
    got = jax.vmap(lambda q, u: attend(q, at, u))(q.reshape(2, 2, 3, 64), units)
    want = attend(q, at, jnp.arange(4))
    np.testing.assert_allclose(got.y.reshape(4, 3, 64), want.y, atol=1e-5)


def test_no_queries_and_no_units():
    at = filled(64, (8, 3), 1024)
    assert attend(jnp.zeros((0, 3, 64)), at, jnp.zeros(0, jnp.int32)).y.shape == (0, 3, 64)
    assert attend(jnp.zeros((2, 0, 64)), at, jnp.arange(2)).lse.shape == (2, 0)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"q": jnp.ones((3, 64))}, ("q", "[N, T, D]")),
        ({"q": jnp.ones((2, 3, 32))}, ("q has shape (2, 3, 32)", "64")),
        ({"units": jnp.arange(3)}, ("units has 3",)),
        ({"units": jnp.zeros((2, 1), int)}, ("units", "[N]")),
        ({"key_gain": (1.0,)}, ("key_gain has 1", "(8, 3)")),
    ],
)
def test_bad_input_is_named(change, names):
    at = pages.create(10_000, 4, 64, (8, 3), 1024)
    good = {"q": jnp.ones((2, 3, 64)), "arena": at, "units": jnp.arange(2)}
    with pytest.raises(ValueError, match=r"must|give") as error:
        paged_attention.attend_pages(**(good | change))
    for name in names:
        assert name in str(error.value)
