"""Admission: who stays is as by brute force, what stays is bit for bit, bytes and neighbours unmoved."""

import dataclasses
import functools
import itertools
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jbalance.cache import _admit, _centroids, _pages, _price
from jbalance.cache._layout import PageLayout
from tests.support.examples import few

U, D, BITS, PAGE, SPAN, SIZE = 5, 16, (8, 4, 3), 256, 3, 20
M = len(BITS)
ROOM = 360  # tokens of a batch in the tests
STEPS = _price.steps(D, BITS)
LAYOUTS = [PageLayout.within(PAGE, D, b) for b in BITS]
SIZES = np.array([x.page_tokens for x in LAYOUTS])
ALL = np.array([SIZE, SIZE])


@functools.partial(jax.jit, donate_argnums=0)
def admit_into(at, rest, first, units, k, v, code, allowance, number):
    """One compilation for all tests: two rows, numbers given."""
    new = units, k, v, code, allowance
    return _admit.admit(at, rest, first, SPAN, *new, num_tokens=number, certain=True)


def admit(at, *args):
    """Where what leaves does not matter."""
    at, _, report = admit_into(at, _centroids.create(U, D), *args)
    return at, report


class Token(NamedTuple):
    """One token as an arena holds it."""

    unit: int
    level: int
    code: int
    content: bytes


def arena(num_pages=30):
    out = _pages.create(num_pages * (PAGE + 4) + 4 * (2 * U * M + 1), U, D, BITS, PAGE)
    rng = np.random.default_rng(0)
    order = jnp.asarray(rng.permutation(num_pages), jnp.int32)
    return dataclasses.replace(out, order=order)


@functools.partial(jax.jit, static_argnums=2)
def encode(k, v, level):
    """The bytes of tokens but for their codes."""
    return LAYOUTS[level].encode(k, v, jnp.zeros(len(k), jnp.uint8))[:, :-1]


@functools.partial(jax.jit, static_argnums=1)
def decode(content, level):
    rows = jnp.pad(content, ((0, 0), (0, 1)))
    return LAYOUTS[level].decode(rows)[:2]


def vectors(found):
    """Keys and values [N, 2 D] of tokens."""
    out = np.zeros((len(found), 2 * D), np.float32)
    for level, layout in enumerate(LAYOUTS):
        at = [i for i, t in enumerate(found) if t.level == level]
        content = np.zeros((ROOM, layout.token_bytes - 1), np.uint8)
        for row, i in enumerate(at):
            content[row] = np.frombuffer(found[i].content, np.uint8)
        out[at] = np.concatenate(decode(content, level), axis=-1)[: len(at)]
    return out


def held(at):
    """All tokens of an arena."""
    data, out = np.asarray(at.flat), []
    assert (at.count <= at.capacity).all()
    for group, ids in enumerate(np.split(at.order, at.offset)[1:-1]):
        unit, level = divmod(group, M)
        # Read with numpy, by the description of a page.
        parts, start, size = [], 0, at.page_tokens[level]
        for i, width in enumerate(LAYOUTS[level].widths):
            across = i > 1 or BITS[level] < 8
            part = data[ids, start : start + size * width]
            part = part.reshape((-1, width, size) if across else (-1, size, width))
            parts.append((part.swapaxes(1, 2) if across else part).reshape(-1, width))
            start += size * width
        content = np.concatenate([parts[i] for i in range(4)], axis=-1)
        for i in range(int(at.count[unit, level])):
            out.append(Token(unit, level, int(parts[4][i, 0]), content[i].tobytes()))
    return out


def entering(units, k, v, code, number):
    """New tokens, of level 0 and without content, and their vectors [N, 2 D]."""
    there = np.arange(SIZE) < number[:, None]
    at = [(int(units[i]), int(c)) for i, c in zip(np.nonzero(there)[0], code[there], strict=True)]
    return [Token(u, 0, c, b"") for u, c in at], np.concatenate([k, v], axis=-1)[there]


def expected(found, x, first, least):
    """Levels [N] of tokens after an admission, and their vectors if they are encoded anew then."""
    unit, now, code = np.array([t[:3] for t in found]).T
    mine = (unit >= first) & (unit < first + SPAN)
    least = np.where(mine[:, None], least[np.clip(unit - first, 0, SPAN - 1)], 0)
    level = np.maximum(_price.levels_of(code.astype(np.uint8), least), now)
    padded = np.zeros((ROOM, 2 * D), np.float32)
    padded[: len(found)] = x
    k, v = np.split(padded, 2, axis=1)
    coded = np.stack([np.concatenate(decode(encode(k, v, m), m), axis=-1) for m in range(M)])
    return level, coded[np.minimum(level, M - 1), np.arange(len(found))]


def assert_same(got, want, size):
    """Every wanted vector is there once."""
    if len(got) == len(want) == 0:
        return
    apart = np.linalg.norm(got[:, None] - want, axis=-1)
    np.testing.assert_array_equal(np.sort(apart.argmin(axis=1)), np.arange(len(want)))
    assert apart.min(axis=1).max(initial=0) < 0.02 * size


