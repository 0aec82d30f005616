"""Prompts: attention over themselves and all before, padding that is nothing, tokens that stay."""

import jax
import numpy as np
import pytest
from jax.experimental import checkify

from jbalance import cache
from jbalance.cache import _pages, _prefill, _price, _requests
from tests.support.small_cache import (
    FREQUENCIES,
    MANY,
    PROTECTED,
    B,
    D,
    H,
    K,
    L,
    S,
    attention,
    compiled,
    create,
    drawn,
    given_back,
    rounded,
)

prefill = compiled("prompts", jax.jit).prefill
shrink = jax.jit(_requests.shrink)
UNITS = L * K
LENGTHS = np.array([S, 13])


def assert_causal(y, q, keys, values, before, length, atol):
    """y of one layer's prompt [S, H, D] is attention over `before` tokens and those up to itself."""
    for t in range(length):
        end = before + t + 1
        np.testing.assert_allclose(
            y[t], attention(q[t], keys[:end], values[:end])[0], atol=atol, err_msg=str(t)
        )


def test_prompts_see_themselves_and_a_second_one_all_before():
    rng, held = np.random.default_rng(0), create()
    first, second = drawn(rng, size=S), drawn(rng, size=S)
    y, held = prefill(held, *first, LENGTHS, MANY)
    for layer in range(L):
        for request, length in enumerate(LENGTHS):
            q, k, v = (x[layer, request] for x in first)
            assert_causal(y[layer, request], q, k, v, 0, length, 1e-5)
    y, held = prefill(held, *second, LENGTHS[::-1], MANY)
    assert not held.centroids.count.any()  # all stayed, most of them at 8 bits
    for layer in range(L):
        for request, length in enumerate(LENGTHS):
            (_, *old), (q, *new) = ([x[layer, request] for x in xs] for xs in (first, second))
            keys, values = (np.append(a[:length], b, 0) for a, b in zip(old, new, strict=True))
            assert_causal(y[layer, request], q, keys, values, length, LENGTHS[1 - request], 0.03)
    held_tokens = held.arena.count.sum(axis=1)
    np.testing.assert_array_equal(held_tokens, LENGTHS.sum())


def test_padding_changes_nothing_bit_for_bit():
    new = drawn(np.random.default_rng(0), size=S)
    behind = np.arange(S) >= LENGTHS[:, None]
    other = [np.where(behind[..., None, None], np.float32(1e3), x) for x in new]
    got = [prefill(create(), *x, LENGTHS, np.full(B, 10, np.int32)) for x in (new, other)]
    (y, held), (y_other, held_other) = got
    assert held.centroids.count.any()  # of the real tokens some have left
    for request, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(y[:, request, :length], y_other[:, request, :length])
    jax.tree.map(np.testing.assert_array_equal, held, held_other)
    there = held.arena.count.sum(axis=1) + held.centroids.count.sum(axis=1)
    np.testing.assert_array_equal(there, np.repeat(LENGTHS, UNITS))


def test_a_prompt_of_no_tokens_changes_nothing():
    rng, held = np.random.default_rng(0), create()
    _, held = prefill(held, *drawn(rng, size=S), LENGTHS, MANY)
    before = jax.tree.map(np.array, held)
    _, held = prefill(held, *drawn(rng, size=S), 0 * LENGTHS, MANY)
    jax.tree.map(np.testing.assert_array_equal, held, before)


def test_prompts_of_fewer_tokens_than_always_stay():
    few, new = np.array([1, 5]), drawn(np.random.default_rng(0), size=S)
    y, held = prefill(create(), *new, few, np.full(B, create().floor_pages, np.int32))
    for layer in range(L):
        for request, length in enumerate(few):
            q, k, v = (x[layer, request] for x in new)
            assert_causal(y[layer, request], q, k, v, 0, length, 1e-5)
    np.testing.assert_array_equal(held.arena.count[:, 0], np.repeat(few, UNITS))


def test_the_mean_key_is_that_of_the_first_prompt_without_its_sinks():
    rng, held = np.random.default_rng(0), create()
    first = drawn(rng, size=S)
    _, held = prefill(held, *first, LENGTHS, MANY)
    _, held = prefill(held, *drawn(rng, size=S), LENGTHS, MANY)
    mean = np.asarray(held.key_mean, np.float32).reshape(B, L, K, D)
    for request, length in enumerate(LENGTHS):
        want = first[1][:, request, 4:length].mean(axis=1)
        np.testing.assert_allclose(mean[request], rounded(want), atol=0.01)


