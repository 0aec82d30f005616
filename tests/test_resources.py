"""What attention costs and what devices have: against real arrays, compiled programs, fake devices."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import resources
from jbalance.resources import AttentionDims

DIMS = AttentionDims(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16)


def test_status_per_device_and_in_total():
    demand, used = jnp.array([50.0, 30.0, 10.0]), jnp.array([20.0, 15.0, 40.0])
    got = resources.status([100.0, 60.0, 7.0], demand, used, [0, 0, 1])
    np.testing.assert_array_equal(got.available, [65, 20, 7])
    np.testing.assert_array_equal(got.remaining, [65, 50, 7])
    assert got.total_available == 92
    assert got.total_remaining == 122
    over = resources.status(10.0, demand, used)
    assert over.available == -65


def test_status_under_transformations():
    demand, used = jnp.array([50.0, 30.0]), jnp.array([20.0, 15.0])
    many = jax.jit(jax.vmap(resources.status, (0, None, None)))(
        jnp.array([200.0, 40.0]), demand, used
    )
    np.testing.assert_array_equal(many.available, [165, 5])
    gradient = jax.grad(lambda u: resources.status(200.0, demand, u).total_available)(used)
    np.testing.assert_array_equal(gradient, [-1, -1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn])
def test_cache_bytes_are_those_of_the_arrays(dtype):
    entries = np.array([[5, 0], [17, 3], [64, 1]])
    arrays = [
        jnp.zeros((n, DIMS.head_dim), dtype) for n in entries.flat for _ in ("keys", "values")
    ]
    bits = 8 * jnp.dtype(dtype).itemsize
    want = sum(x.nbytes for x in arrays)
    assert resources.kv_cache_bytes(DIMS, entries, bits) == want
    scales = [jnp.zeros(n, jnp.float16) for n in entries.flat for _ in ("keys", "values")]
    want += sum(x.nbytes for x in scales)
    assert resources.kv_cache_bytes(DIMS, entries, bits, scale_bits=16) == want


def test_cache_bytes_at_any_size_and_mixed_bits():
    # 2 vectors x 2^40 entries x 6 units x 16 numbers x 2 bytes: past 2^48, exact.
    assert resources.kv_cache_bytes(DIMS, 2**40 + 1) == (2**40 + 1) * 6 * 16 * 2 * 2
    bits = np.array([[2, 4], [8, 16], [3, 4]])
    assert resources.kv_cache_bytes(DIMS, 10, bits) == 10 * 2 * 16 * bits.sum() // 8
    assert resources.kv_entry_bytes(64, bits=3, scale_bits=16) == 52
    assert DIMS.num_units == 6


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("4096", 4096),
        ("4MiB", 4 * 2**20),
        (" 2.5 GB ", 2_500_000_000),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("80gib", 80 * 2**30),
        ("1.5TiB", 3 * 2**39),
        ("7 B", 7),
    ],
)
def test_parse_bytes(text, want):
    assert resources.parse_bytes(text) == want


@dataclass
class Device:
    """What `device_budgets` asks of a device."""

    stats: dict[str, int] | None

    def memory_stats(self):
        return self.stats


def test_device_budgets():
    gib = 2**30
    devices = [
        Device({"bytes_limit": 80 * gib, "bytes_in_use": 20 * gib}),
        Device({"bytes_limit": gib}),
    ]
    assert resources.device_budgets(devices) == [60 * gib, gib]
    assert resources.device_budgets(devices, 0.5) == [30 * gib, gib // 2]
    assert resources.device_budgets(devices, given_bytes=[7, 8]) == [7, 8]
    assert resources.device_budgets(jax.devices()[:1], 0.5, [100]) == [50]


def test_blocks_carry_budgets_past_32_bits():
    budgets = [80 * 2**30 + 5, 3]
    got = resources.blocks(budgets, 4096)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, [80 * 2**30 // 4096, 0])
    assert resources.blocks(2**31 - 1, 1) == 2**31 - 1
    assert resources.blocks(2**40, 1024).shape == ()


def test_partition_over_the_levels_of_a_model():
    level_of = resources.thirds(7)
    np.testing.assert_array_equal(level_of, [0, 0, 0, 1, 1, 2, 2])
    got = resources.partition(100.0, jnp.array([1.0, 1, 2, 0, 4, 1, 1]), level_of)
    np.testing.assert_allclose(got, [40, 40, 20], rtol=1e-6)
    np.testing.assert_allclose(
        resources.partition(70.0, jnp.zeros(7), list(level_of)), [30, 20, 20]
    )


def test_bytes_past_32_bits_stay_whole():
    gib = 2**30
    out = resources.status(80 * gib, np.array([80 * gib, 3000]), np.array([80 * gib, 3000]))
    assert out.available == -3000
    assert out.total_remaining == -3000
    two = resources.status(
        np.array([80 * gib, 2**40 + 1]), [2**40, 7], np.array([2**40 - 1, 5]), [1, 0]
    )
    np.testing.assert_array_equal(two.available, [80 * gib - 5, 2])
    assert two.total_available == 80 * gib - 3
    parts = resources.partition(np.int64(80 * gib), [1, 2, 5], [0, 1, 2])
    np.testing.assert_allclose(parts, [10 * gib, 20 * gib, 50 * gib], rtol=1e-15)
    assert resources.device_budgets([None], 0.1, [2**60 + 8]) == [
        (2**60 + 8) * int(0.1 * 2**55) // 2**55
    ]


def test_amounts_of_memory_are_read_exactly():
    assert resources.parse_bytes("4.1GB") == 4_100_000_000
    assert resources.parse_bytes("1.1kB") == 1100
    for bits in (3.5, True, "8", 0):
        with pytest.raises(ValueError, match="bits is"):
            resources.kv_cache_bytes(DIMS, 1, bits)
