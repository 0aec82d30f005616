"""What other projects' users reported and no other test holds; docs/hardening.md lists all of it."""

import numpy as np
import pytest

from jbalance import allocate, attention
from jbalance.attention import Tiling

TILING = Tiling(8, 8, 4, 4)
DOCUMENTS = np.array([[0] * 4 + [2**32] * 4])  # one document, were they read in 32 bits


def test_whole_amounts_of_weights_past_32_bits():
    for kind in (np.int64, np.uint64, ">i8", np.float64):
        w = np.array([6e9, 2e9]).astype(kind)
        np.testing.assert_array_equal(allocate.whole(w, 8).amount, [6, 2])


def test_names_of_documents_past_32_bits_are_refused():
    x = np.ones((1, 8, 1, 8), np.float32)
    with pytest.raises(ValueError, match=r"q_ids\[\(0, 4\)\] is 4294967296"):
        attention.segments(DOCUMENTS, DOCUMENTS, TILING)
    with pytest.raises(ValueError, match=r"segment_ids\[0\]\[\(0, 4\)\] is 4294967296"):
        attention.attend(x, x, x, attention.dense(TILING), segment_ids=(DOCUMENTS, DOCUMENTS))
    two = attention.to_mask(attention.segments(*[np.sign(DOCUMENTS)] * 2, TILING))
    np.testing.assert_array_equal(two[0, 0], np.eye(2, dtype=bool))
