"""The bytes of a page: parts end to end, tokens that come back as they went in, at every precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance.cache import _codec, _layout
from jbalance.cache._layout import CODES, KEY_NORMS, KEYS, TIMES, PageLayout
from jbalance.cache._rotation import joined, rotate, rotate_keys, rotation, unrotate, unrotate_keys

D, PAGE, W = 16, 300, 3
BITS = (16, 8, 4, 3, 2, 1)
each = pytest.mark.parametrize("bits", BITS)


def tokens(layout, seed=0):
    """k, v and code of W full pages."""
    rng = np.random.default_rng(seed)
    shape = W, layout.page_tokens
    k, v = rng.normal(size=(2, *shape, D)).astype(np.float32)
    return k, v, rng.integers(0, 256, shape).astype(np.uint8)


def plane(packed, first, rows, shifts, width):
    """[..., rows * shifts] codes of a plane by its description: runs of neighbours."""
    part = packed[..., first : first + rows]
    return np.concatenate([part >> at & (2**width - 1) for at in shifts], axis=-1).astype(int)


def halves(packed):
    """Codes of keys in two halves, [..., D / 2] each, and their bits, as the pages' notes say."""
    d = D // 8
    if packed.shape[-1] == 4 * d:  # 5 and 3 bits
        low = plane(packed, 0, 2 * d, (0, 4), 4), plane(packed, 2 * d, d, (0, 2, 4, 6), 2)
        high = plane(packed, 3 * d, d, range(4), 1), plane(packed, 3 * d, d, range(4, 8), 1)
        return (low[0] + 16 * high[0], low[1] + 4 * high[1]), (5, 3)
    if packed.shape[-1] == 3 * d:
        return (plane(packed, 0, 2 * d, (0, 4), 4), plane(packed, 2 * d, d, range(0, 8, 2), 2)), (
            4,
            2,
        )
    first = plane(packed, 0, d, range(0, 8, 2), 2) + 4 * plane(packed, d, d, range(4), 1)
    return (first, plane(packed, d, d, range(4, 8), 1)), (3, 1)


