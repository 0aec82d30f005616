"""The arena of pages: exact bytes, pages neither lost nor owned twice, and what is written is read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jbalance.cache import codec, pages

U, D, BITS, PAGE = 3, 16, (16, 8, 4, 3, 2), 256
M = len(BITS)
reallocate = jax.jit(pages.reallocate)
write = jax.jit(pages.write, static_argnums=2)
read = jax.jit(pages.read, static_argnames=("level", "num_pages"))


def arena(num_pages=40, want=None, bits=BITS, head_dim=D, page_bytes=PAGE):
    """An arena whose pages hold any bytes and lie in any order."""
    rng = np.random.default_rng(0)
    tables = 4 * (2 * U * len(bits) + 1)
    out = pages.create(num_pages * (page_bytes + 4) + tables, U, head_dim, bits, page_bytes)
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


def worths(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, shape), jnp.uint8)


def owned(at):
    """The page ids of each group."""
    return np.split(np.asarray(at.order), np.asarray(at.offset))[1:-1]


@pytest.mark.parametrize("budget", [10_000, 65_536, 1_000_003])
@pytest.mark.parametrize("page_bytes", [256, 1000, 4096])
def test_bytes_are_the_budget_but_for_less_than_a_page(budget, page_bytes):
    out = pages.create(budget, U, D, BITS, page_bytes)
    assert out.nbytes == sum(x.nbytes for x in jax.tree.leaves(out))
    assert budget - page_bytes - 4 < out.nbytes <= budget
    moved, _ = reallocate(out, jnp.ones((U, M), jnp.int32))
    assert moved.nbytes == out.nbytes


def test_tokens_of_a_page():
    for bits in BITS:
        codes = D * bits // 8 + (0 if bits == 16 else 2)
        assert pages.token_bytes(D, bits) == 2 * codes + 1
        assert pages.tokens_per_page(PAGE, D, bits) == PAGE // (2 * codes + 1)


@settings(max_examples=60, deadline=None)
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


@pytest.mark.parametrize("level", range(M))
def test_what_is_written_is_read(level):
    at = arena(want=np.full((U, M), 2))
    npp = at.page_tokens[level]
    (k, v), worth = vectors(2, npp + 2), worths(2, npp + 2)
    new, dropped = write(at, jnp.array([2, 0]), level, jnp.zeros(2, jnp.int32), k, v, worth)
    np.testing.assert_array_equal(dropped, 0)
    assert new.count[2, level] == new.count[0, level] == npp + 2
    for i, unit in enumerate((2, 0)):
        held = read(new, unit, level, num_pages=2)
        np.testing.assert_array_equal(held.valid, np.arange(2 * npp) < npp + 2)
        np.testing.assert_array_equal(held.worth[: npp + 2], worth[i])
        np.testing.assert_array_equal(held.worth[npp + 2 :], 0)
        for got, x in ((held.k, k[i]), (held.v, v[i])):
            np.testing.assert_array_equal(got[npp + 2 :], 0)
            if BITS[level] == 16:
                want = codec.unrotate(codec.rotate(x).astype(jnp.bfloat16))
            else:
                want = codec.decode(codec.encode(x, BITS[level]), D, BITS[level])
            np.testing.assert_allclose(got[: npp + 2], want, atol=1e-5)
    # All other pages are as they were.
    mine = np.concatenate([owned(at)[u * M + level] for u in (2, 0)])
    others = np.setdiff1d(np.arange(at.num_pages), mine)
    np.testing.assert_array_equal(new.data[others], at.data[others])


@pytest.mark.parametrize("level", range(M))
def test_one_by_one_is_the_same_as_at_once(level):
    at = arena(want=np.full((U, M), 2))
    size = at.page_tokens[level] + 1
    tokens = (*vectors(U, size), worths(U, size))
    units, zero = jnp.arange(U), jnp.zeros(U, jnp.int32)
    once, _ = write(at, units, level, zero, *tokens)
    for i in range(size):
        at, _ = write(at, units, level, zero + i, *(x[:, i : i + 1] for x in tokens))
    jax.tree.map(np.testing.assert_array_equal, at, once)


def test_writes_outside_the_capacity_are_reported_and_dropped():
    at = arena(want=np.full((U, M), 1))
    npp = at.page_tokens[2]
    tokens = (*vectors(U, 4), worths(U, 4))
    first = jnp.array([npp - 1, npp + 7, -1])
    new, dropped = write(at, jnp.arange(U), 2, first, *tokens)
    np.testing.assert_array_equal(dropped, [3, 4, 4])
    np.testing.assert_array_equal(new.count[:, 2], [npp, 0, 0])
    changed = np.flatnonzero((np.asarray(new.data) != np.asarray(at.data)).any(axis=1))
    np.testing.assert_array_equal(changed, owned(at)[2])
    none = arena()
    same, dropped = write(none, jnp.arange(U), 2, first * 0, *tokens)
    np.testing.assert_array_equal(dropped, 4)
    jax.tree.map(np.testing.assert_array_equal, same, none)


def test_units_may_write_different_numbers_of_tokens():
    at = arena(want=np.full((U, M), 2))
    tokens = (*vectors(U, 5), worths(U, 5))
    number = jnp.array([0, 3, 5])
    new, dropped = write(at, jnp.arange(U), 4, jnp.zeros(U, jnp.int32), *tokens, number)
    np.testing.assert_array_equal(dropped, 0)
    np.testing.assert_array_equal(new.count[:, 4], number)


def test_demotion_by_reading_and_writing_anew():
    at = arena(want=np.full((U, M), 1))
    (k, v), worth = vectors(1, 3), worths(1, 3)
    at, _ = write(at, jnp.array([1]), 0, jnp.array([0]), k, v, worth)
    held = read(at, 1, 0, num_pages=1)
    again = (x[None, :3] for x in (held.k, held.v, held.worth))
    at, dropped = write(at, jnp.array([1]), 2, jnp.array([0]), *again)
    at = pages.truncate(at, at.count.at[1, 0].set(0))
    assert dropped == 0
    np.testing.assert_array_equal(at.count[1], [0, 0, 3, 0, 0])
    assert not read(at, 1, 0, num_pages=1).valid.any()
    lower = read(at, 1, 2, num_pages=1)
    error = np.square(lower.k[:3] - k[0]).sum() / np.square(k[0]).sum()
    assert error < 0.01


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: pages.create(100, U, D, BITS, PAGE), ("budget_bytes is 100", "take 384")),
        (lambda: pages.create(10**6, U, D, BITS, 64), ("page_bytes is 64", "takes 65")),
        (lambda: pages.create(10**6, U, D, (4, 5), PAGE), ("bits is (4, 5)",)),
        (lambda: pages.create(10**6, U, D, (4, 4), PAGE), ("bits is (4, 4)",)),
        (lambda: pages.create(10**6, U, D, (), PAGE), ("bits is ()",)),
        (lambda: pages.create(10**6, 0, D, BITS, PAGE), ("num_units is 0",)),
        (lambda: pages.create(10**6, U, 20, BITS, PAGE), ("head_dim is 20", "16 and 24")),
        (lambda: pages.create(10**18, 10**6, D, BITS, PAGE), ("int32", "page_bytes 256")),
        (lambda: pages.reallocate(arena(), jnp.ones((U, 2), int)), ("(3, 5)",)),
        (lambda: pages.reallocate(arena(), jnp.ones((U, M))), ("float32", "integers")),
        (lambda: pages.truncate(arena(), jnp.ones(M)), ("(5,)", "(3, 5)")),
        (lambda: pages.read(arena(), 0, 5), ("level is 5",)),
        (lambda: write_with(level=-1), ("level is -1",)),
        (lambda: write_with(k=jnp.ones((1, 2, 8))), ("(1, 2, 8)",)),
        (lambda: write_with(worth=jnp.ones((1, 2))), ("worth is float32", "uint8")),
        (lambda: write_with(worth=worths(2, 1)), ("(2, 1)", "(1, 2)")),
        (lambda: write_with(units=jnp.arange(2)), ("units has shape (2,)",)),
        (lambda: write_with(first_slot=0), ("first_slot has shape ()",)),
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
    good = {"units": zero, "level": 0, "first_slot": zero, "k": k, "v": v, "worth": worths(1, 2)}
    return pages.write(arena(), **(good | changes))
