"""The bytes of a page: which part lies where, and how a token is written and read.

A page holds tokens of one unit at one precision. Below 8 bits it lies coordinate by coordinate:
[D * bits / 8, tokens] bytes of keys, as `_codec.integer_levels` takes them, the same of values, then the
low and the high bytes of the keys' norms, then of the values'. At 8 bits it is [tokens, D] of
keys and of values and the norms; at 16 bits [tokens, D] bfloat16 of keys and of values. Then, at every
precision, one byte per token: the code of its worth (`_price.encode_worth`). Pages of a model with
windows (`timed`) then have the low and the high bytes of the tokens' positions, modulo 2^16. A page's
end may be unused. Values lie in the basis of `_rotation.rotate`, keys in that of `rotate_keys`: one
rotated query serves all precisions.

A norm is a float16. At 2, 3 and 4 bits keys lie in two halves (`_planes.halves`), the first with one bit
more and the second with one bit less, each with a norm: that of the first in the higher eleven bits, a
float16 without its sign and its last four bits, and the second's part of it in the lower five, two bits
of exponent and three of fraction, 1/8 to 15/8. At other bits the halves are `joined`.

Nothing else knows this format: the admission of tokens, the kernels and the tables ask `PageLayout`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance.cache import _codec, _planes
from jbalance.cache._planes import Part
from jbalance.cache._rotation import (
    halved,
    joined,
    rotate,
    rotate_keys,
    rotation,
    unrotate,
    unrotate_keys,
)

WIDE_BITS = 16  # stored as bfloat16, without a norm
ROW_BYTES = 128
TILE_BYTES = 32 * ROW_BYTES  # a TPU's memory holds uint8 in such: others are padded there
# The parts of a page, in their order.
KEYS, VALUES, KEY_NORMS, VALUE_NORMS, CODES, TIMES = range(6)
_LEAST_RATIO, _MOST_RATIO = 0x3000, 15 / 8  # the former's bits as a float16
_MOST_FIRST = 0x7BF0  # bits of the largest norm of a first half


# Traced once for all programs that read or write a page of this format.
_once = functools.partial(jax.jit, static_argnums=0)


class PageLayout(NamedTuple):
    """The format of the pages of one precision; static."""

    head_dim: int
    bits: int
    page_tokens: int
    timed: bool = False  # whether tokens have positions

    @classmethod
    def within(
        cls, page_bytes: int, head_dim: int, bits: int, *, timed: bool = False
    ) -> PageLayout:
        """That of pages of so many bytes; of whole tiles of a TPU with tokens in whole steps."""
        number = page_bytes // token_bytes(head_dim, bits, timed=timed)
        step = 1 if page_bytes % TILE_BYTES else cls(head_dim, bits, 0, timed).token_step
        return cls(head_dim, bits, number - number % step, timed)

    @property
    def wide(self) -> bool:
        """Whether vectors are bfloat16, without norms."""
        return self.bits == WIDE_BITS

    @property
    def across(self) -> bool:
        """Whether vectors lie coordinate by coordinate."""
        return self.bits < 8

    @property
    def widths(self) -> tuple[int, ...]:
        """Bytes of a token in each part."""
        norm = 0 if self.wide else 2
        vector = self.head_dim * self.bits // 8
        return (vector, vector, norm, norm, 1, *((2,) if self.timed else ()))

    @property
    def token_step(self) -> int:
        """Tokens in whose multiples the TPU kernel reads pages; coordinates begin at words then."""
        if not self.across:
            return max(1, ROW_BYTES // self.widths[0])
        narrowest = min(self.run(index) for index in (KEYS, VALUES))
        return max(4, ROW_BYTES // narrowest) if ROW_BYTES % narrowest == 0 else 4

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in all parts."""
        return sum(self.widths)

    @property
    def used_bytes(self) -> int:
        """Bytes of a full page that tokens take."""
        return self.page_tokens * self.token_bytes

    def offset(self, part: int) -> int:
        """Where a part begins in the page."""
        return self.page_tokens * sum(self.widths[:part])

    def parts(self, index: int) -> tuple[Part, ...]:
        """How a key (0) or a value (1) that is not wide is divided: each part has bits and a norm."""
        if index == KEYS and self.split:
            return _planes.halves(self.head_dim, self.bits)
        return _planes.whole(self.head_dim, self.bits)

    def run(self, index: int) -> int:
        """Coordinates of keys (0) or values (1) that lie in one run, of their narrowest plane."""
        return min(x.rows(part.size) for part in self.parts(index) for x in part.planes)

    @property
    def split(self) -> bool:
        """Whether keys lie in two halves."""
        return self.bits in (2, 3, 4) and halved(self.head_dim)

    def asked(self, q: jax.Array) -> jax.Array:
        """Queries [..., D] of `rotate_keys` for the keys of this precision; its own inverse."""
        return q if self.split else joined(q)

    @_once
    def encode(
        self, k: jax.Array, v: jax.Array, code: jax.Array, time: jax.Array | None = None
    ) -> jax.Array:
        """Vectors [..., D], codes and times [...] to the bytes [..., token_bytes] of tokens."""
        both = self.asked(rotate_keys(k)), rotate(v)
        if self.wide:
            parts = [_bytes_of(x.astype(jnp.bfloat16)) for x in both]
        else:
            vectors, norms = zip(*(self._packed(i, x) for i, x in enumerate(both)), strict=True)
            parts = [*vectors, *(_bytes_of(x[..., None]) for x in norms)]
        parts.append(code[..., None])
        if self.timed:
            parts.append(_bytes_of(jnp.asarray(time).astype(jnp.uint16)[..., None]))
        return jnp.concatenate(parts, axis=-1)

    @_once
    def decode(self, rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Bytes [..., token_bytes] to keys and values [..., D] float32 and codes [...] of worth."""
        parts = self._split(rows)
        if self.wide:
            pairs = (x.reshape(*x.shape[:-1], self.head_dim, 2) for x in parts[:2])
            k, v = (lax.bitcast_convert_type(x, jnp.bfloat16) for x in pairs)
        else:
            k, v = (self._unpacked(i, parts[i], parts[KEY_NORMS + i]) for i in range(2))
        return unrotate_keys(self.asked(k)), unrotate(v), parts[CODES][..., 0]

    def levels(self, index: int, packed: jax.Array) -> list[jax.Array]:
        """`_codec.integer_levels` of each part of keys (0) or values (1) [..., width * N]."""
        width = self.widths[index]
        return [_codec.levels_of(packed, part, width) for part in self.parts(index)]

    def norms(self, index: int, word: jax.Array) -> tuple[jax.Array, ...]:
        """Norms [...] float32 of each part of keys (0) or values (1), from their two bytes as uint16."""
        if len(self.parts(index)) == 1:
            return (_float16(word),)
        first, ratio = pair(word)
        return _float16(first), _float16(first) * _float16(ratio)

    def _packed(self, index, y):
        """Bytes [..., width] and norms [...] uint16 of rotated keys (0) or values (1)."""
        parts = self.parts(index)
        codes, norms = zip(
            *(_codec.nearest(y[..., x.first : x.first + x.size], x.bits) for x in parts),
            strict=True,
        )
        word = _bits16(norms[0]) if len(parts) == 1 else _paired(*norms)
        return _planes.pack(list(codes), parts), word

    def _unpacked(self, index, packed, norm_bytes):
        """The rotated keys (0) or values (1) [..., D] of `_packed`."""
        norms = self.norms(index, lax.bitcast_convert_type(norm_bytes, jnp.uint16))
        # A page that was another precision's may hold any bytes behind its last token.
        units = [
            jnp.where(jnp.isfinite(norm), norm, 0)[..., None] * _codec.step(part.size, part.bits)
            for norm, part in zip(norms, self.parts(index), strict=True)
        ]
        levels = [x.astype(jnp.float32) for x in self.levels(index, packed)]
        if self.bits == 8:
            levels = [x + 0.5 for x in levels]
        return jnp.concatenate([x * u for x, u in zip(levels, units, strict=True)], axis=-1)

    def times(self, rows: jax.Array) -> jax.Array:
        """Bytes [..., token_bytes] of `timed` tokens to their positions [...], modulo 2^16."""
        return lax.bitcast_convert_type(rows[..., -2:], jnp.uint16)

    @_once
    def to_page(self, rows: jax.Array) -> jax.Array:
        """Bytes [..., page_tokens, token_bytes] of a page's tokens to the page's [..., used_bytes]."""
        flat = []
        for part, across in zip(self._split(rows), self._lies_across, strict=True):
            part = jnp.swapaxes(part, -1, -2) if across else part
            flat.append(part.reshape(*rows.shape[:-2], -1))
        return jnp.concatenate(flat, axis=-1)

    @_once
    def from_page(self, data: jax.Array) -> jax.Array:
        """Pages [W, page_bytes] to the bytes [W page_tokens, token_bytes] of their tokens."""
        number, size, parts = len(data), self.page_tokens, []
        for i, (width, across) in enumerate(zip(self.widths, self._lies_across, strict=True)):
            part = data[:, self.offset(i) : self.offset(i) + size * width]
            if across:
                part = jnp.swapaxes(part.reshape(number, width, size), 1, 2)
            parts.append(part.reshape(number * size, width))
        return jnp.concatenate(parts, axis=-1)

    @property
    def _lies_across(self):
        """Whether each part lies byte by byte: all first bytes of the tokens, all second ones, ..."""
        return (self.across, self.across, *(True,) * (len(self.widths) - 2))

    def _split(self, rows):
        """Bytes [..., token_bytes] to the parts."""
        return jnp.split(rows, np.cumsum(self.widths)[:-1], axis=-1)


def page_shape(page_bytes: int) -> tuple[int, int]:
    """[rows, bytes of a row] of a page in an arena: rows of 128 bytes, a lane each, if it has such.

    A TPU copies whole rows of a page; from an array [P, page_bytes] it would first copy all pages.
    """
    return (page_bytes // ROW_BYTES, ROW_BYTES) if page_bytes % ROW_BYTES == 0 else (1, page_bytes)


def token_bytes(head_dim: int, bits: int, *, timed: bool = False) -> int:
    """Bytes of one token's key and value with their norms, of its worth, and of its position if `timed`.

    >>> token_bytes(64, bits=4)
    69

    Raises:
      ValueError: unsupported `head_dim` or `bits`, with those that are supported.
    """
    if bits == WIDE_BITS and not isinstance(bits, bool):
        rotation(head_dim)
    else:
        _codec.codes_bytes(head_dim, bits)
    return PageLayout(head_dim, bits, 0, timed).token_bytes


def table_bytes(num_units: int, num_levels: int, num_pages: int) -> int:
    """Bytes of an arena's tables beside its pages: `Arena.order`, `offset` and `count`.

    >>> table_bytes(num_units=90, num_levels=3, num_pages=100)
    2564
    """
    return 4 * (num_pages + 2 * num_units * num_levels + 1)


def _bytes_of(x):
    """[..., n] of 16 bits to [..., 2 n] uint8: low bytes and high bytes in turn."""
    return lax.bitcast_convert_type(x, jnp.uint8).reshape(*x.shape[:-1], -1)


def pair(word: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The bits of two float16: a key's first norm, and what it is to be multiplied by for the second."""
    return (word >> 5) << 4, ((word & 31) << 7) + _LEAST_RATIO


def _paired(first, second):
    """The word of two norms: the nearest that has both, or a first one not too small for the second."""
    first = jnp.maximum(first, second / _MOST_RATIO)
    high = jnp.minimum((_bits16(first).astype(jnp.int32) + 8) >> 4, _MOST_FIRST >> 4)
    kept = _float16((high << 4).astype(jnp.uint16))
    ratio = jnp.where(kept > 0, second / jnp.where(kept > 0, kept, 1), 0)
    low = (_bits16(ratio).astype(jnp.int32) - _LEAST_RATIO + 64) >> 7
    return ((high << 5) | jnp.clip(low, 0, 31)).astype(jnp.uint16)


def _bits16(x):
    """The bits of x as a float16, uint16."""
    return lax.bitcast_convert_type(x.astype(jnp.float16), jnp.uint16)


def _float16(word):
    """The float16 of these bits, in float32."""
    return lax.bitcast_convert_type(word, jnp.float16).astype(jnp.float32)
