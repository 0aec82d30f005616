"""A cache's bytes: all of the budget, none beyond it, refused where it is too small; and its sharing."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import cache
from jbalance.cache import _cache, _pages
from jbalance.cache._layout import token_bytes
from tests.support.small_cache import BUDGET, PAGE, B, D, K, L, R, create

shares = jax.jit(cache.allowance)


@pytest.mark.parametrize("budget", [30_000, 123_457])
def test_bytes_are_the_budget_but_for_less_than_a_page(budget):
    held = create(budget)
    assert budget - PAGE - 4 < held.nbytes <= budget
    assert held.nbytes == sum(x.nbytes for x in jax.tree.leaves(held))
    assert (held.num_requests, held.num_layers, held.num_kv_heads) == (B, L, K)
    assert (held.recent_tokens, held.units_per_request, held.head_dim) == (R, L * K, D)


@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize("budget", [10**5, 10**6, 10**7, 10**9])
def test_pages_waste_little(budget, head_dim):
    size = _cache.page_bytes_for(budget, 90, head_dim, (8, 4, 3))
    assert _cache.LEAST_PAGE_BYTES <= size <= _cache.MOST_PAGE_BYTES
    waste = [size % token_bytes(head_dim, b) / size for b in (8, 4, 3)]
    assert np.mean(waste) < (0.12 if head_dim > 64 else 0.08)
    if head_dim <= 64 and budget == 10**7:  # where neither end of the range binds
        assert 0.75 < budget / 90 / size / _cache.PAGES_PER_UNIT < 1.3


@pytest.mark.parametrize("changes", [{}, {"page_bytes": None, "recent_tokens": None}])
def test_a_budget_too_small_is_refused_and_the_least_that_fits_is_named(changes):
    with pytest.raises(ValueError, match=r"budget_bytes is 100: .* give at least") as error:
        create(100, **changes)
    least = int(re.search(r"give at least (\d+)", str(error.value))[1])
    held = create(least, **changes)
    assert held.nbytes == least
    assert held.arena.num_pages == B * held.floor_pages
    assert held.even_pages == held.floor_pages
    with pytest.raises(ValueError, match=rf"budget_bytes is {least - 1}: .* at least {least}"):
        create(least - 1, **changes)


def test_the_floor_holds_the_tokens_that_always_stay():
    held = create()
    per_unit, left = divmod(held.floor_pages, held.units_per_request)
    assert left == 0
    assert (
        (per_unit - 1) * held.arena.page_tokens[0] < 4 + 8 <= per_unit * held.arena.page_tokens[0]
    )


def test_some_heads_of_a_model():
    slots = np.array([[2, -1], [0, 1]])
    held = create(slots=slots)
    assert held.nbytes <= BUDGET
    assert held.units_per_request == 3
    assert held.recent_keys.shape == (B * 3, R, D)
    for request in range(B):
        np.testing.assert_array_equal(held.units(request, 0), [3 * request + 2, B * 3])
        np.testing.assert_array_equal(held.units(request, 1), [3 * request, 3 * request + 1])


@pytest.mark.parametrize(
    ("floors", "weights", "active", "want"),
    [
        ((0, 0), (1, 1), (True, True), (0.5, 0.5)),
        ((0, 0), (3, 1), (True, True), (0.75, 0.25)),
        ((0, 90), (1, 0), (True, True), (0.1, 0.9)),
        ((20, 90), (1, 1), (True, False), (1, 0)),
        ((0, 0), (0, 0), (True, True), (0, 0)),
        ((30, 0), (0, 1), (True, True), (0.3, 0.7)),
    ],
)
def test_allowances_of_an_empty_arena(floors, weights, active, want):
    held = create(100 * (PAGE + 4) + 20_000)
    total = held.arena.num_pages
    floors = np.array(floors) * total // 100
    weights = np.array(weights, np.float32)
    got = shares(held, weights, np.array(active), floors_pages=floors)
    np.testing.assert_allclose(got, np.array(want) * total, atol=1)
    assert got.sum() <= total


def test_the_floor_of_all_is_that_of_the_tokens_that_always_stay():
    held = create()
    got = shares(held, np.array([1, 0], np.float32), np.array([True, True]))
    np.testing.assert_array_equal(got, [held.arena.num_pages - held.floor_pages, held.floor_pages])


def test_what_others_hold_is_not_allowed_twice():
    held = create()
    total = held.arena.num_pages
    pages = jnp.zeros(held.arena.count.shape, jnp.int32).at[0, 0].set(total - 5)
    arena, _ = _pages.reallocate(held.arena, pages)
    held = dataclasses.replace(held, arena=arena)
    even, both = np.ones(2, np.float32), np.array([True, True])
    got = shares(held, even, both, floors_pages=np.array([0, 10]))
    np.testing.assert_array_equal(got, [total // 2, 5])  # until request 0 has shrunk


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: create(-1), ("budget_bytes is -1", "at least 0")),
        (lambda: create(num_layers=0), ("num_layers is 0",)),
        (lambda: create(num_requests=0), ("num_requests is 0",)),
        (lambda: create(recent_tokens=7), ("recent_tokens is 7", "even")),
        (lambda: create(bits=(4, 8)), ("(4, 8)", "descend")),
        (lambda: create(slots=np.array([[0, 1]])), ("slots has shape (1, 2)", "(2, 2)")),
        (lambda: create(slots=np.array([[0, 2], [-1, -1]])), ("slots", "0, 1, ... once each")),
        (lambda: create(slots=np.array([[0, 0], [1, -1]])), ("slots", "0, 1, ... once each")),
        (lambda: create(slots=np.full((2, 2), -1)), ("slots holds only -1",)),
        (lambda: cache.release(create(), 2), ("request is 2", "0..1")),
        (lambda: share_with(weights=np.array([-1.0, 1])), ("weights[0] is -1",)),
        (lambda: share_with(floors_pages=np.array([999, 1])), ("sum to 1000", "the arena has")),
        (lambda: share_with(floors_pages=np.array([0.5, 1])), ("floors_pages has dtype float64",)),
        (lambda: share_with(active=np.array([True])), ("shape (1,)",)),
    ],
)
def test_bad_input_is_named(call, names):
    with pytest.raises(ValueError, match=r"must|take|has|only") as error:
        call()
    for name in names:
        assert name in str(error.value)


def share_with(**changes):
    good = {"cache": create(), "weights": np.ones(2), "active": np.array([True, True])}
    return cache.allowance(**(good | {"floors_pages": np.array([1, 1])} | changes))
