"""The bytes of a page: parts end to end, tokens that come back as they went in, at every precision."""

import jax.numpy as jnp
import numpy as np
import pytest

from jbalance.cache import _codec, _layout
from jbalance.cache._layout import CODES, KEY_NORMS, KEYS, TIMES, PageLayout

D, PAGE, W = 16, 300, 3
BITS = (16, 8, 4, 3, 2, 1)
each = pytest.mark.parametrize("bits", BITS)


def tokens(layout, seed=0):
    """k, v and code of W full pages."""
    rng = np.random.default_rng(seed)
    shape = W, layout.page_tokens
    k, v = rng.normal(size=(2, *shape, D)).astype(np.float32)
    return k, v, rng.integers(0, 256, shape).astype(np.uint8)


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
    for x, y in zip((k, v), got, strict=True):
        if bits == 16:
            want = _codec.unrotate(_codec.rotate(x).astype(jnp.bfloat16))
        else:
            want = _codec.dequantize(_codec.quantize(x, bits), D, bits)
        np.testing.assert_allclose(y, np.reshape(want, y.shape), atol=1e-5)


@each
def test_each_part_is_where_its_offset_says(bits):
    layout = PageLayout.within(PAGE, D, bits)
    k, v, code = tokens(layout)
    data = pages_of(layout, layout.encode(k, v, code))
    parts = [data[:, layout.offset(i) : layout.offset(i + 1)] for i in range(CODES + 1)]
    np.testing.assert_array_equal(parts[CODES], code)
    for i, x in enumerate((k, v)):
        if bits == 16:
            want = np.asarray(_codec.rotate(x).astype(jnp.bfloat16))
            got = parts[i].reshape(W, -1, 2 * D)
            np.testing.assert_array_equal(got.view(want.dtype), want)
            continue
        stored = _codec.quantize(x, bits)
        across = np.swapaxes(stored.packed, 1, 2) if bits < 8 else stored.packed
        np.testing.assert_array_equal(parts[i], np.reshape(across, parts[i].shape))
        low, high = np.split(parts[KEY_NORMS + i], 2, axis=1)
        norm = (low | high.astype(np.uint16) << 8).view(np.float16)
        np.testing.assert_array_equal(norm, stored.norm)


@pytest.mark.parametrize("bits", [4, 3, 2, 1])
def test_planes_are_the_rows_of_a_vector_that_lies_across(bits):
    layout = PageLayout.within(PAGE, D, bits)
    codes = np.random.default_rng(0).integers(0, 2**bits, D)
    packed = np.asarray(_codec.pack_bits(jnp.asarray(codes), bits))
    got = np.zeros(D, int)
    for width, lowest, row in layout.planes:
        run = D * width // 8
        for i in range(D):
            part = packed[row + i % run] >> (width * (i // run)) & (2**width - 1)
            got[i] |= int(part) << lowest
    np.testing.assert_array_equal(got, codes)
    assert sum(width for width, *_ in layout.planes) == bits


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
