"""What a cached token is worth, in one byte, and the one price that decides who stays at how many bits.

A token of worth w gains w (V_m - V_n) when it is kept at level m in place of the next lower level n,
or of being evicted (V = 0): V_m = 1 - error_m^0.75, with the codec's relative squared errors. One
price over all units decides: a step is taken iff its gain per byte reaches the price. Worth and price
are counted in twelfths of an octave, so that a level's slope is a whole offset: a token of code c takes
the step to level m iff c >= price + offset_m. Pages are whole, so each unit then lets in the next best
tokens for which the pages that it pays for have room.

Worth adds up where tokens are evicted, whose loss has one direction; errors of codes have none, and add
up in squares. So the fewer tokens leave, the more the finest levels gain beside: by the part of all
tokens that the pages would hold there (`plenty`). That is for worth that is certain, learned or
measured: tokens that a sketch of it lets go by mistake cost more than finer codes for others bring.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import checks
from jbalance.cache._layout import PageLayout, token_bytes

PROTECTED = 255  # the code of tokens that are neither demoted nor evicted
NUM_CODES = 256
LOWEST, HIGHEST = 1, 254  # codes of worth, saturated
_PER_OCTAVE, _OF_ONE = 12, 200  # code of worth 1
# Of a vector with the same bits for all coordinates; of keys in two halves the logits have less.
_ERROR = {1: 0.561, 2: 0.125, 3: 0.0304, 4: 0.00724, 8: 3.43e-5, 16: 0.0}
_HALVES = 0.4
_FINE_BITS = 8  # of levels that plenty is for
_SCARCE = 1 / 5  # of the tokens would fit there, and plenty begins
_PLENTY_STEP = 3  # whole quarters of an octave: what is asked of a plan changes rarely


class Price(NamedTuple):
    """The price, and what it leaves; U units, M levels."""

    price: jax.Array  # [U] int32, the same but for one, which the first units pay
    least: jax.Array  # [U, M] int32, the least code that reaches each level, non-increasing
    tokens: jax.Array  # [U, M] int32, at each level
    pages: jax.Array  # [U, M] int32, pages they take
    shortfall: jax.Array  # [] int32, pages that are missing even if only protected tokens stay


def encode_worth(w: jax.Array) -> jax.Array:
    """The code of a worth: round(12 log2 w) + 200, within 1..254.

    A code is right to 3 %. The range is part of the code: every worth below 1e-5 has code 1 and every
    worth above 22 has code 254; 255 is `PROTECTED`, and 0 is never given.

    >>> encode_worth(jnp.array([1.0, 0.5, 0.0]))
    Array([200, 188,   1], dtype=uint8)

    Args:
      w: [...] float, >= 0.

    Returns:
      [...] uint8; traced NaN has the lowest.

    Raises:
      ValueError: worth that is negative or not finite.
    """
    w = checks.non_negative("w", w)
    code = jnp.round(_PER_OCTAVE * jnp.log2(jnp.asarray(w, jnp.float32))) + _OF_ONE
    code = jnp.where(jnp.isnan(code), LOWEST, jnp.clip(code, LOWEST, HIGHEST))
    return code.astype(jnp.uint8)


@jax.jit
def decode_worth(code: jax.Array) -> jax.Array:
    """The worth of a code [...] uint8, float32; infinite for `PROTECTED`."""
    w = jnp.exp2((code.astype(jnp.float32) - _OF_ONE) / _PER_OCTAVE)
    return jnp.where(code == PROTECTED, jnp.inf, w)


class Steps(NamedTuple):
    """By how much the code must exceed the price for each level: static, in twelfths of an octave."""

    offsets: tuple[int, ...]  # [M] non-increasing, 0 for the lowest
    least: tuple[int, ...]  # [M] to which plenty lowers them, at most to the next level's

    def at(self, plenty: jax.Array | int) -> jax.Array:
        """[M] int32 offsets at this much of it."""
        return jnp.maximum(
            np.array(self.offsets, np.int32) - plenty, np.array(self.least, np.int32)
        )


@functools.lru_cache
def steps(head_dim: int, bits: tuple[int, ...]) -> Steps:
    """The `Steps` of levels.

    A level that is not on the concave envelope of value over bytes has the offset of the next level
    above it: who reaches it passes it.

    >>> steps(64, (8, 4, 3))
    Steps(offsets=(71, 35, 0), least=(35, 35, 0))

    Args:
      head_dim: D.
      bits: of each level, descending.

    Raises:
      ValueError: bits that are not of `pages.create` or do not descend.
    """
    if not bits or any(b not in _ERROR for b in bits):
        raise ValueError(f"bits is {bits}: it must be different ones of {tuple(_ERROR)}")
    if list(bits) != sorted(set(bits), reverse=True):
        raise ValueError(f"bits is {bits}: they must descend, {tuple(sorted(set(bits))[::-1])}")
    size = [token_bytes(head_dim, b) for b in bits]
    value = values(head_dim, bits)
    slopes: list[float] = []
    at_bytes, at_value, level = 0, 0.0, len(bits)
    while level:  # the envelope's next corner is that of the steepest way up
        slope, best = max(((value[m] - at_value) / (size[m] - at_bytes), -m) for m in range(level))
        slopes += [slope] * (level + best)
        at_bytes, at_value, level = size[-best], value[-best], -best
    offsets = tuple(round(_PER_OCTAVE * math.log2(slopes[0] / slope)) for slope in slopes[::-1])
    coarse = [x for x, b in zip(offsets, bits, strict=True) if b < _FINE_BITS]
    least = coarse[0] if coarse else 0
    return Steps(offsets, tuple(min(x, least) for x in offsets))


@functools.partial(jax.jit, static_argnums=0)
def plenty(
    page_tokens: tuple[int, ...], pages: jax.Array | int, tokens: jax.Array | int
) -> jax.Array:
    """[] int32, how far the offsets of the finest levels fall where pages are plenty for the tokens.

    By an octave for each octave of the part that would fit there, above `_SCARCE`: that is, their steps'
    gain is taken times 5 times that part.

    >>> plenty((3, 5, 7), 40, 240)
    Array(15, dtype=int32)

    Args:
      page_tokens: [M] tokens per page.
      pages: [] int, of all units together.
      tokens: [] int, that there have been in these units, evicted ones too.
    """
    part = jnp.asarray(pages, jnp.float32) * page_tokens[0] / jnp.maximum(tokens, 1)
    octaves = jnp.log2(jnp.maximum(part / _SCARCE, 1))
    quarters = jnp.minimum(jnp.round(octaves * (_PER_OCTAVE / _PLENTY_STEP)), PROTECTED)
    return _PLENTY_STEP * quarters.astype(jnp.int32)


def values(head_dim: int, bits: tuple[int, ...]) -> list[float]:
    """Of each level, the part of a token's worth that is kept there."""
    return [1 - error(head_dim, b) ** 0.75 for b in bits]