def test_first_and_latest_tokens_of_the_first_prompt_stay():
    held, length = create(), S - 4  # the first request has none
    rng = np.random.default_rng(0)
    _, k, _ = new = drawn(rng, size=S)
    _, held = prefill(held, *new, np.array([0, length]), MANY)
    np.testing.assert_array_equal(held.arena.count.sum(axis=1), np.repeat([0, length], UNITS))
    assert held.arena.page_tokens[0] == 7
    held, report = shrink(held, 1, held.floor_pages)
    # Two pages of a unit hold the 12 that are protected, and the best two.
    assert report.held == UNITS * (PROTECTED + 2)
    np.testing.assert_array_equal(held.arena.count[UNITS:, 0], PROTECTED + 2)
    left = np.asarray(held.centroids.count.sum(axis=1))
    np.testing.assert_array_equal(left[UNITS:], length - PROTECTED - 2)
    assert left.sum() == report.evicted
    for layer in range(L):
        for head in range(K):
            unit = UNITS + layer * K + head
            kept = _pages.read(held.arena, unit, 0)
            want = k[layer, 1, [*range(4), *range(length - 8, length)], head]
            protected = np.flatnonzero(kept.code == _price.PROTECTED)
            keys, _ = given_back(held, unit, kept.k[protected], kept.v[protected])
            np.testing.assert_allclose(keys, want, atol=0.05)
    # The latest of a second prompt have the highest code, but they may leave when it comes to it.
    _, held = prefill(held, *drawn(rng, size=S), np.array([0, 9]), MANY)
    kept = _pages.read(held.arena, UNITS, 0)
    assert (kept.code == _price.PROTECTED).sum() == PROTECTED
    assert (kept.code == _price.HIGHEST).sum() == 8
    held, report = shrink(held, 1, held.floor_pages)
    assert report.shortfall == 0
    assert report.held == UNITS * PROTECTED  # the eight are worth the same: none, or all of them


def test_below_the_floor_nothing_enters_and_nothing_is_lost():
    rng, held = np.random.default_rng(0), create()
    _, held = prefill(held, *drawn(rng, size=S), LENGTHS, MANY)
    before = jax.tree.map(np.array, (held.arena, held.centroids))
    _, held = prefill(
        held, *drawn(rng, size=S), LENGTHS, np.full(B, held.floor_pages - 1, np.int32)
    )
    jax.tree.map(np.testing.assert_array_equal, (held.arena, held.centroids), before)


@pytest.mark.slow
def test_what_lacks_pages_is_reported():
    rng, held = np.random.default_rng(0), create()
    w = rng.uniform(0.01, 1, (K, S)).astype(np.float32)
    (_, k, v), admit = drawn(rng, size=S), jax.jit(_prefill.admit)
    held, report = admit(held, 1, 0, k[0, 1], v[0, 1], w, 2 * K)
    assert report.shortfall == 0
    assert report.held == K * (PROTECTED + 2)
    before = jax.tree.map(np.array, (held.arena, held.centroids))
    held, report = admit(held, 1, 1, k[1, 1], v[1, 1], w, 2 * K)
    assert report.shortfall == 2 * K
    assert report.rejected == K * S
    jax.tree.map(np.testing.assert_array_equal, (held.arena, held.centroids), before)


@pytest.mark.slow
def test_below_the_floor_is_an_error_under_checkify():
    held, (q, k, v) = create(), drawn(np.random.default_rng(0), size=S)

    def admitted(pages):
        more = {"frequencies": FREQUENCIES, "allowance_pages": pages}
        return cache.prefill(held, 0, q[0], k[0], v[0], **more)[0]

    checked = jax.jit(checkify.checkify(admitted))
    error, _ = checked(np.full(B, held.floor_pages - 1))
    with pytest.raises(checkify.JaxRuntimeError, match="allowance_pages must be whole numbers in"):
        error.throw()
    error, _ = checked(np.full(B, held.floor_pages))
    error.throw()


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: prefill_with(q=np.ones((B, S, 3, D))), ("q has shape (2, 24, 3, 16)", "of 2")),
        (
            lambda: prefill_with(q=np.ones((B, 0, H, D))),
            ("q has shape (2, 0, 4, 16)", "at least 1"),
        ),
        (lambda: prefill_with(q=np.ones((B, H, D))), ("q must have shape [B, S, H or K, D]",)),
        (
            lambda: prefill_with(k=np.ones((B, S + 1, K, D))),
            ("k has shape (2, 25", "(2, 24, 2, 16)"),
        ),
        (lambda: prefill_with(layer=L), ("layer is 2", "0..1")),
        (lambda: prefill_with(lengths=np.array([S, S + 1])), ("lengths[1] is 25", "0..24")),
        (lambda: prefill_with(lengths=np.array([S])), ("lengths has shape (1,)", "(2,)")),
        (
            lambda: prefill_with(allowance_pages=np.array([8, 7])),
            ("allowance_pages[1] is 7", "8.."),
        ),
        (lambda: prefill_with(allowance_pages=8), ("allowance_pages must have shape [B]", "()")),
        (lambda: admit_with(layer=2), ("layer is 2",)),
        (lambda: admit_with(request=2), ("request is 2",)),
        (lambda: admit_with(w=np.ones(3)), ("w has shape (3,)", "(2, 24)")),
        (lambda: admit_with(k=np.ones((3, K, 8))), ("(3, 2, 8)",)),
    ],
)
def test_bad_input_is_named(call, names):
    with pytest.raises(ValueError, match=r"must|has") as error:
        call()
    for name in names:
        assert name in str(error.value)


def prefill_with(**changes):
    q, k, v = (x[0] for x in drawn(np.random.default_rng(0), size=S))
    good = {"cache": create(), "layer": 0, "q": q, "k": k, "v": v, "frequencies": FREQUENCIES}
    return cache.prefill(**(good | changes))


def admit_with(**changes):
    _, k, v = (x[0, 0] for x in drawn(np.random.default_rng(0), size=S))
    good = {"cache": create(), "request": 0, "layer": 0, "k": k, "v": v, "w": np.ones((K, S))}
    return _prefill.admit(**(good | {"allowance_pages": 9} | changes))
