"""Attention from packed pages: equal to attention over what they decode to, and compiled once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance.attention import EMPTY, Partial
from jbalance.cache import _attend, _pages
from jbalance.cache._layout import PageLayout
from jbalance.cache.backends import reference

attend = jax.jit(_attend.attend_pages)
by_definition = jax.jit(reference.attend)


def filled(head_dim, bits, page_bytes, num_units=4, num_pages=40, seed=0, behind=None):
    """An arena of random tokens: groups empty, without pages, and half full.

    `behind` is the byte behind the last token of a group; None for any.
    """
    rng = np.random.default_rng(seed)
    groups = num_units * len(bits)
    budget = num_pages * (page_bytes + 4) + 4 * (2 * groups + 1)
    at = _pages.create(budget, num_units, head_dim, bits, page_bytes)
    want = rng.multinomial(num_pages - 2, np.ones(groups) / groups).reshape(num_units, -1)
    want[1, 0] = want[3] = 0
    order = rng.permutation(num_pages).astype(np.int32)
    offset = np.append(0, np.cumsum(want)).astype(np.int32)
    capacity = want * np.array(at.page_tokens)
    count = rng.integers(0, capacity + 1) * (rng.random(capacity.shape) < 0.8)
    data = np.zeros((at.num_pages, page_bytes), np.uint8)
    for group in range(groups):
        unit, level = divmod(group, len(bits))
        for i, page in enumerate(order[offset[group] : offset[group + 1]]):
            used = count[unit, level] - i * at.page_tokens[level]
            data[page] = random_page(rng, head_dim, bits[level], page_bytes, used, behind)
    return dataclasses.replace(
        at,
        data=jnp.asarray(data.reshape(at.data.shape)),
        order=jnp.asarray(order),
        offset=jnp.asarray(offset),
        count=jnp.asarray(count, jnp.int32),
    )


def random_page(rng, head_dim, bits, page_bytes, used, behind):
    """Bytes of a page by its description: random codes and norms of `used` tokens."""
    layout, out = PageLayout.within(page_bytes, head_dim, bits), []
    size = layout.page_tokens
    for i, width in enumerate(layout.widths):
        across = i > 1 or bits < 8
        if bits == 16 and width > 1:
            part = np.asarray(rng.normal(size=(size, head_dim)), jnp.bfloat16).view(np.uint8)
        elif width == 2 and i > 1:
            longest = (
                3 if bits == 8 else head_dim**0.5
            )  # its norm is that of the largest coordinate
            part = rng.uniform(0.3, longest, (size, 1)).astype(np.float16).view(np.uint8)
        else:
            part = rng.integers(0, 256, (size, width)).astype(np.uint8)
        if behind is not None:
            part[max(0, used) :] = behind
        out.append((part.T if across else part).ravel())
    out = np.concatenate(out)
    return np.append(out, rng.integers(0, 256, page_bytes - out.size)).astype(np.uint8)


def queries(num_units, rows, head_dim, seed=1):
    x = np.random.default_rng(seed).normal(size=(num_units, rows, head_dim))
    return jnp.asarray(x, jnp.float32)


def assert_close(got: Partial, want: Partial, atol=1e-5):
    np.testing.assert_allclose(got.y, want.y, atol=atol)
    np.testing.assert_allclose(got.lse, want.lse, atol=atol)


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
        assert_close(got, by_definition(q, at, units))
        np.testing.assert_array_equal(got.y[1], 0)
        assert (got.lse[1] < -1e29).all()


def test_attention_is_softmax_over_what_was_written():
    # From the start: exact vectors in 8 and 16 bits, attention in float64.
    at = _pages.create(100_000, 1, 64, (16, 8), 2048)
    at, _ = _pages.reallocate(at, jnp.array([[10, 10]]))
    k, v = np.random.default_rng(0).normal(size=(2, 1, 90, 64)).astype(np.float32)
    one = jnp.zeros(1, jnp.int32)
    write = jax.jit(_pages.write, static_argnums=2)
    code = jnp.zeros((1, 90), jnp.uint8)
    at, _ = write(at, one, 0, k[:, :30], v[:, :30], code[:, :30])
    at, _ = write(at, one, 1, k[:, 30:], v[:, 30:], code[:, 30:])
    q = queries(1, 2, 64)
    logits = np.asarray(q[0], float) @ k[0].T.astype(float) / 8
    weight = np.exp(logits)
    got = attend(q, at, one)
    np.testing.assert_allclose(got.y[0], weight @ v[0] / weight.sum(-1)[:, None], atol=0.01)
    np.testing.assert_allclose(got.lse[0], np.log(weight.sum(-1)), atol=0.01)


def test_an_index_outside_the_units_has_no_tokens():
    at, q = filled(64, (16, 8, 4, 3, 2), 1024), queries(4, 3, 64)
    units = jnp.array([2, -1, 4, 2**31 - 1])
    got, want = attend(q, at, units), attend(q, at, jnp.array([2, 0, 0, 0]))
    assert (got.lse[0] > 0).all()
    np.testing.assert_array_equal(got.y[0], want.y[0])
    np.testing.assert_array_equal(got.lse[0], want.lse[0])
    np.testing.assert_array_equal(got.y[1:], 0)
    np.testing.assert_array_equal(got.lse[1:], np.float32(EMPTY))


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
    assert_close(attend(q, at, units), by_definition(q, at, units), tolerance)


def test_new_contents_compile_nothing_anew_and_no_arena_is_copied():
    traces = []

    @jax.jit
    def traced(q, at, units):
        traces.append(1)
        return _attend.attend_pages(q, at, units)

    q, units = queries(4, 3, 64), jnp.arange(4)
    for seed in range(2):
        traced(q, filled(64, (16, 3), 1024, seed=seed), units)
    assert len(traces) == 1
    large = _pages.create(2**26, 4, 64, (16, 8, 4, 3, 2), 16384)
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
        ({"backend": "cpu"}, ("backend is 'cpu'", "'xla'")),
        ({"backend": "tpu"}, ("backend is 'tpu'", "tokens of 8 bits")),
    ],
)
def test_bad_input_is_named(change, names):
    at = _pages.create(10_000, 4, 64, (8, 3), 1024)
    good = {"q": jnp.ones((2, 3, 64)), "arena": at, "units": jnp.arange(2)}
    with pytest.raises(ValueError, match=r"must|give") as error:
        _attend.attend_pages(**(good | change))
    for name in names:
        assert name in str(error.value)
