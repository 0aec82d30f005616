"""The bytes of a page: which part lies where, and how a token is written and read.

A page holds tokens of one unit at one precision. Below 8 bits it lies coordinate by coordinate:
[D * bits / 8, tokens] bytes of keys, as `_codec.integer_levels` takes them, the same of values, then the
low and the high bytes of the keys' float16 norms, then of the values'. At 8 bits it is [tokens, D] of
keys and of values and the norms; at 16 bits [tokens, D] bfloat16 of keys and of values. Then, at every
precision, one byte per token: the code of its worth (`_price.encode_worth`). Pages of a model with
windows (`timed`) then have the low and the high bytes of the tokens' positions, modulo 2^16. A page's
end may be unused. Every precision stores vectors in the basis of `_codec.rotate`: one rotated query
serves all.

Nothing else knows this format: the admission of tokens, the kernels and the tables ask `PageLayout`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance.cache import _codec

WIDE_BITS = 16  # stored as bfloat16, without a norm
ROW_BYTES = 128
TILE_BYTES = 32 * ROW_BYTES  # a TPU's memory holds uint8 in such: others are padded there
# The parts of a page, in their order.
KEYS, VALUES, KEY_NORMS, VALUE_NORMS, CODES, TIMES = range(6)


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
        narrowest = self.head_dim * min(width for width, *_ in self.planes) // 8
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

    @property
    def planes(self) -> tuple[tuple[int, int, int], ...]:
        """(bits, lowest bit, first row of bytes) of the planes of a vector that lies across."""
        rows = np.cumsum(
            [0, *(self.head_dim * width // 8 for width, _ in _codec.PLANES[self.bits])]
        )
        return tuple(
            (*plane, int(r)) for plane, r in zip(_codec.PLANES[self.bits], rows, strict=False)
        )

    def encode(
        self, k: jax.Array, v: jax.Array, code: jax.Array, time: jax.Array | None = None
    ) -> jax.Array:
        """Vectors [..., D], codes and times [...] to the bytes [..., token_bytes] of tokens."""
        both = jnp.stack([k, v]).astype(jnp.float32)  # at once: half to compile
        if self.wide:
            parts = [*_bytes_of(_codec.rotate(both).astype(jnp.bfloat16))]
        else:
            codes = _codec.quantize(both, self.bits)
            parts = [*codes.packed, *_bytes_of(codes.norm[..., None])]
        parts.append(code[..., None])
        if self.timed:
            parts.append(_bytes_of(jnp.asarray(time).astype(jnp.uint16)[..., None]))
        return jnp.concatenate(parts, axis=-1)

    def decode(self, rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Bytes [..., token_bytes] to keys and values [..., D] float32 and codes [...] of worth."""
        parts = self._split(rows)
        vectors = jnp.stack(parts[:2])
        if self.wide:
            pairs = vectors.reshape(*vectors.shape[:-1], self.head_dim, 2)
            both = _codec.unrotate(lax.bitcast_convert_type(pairs, jnp.bfloat16))
        else:
            norm = lax.bitcast_convert_type(jnp.stack(parts[2:4]), jnp.float16)
            # A page that was another precision's may hold any bytes behind its last token.
            norm = jnp.where(jnp.isfinite(norm), norm, 0)
            both = _codec.dequantize(_codec.Codes(vectors, norm), self.head_dim, self.bits)
        return both[0], both[1], parts[CODES][..., 0]

    def times(self, rows: jax.Array) -> jax.Array:
        """Bytes [..., token_bytes] of `timed` tokens to their positions [...], modulo 2^16."""
        return lax.bitcast_convert_type(rows[..., -2:], jnp.uint16)

    def to_page(self, rows: jax.Array) -> jax.Array:
        """Bytes [..., page_tokens, token_bytes] of a page's tokens to the page's [..., used_bytes]."""
        flat = []
        for part, across in zip(self._split(rows), self._lies_across, strict=True):
            part = jnp.swapaxes(part, -1, -2) if across else part
            flat.append(part.reshape(*rows.shape[:-2], -1))
        return jnp.concatenate(flat, axis=-1)

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
        _codec.rotation(head_dim)
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
