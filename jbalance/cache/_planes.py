"""Codes in bytes: planes of a few bits each, of a whole vector or of its two halves.

Coordinate i of a part lies, `width` bits of it, at bit shift + width (i div R) of byte row + (i mod R)
of the vector, where R is the bytes of the plane: runs of neighbours unpack into runs of neighbours,
which compilers turn into vector instructions. A vector in two halves has b + 1 bits a coordinate in
the first and b - 1 in the second; where these are odd, their highest bits share a plane.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_PLANES = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    8: (8,),
}  # widths, the lowest bits first


class Plane(NamedTuple):
    """Some bits of each coordinate of a part."""

    width: int
    lowest: int  # which of the code's bits its lowest one is
    row: int  # first byte of the vector
    positions: int  # coordinates of the part in a byte
    shift: int  # bit of the byte where the first of them begins

    def rows(self, size: int) -> int:
        """Bytes of a part of so many coordinates."""
        return size // self.positions

    def bit(self, position: int) -> int:
        """Where in the byte the position begins."""
        return self.shift + self.width * position


class Part(NamedTuple):
    """Coordinates of a vector that have the same bits, and a norm."""

    first: int
    size: int
    bits: int
    planes: tuple[Plane, ...]


def whole(size: int, bits: int) -> tuple[Part]:
    """All coordinates."""
    planes, row, lowest = [], 0, 0
    for width in _PLANES[bits]:
        planes.append(Plane(width, lowest, row, 8 // width, 0))
        row, lowest = row + size * width // 8, lowest + width
    return (Part(0, size, bits, tuple(planes)),)


def halves(size: int, bits: int) -> tuple[Part, Part]:
    """Two halves of `bits` + 1 and `bits` - 1, which must be 2, 3 or 4."""
    half, row, parts = size // 2, 0, []
    last = size // 8 * (bits - 1)  # the plane of both halves' highest bits
    for i, own in enumerate((bits + 1, bits - 1)):
        planes, width = [], own - own % 2
        if width:
            planes.append(Plane(width, 0, row, 8 // width, 0))
            row += half * width // 8
        if own % 2:
            planes.append(Plane(1, width, last, 4, 4 * i))
        parts.append(Part(i * half, half, own, tuple(planes)))
    return parts[0], parts[1]


def pack(codes: list[jax.Array], parts: tuple[Part, ...]) -> jax.Array:
    """Codes [..., size] of each part to the bytes [..., D * bits / 8] of the vector, without waste."""
    rows: dict[int, jax.Array] = {}
    for code, part in zip(codes, parts, strict=True):
        for plane in part.planes:
            bits = (code.astype(jnp.uint8) >> np.uint8(plane.lowest)) & np.uint8(2**plane.width - 1)
            bits = bits.reshape(*code.shape[:-1], plane.positions, plane.rows(part.size))
            bits = jnp.bitwise_or.reduce(bits << _shifts(plane)[:, None], axis=-2)
            rows[plane.row] = bits | rows[plane.row] if plane.row in rows else bits
    return jnp.concatenate([rows[row] for row in sorted(rows)], axis=-1)


def select(
    packed: jax.Array, part: Part, vector_bytes: int, magnitudes: tuple[int, ...]
) -> jax.Array:
    """The levels of a part's codes: [..., vector_bytes * N] uint8 to [..., size * N] int8.

    N tokens may lie coordinate by coordinate. The higher half of the codes has the magnitudes, the
    lower half mirrors them.

    Bits are tested where they lie, a tree of selects each: a lookup would be a gather, which CPUs do one
    by one, and codes shifted out first and compared with each level take two to three times as long.
    """
    tokens = packed.shape[-1] // vector_bytes
    found = [
        packed[..., x.row * tokens : (x.row + x.rows(part.size)) * tokens] for x in part.planes
    ]
    *low, high = part.planes
    lead, run = packed.shape[:-1], high.rows(part.size) * tokens
    signs = _bits(high)
    if low:
        ratio = low[0].rows(part.size) // high.rows(part.size)
        byte, unit = found[0].reshape(*lead, 1, ratio, run), _bits(low[0]).reshape(-1, 1, 1)
        sign_byte, sign = found[1].reshape(*lead, 1, 1, run), signs.reshape(-1, ratio, 1)
    else:
        byte = sign_byte = found[0][..., None, :]
        unit, sign = signs[:, None], signs[:, None] << np.uint8(high.width - 1)
    positive = (sign_byte & sign) != 0
    mirrored = jnp.where(positive, byte, ~byte)
    level = [jnp.int8(m) for m in magnitudes]
    for i in range(part.bits - 1):
        test = (mirrored & (unit << np.uint8(i))) != 0
        level = [jnp.where(test, b, a) for a, b in zip(level[::2], level[1::2], strict=True)]
    return jnp.where(positive, level[0], -level[0]).reshape(*lead, part.size * tokens)


def _shifts(plane):
    """Where in a byte each of a plane's positions begins."""
    return np.array([plane.bit(i) for i in range(plane.positions)], np.uint8)


def _bits(plane):
    """The lowest bit of each of a byte's codes."""
    return np.uint8(1) << _shifts(plane)
