"""Numbers of the host in narrow and unsigned types: what is computed with them does not wrap."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jbalance import Status, cache, decode, importance, place, resources, sharded
from jbalance.attention import Tiling

W = np.array([4.0, 3.0, 2.0, 1.0])


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.uint64, lambda n: np.array(n, ">u8")])
def test_static_numbers_of_any_type_are_pythons(kind):
    assert Tiling(kind(100), kind(60), kind(16), kind(7)).shape == (7, 9)
    assert resources.AttentionDims(kind(100), kind(8), kind(4), kind(64)).num_units == 400
    assert sharded.padding(kind(9), kind(8)).size == 16
    assert place.pack(W, kind(2), max_count=kind(2)).count.tolist() == [2, 2]
    assert place.bound(W, kind(2), num_slots=kind(5)).value == place.bound(W, 2, num_slots=5).value
    reserve = decode.Reserve(kind(100), kind(120))
    assert reserve.unit_bytes(64) == decode.Reserve(100, 120).unit_bytes(64)
    held = cache.create(
        kind(99) * 1000 if kind is np.uint64 else 99_000, kind(1), kind(1), kind(64)
    )
    assert held.arena.head_dim == 64
    np.testing.assert_array_equal(
        cache.quantize(W[:, None] * np.ones(64, np.float32), kind(4)).packed,
        cache.quantize(W[:, None] * np.ones(64, np.float32), 4).packed,
    )


def test_whole_numbers_that_numpy_reads_as_floats_stay_whole():
    """[0, 2^63] becomes float64 in NumPy, and 2^63 + 1 another number."""
    with pytest.raises(ValueError, match=r"x\[\(1, 0\)\] is 9223372036854775809"):
        importance.correlation([[0], [2**63 + 1]], [0, 1], num_classes=2)


def test_a_capacity_that_xla_takes_for_zero():
    with pytest.raises(ValueError, match=r"capacity\[1\] is 1e-40.*> 0"):
        place.pack(W, 2, np.array([1, 1e-40]))
    out = jax.jit(lambda capacity: place.pack(W, 2, capacity))(np.zeros(2, np.float32))
    assert out.status == Status.INVALID


def test_names_of_classes_are_no_number_of_classes():
    with pytest.raises(ValueError, match=r"y\[1\] is 403789370.*integers in 0\.\.1048575"):
        importance.anova(np.ones((2, 1)), np.array([0, 403789370]))


def test_scores_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"scores\[\(0, 1\)\] is nan"):
        importance.combine([[1.0, np.nan]], [1.0])
