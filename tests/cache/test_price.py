"""The byte of worth, and the price: as by brute force, to the page."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jbalance.cache import _price
from jbalance.cache._layout import token_bytes
from tests.support.examples import few

BITS = (8, 4, 3)
STEPS = _price.steps(64, BITS)
SIZES = (3, 5, 7)
price_of = jax.jit(_price.price_of, static_argnums=(1, 2))


def test_codes_are_right_to_a_twenty_fourth_of_an_octave():
    w = np.geomspace(2e-5, 20, 1000)
    code = _price.encode_worth(w)
    assert code.dtype == jnp.uint8
    assert np.abs(np.log2(_price.decode_worth(code) / w)).max() < 1 / 24 + 1e-4
    np.testing.assert_array_equal(np.diff(np.asarray(code, int)) >= 0, True)


def test_the_range_saturates_short_of_protection():
    np.testing.assert_array_equal(_price.encode_worth(jnp.array([0, 1e-30, 1e30])), [1, 1, 254])
    assert _price.decode_worth(jnp.uint8(_price.PROTECTED)) == np.inf


@pytest.mark.parametrize("bits", [(8, 4, 3), (16, 8, 4, 3, 2), (8, 2), (4,), (8, 4, 3, 2, 1)])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_each_token_has_the_level_of_most_value_less_price(bits, head_dim):
    offsets = _price.steps(head_dim, bits).offsets
    assert offsets[-1] == 0
    assert list(offsets) == sorted(offsets, reverse=True)
    size = np.array([token_bytes(head_dim, b) for b in bits] + [0])
    value = np.array([1 - _price.error(head_dim, b) ** 0.75 for b in bits] + [0])
    lowest = max(value[:-1] / size[:-1])
    code = np.arange(1, 255)
    least = 90 + np.array(offsets)
    got = np.asarray(_price.levels_of(code.astype(np.uint8), least))
    gain = 2.0 ** ((code - 90) / 12)[:, None] / lowest * value - size
    chosen = gain[np.arange(len(code)), got]
    # A code and an offset are whole twelfths: right to one of them.
    shifted = 2.0 ** ((code - 89) / 12)[:, None] / lowest * value - size
    assert (chosen >= gain.max(axis=1) - (shifted - gain).max(axis=1) - 1e-6).all()


def counted(levels, codes, least):
    """Tokens [U, M] that stay at each level."""
    now = np.maximum(3 - (codes[..., None] >= least).sum(axis=-1), levels)
    return np.stack([(now == m).sum(axis=1) for m in range(3)], axis=1)


def filled(levels, codes, offsets, price, count):
    """The least codes, lowered one by one while the slots of the pages of these counts have room."""
    least = np.clip(np.array(price)[:, None] + offsets, 0, 255)
    room = -(-count // SIZES) * SIZES
    for unit, level in itertools.product(range(2), range(3)):
        while least[unit, level] > 0:
            lower = least.copy()
            lower[unit, level:] = np.minimum(lower[unit, level:], lower[unit, level] - 1)
            if (counted(levels, codes, lower[:, None])[unit, level:] > room[unit, level:]).any():
                break
            least = lower
    return least


def brute(levels, codes, offsets, allowance):
    """The lowest price that fits, by counting, and its counts."""

    def at(price):
        least = np.clip(np.array(price)[:, None, None] + offsets, 0, 255)
        count = counted(levels, codes, least)
        return (-(-count // SIZES)).sum() <= allowance, price, count

    lowest, units = 1 - max(STEPS.offsets), len(levels)
    whole = (at([p] * units) for p in range(lowest, 256))
    last = found = next((x for x in whole if x[0]), at([255] * units))
    if found[0] and found[1][0] > lowest:
        for r in range(units):
            found = at([last[1][0]] * (r + 1) + [last[1][0] - 1] * (units - r - 1))
            if found[0]:
                break
    return found[1:]


@few(40)
@given(
    st.integers(0, 10**6),
    st.integers(0, 40),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0, 9, 60]),
)
def test_the_price_is_that_of_brute_force(seed, allowance, protected, plenty):
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 3, (2, 60))
    codes = rng.choice([rng.integers(1, 255), 100, 120, 140], (2, 60)).astype(np.uint8)
    codes = np.where(rng.random((2, 60)) < 0.5, rng.integers(1, 255, (2, 60)), codes)
    levels, codes = (
        np.where(rng.random((2, 60)) < protected, new, x).astype(np.uint8)
        for x, new in ((levels, 0), (codes, 255))
    )
    codes = np.where((codes == 255) & (levels > 0), 200, codes).astype(np.uint8)
    histogram = np.zeros((2, 3, 256), np.int32)
    np.add.at(histogram, (np.arange(2)[:, None], levels, codes), 1)
    offsets = np.array([max(71 - plenty, 35), 35, 0])
    got = price_of(histogram, STEPS, SIZES, allowance, plenty)
    price, count = brute(levels, codes, offsets, allowance)
    np.testing.assert_array_equal(got.price, price)
    np.testing.assert_array_equal(got.least, filled(levels, codes, offsets, price, count))
    np.testing.assert_array_equal(got.tokens, counted(levels, codes, got.least[:, None]))
    np.testing.assert_array_equal(got.pages, -(-np.asarray(got.tokens) // SIZES))
    assert (got.pages <= -(-count // SIZES)).all()
    assert got.shortfall == max((-(-count // SIZES)).sum() - allowance, 0)


def test_slots_are_filled_and_a_shortfall_is_told():
    histogram = np.zeros((1, 3, 256), np.int32)
    histogram[0, 0, [100, 150, 200, 255]] = 1
    assert price_of(histogram, STEPS, SIZES, 9).price == 1 - max(STEPS.offsets)
    got = price_of(histogram, STEPS, SIZES, 1)
    assert got.price == 201  # that of the protected token alone, whose page has two slots more
    np.testing.assert_array_equal(got.tokens, [[3, 0, 0]])
    np.testing.assert_array_equal(got.least, [[101, 101, 101]])
    assert price_of(histogram, STEPS, SIZES, 0).shortfall == 1


def test_plenty_begins_where_a_fifth_of_the_tokens_fit_at_the_finest_level():
    """An octave of it more is one by which the finest level's offset falls, in quarters."""
    pages = np.array([0, 10, 16, 16 * 2**0.5, 16 * 2**1.5, 512])
    got = [int(_price.plenty(SIZES, x, 240)) for x in pages]
    assert got == [0, 0, 0, 6, 18, 60]
    assert list(STEPS.at(6)) == [65, 35, 0]
    assert list(STEPS.at(60)) == [35, 35, 0]
    assert _price.steps(64, (8,)).least == (0,)
    assert int(_price.plenty(SIZES, 5, 0)) >= 71  # no tokens yet


def test_more_tokens_are_fine_where_memory_is_plenty():
    histogram = np.zeros((1, 3, 256), np.int32)
    histogram[0, 0, 60:200] = 1
    scarce, ample = (
        np.asarray(price_of(histogram, STEPS, SIZES, 25, x).tokens[0]) for x in (0, 18)
    )
    assert ample[0] > scarce[0]
    assert ample.sum() < scarce.sum()


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: _price.encode_worth(-1.0), ("w is -1.0", ">= 0")),
        (lambda: _price.encode_worth(np.array([np.nan])), ("w[0] is nan",)),
        (lambda: _price.steps(64, (4, 8)), ("(4, 8)", "descend, (8, 4)")),
        (lambda: _price.steps(64, (5,)), ("(5,)", "16")),
        (lambda: _price.price_of(jnp.zeros((2, 3, 9)), STEPS, SIZES, 1), ("(2, 3, 9)", "256")),
    ],
)
def test_bad_input_is_named(call, names):
    with pytest.raises(ValueError, match=r"is|has") as error:
        call()
    for name in names:
        assert name in str(error.value)
