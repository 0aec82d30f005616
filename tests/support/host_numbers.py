"""Numbers as hosts hold them: any type, byte order and size, with what they are exactly."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

INT64_MAX = 2**63 - 1
FLOAT32_MAX = float(np.finfo(np.float32).max)
EDGES = [
    2**24 + 1,
    2**31 - 1,
    2**31,
    2**32 + 1,
    2**53 + 1,
    2**62,
    INT64_MAX,
    2**63,
    2**64 - 1,
    2**70,
]
REALS = [0.5, 1e-300, 1e-38, 1e-30, 1e30, 3.4e38, 1e39, 1e300, math.nan, math.inf, -math.inf]
TYPES = ("int8", "int32", "int64", "uint32", "uint64", ">i4", ">i8", ">u8", "float64", ">f8")

tame = st.one_of(st.integers(0, 9), st.integers(0, 2**40))
whole = st.one_of(st.integers(0, 9), st.sampled_from(EDGES), st.integers(0, 2**64))
real = st.one_of(st.integers(0, 9), st.floats(0, 1e12), st.sampled_from(REALS))
signed = st.one_of(whole, whole.map(lambda n: -n), real, st.floats())
# Tame ones most of the time, or one odd number would have nearly all examples refused.
KINDS = {"tame": tame, "whole": whole, "real": real, "signed": signed}


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What is given, and what it is."""

    given: Any  # a number, nested lists, or an array
    values: list[int | float]  # one after the other
    shape: tuple[int, ...]
    kind: str

    @property
    def is_whole(self) -> bool:
        """By its type."""
        if hasattr(self.given, "dtype"):
            return self.given.dtype.kind in "iuO"
        return all(type(x) is int for x in self.values)

    @property
    def finite(self) -> bool:
        return self.readable and all(math.isfinite(x) for x in self.values)

    @property
    def readable(self) -> bool:
        """Whether NumPy puts them together: of more than 64 bits it does so only with their like."""
        return self.is_whole or np.asarray(self.given).dtype.kind != "O"

    @property
    def exact(self) -> list[Fraction]:
        return [Fraction(x) for x in self.values]

    def fits_float32(self, positive: bool = False) -> bool:
        """Whether all are >= 0 (or as large as the smallest normal one) and finite in float32."""
        with np.errstate(over="ignore"):
            as_float = [np.float32(float(x)) for x in self.values]
        least = np.finfo(np.float32).tiny if positive else 0
        return self.readable and all(np.isfinite(x) and x >= least for x in as_float)

    def in_range(self, low: int, high: int) -> bool:
        """Whether all are whole by type and in low..high."""
        return self.is_whole and all(low <= x <= high for x in self.values)


def as_given(
    values: list[int | float], shape: tuple[int, ...], types: tuple[str, ...] = TYPES
) -> st.SearchStrategy[Any]:
    """The same values in all the ways in which a host can write them exactly."""
    nested = np.empty(len(values), object)
    nested[:] = values
    nested = nested.reshape(shape)
    forms: list[Any] = [nested.tolist()]
    if shape and all(type(x) is int for x in values):
        forms.append(nested)
    for name in types:
        with np.errstate(all="ignore"):
            try:
                array = np.array(values, name).reshape(shape)
            except (OverflowError, ValueError):
                continue
        if all(_same(x, y) for x, y in zip(array.reshape(-1).tolist(), values, strict=True)):
            forms.append(array)
            if name == "int32":
                forms.append(jnp.asarray(array))
    return st.sampled_from(forms)


def _same(x, y) -> bool:
    return x == y or (x != x and y != y)


@st.composite
def numbers(draw, *shape: int, kind: str | None = None) -> Numbers:
    """`Numbers` of a shape, of one of `KINDS`."""
    kind = kind or draw(st.sampled_from(["tame", "tame", *KINDS]))
    size = math.prod(shape)
    values = draw(st.lists(KINDS[kind], min_size=size, max_size=size))
    out = Numbers(draw(as_given(values, shape)), values, shape, kind)
    return dataclasses.replace(out, values=list(map(int, values))) if out.is_whole else out


def devices(size: int, number: int) -> st.SearchStrategy[Numbers]:
    """The device of each unit, [size] in 0..number-1."""
    of = st.lists(st.integers(0, number - 1), min_size=size, max_size=size)
    return of.flatmap(
        lambda x: as_given(x, (size,), TYPES[:-2]).map(
            lambda given: Numbers(given, x, (size,), "tame")
        )
    )
