"""Values that no caller means: of every kind, for every kind of argument, drawn by a seed."""

from __future__ import annotations

import decimal
import fractions
import pathlib
import traceback
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jbalance
from jbalance.types import Status

LIBRARY = pathlib.Path(jbalance.__file__).resolve().parent  # of a wheel not beside this file
NAN, INF = float("nan"), float("inf")
LONGEST = 2000  # characters of a message

# What is no number, array or object of the library.
OTHERS: tuple[Any, ...] = (
    *("x", "", b"4", "\x1b[2J", {}, {"a": 1}, set(), object(), len, Ellipsis, NotImplemented),
    *(1j, [], [[]], [[1], [2, 3]], ["a", 1], [None], (1, "x"), range(0), pathlib.Path("x")),
    *(decimal.Decimal("1.5"), fractions.Fraction(1, 3), slice(3)),
    *(np.array("x"), np.array([None]), np.array([{}, 1], object), np.array([1j, 2])),
    *(np.array(["2026-01-01"], "datetime64[D]"), np.array([(1, 2.0)], "i4,f8")),
    *(np.array([1], "timedelta64[s]"), np.array([b"a", b"b"]), np.zeros((0, 3)), jnp.zeros(0)),
    *(jnp.ones(3, jnp.complex64), jnp.ones((1,) * 9), np.ones((2,) * 12), jax.random.key(0)),
)
# What is no whole number of a size that fits.
NO_SIZES: tuple[Any, ...] = (
    *(1.5, 0.5, NAN, INF, -INF, True, False, -1, -(2**31), -(2**63), 2**200, -(2**200), 1e30),
    *(np.float32(2.5), np.bool_(True), np.int8(-1), np.nan, np.array([1, 2]), np.array([[4.5]])),
    *("4", "1e3", [4], (4,), [1, 2], np.array("4"), decimal.Decimal(4), fractions.Fraction(4)),
)
NUMBERS = (NAN, INF, -INF, -1.0, -1e-30, -1e38, 1e39, -1e39, 1e308, -(2**31), 2**31, 2**40)
WHOLE = (-1, -(2**31), 2**31, 2**32, 2**53 + 1, 2**63 - 1, -(2**63), 2**63, 10**30, -(10**30))


class Bad(NamedTuple):
    """A value and in which way it is bad."""

    kind: str
    value: Any


def no_sizes() -> Iterator[Bad]:
    """In place of a static whole number; each is none, or absurd."""
    for value in (*NO_SIZES, *OTHERS):
        yield Bad("size", value)


def no_objects() -> Iterator[Bad]:
    """In place of an object of the library."""
    for value in (*OTHERS, *NO_SIZES):
        yield Bad("object", value)


def no_arrays(good: Any, rng: np.random.Generator, draws: int) -> Iterator[Bad]:
    """In place of numbers: the same of other ranks, lengths and types, with some entries changed."""
    for value in OTHERS:
        yield Bad("type", value)
    x = np.asarray(good)
    for value in (
        x[None],
        x[..., None],
        x[None, ..., None],
        x.ravel()[:1].reshape(()) if x.size else x,
    ):
        if value.shape != x.shape:
            yield Bad("rank", value)
    if x.ndim:
        for axis in range(x.ndim):
            yield Bad("empty", np.take(x, [], axis))
            yield Bad("length", np.concatenate([x, x, x], axis))
            if x.shape[axis] > 1:
                yield Bad("length", np.take(x, [0], axis))
        yield Bad("rank", np.float32(1.0))
    for dtype in ("U3", "S3", object, complex, bool, "M8[s]"):
        try:
            yield Bad("dtype", x.astype(dtype))
        except (ValueError, TypeError):
            continue
    for _ in range(draws):
        pool = NUMBERS if x.dtype.kind == "f" or rng.random() < 0.3 else WHOLE
        number = pool[rng.integers(len(pool))]
        if not x.ndim:
            yield Bad("number", number)
            continue
        if type(number) is int and abs(number) >= 2**63:
            changed = x.astype(object)
        else:
            kind = type(number) if x.dtype.kind in "iub" else np.float64
            changed = x.astype(kind)
        for at in rng.integers(x.size, size=rng.integers(1, 3)):
            changed.flat[at] = number
        yield Bad("number", changed.tolist() if rng.random() < 0.2 else changed)


def outcome(call: Any, names: Iterable[str]) -> str | None:
    """None if a call ends well, or with the library's own error that has one of the names; else how."""
    try:
        found = call()
        jax.block_until_ready(found)
    except (ValueError, TypeError) as error:
        said, frames = str(error), traceback.extract_tb(error.__traceback__)
        short = f"{type(error).__name__}: {said[:150]!r}"
        if not pathlib.Path(frames[-1].filename).is_relative_to(LIBRARY):
            return f"from {pathlib.Path(frames[-1].filename).name}:{frames[-1].lineno}: {short}"
        if not any(name.removesuffix("s") in said for name in names):
            return f"does not name it: {short}"
        return f"{len(said)} characters" if len(said) > LONGEST else None
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:150]!r}"
    return _not_finite(found)


def _not_finite(found: Any) -> str | None:
    """Whether what is accepted gives NaN without a status that says so."""
    leaves = [
        np.asarray(x) for x in jax.tree.leaves(found) if isinstance(x, jax.Array | np.ndarray)
    ]
    status = getattr(found, "status", None)
    if status is not None and (np.asarray(status) != Status.OK).any():
        return None
    if any(jnp.issubdtype(x.dtype, jnp.floating) and np.isnan(x).any() for x in leaves):
        return "accepted, gives NaN"
    return None
