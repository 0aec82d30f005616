"""Attention from packed pages by kernels: interpreted, equal to attention over what they decode to;
and lowered for the accelerators that these tests do not have."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jbalance.attention import Partial
from jbalance.cache import _attend, _cache, _codec, _pages
from jbalance.cache._layout import page_shape
from jbalance.cache._rotation import rotate_keys, unrotate
from jbalance.cache.backends import _kernels, _tpu_page, gpu, tpu
from jbalance.decode import Reserve
from tests.cache.test_paged_attention import assert_close, by_definition, filled, queries

KERNELS = {"gpu": gpu, "tpu": tpu}
CALLS = {"gpu": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call"}
PLATFORMS = {"gpu": "cuda", "tpu": "tpu"}
UNITS = jnp.array([2, 3, 0, 1, 0])

both = pytest.mark.parametrize("kernel", KERNELS)


def between_rotations(q, at, units, *, kernel, interpret=True):
    """A kernel as `attend_pages` calls it."""
    turned = rotate_keys(q) / math.sqrt(at.head_dim)
    got = KERNELS[kernel].attend_rotated(turned, at, units, interpret=interpret)
    return Partial(unrotate(got.y), got.lse)


# What interprets a kernel is large and runs once: a quick compilation is worth more than quick code.
attend = jax.jit(
    between_rotations,
    static_argnames=("kernel", "interpret"),
    compiler_options={"xla_backend_optimization_level": 0},
)


def shaped(head_dim, bits, page_bytes, num_pages=4000, num_units=16):
    """An arena of shapes alone."""
    groups = num_units * len(bits)
    return _pages.Arena(
        data=jax.ShapeDtypeStruct((num_pages, *page_shape(page_bytes)), jnp.uint8),
        order=jax.ShapeDtypeStruct((num_pages,), jnp.int32),
        offset=jax.ShapeDtypeStruct((groups + 1,), jnp.int32),
        count=jax.ShapeDtypeStruct((num_units, len(bits)), jnp.int32),
        head_dim=head_dim,
        bits=bits,
    )


def page_size(head_dim, bits, least):
    """The smallest page of at least so many bytes that both kernels read."""
    for size in range(-(-least // 128) * 128, 2**17, 128):
        at = shaped(head_dim, bits, size)
        if min(at.page_tokens) > 0 and not any(k.unsupported(at) for k in KERNELS.values()):
            return size
    raise AssertionError(f"no page size for {bits} bits of {head_dim}")


@both
@pytest.mark.parametrize(
    ("head_dim", "bits", "least", "rows"),
    [
        (64, (16, 8, 4), 512, 3),
        (64, (3,), 6000, 9),
        (64, (8,), 512, 150),
        pytest.param(64, (2, 16), 512, 1, marks=pytest.mark.slow),
        pytest.param(64, (1, 8), 512, 7, marks=pytest.mark.slow),
        pytest.param(128, (8, 3), 512, 2, marks=pytest.mark.slow),
        pytest.param(128, (4, 16), 512, 5, marks=pytest.mark.slow),
        pytest.param(32, (8, 2), 256, 17, marks=pytest.mark.slow),
    ],
)
def test_attention_is_that_over_the_decoded_tokens(kernel, head_dim, bits, least, rows):
    page_bytes = page_size(head_dim, bits, least)
    q = queries(5, rows, head_dim)
    before = attend._cache_size()
    for seed in range(2):
        at = filled(head_dim, bits, page_bytes, seed=seed)
        got = attend(q, at, UNITS, kernel=kernel)
        assert_close(got, by_definition(q, at, UNITS))
        np.testing.assert_array_equal(got.y[1], 0)
        assert (got.lse[1] < -1e29).all()
    assert attend._cache_size() == before + 1  # contents are data


def test_gpu_reads_pages_of_any_size():
    at = filled(64, (4, 16), 5001)
    q = queries(5, 4, 64)
    assert_close(attend(q, at, UNITS, kernel="gpu"), by_definition(q, at, UNITS))


@both
def test_many_pages_for_few_programs(kernel, monkeypatch):
    monkeypatch.setattr(gpu, "PROGRAMS", 1)
    monkeypatch.setattr(tpu, "_RING_BYTES", 0)
    at = filled(64, (4,), page_size(64, (4,), 1024), num_pages=90)
    q = queries(5, 6, 64)
    assert_close(attend(q, at, UNITS, kernel=kernel), by_definition(q, at, UNITS))


@both
def test_bytes_behind_the_last_token_do_not_matter(kernel):
    q, page_bytes = queries(5, 3, 64), page_size(64, (16, 8, 4), 512)
    zeros, nans = (
        attend(q, filled(64, (16, 8, 4), page_bytes, behind=b), UNITS, kernel=kernel)
        for b in (0, 0xFF)
    )
    jax.tree.map(np.testing.assert_array_equal, zeros, nans)


@both
@pytest.mark.parametrize("scale", [1e-30, 300.0])
def test_any_size_of_queries(kernel, scale):
    at = filled(64, (16, 8, 4), page_size(64, (16, 8, 4), 512))
    q = queries(5, 3, 64) * scale
    assert_close(
        attend(q, at, UNITS, kernel=kernel), by_definition(q, at, UNITS), 1e-5 * max(1, scale)
    )


@both
def test_under_vmap(kernel):
    at = filled(64, (8, 4), page_size(64, (8, 4), 1024))
    q, units = queries(4, 3, 64), jnp.array([[0, 1], [2, 3]])
    got = jax.vmap(lambda q, u: attend(q, at, u, kernel=kernel))(q.reshape(2, 2, 3, 64), units)
    want = by_definition(q, at, jnp.arange(4))
    np.testing.assert_allclose(got.y.reshape(4, 3, 64), want.y, atol=1e-5)


@both
@pytest.mark.parametrize(
    ("head_dim", "bits", "rows", "dtype"),
    [
        (64, (16, 8, 4), 1, jnp.float32),
        (64, (16, 8, 4), 8, jnp.bfloat16),
        (64, (3,), 40, jnp.float32),
        (64, (2, 16), 8, jnp.bfloat16),
        (64, (1,), 8, jnp.float32),
        (128, (8, 4, 16), 8, jnp.bfloat16),
        (128, (3,), 8, jnp.float32),
    ],
)
def test_lowers_for_its_platform(kernel, head_dim, bits, rows, dtype):
    at = shaped(head_dim, bits, page_size(head_dim, bits, 8192))
    q = jax.ShapeDtypeStruct((8, rows, head_dim), dtype)
    lowered = export.export(
        jax.jit(functools.partial(between_rotations, kernel=kernel, interpret=False)),
        platforms=[PLATFORMS[kernel]],
        disabled_checks=[export.DisabledSafetyCheck.custom_call(CALLS[kernel])],
    )(q, at, jax.ShapeDtypeStruct((8,), jnp.int32))
    assert lowered.mlir_module().count(CALLS[kernel]) == len(bits)
    assert [x.dtype for x in lowered.out_avals] == [jnp.float32] * 2


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_levels_are_those_of_the_codec(bits):
    codes = jnp.arange(2**bits)
    got = _kernels.whole_levels(codes, bits).astype(jnp.float32) * _codec.step(64, bits)
    np.testing.assert_allclose(got, _codec.levels(64, bits), rtol=1e-6)


def test_three_digits_are_a_float32():
    x = np.random.default_rng(0).normal(size=1000) * 10.0 ** np.arange(-20, 20, 0.04)
    parts = jax.jit(_kernels.digits)(jnp.asarray(x, jnp.float32))
    total = sum(np.asarray(p, np.float64) for p in parts)
    np.testing.assert_array_equal(total, x.astype(np.float32))


def test_norms_are_read_without_float16():
    bits = np.arange(2**16, dtype=np.uint16)
    want = bits.view(np.float16).astype(np.float32)
    known = np.isfinite(want)
    got = _tpu_page._from_float16(jnp.asarray(bits, jnp.int32))
    np.testing.assert_array_equal(np.asarray(got)[known], want[known])


@pytest.mark.parametrize(
    ("kernel", "at", "names"),
    [
        ("gpu", shaped(24, (4,), 4096), ("head_dim is 24", "64")),
        ("gpu", shaped(64, (4,), 16384, num_pages=200_000), ("between 2 and 4 GiB",)),
        ("tpu", shaped(64, (8,), 5000), ("page_bytes is 5000", "128")),
        ("tpu", shaped(64, (3,), 128 * 70), ("tokens of 3 bits", "multiple of 16")),
        ("tpu", shaped(32, (16,), 128 * 14), ("tokens of 16 bits", "multiple of 2")),
        ("tpu", shaped(24, (8,), 128 * 49), ("head_dim is 24",)),
        ("tpu", shaped(64, (16,), 1024, num_pages=10**6), ("page_bytes must be larger",)),
    ],
)
def test_what_a_kernel_cannot_read_is_named(kernel, at, names):
    q = jnp.zeros((2, 1, at.head_dim))
    with pytest.raises(NotImplementedError, match="arena") as error:
        KERNELS[kernel].attend_rotated(q, at, jnp.arange(2))
    for name in names:
        assert name in str(error.value)


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("bits", [(8, 4, 3), (16, 8, 4, 3, 2)])
def test_pages_of_the_library_are_read_by_both_kernels(head_dim, bits, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for budget, units in ((2**25, 90), (2**28, 256), (6 * 2**30, 1024)):
        size = _cache.page_bytes_for(budget, units, head_dim, bits)
        at = shaped(head_dim, bits, size, budget // (size + 4), units)
        assert tpu.unsupported(at) is None
        assert gpu.unsupported(at) is None or 2**31 <= budget < 2**32
        assert size % 4096 == 0
        waste = [1 - layout.used_bytes / size for layout in at.layouts]
        assert max(waste) <= 0.13


def test_each_platform_has_its_kernel_and_says_when_it_has_not(monkeypatch):
    q, units = jnp.zeros((2, 1, 64)), jnp.arange(2)

    def module(at, platform):
        return export.export(
            jax.jit(lambda q, at: _attend.attend_pages(q, at, units)),
            platforms=[PLATFORMS[platform]],
            disabled_checks=[export.DisabledSafetyCheck.custom_call(x) for x in CALLS.values()],
        )(q, at).mlir_module()

    for platform, call in CALLS.items():
        assert module(shaped(64, (8, 4, 3), 16384), platform).count(call) == 3
    assert CALLS["tpu"] not in module(shaped(64, (8, 4, 3), 6784), "tpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.warns(RuntimeWarning, match="tokens of 8 bits: it must be a multiple of 2"):
        jax.eval_shape(_attend.attend_pages, q, shaped(64, (8, 4, 3), 6784), units)


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_pages_of_requests_beside_a_context_are_read_by_both_kernels(head_dim, monkeypatch):
    on_cpu = Reserve(2, 64).unit_bytes(head_dim)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    reserve = Reserve(2, 64)
    at = shaped(head_dim, (8, 4, 3), reserve.page_bytes(head_dim))
    assert tpu.unsupported(at) is None
    assert gpu.unsupported(at) is None
    pages = -(-64 // at.page_tokens[0]) + 3
    assert 2 * pages * at.page_bytes <= reserve.unit_bytes(head_dim) <= 4 * on_cpu
