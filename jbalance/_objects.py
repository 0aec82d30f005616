"""Checks of what is no array: names, objects of the library, sequences, keys of random numbers."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def choice(name: str, value: str, table: Any) -> Any:
    """The entry of `table` called `value`; ValueError that lists the names otherwise."""
    if isinstance(value, str) and value in table:
        return table[value]
    raise ValueError(
        f"{name} is {reprlib.repr(value)}: it must be one of {', '.join(map(repr, table))}"
    )


def instance(name: str, x: Any, *kinds: type) -> None:
    """ValueError unless `x` is one of the library's own objects of these types."""
    if not isinstance(x, kinds):
        names = " or a ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{name} is {reprlib.repr(x)}: it must be a {names}")


def items(name: str, x: Any, want: str) -> list[Any]:
    """The entries of a sequence, or of another iterable; ValueError for what has none."""
    try:
        if not isinstance(x, str | bytes | Mapping):
            return list(x)
    except TypeError:
        pass
    raise ValueError(f"{name} is {reprlib.repr(x)}: it must be {want}, a sequence")


def mapping(name: str, x: Any, want: str) -> None:
    """ValueError unless `x` is a mapping."""
    if not isinstance(x, Mapping):
        raise ValueError(f"{name} is {reprlib.repr(x)}: it must be {want}, a mapping")


def function(name: str, x: Any) -> None:
    """ValueError unless `x` can be called."""
    if not callable(x):
        raise ValueError(f"{name} is {reprlib.repr(x)}: it must be a function")


def random_key(name: str, x: Any) -> None:
    """ValueError unless `x` is one key of random numbers, of the new style or the old."""
    dtype, shape = getattr(x, "dtype", None), getattr(x, "shape", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ():
        return
    if dtype != jnp.uint32 or shape != (2,):
        raise ValueError(
            f"{name} is {reprlib.repr(x)}: it must be one key, as jax.random.key gives it"
        )
