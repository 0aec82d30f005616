"""JAX's 64-bit mode on: every public function gives the types and the values that it gives without."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import decode
from tests.support.calls import CALLS, RETURN_NO_ARRAYS
from tests.support.more_calls import BUDGETS, MODEL, MORE_CALLS, PROMPT

ALL_CALLS = CALLS | MORE_CALLS
COMPILED = [name for name in ALL_CALLS if name not in RETURN_NO_ARRAYS]


def arrays_of(name):
    fn, good, _ = ALL_CALLS[name]
    leaves = [x for x in jax.tree.leaves(fn(**good)) if isinstance(x, jax.Array | np.ndarray)]
    return [x for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]


def check(name):
    want = arrays_of(name)
    with jax.enable_x64(True):
        got = arrays_of(name)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(
            np.asarray(x, float), np.asarray(y, float), rtol=2e-5, atol=2e-5, equal_nan=False
        )


# Those that failed, or placed otherwise, before.
@pytest.mark.parametrize(
    "name",
    ["reconstruction", "replicate", "over_layers", "bound with slots", "fair", "TileBudget.of"],
)
def test_a_function(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_every_function(name):
    check(name)


def test_a_model_with_windows_generates_the_same():
    def found():
        return decode.generate(MODEL, [PROMPT], BUDGETS, max_new_tokens=3)

    want = found()
    with jax.enable_x64(True):
        np.testing.assert_array_equal(found(), want)
