"""The arena of pages: exact bytes, pages neither lost nor owned twice, and what is written is read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jbalance.cache import _pages
from tests.support.examples import few

U, D, BITS, PAGE = 3, 16, (16, 8, 4, 3, 2), 256
M = len(BITS)
reallocate = jax.jit(_pages.reallocate)
write = jax.jit(_pages.write, static_argnums=2)
read = jax.jit(_pages.read, static_argnames="level")


def arena(num_pages=40, want=None, bits=BITS, head_dim=D, page_bytes=PAGE):
    """An arena whose pages hold any bytes and lie in any order."""
    rng = np.random.default_rng(0)
    tables = 4 * (2 * U * len(bits) + 1)
    out = _pages.create(num_pages * (page_bytes + 4) + tables, U, head_dim, bits, page_bytes)
    out = dataclasses.replace(
        out,
        data=jnp.asarray(rng.integers(0, 256, out.data.shape), jnp.uint8),
        order=jnp.asarray(rng.permutation(num_pages), jnp.int32),
    )
    if want is None:
        return out
    out, shortfall = reallocate(out, jnp.asarray(want))
    assert shortfall == 0
    return out


def vectors(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(*shape, D)), jnp.float32) for _ in range(2)]


def codes(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, shape), jnp.uint8)


def owned(at):
    """The page ids of each group."""
    return np.split(np.asarray(at.order), np.asarray(at.offset))[1:-1]


@pytest.mark.parametrize("budget", [10_000, 65_536, 1_000_003])
@pytest.mark.parametrize("page_bytes", [256, 1000, 4096])
def test_bytes_are_the_budget_but_for_less_than_a_page(budget, page_bytes):
    out = _pages.create(budget, U, D, BITS, page_bytes)
    assert out.nbytes == sum(x.nbytes for x in jax.tree.leaves(out))
    assert budget - page_bytes - 4 < out.nbytes <= budget
    moved, _ = reallocate(out, jnp.ones((U, M), jnp.int32))
    assert moved.nbytes == out.nbytes


@few(60)
@given(
    st.lists(st.lists(st.integers(0, 6), min_size=U * M, max_size=U * M), min_size=1, max_size=4)
)
def test_reallocation_loses_and_shares_no_page(requests):
    at = arena()
    at = dataclasses.replace(at, count=jnp.full((U, M), 10**6))
    for request in requests:
        want = np.reshape(request, (U, M))
        new, shortfall = reallocate(at, want)
        assert shortfall == max(want.sum() - at.num_pages, 0)
        if shortfall:
            jax.tree.map(np.testing.assert_array_equal, new, at)
            continue
        np.testing.assert_array_equal(np.sort(new.order), np.arange(at.num_pages))
        np.testing.assert_array_equal(new.pages, want)
        np.testing.assert_array_equal(new.count, np.minimum(at.count, new.capacity))
        for before, after in zip(owned(at), owned(new), strict=True):
            stay = min(len(before), len(after))
            np.testing.assert_array_equal(before[:stay], after[:stay])
        at = new


@pytest.mark.parametrize("value", [-1, -(2**31), 2**31 - 1])
def test_absurd_requests_are_refused(value):
    at = arena(want=np.ones((U, M), int))
    new, shortfall = reallocate(at, at.pages.at[1, 1].set(value))
    assert shortfall > 0
    jax.tree.map(np.testing.assert_array_equal, new, at)


def test_the_shortfall_counts_what_is_below_zero_and_what_is_too_much():
    at = arena(want=np.ones((U, M), int))
    over = at.num_pages - int(at.pages.sum()) + 5
    want = at.pages.at[1, 1].set(-2).at[0, 0].add(over + 1)  # the entry that is below gave up one
    assert reallocate(at, want)[1] == 5 + 2


@pytest.mark.parametrize("level", range(M))
def test_what_is_written_is_read(level):
    at = arena(want=np.full((U, M), 2))
    npp = at.page_tokens[level]
    (k, v), code = vectors(2, npp + 2), codes(2, npp + 2)
    new, dropped = write(at, jnp.array([2, 0]), level, k, v, code)
    np.testing.assert_array_equal(dropped, 0)
    assert new.count[2, level] == new.count[0, level] == npp + 2
    for i, unit in enumerate((2, 0)):
        held = read(new, unit, level=level)
        np.testing.assert_array_equal(held.valid, np.arange(len(held.valid)) < npp + 2)
        np.testing.assert_array_equal(held.code[: npp + 2], code[i])
        np.testing.assert_array_equal(held.code[npp + 2 :], 0)
        # What the bytes of a token mean is `test_layout`'s.
        layout = at.layouts[level]
        stored = layout.decode(layout.encode(k[i], v[i], code[i]))[:2]
        for got, want in zip((held.k, held.v), stored, strict=True):
            np.testing.assert_array_equal(got[npp + 2 :], 0)
            np.testing.assert_allclose(got[: npp + 2], want, atol=1e-5)
    # All other pages are as they were.
    mine = np.concatenate([owned(at)[u * M + level] for u in (2, 0)])
    others = np.setdiff1d(np.arange(at.num_pages), mine)
    np.testing.assert_array_equal(new.data[others], at.data[others])


def test_what_has_no_page_is_reported_and_dropped():
    at = arena(want=np.full((U, M), 1))
    npp = at.page_tokens[2]
    tokens = (*vectors(U, npp + 3), codes(U, npp + 3))
    new, dropped = write(at, jnp.arange(U), 2, *tokens, jnp.array([npp + 3, npp, 0]))
    np.testing.assert_array_equal(dropped, [3, 0, 0])
    np.testing.assert_array_equal(new.count[:, 2], [npp, npp, 0])
    changed = np.flatnonzero((np.asarray(new.flat) != np.asarray(at.flat)).any(axis=1))
    np.testing.assert_array_equal(changed, np.sort([owned(at)[u * M + 2][0] for u in (0, 1)]))
    none = arena()
    same, dropped = write(none, jnp.arange(U), 2, *tokens)
    np.testing.assert_array_equal(dropped, npp + 3)
    jax.tree.map(np.testing.assert_array_equal, same, none)


def test_units_may_write_different_numbers_of_tokens():
    at = arena(want=np.full((U, M), 2))
    tokens = (*vectors(U, 5), codes(U, 5))
    number = jnp.array([0, 3, 5])
    new, dropped = write(at, jnp.arange(U), 4, *tokens, number)
    np.testing.assert_array_equal(dropped, 0)
    np.testing.assert_array_equal(new.count[:, 4], number)


def test_demotion_by_reading_and_writing_anew():
    at = arena(want=np.full((U, M), 1))
    (k, v), code = vectors(1, 3), codes(1, 3)
    at, _ = write(at, jnp.array([1]), 0, k, v, code)
    held = read(at, 1, level=0)
    again = (x[None, :3] for x in (held.k, held.v, held.code))
    at, dropped = write(at, jnp.array([1]), 2, *again)
    at = dataclasses.replace(at, count=at.count.at[1, 0].set(0))
    assert dropped == 0
    np.testing.assert_array_equal(at.count[1], [0, 0, 3, 0, 0])
    assert not read(at, 1, level=0).valid.any()
    lower = read(at, 1, level=2)
    error = np.square(lower.k[:3] - k[0]).sum() / np.square(k[0]).sum()
    assert error < 0.02  # half of the coordinates at 3 bits


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: _pages.create(100, U, D, BITS, PAGE), ("budget_bytes is 100", "take 384")),
        (lambda: _pages.create(10**6, U, D, BITS, 64), ("page_bytes is 64", "takes 65")),
        (lambda: _pages.create(10**6, U, D, (4, 5), PAGE), ("bits is (4, 5)",)),
        (lambda: _pages.create(10**6, U, D, (4, 4), PAGE), ("bits is (4, 4)",)),
        (lambda: _pages.create(10**6, U, D, (), PAGE), ("bits is ()",)),
        (lambda: _pages.create(10**6, 0, D, BITS, PAGE), ("num_units is 0",)),
        (lambda: _pages.create(10**6, U, 20, BITS, PAGE), ("head_dim is 20", "16 and 24")),
        (lambda: _pages.create(10**18, 10**6, D, BITS, PAGE), ("int32", "page_bytes 256")),
        (lambda: _pages.reallocate(arena(), jnp.ones((U, 2), int)), ("(3, 5)",)),
        (lambda: _pages.reallocate(arena(), jnp.ones((U, M))), ("float32", "integers")),
        (lambda: _pages.read(arena(), 0, 5), ("level is 5",)),
        (lambda: write_with(level=-1), ("level is -1",)),
        (lambda: write_with(k=jnp.ones((1, 2, 8))), ("(1, 2, 8)",)),
        (lambda: write_with(code=jnp.ones((1, 2))), ("code is float32", "uint8")),
        (lambda: write_with(code=codes(2, 1)), ("(2, 1)", "(1, 2)")),
        (lambda: write_with(units=jnp.arange(2)), ("units has shape (2,)",)),
        (lambda: write_with(num_tokens=0), ("num_tokens has shape ()",)),
    ],
)
def test_bad_input_is_named(call, names):
    with pytest.raises(ValueError, match=r"is|has") as error:
        call()
    for name in names:
        assert name in str(error.value)


def write_with(**changes):
    """`write` with good arguments but for some."""
    k, v = vectors(1, 2)
    zero = jnp.zeros(1, jnp.int32)
    good = {"units": zero, "level": 0, "k": k, "v": v, "code": codes(1, 2)}
    return _pages.write(arena(), **(good | changes))
