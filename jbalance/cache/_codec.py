"""Vectors in few bits: rotated, quantized against a fixed codebook, packed, one norm per vector.

A random rotation makes the coordinates of any vector nearly Gaussian, so one codebook, made for the
normal distribution, serves all; nothing is calibrated, and every vector can be encoded, or encoded
anew in fewer bits, by itself. Attention need not rotate back: R is orthonormal, so q · x = (q R) ·
(x R), and a weighted sum of rotated values is rotated back once, after the sum.

Method: Ashkboos et al., QuaRot (arXiv:2404.00456), rotation; Zandieh et al., TurboQuant
(arXiv:2504.19874), the codebook of the rotated coordinate; Max (1960) and Lloyd (1982), the
codebook.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance import _axes, checks
from jbalance._bits import in_32_bits
from jbalance.cache import _planes
from jbalance.cache._rotation import rotate, rotation, unrotate

BITS = (1, 2, 3, 4, 8)
NORM_MAX = 65504.0  # the largest float16
MOST = 1e15  # of an entry of keys and values: products and energies of larger ones leave float32

# Levels > 0 of the codes, those below 0 mirror them: the Lloyd-Max levels of the standard normal
# distribution in whole 127ths of the largest, so that products with them can be taken in 8-bit
# integers. The rounding costs 0.00, 0.05 and 0.14 % of error at 2, 3 and 4 bits.
_MAGNITUDES = {
    1: (127,),
    2: (38, 127),
    3: (14, 45, 79, 127),
    4: (6, 18, 31, 44, 58, 75, 96, 127),
    5: (3, 8, 13, 18, 24, 29, 35, 41, 47, 54, 61, 70, 79, 90, 105, 127),  # of half a key only
}
_LARGEST = {1: 0.79788456, 2: 1.51041761, 3: 2.1519457, 4: 2.73258957, 5: 3.26073249}  # Max 1960
# Stretches of the grid among which each vector takes its best: 2, 9 and 19 % less error at 2, 3 and 4
# bits for D = 64, and no bytes. At 1 bit all are the same; at 8 bits the grid ends at the largest
# coordinate. Nine stretches in place of five: 0.1, 0.4 and 2 % less again.
_STRETCHES = {1: (1.0,), 8: (1.0,)} | dict.fromkeys((2, 3, 4, 5), (0.8, 0.9, 1.0, 1.1, 1.2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes:
    """Quantized vectors: D * bits / 8 + 2 bytes each."""

    packed: jax.Array  # [..., D * bits / 8] uint8
    norm: jax.Array  # [...] float16: what the levels are multiplied by

    @property
    def nbytes(self) -> int:
        """Bytes that stay resident."""
        return self.packed.nbytes + self.norm.nbytes


def codes_bytes(head_dim: int, bits: int) -> int:
    """Bytes of one quantized vector of `head_dim` coordinates, its norm included.

    >>> codes_bytes(64, bits=4)
    34

    Raises:
      ValueError: unsupported `head_dim` or `bits`, with those that are supported.
    """
    return head_dim * _check(head_dim, bits) // 8 + 2


@in_32_bits
def quantize(x: jax.Array, bits: int) -> Codes:
    """Rotated Lloyd-Max quantization: of a few grids the codes whose levels point most nearly along x R.

    The norm is the factor for which x · x̂ = |x|², so that products are right in the mean: E[q · x̂] =
    q · x. The factor of least squared error would shrink them all by the error, and what the errors
    of many vectors have in common does not average out. Relative squared errors on Gaussian vectors of
    64 coordinates: 0.561, 0.125, 0.0304, 0.0072 and 3.4e-5 at 1, 2, 3, 4 and 8 bits. The rotation is
    fixed, so an error bound holds for data that does not know it; the worst vectors (rows of Rᵀ) are
    several times worse. A zero vector decodes to zeros. Traced norms above 65504 saturate, and norms
    below 6e-8 are zero.

    Args:
      x: [..., D] float vectors; D a multiple of 8 for which `rotation` knows a matrix.
      bits: per coordinate, 1, 2, 3, 4 or 8; static.

    Returns:
      `Codes` with packed [..., D * bits / 8] and norm [...].

    Raises:
      ValueError: unsupported D, bits or dtype; values that are not finite or too long for the norm.
    """
    _axes.unsplit(x=x)
    x = checks.floats("x", x, tuple(range(1, 9)), "[..., D]")
    bits = _check(np.shape(x)[-1], bits, "x's last axis")
    x = checks.finite("x", x)
    checks.largest_finite("x", x, _most(np.shape(x)[-1]))
    codes = _quantize(jnp.asarray(x), bits)
    if checks.is_concrete(codes.norm) and not np.all(np.asarray(codes.norm) < NORM_MAX):
        raise ValueError(
            f"x has values up to {float(np.max(np.abs(np.asarray(x))))}: "
            f"the norms of its vectors must be below {NORM_MAX}, scale it down"
        )
    return codes


@in_32_bits
def dequantize(codes: Codes, head_dim: int, bits: int) -> jax.Array:
    """The vectors x̂ = norm · levels[codes] Rᵀ that `quantize` stored, in float32.

    Args:
      codes: quantized vectors [...].
      head_dim: D, as it was quantized; static.
      bits: as they were quantized; static.

    Returns:
      [..., D] float32 vectors.

    Raises:
      ValueError: codes that are not of this `head_dim` and `bits`.
    """
    checks.instance("codes", codes, Codes)
    head_dim = checks.static_int("head_dim", head_dim, 1)
    bits = _check(head_dim, bits)
    width = head_dim * bits // 8
    if codes.packed.dtype != jnp.uint8 or codes.packed.shape[-1:] != (width,):
        raise ValueError(
            f"codes.packed is {codes.packed.dtype} of shape {codes.packed.shape}: {head_dim} "
            f"coordinates of {bits} bits must be uint8 of shape [..., {width}]"
        )
    if codes.norm.shape != codes.packed.shape[:-1]:
        raise ValueError(
            f"codes.norm has shape {codes.norm.shape}: it must be {codes.packed.shape[:-1]}, "
            f"one for each vector of codes.packed"
        )
    return _dequantized(codes, head_dim, bits)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _dequantized(codes, head_dim, bits):
    level = _value(integer_levels(codes.packed, bits), head_dim, bits)
    return unrotate(level * codes.norm.astype(jnp.float32)[..., None])


def levels(head_dim: int, bits: int) -> np.ndarray:
    """[2^bits] float32 values of the codes, ascending, for norm 1.

    Up to 4 bits the Gaussian codebook / sqrt(D); at 8 bits 256 even steps in [-1, 1].
    """
    if bits == 8:
        return np.linspace(-1, 1, 256, dtype=np.float32)
    positive = np.array(_MAGNITUDES[bits])
    both = np.concatenate([-positive[::-1], positive])
    return both.astype(np.float32) * step(head_dim, bits)


def step(head_dim: int, bits: int) -> np.float32:
    """What one unit of `integer_levels` is worth, for norm 1."""
    if bits == 8:
        return np.float32(1 / 127.5)
    return np.float32(_LARGEST[bits] / (127 * math.sqrt(head_dim)))


def integer_levels(packed: jax.Array, bits: int) -> jax.Array:
    """The levels of `pack_bits`' codes, [..., D * bits / 8] uint8 to [..., D] int8.

    levels = step · (integer_levels + 1/2 at 8 bits). Packed vectors of N tokens that lie coordinate by
    coordinate, [..., D * bits / 8 * N], give levels that lie so, [..., D * N].
    """
    (part,) = _planes.whole(packed.shape[-1] * 8 // bits, bits)
    return levels_of(packed, part, packed.shape[-1])


def levels_of(packed: jax.Array, part: _planes.Part, vector_bytes: int) -> jax.Array:
    """`integer_levels` of a part of vectors [..., vector_bytes * N]: [..., size * N]."""
    if part.bits == 8:
        return lax.bitcast_convert_type(packed ^ np.uint8(128), jnp.int8)
    return _planes.select(packed, part, vector_bytes, _MAGNITUDES[part.bits])


def pack_bits(codes: jax.Array, bits: int) -> jax.Array:
    """Codes [..., D] below 2^bits to [..., D * bits / 8] uint8, without waste (`_planes`)."""
    return _planes.pack([codes], _planes.whole(codes.shape[-1], bits))


@functools.partial(jax.jit, static_argnames="bits")
def _quantize(x, bits):
    """`quantize` without its checks."""
    most = _most(x.shape[-1])
    codes, norm = nearest(rotate(jnp.clip(x, -most, most)), bits)
    return Codes(pack_bits(codes, bits), norm.astype(jnp.float16))


def _most(head_dim: int) -> float:
    """Of an entry of a vector: with a larger one it has no norm here, at any precision."""
    return NORM_MAX * math.sqrt(head_dim)


def usable(k: jax.Array, v: jax.Array) -> jax.Array:
    """Which tokens' keys and values [..., D] are numbers up to `MOST`; [...] bool."""
    return jnp.all(
        (jnp.abs(k.astype(jnp.float32)) <= MOST) & (jnp.abs(v.astype(jnp.float32)) <= MOST), axis=-1
    )


