"""Codecs: distortion as in theory, exact bytes, lossless packing, and the same result transformed."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jbalance import cache
from jbalance.cache import _codec
from jbalance.cache._rotation import rotate, rotation, unrotate
from tests.support.versions import NEWER_JAX

pack_bits, integer_levels = (
    jax.jit(f, static_argnums=1) for f in (_codec.pack_bits, _codec.integer_levels)
)

BITS = [1, 2, 3, 4, 8]
SOME_BITS = [3, 8, *(pytest.param(b, marks=pytest.mark.slow) for b in (1, 2, 4))]
D = 64
THEORY = {1: 0.3634, 2: 0.1175, 3: 0.03455, 4: 0.0095}  # Max 1960: error of the Gaussian codebook
# Of the codebook at the norm that keeps products: e / (1 - e).
UNBIASED = {bits: error / (1 - error) for bits, error in THEORY.items()}
# Measured bounds at D = 64, where every vector's own grid and norm beat the codebook's average.
AT_64 = {1: 0.563, 2: 0.1265, 3: 0.0306, 4: 0.0073, 8: 3.6e-5}


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def coded(x, bits):
    return cache.dequantize(cache.quantize(jnp.asarray(x), bits), x.shape[-1], bits)


def unpacked(packed, bits):
    """The codes by the documented layout: runs of each plane, the lowest bits first."""
    packed = np.asarray(packed)
    size = packed.shape[-1]
    planes = [(bits, packed)] if bits != 3 else [(2, packed[..., : size // 3 * 2])]
    planes += [(1, packed[..., size // 3 * 2 :])] if bits == 3 else []
    parts = [
        np.concatenate([plane >> at & (2**width - 1) for at in range(0, 8, width)], axis=-1)
        for width, plane in planes
    ]
    return sum(part.astype(int) << (2 * i) for i, part in enumerate(parts))


def relative_error(x, bits):
    """[N] |x - x̂|² / |x|²."""
    x = np.asarray(x, np.float64)
    error = x - np.asarray(coded(np.asarray(x, np.float32), bits), np.float64)
    return (error**2).sum(-1) / (x**2).sum(-1)


def lloyd(count):
    """The Lloyd-Max levels of the standard normal distribution, from the definition, and their error."""
    normal = NormalDist()
    level = np.linspace(-2, 2, count)
    for _ in range(2000):
        edge = (level[1:] + level[:-1]) / 2
        mass = np.diff([0, *map(normal.cdf, edge), 1])
        first_moment = -np.diff([0, *map(normal.pdf, edge), 0])
        level = first_moment / mass
    return level, 1 - (mass * level**2).sum()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codebook_is_lloyd_max(bits):
    level, error = lloyd(2**bits)
    # In whole 127ths of the largest.
    np.testing.assert_allclose(
        _codec.levels(D, bits) * np.sqrt(D), level, atol=0.75 * level[-1] / 127
    )
    assert _codec.levels(D, bits)[-1] * np.sqrt(D) == pytest.approx(level[-1], rel=1e-6)
    assert error == pytest.approx(THEORY[bits], rel=1e-3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.slow
def test_distortion_of_long_vectors_is_the_theory(bits):
    # A vector's own grid gains less, the longer it is.
    x = gaussian(200, 4096)
    error = relative_error(x, bits).mean()
    assert error == pytest.approx(UNBIASED[bits], rel=0.02)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "head_dim", [64, 128, *(pytest.param(n, marks=pytest.mark.slow) for n in (96, 112, 256))]
)
def test_distortion_is_at_most_the_theory(bits, head_dim):
    bound = AT_64[bits] if head_dim == 64 else UNBIASED.get(bits, 1e-4) * 1.005
    assert relative_error(gaussian(4000, head_dim), bits).mean() <= bound


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "kind", ["few_entries", "one_large", "heavy_tails", "outlier_channels", "smooth", "constant"]
)
def test_rotation_makes_any_data_as_good_as_gaussian(bits, kind):
    rng = np.random.default_rng(1)
    noise = gaussian(4000, D, seed=2)
    x = {
        "few_entries": noise * (rng.random(noise.shape).argsort(-1) < 4),
        "one_large": noise * 0.1
        + np.eye(D)[rng.integers(0, D, 4000)] * rng.choice([-1, 1], (4000, 1)),
        "heavy_tails": rng.standard_t(2, size=noise.shape),
        "outlier_channels": noise * np.where(np.arange(D) % 29 == 3, 20, 1),
        "smooth": noise.cumsum(-1),
        "constant": np.ones((1, D)),
    }[kind]
    assert relative_error(x, bits).mean() <= 1.15 * AT_64[bits]


@pytest.mark.parametrize("bits", BITS)
def test_one_hot_vectors_are_stored_to_the_precision_of_the_norm(bits):
    x = np.eye(D, dtype=np.float32) * np.where(np.arange(D) % 2, -3.7, 0.2)[:, None]
    np.testing.assert_allclose(coded(x, bits), x, atol=3.7 * 2**-11)


@pytest.mark.parametrize("bits", BITS)
def test_inner_products_err_as_theory_says(bits):
    # (q · (x - x̂))² = |q|² |x - x̂|² / D in the mean over directions of q, and the norm keeps x · x̂.
    x, q = gaussian(20000, D), gaussian(20000, D, seed=3)
    error = relative_error(x, bits).mean()
    decoded = np.asarray(coded(x, bits), np.float64)
    x, q = x.astype(np.float64), q.astype(np.float64)
    square = (q * (x - decoded)).sum(-1) ** 2 / (q**2).sum(-1) / (x**2).sum(-1)
    assert square.mean() * D == pytest.approx(error, rel=0.05)
    kept = (x * decoded).sum(-1) / (x**2).sum(-1)
    np.testing.assert_allclose(kept, 1, atol=2**-10)  # float16


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [8, 24, 64, 112])
def test_bytes_are_exact(bits, head_dim):
    codes = cache.quantize(jnp.ones((3, 5, head_dim)), bits)
    assert codes.packed.shape == (3, 5, head_dim * bits // 8)
    assert codes.nbytes == sum(x.nbytes for x in jax.tree.leaves(codes))
    assert codes.nbytes == 15 * _codec.codes_bytes(head_dim, bits)


@given(bits=st.sampled_from(BITS), groups=st.integers(1, 16), data=st.data())
def test_packing_loses_nothing(bits, groups, data):
    size = 8 * groups
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=size, max_size=size))
    packed = pack_bits(jnp.asarray(codes), bits)
    assert packed.dtype == jnp.uint8
    assert packed.shape == (size * bits // 8,)
    np.testing.assert_array_equal(unpacked(packed, bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_byte_is_a_code(bits):
    # Unpacking and packing give the bytes back, so no two patterns mean the same.
    packed = np.random.default_rng(0).integers(0, 256, (50, D * bits // 8)).astype(np.uint8)
    codes = jnp.asarray(unpacked(packed, bits))
    np.testing.assert_array_equal(pack_bits(codes, bits), packed)


def test_layout_is_the_documented_one():
    # Stored caches depend on it: code i at bit 4 (i div 4) of byte i mod 4; 3 bits: two planes.
    np.testing.assert_array_equal(pack_bits(jnp.arange(8), 4), [0x40, 0x51, 0x62, 0x73])
    codes = np.array([5, 2, 7, 0, 1, 6, 3, 4])
    low, high = codes & 3, codes >> 2
    want = [
        *(sum(low[2 * i + j] << (2 * i) for i in range(4)) for j in range(2)),
        sum(high[i] << i for i in range(8)),
    ]
    np.testing.assert_array_equal(pack_bits(jnp.asarray(codes), 3), want)


@pytest.mark.parametrize("bits", BITS)
def test_tokens_may_lie_coordinate_by_coordinate(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (7, D))
    packed = pack_bits(jnp.asarray(codes), bits)
    by_coordinate = integer_levels(packed.T.reshape(-1), bits).reshape(D, 7)
    np.testing.assert_array_equal(by_coordinate, integer_levels(packed, bits).T)


@pytest.mark.parametrize("bits", BITS)
def test_integer_levels_are_the_levels(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (50, D))
    whole = np.asarray(integer_levels(pack_bits(jnp.asarray(codes), bits), bits), float)
    value = (whole + 0.5 * (bits == 8)) * _codec.step(D, bits)
    np.testing.assert_allclose(value, _codec.levels(D, bits)[codes], rtol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_encoding_what_was_decoded_changes_nothing(bits):
    first = cache.quantize(gaussian(500, D), bits)
    again = cache.quantize(cache.dequantize(first, D, bits), bits)
    np.testing.assert_array_equal(again.packed, first.packed)
    np.testing.assert_allclose(again.norm, first.norm, rtol=2**-10)


@pytest.mark.parametrize("bits", SOME_BITS)
def test_jit_and_vmap_equal_the_plain_call(bits):
    x = gaussian(4, 7, D)
    plain = cache.quantize(x, bits)
    for transformed in (
        jax.jit(cache.quantize, static_argnums=1)(x, bits),
        jax.vmap(lambda x: cache.quantize(x, bits))(x),
    ):
        jax.tree.map(np.testing.assert_array_equal, plain, transformed)

    def decoded(codes):
        return cache.dequantize(codes, D, bits)

    np.testing.assert_allclose(jax.jit(decoded)(plain), decoded(plain), atol=4e-6)
    np.testing.assert_allclose(jax.vmap(decoded)(plain), decoded(plain), atol=4e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_sixteen_bit_vectors(dtype):
    x = jnp.asarray(gaussian(100, D), dtype)
    codes = cache.quantize(x, 4)
    wide = cache.quantize(x.astype(jnp.float32), 4)
    jax.tree.map(np.testing.assert_array_equal, codes, wide)
    assert cache.dequantize(codes, D, 4).dtype == jnp.float32


@NEWER_JAX  # whose programs of two shapes round alike
@pytest.mark.parametrize("bits", SOME_BITS)
def test_zero_tiny_and_empty(bits):
    x = np.stack([np.zeros(D), np.full(D, 1e-30), gaussian(D)]).astype(np.float32)
    out = np.asarray(coded(x, bits))
    np.testing.assert_array_equal(out[:2], 0)
    np.testing.assert_array_equal(out[2], np.asarray(coded(x[2:], bits))[0])
    assert coded(np.zeros((0, D), np.float32), bits).shape == (0, D)


@pytest.mark.parametrize("bits", BITS)
def test_error_does_not_depend_on_the_scale(bits):
    x = gaussian(500, D)
    for scale in (1e-3, 3e3):
        ratio = relative_error(x * scale, bits).mean() / relative_error(x, bits).mean()
        assert ratio == pytest.approx(1, rel=0.02)


def test_traced_values_saturate_and_stay_finite():
    quantize = jax.jit(cache.quantize, static_argnums=1)
    for bits in BITS:
        x = jnp.asarray(gaussian(3, D)) * jnp.array([[1.0], [1e6], [1e30]])
        codes = quantize(x, bits)
        np.testing.assert_array_equal(codes.norm[1:], _codec.NORM_MAX)
        assert jnp.isfinite(cache.dequantize(codes, D, bits)).all()


@pytest.mark.parametrize("head_dim", [8, 16, 40, 56, 64, 72, 80, 96, 112, 120, 128, 160, 192, 256])
def test_rotation_is_orthonormal_and_flat(head_dim):
    r = rotation(head_dim).astype(np.float64)
    np.testing.assert_allclose(r @ r.T, np.eye(head_dim), atol=1e-6)
    np.testing.assert_allclose(abs(r), head_dim**-0.5, rtol=1e-6)
    x = gaussian(10, head_dim)
    np.testing.assert_allclose(unrotate(rotate(x)), x, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_attention_needs_no_rotation_back(bits):
    x, q = gaussian(50, D), gaussian(3, D, seed=1)
    codes = cache.quantize(x, bits)
    whole = integer_levels(codes.packed, bits) + 0.5 * (bits == 8)
    stored = whole * _codec.step(D, bits) * codes.norm.astype(jnp.float32)[:, None]
    np.testing.assert_allclose(
        rotate(q) @ stored.T, q @ cache.dequantize(codes, D, bits).T, atol=1e-4
    )


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda x: cache.quantize(x, 5), ("bits is 5", "1, 2, 3, 4, 8")),
        (lambda x: cache.quantize(x, True), ("bits is True",)),
        (lambda x: cache.quantize(x, 2.5), ("bits is 2.5",)),
        (lambda x: cache.quantize(x[:, :60], 4), ("x's last axis is 60", "56 and 64")),
        (lambda x: cache.quantize(x[:, :0], 4), ("x's last axis is 0",)),
        (lambda x: cache.quantize(jnp.float32(1), 4), ("x must have shape [..., D]",)),
        (lambda x: cache.quantize(x.astype(jnp.int32), 4), ("x has dtype int32",)),
        (lambda x: cache.quantize(x.at[1, 2].set(jnp.nan), 4), ("x[(1, 2)] is nan",)),
        (lambda x: cache.quantize(x.at[0, 3].set(jnp.inf), 4), ("x[(0, 3)] is inf",)),
        (lambda x: cache.quantize(x * 1e5, 4), ("x has values up to 100000", "65504")),
        (lambda x: cache.quantize(x * 3e38, 4), ("the largest |x| is 3.0", "524032")),
        (lambda x: _codec.codes_bytes(184, 4), ("head_dim is 184", "176 and 192")),
        (lambda x: _codec.codes_bytes(-8, 4), ("head_dim is -8",)),
        (lambda x: _codec.codes_bytes(2**20, 4), ("head_dim is 1048576", "at most 4096")),
        (lambda x: _codec.codes_bytes(64, 16), ("bits is 16",)),
        (
            lambda x: cache.dequantize(cache.quantize(x, 4), 64, 3),
            ("codes.packed is uint8 of shape (2, 32)", "[..., 24]"),
        ),
        (
            lambda x: cache.dequantize(cache.Codes(x, x[:, 0]), 64, 8),
            ("codes.packed is float32",),
        ),
        (
            lambda x: cache.dequantize(cache.Codes(x.astype(jnp.uint8), x[0]), 64, 8),
            ("codes.norm has shape (64,)", "(2,)"),
        ),
    ],
)
def test_bad_input_is_named(call, names):
    with pytest.raises(ValueError, match=r"is|has|must") as error:
        call(jnp.ones((2, D)))
    for name in names:
        assert name in str(error.value)