def key_of(packed, word, bits):
    """Keys [..., D] of their bytes and the words of their norms."""
    packed, word = np.asarray(packed), np.asarray(word)
    if bits in (8, 1):
        codes = packed.astype(int) if bits == 8 else plane(packed, 0, D // 8, range(8), 1)
        turned = _codec.levels(D, bits)[codes] * word.view(np.float16)[..., None]
    else:
        codes, own = halves(packed)
        norm = (word >> 5 << 4).view(np.float16).astype(float)
        mantissa, exponent = word % 8, word // 8 % 4
        second = norm * (1 + mantissa / 8) * 2.0 ** (exponent.astype(int) - 3)
        turned = np.concatenate(
            [
                _codec.levels(D // 2, b)[c] * n[..., None]
                for c, b, n in zip(codes, own, (norm, second), strict=True)
            ],
            axis=-1,
        )
    a, b = np.split(turned, 2, axis=-1)
    if bits in (8, 1):
        a, b = (a + b) / 2**0.5, (a - b) / 2**0.5
    return np.concatenate([a @ rotation(D // 2).T, b @ rotation(D // 2).T], axis=-1)


def pages_of(layout, rows):
    """Whole pages [W, PAGE], of any bytes where no token lies."""
    used = np.asarray(layout.to_page(rows))
    assert used.shape == (W, layout.used_bytes)
    data = np.random.default_rng(1).integers(0, 256, (W, PAGE)).astype(np.uint8)
    data[:, : layout.used_bytes] = used
    return data


@each
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("head_dim", [16, 24, 64])
def test_parts_lie_end_to_end(bits, head_dim, timed):
    codes = head_dim * bits // 8 + (0 if bits == 16 else 2)
    size, last = 2 * codes + 1 + 2 * timed, TIMES if timed else CODES
    assert _layout.token_bytes(head_dim, bits, timed=timed) == size
    layout = PageLayout.within(1000, head_dim, bits, timed=timed)
    assert layout == (head_dim, bits, 1000 // size, timed)
    assert layout.offset(KEYS) == 0
    assert layout.offset(last + 1) == layout.used_bytes <= 1000 < layout.used_bytes + size
    sizes = [layout.offset(i + 1) - layout.offset(i) for i in range(last + 1)]
    assert sizes == [layout.page_tokens * width for width in layout.widths]


@each
@pytest.mark.parametrize("timed", [False, True])
def test_tokens_come_back_as_they_went_in(bits, timed):
    layout = PageLayout.within(PAGE, D, bits, timed=timed)
    k, v, code = tokens(layout)
    time = np.arange(code.size).reshape(code.shape) * 997
    rows = layout.encode(k, v, code, time)
    assert rows.shape == (*code.shape, layout.token_bytes)
    got = layout.from_page(pages_of(layout, rows))
    np.testing.assert_array_equal(got, np.reshape(rows, got.shape))
    if timed:
        np.testing.assert_array_equal(layout.times(got), time.ravel() % 2**16)
    *got, got_code = layout.decode(got)
    np.testing.assert_array_equal(got_code, code.ravel())
    if bits == 16:
        want = (
            unrotate_keys(joined(joined(rotate_keys(k)).astype(jnp.bfloat16))),
            unrotate(rotate(v).astype(jnp.bfloat16)),
        )
    else:
        packed, word = np.asarray(rows)[..., : D * bits // 8], layout.widths[:2]
        norms = np.asarray(rows)[..., sum(word) : sum(word) + 2].copy().view(np.uint16)[..., 0]
        want = key_of(packed, norms, bits), _codec.dequantize(_codec.quantize(v, bits), D, bits)
    for x, y in zip(want, got, strict=True):
        np.testing.assert_allclose(y, np.reshape(x, y.shape), atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "of_halves"), [(4, (1.7e-3, 0.028)), (3, (6.4e-3, 0.121)), (2, (0.028, 0.57))]
)
def test_the_first_half_of_a_key_errs_less(bits, of_halves):
    layout, x = PageLayout(64, bits, 1), np.random.default_rng(0).normal(size=(4000, 64))
    x[:, :32] *= 1.5
    k, *_ = layout.decode(layout.encode(x, x, np.zeros(4000, np.uint8)))
    for half, bound in zip(np.split(np.arange(64), 2), of_halves, strict=True):
        off = np.square(np.asarray(k) - x)[:, half].sum(-1) / np.square(x)[:, half].sum(-1)
        assert 0.7 * bound < off.mean() <= bound


def test_norms_of_halves_are_near():
    first = np.geomspace(1e-3, 6e4, 500).astype(np.float32)
    ratio = np.linspace(0.125, 1.875, 500).astype(np.float32)
    word = np.asarray(_layout._paired(jnp.asarray(first), jnp.asarray(first * ratio)))
    got = (word >> 5 << 4).view(np.float16).astype(float)
    np.testing.assert_allclose(got, first, rtol=1 / 127)
    second = got * (1 + word % 8 / 8) * 2.0 ** ((word // 8 % 4).astype(int) - 3)
    np.testing.assert_allclose(second, first * ratio, rtol=1 / 15)


@pytest.mark.parametrize("norms", [(0.0, 5.0), (0.1, 5.0), (5.0, 0.0), (0.0, 0.0), (4e4, 4e4)])
def test_norms_of_halves_that_are_far_apart(norms):
    """The larger one is kept: the other is at most an eighth or eight fifteenths of it."""
    word = _layout._paired(*(jnp.float32(x) for x in norms))
    layout = PageLayout(64, 4, 1)
    first, second = (float(x) for x in layout.norms(0, word))
    for got, want in ((first, norms[0]), (second, norms[1])):
        if want == max(norms):
            assert got == pytest.approx(want, rel=1 / 14)
        else:
            assert got <= 0.54 * max(norms)


@each
def test_each_part_is_where_its_offset_says(bits):
    layout = PageLayout.within(PAGE, D, bits)
    k, v, code = tokens(layout)
    data = pages_of(layout, layout.encode(k, v, code))
    parts = [data[:, layout.offset(i) : layout.offset(i + 1)] for i in range(CODES + 1)]
    np.testing.assert_array_equal(parts[CODES], code)
    low, high = np.split(parts[KEY_NORMS], 2, axis=1) if bits < 16 else (0, 0)
    if bits < 16:
        word = low | high.astype(np.uint16) << 8
        packed = parts[KEYS].reshape(W, D * bits // 8, -1) if bits < 8 else parts[KEYS]
        packed = np.swapaxes(packed, 1, 2) if bits < 8 else packed.reshape(W, -1, D)
        got, _, _ = layout.decode(layout.encode(k, v, code))
        np.testing.assert_allclose(key_of(packed, word, bits), got, atol=1e-5)
    for i, x in enumerate((k, v)):
        if bits == 16:
            turned = rotate(x) if i else joined(rotate_keys(x))
            want = np.asarray(turned.astype(jnp.bfloat16))
            got = parts[i].reshape(W, -1, 2 * D)
            np.testing.assert_array_equal(got.view(want.dtype), want)
            continue
        if i == KEYS:
            continue
        stored = _codec.quantize(x, bits)
        across = np.swapaxes(stored.packed, 1, 2) if bits < 8 else stored.packed
        np.testing.assert_array_equal(parts[i], np.reshape(across, parts[i].shape))
        low, high = np.split(parts[KEY_NORMS + i], 2, axis=1)
        norm = (low | high.astype(np.uint16) << 8).view(np.float16)
        np.testing.assert_array_equal(norm, stored.norm)


@pytest.mark.parametrize("bits", [4, 3, 2, 1])
@pytest.mark.parametrize("index", [0, 1])
def test_planes_are_where_a_vector_that_lies_across_has_them(bits, index):
    layout = PageLayout.within(PAGE, D, bits)
    packed = np.random.default_rng(0).integers(0, 256, D * bits // 8).astype(np.uint8)
    codes = []
    for part in layout.parts(index):
        codes.append(np.zeros(part.size, int))
        for i in range(part.size):
            for x in part.planes:
                position, row = divmod(i, x.rows(part.size))
                code = packed[x.row + row] >> (x.shift + x.width * position) & (2**x.width - 1)
                codes[-1][i] |= int(code) << x.lowest
        assert sum(x.width for x in part.planes) == part.bits
    if len(codes) == 2:
        for got, want in zip(codes, halves(packed)[0], strict=True):
            np.testing.assert_array_equal(got, want)
    else:
        np.testing.assert_array_equal(
            jax.jit(_codec.pack_bits, static_argnums=1)(jnp.asarray(codes[0]), bits), packed
        )
    levels = [
        _codec.levels(x.size, x.bits)[c] for x, c in zip(layout.parts(index), codes, strict=True)
    ]
    units = [np.full(x.size, _codec.step(x.size, x.bits)) for x in layout.parts(index)]
    got = np.concatenate(layout.levels(index, jnp.asarray(packed))) * np.concatenate(units)
    np.testing.assert_allclose(got, np.concatenate(levels), rtol=1e-6)


@pytest.mark.parametrize("bits", BITS[1:])  # bfloat16 has no norm: its readers mask
def test_what_lay_in_a_page_before_decodes_to_finite_vectors(bits):
    layout = PageLayout.within(PAGE, D, bits)
    k, v, _ = layout.decode(layout.from_page(jnp.full((W, PAGE), 255, jnp.uint8)))
    assert np.isfinite(k).all()
    assert np.isfinite(v).all()


def test_tables_are_those_of_an_arena():
    got = _layout.table_bytes(num_units=3, num_levels=2, num_pages=7)
    assert got == 4 * (7 + (3 * 2 + 1) + 3 * 2)  # order, offset, count


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: _layout.token_bytes(20, 16), ("head_dim is 20", "16 and 24")),
        (lambda: _layout.token_bytes(16, 5), ("bits is 5", "1, 2, 3, 4, 8")),
        (lambda: _layout.token_bytes(16, True), ("bits is True",)),
    ],
)
def test_bad_input_is_named(call, names):
    with pytest.raises(ValueError, match="is") as error:
        call()
    for name in names:
        assert name in str(error.value)
