"""Every public function, one bad argument at a time: a ValueError that names it, never another error.

Sizes and counts must be refused where they are no whole numbers; arrays where they are no numbers, of
the wrong rank, or of rows of different lengths.
"""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.calls import CALLS, RETURN_NO_ARRAYS, STRUCTURES

NO_INTEGERS = ["x", 1.5, float("nan"), float("inf"), True, 2**31, 2**40, 1j, [1, 2], -1]
NO_NUMBERS = ["x", [[1], [2, 3]], {}, 1j]


def bad_values(name):
    """(argument, bad value) of a call, each bad for sure."""
    fn, good, static = CALLS[name]
    default = {p.name: p.default for p in inspect.signature(fn).parameters.values()}
    for argument in good:
        if argument in static.split():
            bad = list(NO_INTEGERS)
            if argument in ("budget_bytes", "block_bytes"):  # of any size
                bad = [x for x in bad if x not in (2**31, 2**40)]
        else:
            bad = list(["x", 1.5] if argument in STRUCTURES else NO_NUMBERS)
        if default.get(argument, 0) is not None and argument != "frequencies":  # None: not rotated
            bad.append(None)
        for value in bad:
            yield argument, value


@pytest.mark.parametrize("name", CALLS)
def test_a_bad_argument_is_named(name):
    fn, good, _ = CALLS[name]
    wrong = []
    for argument, value in bad_values(name):
        try:
            fn(**good | {argument: value})
        except Exception as error:
            if type(error) is ValueError and argument.removesuffix("s") in str(error):
                continue
            wrong.append(f"{argument} = {value!r}: {type(error).__name__}: {error}")
        else:
            wrong.append(f"{argument} = {value!r}: accepted")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", [x for x in CALLS if x not in RETURN_NO_ARRAYS])
def test_arrays_of_another_byte_order_and_of_64_bits_are_read_as_they_are(name):
    fn, good, _ = CALLS[name]
    other = {
        key: np.asarray(x, x.dtype.newbyteorder(">"))
        if isinstance(x, np.ndarray) and x.dtype.kind in "if"
        else x
        for key, x in good.items()
    }
    for _ in range(2):  # the second call of a jitted function takes another way
        for got, want in zip(
            jax.tree.leaves(fn(**other)), jax.tree.leaves(fn(**good)), strict=True
        ):
            np.testing.assert_array_equal(jnp.asarray(got), jnp.asarray(want))