def error(head_dim: int, bits: int) -> float:
    """Relative squared error of a token at so many bits: the mean of its logits' and its value's."""
    keys = _HALVES if PageLayout(head_dim, bits, 0).split else 1
    return _ERROR[bits] * (1 + keys) / 2


@jax.jit
def levels_of(code: jax.Array, least: jax.Array) -> jax.Array:
    """The level that each token reaches: an index into the levels, or M for evicted.

    Args:
      code: [...] uint8.
      least: [..., M] int32, `Price.least` of the token's unit.

    Returns:
      [...] int32; `PROTECTED` tokens have level 0.
    """
    reached = jnp.asarray(code).astype(jnp.int32)[..., None] >= least
    return least.shape[-1] - jnp.sum(reached, axis=-1, dtype=jnp.int32)


def price_of(
    histogram: jax.Array,
    steps: Steps,
    page_tokens: tuple[int, ...],
    allowance_pages: jax.Array,
    plenty: jax.Array | int = 0,
) -> Price:
    """The lowest price at which all tokens fit, every group in whole pages of its own.

    All prices are looked at, so that rounding up to pages is exact. The price is a twelfth of an
    octave too high for the last few pages: only as many units as must pay it, the first ones, the
    others one less. Then the highest level takes as many of the next best tokens as its pages have
    slots for, then the next level. A token is never raised: at level m it stays there or falls.

    Args:
      histogram: [U, M, 256] int, tokens of each unit, level and code; new ones count at level 0.
      steps: of the levels; static.
      page_tokens: [M] tokens per page.
      allowance_pages: [] int, pages of all units together.
      plenty: [] int32 of `plenty`.

    Returns:
      `Price`; with a shortfall it is the highest one, at which only protected tokens stay.

    Raises:
      ValueError: a histogram whose shape does not fit.
    """
    levels = len(steps.offsets)
    if np.ndim(histogram) != 3 or np.shape(histogram)[1:] != (levels, NUM_CODES):
        raise ValueError(
            f"histogram has shape {np.shape(histogram)}: "
            f"it must be [U, M, {NUM_CODES}] with M = {levels}"
        )
    return _price_of(histogram, steps, page_tokens, allowance_pages, plenty)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _price_of(histogram, steps, page_tokens, allowance_pages, plenty):
    prices = every_price(steps)
    need = pages_at(histogram, steps, page_tokens, plenty)
    total = jnp.sum(need, axis=0)
    fits = total <= allowance_pages
    at = jnp.where(jnp.any(fits), jnp.argmax(fits), len(prices) - 1)
    below = jnp.maximum(at - 1, 0)
    saved = jnp.cumsum(need[:, below] - need[:, at])
    enough = total[below] - saved <= allowance_pages
    spared = jnp.any(fits) & (np.arange(len(enough)) > jnp.argmax(enough))
    price = (prices[0] + jnp.where(spared, below, at)).astype(jnp.int32)
    least, tokens = filled(histogram, price, steps, page_tokens, plenty)
    return Price(
        price,
        least,
        tokens,
        -(-tokens // np.array(page_tokens, np.int32)),
        jnp.maximum(total[-1] - allowance_pages, 0),
    )


def every_price(steps: Steps) -> np.ndarray:
    """[n] that are looked at, rising: from what every token pays to what only protected ones do."""
    return np.arange(LOWEST - max(steps.offsets), PROTECTED + 1)


def pages_at(
    histogram: jax.Array,
    steps: Steps,
    page_tokens: tuple[int, ...],
    plenty: jax.Array | int = 0,
) -> jax.Array:
    """[U, n] pages that each unit pays for at `every_price`; the arguments are those of `price_of`."""
    prices = every_price(steps)
    grid = np.broadcast_to(prices, (np.shape(histogram)[0], prices.size))
    counts = _counts(_reaching(histogram), grid, steps.at(plenty))
    return sum(-(-count // size) for count, size in zip(counts, page_tokens, strict=True))


@functools.partial(jax.jit, static_argnums=(2, 3))
def filled(
    histogram: jax.Array,
    price: jax.Array,
    steps: Steps,
    page_tokens: tuple[int, ...],
    plenty: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array]:
    """The least codes [U, M] that leave the fewest slots of the pages that a price [U] pays for empty,
    and the tokens at each level."""
    reaching, offsets = _reaching(histogram), steps.at(plenty)
    counts = jnp.concatenate(_counts(reaching, price[:, None], offsets), axis=1)
    slots = -(-counts // np.array(page_tokens, np.int32)) * np.array(page_tokens, np.int32)
    # Below where a lower level began, its own tokens stay there as well, and need slots.
    fits = [
        (np.arange(NUM_CODES) >= threshold(price, offsets[m])[:, None])
        | (reaching[:, m] - reaching[:, m - 1] <= slots[:, m, None])
        for m in range(len(page_tokens))
    ]
    above = jnp.zeros_like(price)
    least, tokens = [], []
    for level in range(len(page_tokens)):
        number = reaching[:, level] - above[:, None]
        allowed = functools.reduce(
            jnp.logical_and, fits[level + 1 :], number <= slots[:, level, None]
        )
        least.append(jnp.argmax(allowed, axis=1).astype(jnp.int32))
        tokens.append(jnp.take_along_axis(number, least[-1][:, None], axis=1)[:, 0])
        above += tokens[-1]
    return jnp.stack(least, axis=1), jnp.stack(tokens, axis=1)


def _reaching(histogram: jax.Array) -> jax.Array:
    """[U, M, 256]: of tokens at this level or one above, how many have this code or a higher one."""
    return jnp.cumsum(tails(histogram), axis=1)


def tails(histogram: jax.Array) -> jax.Array:
    """[..., 256] to [..., 256]: how many have this code or a higher one."""
    return jnp.cumsum(histogram[..., ::-1], axis=-1)[..., ::-1]


def threshold(price: jax.Array, offset: jax.Array | int) -> jax.Array:
    """The least code, 0..255, that reaches a level at a price [...]."""
    return jnp.clip(price + offset, 0, PROTECTED)


def _counts(reaching, prices, offsets):
    """[U, n] tokens of each level at prices [U, n], from how many may reach each code [U, M, 256]."""
    reach = [
        jnp.take_along_axis(reaching[:, m], threshold(prices, offsets[m]), axis=1)
        for m in range(reaching.shape[1])
    ]
    return [reach[0], *(low - high for high, low in itertools.pairwise(reach))]
