"""Rules about units: what they compile to, against sets and thresholds."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jbalance import allocate
from jbalance.importance import Implies, Keep, Matters, blend, imply, in_spans, knowledge

U, R = 8, 3
masks = arrays(bool, (R, U), elements=st.booleans())
worths = arrays(np.float32, U, elements=st.integers(0, 9).map(np.float32))
IMPLY = jax.jit(imply)


def mask(*units):
    return np.isin(np.arange(U), units)


def closed(units, pairs):
    """Everything that follows from a set of units."""
    found = set(units)
    while True:
        new = {b for a, then in pairs if found & a for b in then} - found
        if not new:
            return found
        found |= new


@given(w=worths, a=masks, b=masks)
def test_whatever_price_keeps_units_keeps_what_follows_and_nothing_else(w, a, b):
    known = knowledge([Implies(x, y) for x, y in zip(a, b, strict=True)], U)
    raised = np.asarray(IMPLY(w, known))
    pairs = [({*np.flatnonzero(x)}, {*np.flatnonzero(y)}) for x, y in zip(a, b, strict=True)]
    for price in range(1, 10):
        want = closed({*np.flatnonzero(w >= price)}, pairs)
        assert {*np.flatnonzero(raised >= price)} == want


@given(keep=arrays(bool, U, elements=st.booleans()), a=masks, b=masks)
def test_what_always_stays_brings_along_what_follows(keep, a, b):
    rules = [Keep(keep), *(Implies(x, y) for x, y in zip(a, b, strict=True))]
    pairs = [({*np.flatnonzero(x)}, {*np.flatnonzero(y)}) for x, y in zip(a, b, strict=True)]
    want = closed({*np.flatnonzero(keep)}, pairs)
    assert {*np.flatnonzero(knowledge(rules, U).keep)} == want


def test_codes_in_bytes_are_ordered_like_worths():
    known = knowledge([Implies(mask(0), mask(1, 2))], U)
    codes = np.array([[255, 3, 200, 9, 0, 0, 0, 0], [7, 3, 200, 9, 0, 0, 0, 0]], np.uint8)
    got = imply(codes, known)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got[:, :4], [[255, 255, 255, 9], [7, 7, 200, 9]])


def test_priors_multiply_and_count_as_much_as_beta():
    rules = [Matters(mask(0, 1), 4.0), Matters(mask(1, 2), 9.0), Matters(mask(3), 0.25)]
    known = knowledge(rules, U, beta=0.5)
    np.testing.assert_allclose(known.prior, [4, 36, 9, 0.25, 1, 1, 1, 1])
    w = np.asarray(blend(np.ones(U), known.prior, known.beta))
    np.testing.assert_allclose(w[1] / w[4], 6, rtol=1e-5)
    np.testing.assert_allclose(w.sum(), U, rtol=1e-5)


def test_floors_are_those_of_an_allocation():
    known = knowledge([Keep(mask(5)), Implies(mask(5), mask(6))], U)
    w = np.where(mask(5, 6), 0, 1.0)
    out = allocate.whole(w, 8, np.asarray(known.keep, np.int32))
    np.testing.assert_array_equal(out.amount[5:7], [1, 1])


def test_tokens_of_spans_overlap_them():
    text = "To be, or not to be"
    words = [(0, 2), (3, 5), (5, 6), (7, 9), (10, 13), (14, 16), (17, 19)]
    at = text.index("or not")
    got = in_spans(words, [(at, at + len("or not"))])
    np.testing.assert_array_equal(got, [0, 0, 0, 1, 1, 0, 0])
    assert not in_spans(words, [(2, 3), (6, 7)]).any()  # between words
    assert in_spans(words, [(1, 4)])[:3].tolist() == [True, True, False]  # parts of two


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: knowledge([Keep(np.ones(3, bool))], U), r"rules\[0\].where has .* \(3,\)"),
        (lambda: knowledge([Keep(np.ones(U))], U), r"rules\[0\].where has dtype float64"),
        (lambda: knowledge([Matters(mask(1), -2)], U), r"rules\[0\].times is -2"),
        (lambda: knowledge([3], U), r"rules\[0\] is 3: it must be Matters, Keep or Implies"),
        (lambda: knowledge([], U, beta=2), "beta is 2"),
        (lambda: knowledge([], 0), "num_units is 0"),
        (lambda: imply(np.ones(3), knowledge([], U)), "w has 3 entries"),
        (lambda: in_spans([(0, 1)], [(3, 2)]), r"spans\[0\] is \(3, 2\)"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