def nearest(y: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Codes [..., D] uint8 of rotated vectors y, and the norms [...] float32 of their levels."""
    norm = jnp.max(jnp.abs(y), axis=-1) if bits == 8 else jnp.sqrt(jnp.sum(y * y, axis=-1))
    norm = jnp.minimum(norm, NORM_MAX)
    y *= (1 / jnp.where(norm > 0, norm, 1))[..., None]
    size, energy = jnp.abs(y), jnp.sum(y * y, axis=-1)
    stretches = jnp.asarray(_STRETCHES[bits], jnp.float32)

    def fit(i, best):
        """The best of the grids so far, and grid i: the cosine of its levels with y."""
        level = _rounded(size * (1 / stretches[i]), bits)
        dot, square = (jnp.sum(x * level, axis=-1) for x in (size, level))
        # Least squared error would be dot / square, which shrinks every product by the error.
        factor = jnp.where(dot > 0, energy / jnp.where(dot > 0, dot, 1), 0)
        new = dot / jnp.sqrt(square), factor, jnp.full(dot.shape, stretches[i])
        return jax.tree.map(lambda x, old: jnp.where(new[0] > best[0], x, old), new, best)

    none = jnp.zeros_like(norm)
    # A loop, though short: unrolled it takes half as long again to compile, once for each precision.
    _, factor, stretch = lax.fori_loop(0, len(stretches), fit, (none, none, none + 1))
    codes = _nearest(y / stretch[..., None], bits)
    return codes, jnp.minimum(norm * factor, NORM_MAX)


def _nearest(y, bits):
    """uint8 codes [..., D] of the levels nearest to y."""
    if bits == 8:
        return jnp.clip(jnp.round(y * 127.5 + 127.5), 0, 255).astype(jnp.uint8)
    table = levels(y.shape[-1], bits)
    return sum((y > edge).astype(jnp.uint8) for edge in (table[1:] + table[:-1]) / 2)


def _rounded(size, bits):
    """The level nearest to each y >= 0: that of `_nearest`, by selects: no gather."""
    if bits == 8:
        return _value(integer_levels(_nearest(size, bits), 8), size.shape[-1], bits)
    table = levels(size.shape[-1], bits)[2 ** (bits - 1) :]
    steps = zip((table[1:] + table[:-1]) / 2, np.diff(table), strict=True)
    return table[0] + sum((jnp.where(size > edge, step, 0) for edge, step in steps), 0 * size)


def _value(whole, head_dim, bits):
    """Values [..., D] float32 of `integer_levels`."""
    whole = whole.astype(jnp.float32)
    return (whole + 0.5 if bits == 8 else whole) * step(head_dim, bits)


def _check(head_dim, bits, name="head_dim"):
    """`bits`; ValueError unless these and head_dim are supported."""
    hint = f"it must be one of {', '.join(map(str, BITS))}"
    bits = checks.static_int("bits", bits, 1, max(BITS), hint)
    if bits not in BITS:
        raise ValueError(f"bits is {bits}: {hint}")
    rotation(head_dim, name)
    return bits