def tokens(rng, rows, protected=0.0):
    k, v = (rng.normal(size=(rows, SIZE, D)).astype(np.float32) for _ in range(2))
    code = rng.integers(60, 200, (rows, SIZE)).astype(np.uint8)
    return k, v, np.where(rng.random(code.shape) < protected, 255, code).astype(np.uint8)


def assert_left(rest, unit, x, code):
    """The centroids of U units stand for exactly these tokens of units [N], with vectors and codes."""
    entries = _centroids.load(rest, np.arange(U))
    w = np.asarray(_price.decode_worth(code), float)
    both = np.concatenate([entries.keys, entries.values], axis=-1)
    for u in range(U):
        mine = unit == u
        assert entries.count[u].sum() == mine.sum()
        np.testing.assert_allclose(entries.weight[u].sum(), w[mine].sum(), rtol=1e-5, atol=1e-9)
        want = w[mine] @ x[mine]
        apart = np.asarray(entries.weight[u]) @ both[u] - want
        assert np.linalg.norm(apart) <= 0.02 * (w[mine] @ np.linalg.norm(x[mine], axis=-1) + 1e-9)


def need(found, mine):
    """Pages that the groups of some units need."""
    count = np.zeros((U, M), int)
    for unit, level, *_ in found:
        count[unit, level] += 1
    return (-(-count // SIZES))[mine].sum()


@few(8)
@given(st.integers(0, 10**6), st.lists(st.integers(2, 30), min_size=3, max_size=5))
def test_who_stays_is_as_by_brute_force_and_what_stays_is_bit_for_bit(seed, allowances):
    rng = np.random.default_rng(seed)
    at = arena()
    for allowance in allowances:
        first = int(rng.integers(0, U - SPAN + 1))
        units = first + rng.permutation(SPAN)[:2]
        k, v, code = tokens(rng, 2, protected=rng.choice([0, 0.05]))
        number = rng.integers(0, SIZE + 1, 2)
        old, tables = held(at), jax.tree.map(np.asarray, at)
        new, x = entering(units, k, v, code, number)
        nothing = _centroids.create(U, D)
        at, rest, report = admit_into(at, nothing, first, units, k, v, code, allowance, number)
        assert at.nbytes == arena().nbytes
        np.testing.assert_array_equal(np.sort(at.order), np.arange(at.num_pages))
        mine = slice(first, first + SPAN)
        if report.shortfall:
            jax.tree.map(np.testing.assert_array_equal, at, tables)
            assert report.rejected == number.sum()
            assert not rest.count.any()
            free = at.num_pages - tables.offset[-1]
            limit = min(allowance, free + tables.pages[mine].sum())
            kept = [t for t in old + new if t.code == 255 and first <= t.unit < first + SPAN]
            assert need([(t.unit, t.level) for t in kept], mine) > limit
            continue
        x = np.append(vectors(old), x, axis=0)
        level, coded = expected(old + new, x, first, report.least)
        gone = np.array([t[:3] for t in old + new])[level == M]
        assert_left(rest, gone[:, 0], x[level == M], gone[:, 2].astype(np.uint8))
        now, stays = held(at), level[: len(old)] == [t.level for t in old]
        assert not Counter(t for t, same in zip(old, stays, strict=True) if same) - Counter(now)
        for unit, m in itertools.product(range(U), range(M)):
            there = [i for i, t in enumerate(old + new) if t.unit == unit and level[i] == m]
            got = [t for t in now if (t.unit, t.level) == (unit, m)]
            assert Counter(t.code for t in got) == Counter((old + new)[i].code for i in there)
            recoded = [i for i in there if i >= len(old) or not stays[i]]
            added = Counter(got) - Counter(old[i] for i in there if i < len(old) and stays[i])
            assert_same(vectors(list(added.elements())), coded[recoded], np.sqrt(2 * D))
        assert report.held_pages == at.pages[mine].sum() <= allowance
        assert need(now, mine) == report.held_pages
        assert report.held == at.count[mine].sum()
        assert len(old) - len(now) + number.sum() == report.evicted + report.rejected
        fallen = (level[: len(old)] < M) & ~stays
        assert report.demoted == fallen.sum()
        # Others keep their pages, in their order.
        for group in [g for g in range(U * M) if not first <= g // M < first + SPAN]:
            was, is_now = (np.split(a.order, a.offset)[1 + group] for a in (tables, at))
            np.testing.assert_array_equal(was, is_now)


def test_the_price_is_the_lowest_that_fits_but_for_the_first_units():
    """For the tokens that come and those that are held or have left, which decide what is plenty."""
    rng, at, rest, there = np.random.default_rng(0), arena(), _centroids.create(U, D), 0
    for _ in range(4):
        k, v, code = tokens(rng, 2)
        old = held(at)
        at, rest, report = admit_into(at, rest, 0, np.arange(2), k, v, code, 7, ALL)
        there += ALL.sum()
        assert sum(at.count.sum(axis=1)) + rest.count.sum() == there
        assert report.held_pages <= 7
        assert set(np.diff(report.price)) <= {0, -1}
        offsets = np.asarray(STEPS.at(_price.plenty(tuple(SIZES), 7, int(there))))
        codes, levels = (
            np.concatenate([[x[i] for x in old], y])
            for i, y in ((2, code.reshape(-1)), (1, np.zeros(code.size, int)))
        )
        units = np.concatenate([[x.unit for x in old], np.repeat([0, 1], SIZE)])
        for price in range(1 - max(STEPS.offsets), int(report.price.max())):
            level = np.asarray(_price.levels_of(codes.astype(np.uint8), price + offsets))
            level = np.maximum(level, levels)
            count = [[((level == m) & (units == u)).sum() for m in range(M)] for u in range(2)]
            assert (-(-np.array(count) // SIZES)).sum() > 7


def test_a_page_in_which_nothing_changes_stays_where_it_is():
    rng, full = np.random.default_rng(0), int(SIZES[0])
    k, v, code = tokens(rng, 2, protected=1.0)
    at, _ = admit(arena(), 0, np.arange(2), k, v, code, 30, np.array([full, 0]))
    before, page = held(at), int(at.order[0])
    at, report = admit(at, 0, np.arange(2), *tokens(rng, 2), 3, ALL)
    assert report.shortfall == 0
    assert set(before) <= set(held(at))
    assert at.order[0] == page
    assert at.pages.sum() == 3


def test_more_room_changes_nothing_that_is_held():
    rng = np.random.default_rng(0)
    at, _ = admit(arena(), 0, np.arange(2), *tokens(rng, 2), 5, ALL)
    before = jax.tree.map(np.asarray, at)
    at, report = admit(at, 0, np.arange(2), *tokens(rng, 2), 30, 0 * ALL)
    assert (report.evicted, report.demoted, report.rejected) == (0, 0, 0)
    jax.tree.map(np.testing.assert_array_equal, at, before)


def test_pages_without_tokens_are_given_back():
    at, _ = _pages.reallocate(arena(), jnp.full((U, M), 2))
    new = tokens(np.random.default_rng(0), 2)
    at, report = admit(at, 1, np.array([2, 1]), *new, 12, np.array([SIZE, 0]))
    assert report.shortfall == 0
    np.testing.assert_array_equal(at.pages[np.array([0, 4])], 2)
    np.testing.assert_array_equal(at.pages[np.array([1, 3])], 0)
    assert report.held_pages == at.pages[2].sum()


@pytest.mark.parametrize(("units", "dropped"), [((0, 2), SIZE), ((2, 2), SIZE), ((0, 4), 2 * SIZE)])
def test_tokens_of_foreign_units_and_second_copies_are_reported(units, dropped):
    new = tokens(np.random.default_rng(0), 2)
    at, report = admit(arena(), 1, np.array(units), *new, 30, ALL)
    assert report.dropped == dropped
    assert report.held == at.count.sum() == at.count[2].sum() == 2 * SIZE - dropped


def test_new_values_compile_nothing_anew_and_the_arena_is_not_copied():
    rng, at = np.random.default_rng(0), arena()
    for first in (0, 2):
        at, _ = admit(at, first, np.arange(2) + first, *tokens(rng, 2), 7 + first, ALL)
    assert admit_into._cache_size() == 1
    large = _pages.create(2**27, U, D, BITS, 2**14)
    args = (large, _centroids.create(U, D), 0, np.arange(2), *tokens(rng, 2), 7, ALL)
    memory = admit_into.lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < large.nbytes / 30
    assert memory.alias_size_in_bytes >= large.data.nbytes


def good(**changes):
    k, v, code = tokens(np.random.default_rng(0), 2)
    args = {"first_unit": 0, "num_units": SPAN, "units": np.arange(2), "k": k, "v": v}
    args |= {"arena": arena(), "centroids": _centroids.create(U, D)}
    return args | {"code": code, "allowance_pages": 3} | changes


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"k": np.ones((2, SIZE, 8))}, ("(2, 20, 8)", "[N, S, 16]")),
        ({"code": np.ones((2, SIZE))}, ("code is float", "uint8")),
        ({"units": np.arange(3)}, ("units has shape (3,)", "(2,)")),
        ({"num_tokens": np.arange(3)}, ("num_tokens has shape (3,)",)),
        ({"num_units": 6}, ("num_units is 6", "1..5")),
        ({"first_unit": 3}, ("first_unit is 3", "0..2")),
        (
            {"centroids": _centroids.create(U, 8)},
            ("centroids are of 5 units and head_dim 8", "5 and 16"),
        ),
        ({"arena": _pages.create(10**4, U, D, (4, 8), PAGE)}, ("(4, 8)", "descend")),
    ],
)
def test_bad_input_is_named(change, names):
    with pytest.raises(ValueError, match="must") as error:
        _admit.admit(**good(**change))
    for name in names:
        assert name in str(error.value)
