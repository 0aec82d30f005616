"""What the TPU kernel knows of a page: its rows of 128 bytes, and the vectors and norms in them."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jbalance.cache import _codec
from jbalance.cache._layout import KEY_NORMS, PageLayout, pair
from jbalance.cache.backends._kernels import digits, whole_levels

LANES = 128


class Level(NamedTuple):
    """What is known of a level when it is compiled."""

    number: int
    num_levels: int
    layout: PageLayout
    page_rows: int  # of 128 bytes

    @property
    def bits(self) -> int:
        """Of a coordinate."""
        return self.layout.bits

    @property
    def page_tokens(self) -> int:
        """Tokens that a page holds."""
        return self.layout.page_tokens

    @property
    def across(self) -> bool:
        """Whether a page lies coordinate by coordinate."""
        return self.layout.across

    @property
    def width(self) -> int:
        """Bytes of one token's key."""
        return self.layout.widths[0]

    @property
    def parts(self) -> int:
        """Rows that a token takes, at least 1."""
        return 1 if self.across else max(1, self.width // LANES)

    @property
    def shared(self) -> int:
        """Tokens that share a row, at least 1."""
        return 1 if self.across else max(1, LANES // self.width)

    @property
    def turns(self) -> int:
        """Alignments of the rows: row r begins at that of row r mod turns."""
        return LANES // math.gcd(self.page_tokens, LANES)


class Block(NamedTuple):
    """128 tokens of a page, fewer at its end."""

    ref: jax.Array
    number: int  # of the block in its page
    left: jax.Array  # tokens of the group from this page on
    level: Level

    def there(self, tokens):
        """Whether these tokens [..., 128] of the block are."""
        tokens += self.number * LANES
        return (tokens < self.left) & (tokens < self.level.page_tokens)

    def tokens(self, shape, axis):
        """Tokens of the block in the order in which `vectors` has them."""
        at, shared = lax.broadcasted_iota(jnp.int32, shape, axis), self.level.shared
        per_row = LANES // shared
        return at if shared == 1 else lax.rem(at, per_row) * shared + lax.div(at, per_row)

    def bytes(self, first, rows=1, stride=1):
        """128 bytes each, from byte `first` on and `stride` rows of the page apart: [rows, 128]."""
        at, lane = divmod(first, LANES)
        out = self.ref[pl.ds(at, rows, stride=stride)]
        if lane == 0:
            return out
        after = self.ref[pl.ds(at + 1, rows, stride=stride)]
        ahead = lax.broadcasted_iota(jnp.int32, out.shape, 1) >= lane
        return pltpu.roll(jnp.where(ahead, out, after), LANES - lane, 1)

    def vectors(self, index):
        """Keys (0) or values (1) for norm 1 in bfloat16, by parts: [size, 128], else [128, 128]."""
        if self.level.across:
            return [self._coordinates(index, part) for part in self.level.layout.parts(index)]
        return [self._rows(index, i) for i in range(self.level.parts)]

    def _coordinates(self, index, part):
        """[size, 128] of a part of the vectors, coordinates in the order of `_lay_out`."""
        layout, npp = self.level.layout, self.level.page_tokens
        chunk, turns = self.level.layout.run(index), self.level.turns
        groups = [0] * (part.size // chunk)
        for plane in part.planes:
            runs = plane.rows(part.size) // chunk
            start = layout.offset(index) + plane.row * npp + self.number * LANES
            found = [
                jnp.concatenate(
                    [
                        self.bytes(
                            start + (run * chunk + turn) * npp, chunk // turns, turns * npp // LANES
                        )
                        for turn in range(turns)
                    ]
                )
                for run in range(runs)
            ]
            for i in range(len(groups)):
                code = (found[i % runs] >> plane.bit(i // runs)) & (2**plane.width - 1)
                groups[i] = groups[i] | (code << plane.lowest)
        return whole_levels(jnp.concatenate(groups), part.bits)

    def _rows(self, index, part):
        """[128, 128], part of each token on its lanes, 0 on others."""
        bits, npp = self.level.layout[1:3]
        parts, shared = self.level.parts, self.level.shared
        rows = LANES // shared
        first = (index * npp + self.number * LANES) * self.level.width // LANES + part
        found = self.ref[pl.ds(first, rows, stride=parts)]
        lane = lax.broadcasted_iota(jnp.int32, found.shape, 1)
        if bits == 8:
            out = whole_levels(found, 8).astype(jnp.float32)
        else:
            joined = (found | (pltpu.roll(found, LANES - 1, 1) << 8)) << 16
            out = lax.bitcast_convert_type(joined, jnp.float32)
            out = jnp.where(lane % 2 == 0, out, 0)
        if shared > 1:
            own = lax.div(lane, LANES // shared)
            out = jnp.concatenate([jnp.where(own == i, out, 0) for i in range(shared)])
        # What lies behind the last token may decode to NaN.
        return jnp.where(self.there(self.tokens(out.shape, 0)), out, 0).astype(jnp.bfloat16)

    def units(self, index):
        """What one of `vectors` is worth in each part: [1, 128] float32, 0 where there is no token."""
        layout, npp = self.level.layout, self.level.page_tokens
        start = self.level.layout.offset(KEY_NORMS + index) + self.number * LANES
        low, high = self.bytes(start), self.bytes(start + npp)
        word, parts = low | (high << 8), layout.parts(index)
        norms = [_from_float16(word)]
        if len(parts) > 1:
            first, ratio = map(_from_float16, pair(word))
            norms = [first, first * ratio]
        there = self.there(lax.broadcasted_iota(jnp.int32, word.shape, 1))
        return [
            self._shared(jnp.where(there, norm, 0)) * _codec.step(part.size, part.bits)
            for norm, part in zip(norms, parts, strict=True)
        ]

    def _shared(self, norm):
        """Norms [1, 128] of tokens in their order, in that of `vectors`."""
        if self.level.shared == 1:
            return norm
        shape = (LANES, LANES)
        moved = lax.broadcasted_iota(jnp.int32, shape, 0) == self.tokens(shape, 1)
        return dot(digits(norm), moved.astype(jnp.float32).astype(jnp.bfloat16))


def _from_float16(bits):
    """The float32 values of float16 whose bits are in int32; subnormal ones too."""
    exponent, fraction = (bits >> 10) & 31, bits & 1023
    normal = lax.bitcast_convert_type(((exponent + 112) << 23) | (fraction << 13), jnp.float32)
    small = fraction.astype(jnp.float32) * 2.0**-24
    return jnp.where(bits >= 1 << 15, -1.0, 1.0) * jnp.where(exponent == 0, small, normal)


def dot(rows, vectors, across=False):
    """The sum of the products of bfloat16 digits with vectors; `across` contracts last axes."""
    dims = (((1,), (1,)) if across else ((1,), (0,))), ((), ())
    return sum(lax.dot_general(x, vectors, dims, preferred_element_type=jnp.float32) for x in rows)
