"""Errors for bad input: each names the argument, its value and what would fit.

The checks of values return the array that is computed with: float32 or int32, converted on the host,
before jit could wrap a 64-bit number. Shapes are checked always. Values are checked where they are
concrete; a tracer has none, so under jit the functions report a `Status`, and `_debug_check` states the
same conditions for `jax.experimental.checkify`: wrap the caller in `checkify.checkify` to turn them on.
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbalance._debug_check import debug_check
from jbalance._objects import choice, function, instance, items, mapping, random_key

__all__ = ["choice", "function", "instance", "items", "mapping", "random_key"]

SCALE_MAX = 1e9  # of logits
INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1
FLOAT32_MAX, FLOAT32_TINY = (float(getattr(np.finfo(np.float32), x)) for x in ("max", "tiny"))


def is_concrete(*xs: Any) -> bool:
    """Whether every argument has a value here and now, so that it can be looked at.

    An array that lies on the devices of several processes has not: each sees its own part.
    """
    return not any(
        isinstance(leaf, jax.core.Tracer)
        or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable)
        for leaf in jax.tree.leaves(xs)
    )


def rank(name: str, x: Any, ndim: int | tuple[int, ...], shape_hint: str) -> None:
    """ValueError unless `x` has (one of) `ndim` dimensions."""
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    try:
        np.shape(x)
    except ValueError:
        raise ValueError(
            f"{name} has rows of different lengths: it must have shape {shape_hint}"
        ) from None
    if np.ndim(x) not in allowed:
        raise ValueError(f"{name} must have shape {shape_hint}, got shape {np.shape(x)}")


def same_length(name: str, x: Any, other_name: str, other: Any, axis: int = 0) -> None:
    """ValueError unless `x` and `other` agree along `axis`."""
    for label, given in ((name, x), (other_name, other)):
        dims = axis + 1 if axis >= 0 else -axis
        if np.ndim(given) < dims:
            raise ValueError(
                f"{label} has shape {np.shape(given)}: it must have {dims} axes or more"
            )
    got, want = np.shape(x)[axis], np.shape(other)[axis]
    if got != want:
        raise ValueError(
            f"{name} has {got} entries along axis {axis} but {other_name} has {want}: "
            f"give {name} {want} entries"
        )


def length(name: str, x: Any, size: int, size_name: str) -> None:
    """ValueError unless `x` [size] has one entry for each of `size_name`."""
    if np.shape(x)[0] != size:
        raise ValueError(f"{name} has {np.shape(x)[0]} entries for {size_name} = {size}")


def non_empty(name: str, x: Any) -> None:
    """ValueError if `x` holds nothing."""
    if np.size(x) == 0:
        raise ValueError(f"{name} is empty (shape {np.shape(x)}): at least one entry is needed")


def _where(name: str, x: Any, bad: np.ndarray, want: str) -> None:
    """Raise for the first entry where `bad`."""
    if not bad.any():
        return
    if x.ndim == 0:
        raise ValueError(f"{name} is {x.item()}: it must be {want}")
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    index = at[0] if len(at) == 1 else at
    entry = x[at].item() if hasattr(x[at], "item") else x[at]
    raise ValueError(
        f"{name}[{index}] is {entry} ({int(bad.sum())} such of {x.size}): every entry must be {want}"
    )


def _host(name: str, x: Any, want: str) -> np.ndarray:
    """Concrete numbers as NumPy has them; ValueError for what are none."""
    try:
        out = np.asarray(x)
    except (ValueError, TypeError) as error:
        is_key = isinstance(error, TypeError)  # as JAX says it of a key of random numbers
        said = f"is {reprlib.repr(x)}" if is_key else "has rows of different lengths"
        raise ValueError(f"{name} {said}: it must be numbers, {want}") from None
    if out.dtype == np.float64 and not hasattr(x, "dtype"):  # as NumPy reads [0, 2**63]
        given = np.asarray(x, object)
        out = given if all(type(i) is int for i in given.flat) else out
    whole = out.dtype.kind == "O" and all(type(i) is int for i in out.flat)  # Python's, of any size
    if not (whole or _is_real(out.dtype)):
        raise ValueError(
            f"{name} is {reprlib.repr(x)} (dtype {out.dtype}): it must be numbers, {want}"
        )
    return out


def _is_real(dtype: Any) -> bool:
    """Whether these are real numbers; booleans and time spans, NumPy's integers, are not."""
    if jnp.issubdtype(dtype, np.timedelta64):
        return False
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def _float32(name: str, x: Any, want: str, bad: Callable[[Any, Any], Any]) -> Any:
    """Numbers in float32, whatever their type was on the host: checked now, or by checkify.

    Inside jit NumPy's 64-bit integers would wrap, and other byte orders be misread.
    """
    if not is_concrete(x):
        if not _is_real(x.dtype):
            raise ValueError(f"{name} has dtype {x.dtype}: it must be numbers, {want}")
        x = jnp.asarray(x).astype(jnp.float32)
        debug_check(~jnp.any(bad(jnp, x)), f"{name} must be {want}")
        return x
    given = _host(name, x, want)
    with np.errstate(over="ignore", invalid="ignore"):
        try:
            number = given.astype(np.float32)
        except OverflowError:  # Python's integers beyond float64
            number = np.full(given.shape, np.inf, np.float32)
            fits = np.abs(given) <= INT64_MAX
            number[fits] = given[fits].astype(np.float32)
    _where(name, given, np.asarray(bad(np, number)), want)
    return x.astype(jnp.float32) if isinstance(x, jax.Array) else number


def _int32(name: str, x: Any, low: int, high: int, want: str) -> Any:
    """Whole numbers in int32: checked before anything can wrap, or by checkify."""
    kind = _host(name, x, want).dtype if is_concrete(x) else x.dtype
    if not (kind.kind == "O" or jnp.issubdtype(kind, jnp.integer)):
        raise ValueError(f"{name} has dtype {kind}: it must be {want}")
    if not is_concrete(x):
        debug_check(jnp.all((x >= low) & (x <= high)), f"{name} must be {want}")
        return jnp.asarray(x).astype(jnp.int32)
    given = _host(name, x, want)
    _where(name, given, np.asarray((given < low) | (given > high), bool), want)
    return x.astype(jnp.int32) if isinstance(x, jax.Array) else given.astype(np.int32)


def host_numbers(name: str, x: Any) -> np.ndarray:
    """Concrete numbers for sums on the host: int64 if they are whole by type, else float64.

    Raises:
      ValueError: what are no numbers, or are not finite, or whole ones above 2^63-1.
    """
    given = _host(name, x, "finite")
    if given.dtype.kind == "O" or jnp.issubdtype(given.dtype, jnp.integer):
        want = f"whole numbers in {-INT64_MAX}..{INT64_MAX}"
        _where(name, given, np.asarray((given < -INT64_MAX) | (given > INT64_MAX), bool), want)
        return given.astype(np.int64)
    given = given.astype(np.float64)
    _where(name, given, ~np.isfinite(given), "finite")
    return given


def finite(name: str, x: Any) -> Any:
    """`x` in float32; ValueError if it holds NaN, infinity or more than float32 can."""
    return _float32(name, x, "finite", lambda np_, x: ~np_.isfinite(x))


def non_negative(name: str, x: Any) -> Any:
    """`x` in float32; ValueError if it holds NaN, infinity or a negative number."""
    return _float32(
        name,
        x,
        "finite and >= 0",
        lambda np_, x: ~(np_.isfinite(x) & (x >= 0)),
    )


def positive(name: str, x: Any) -> Any:
    """`x` in float32; ValueError if it holds NaN, infinity, a negative number, or zero there.

    XLA takes numbers below the smallest normal one, 1.2e-38, for zero.
    """
    return _float32(
        name,
        x,
        "finite and > 0",
        lambda np_, x: ~(np_.isfinite(x) & (x >= FLOAT32_TINY)),
    )


def in_range(name: str, x: Any, low: float, high: float) -> Any:
    """`x` in float32; ValueError if it holds NaN or anything outside [low, high]."""
    return _float32(
        name,
        x,
        f"in [{low}, {high}]",
        lambda np_, x: ~((x >= low) & (x <= high)),
    )


def int_in_range(name: str, x: Any, low: int = -INT32_MAX, high: int = INT32_MAX) -> Any:
    """`x` in int32; ValueError unless it is whole numbers in low..high."""
    return _int32(name, x, low, high, f"whole numbers in {low}..{high}")


def one_int(name: str, x: Any, low: int = -INT32_MAX, high: int = INT32_MAX) -> Any:
    """`int_in_range` of a single number, [] int32."""
    rank(name, x, 0, "[]")
    return int_in_range(name, x, low, high)


def index_below(name: str, x: Any, bound: int) -> Any:
    """`x` in int32; ValueError unless it is integers in 0..bound-1."""
    return _int32(name, x, 0, bound - 1, f"integers in 0..{bound - 1}")


def whole(name: str, x: Any) -> Any:
    """`x` in int32; ValueError unless it is whole numbers in 0..2^31-1."""
    return _int32(
        name,
        x,
        0,
        INT32_MAX,
        f"whole numbers in 0..{INT32_MAX}: count larger amounts in blocks, entries or pages "
        f"(resources.blocks)",
    )


def not_above(name: str, x: Any, other_name: str, other: Any) -> None:
    """ValueError where `x` > `other`, entry by entry, if both are concrete."""
    if not is_concrete(x, other):
        debug_check(jnp.all(x <= other), f"{name} must not exceed {other_name}")
        return
    x, other = np.broadcast_arrays(np.asarray(x), np.asarray(other))
    bad = x > other
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name}{list(at) if at else ''} is {x[at].item()}, above {other_name}, "
            f"which is {other[at].item()} there: {name} must not exceed {other_name}"
        )


def static_int(
    name: str, value: Any, least: int = 0, most: int | None = INT32_MAX, hint: str = ""
) -> int:
    """The static whole number `value`; ValueError unless in least..most, which `hint` may explain."""
    want = f"a whole number, at least {least}"
    if most is not None:
        want += " and below 2^31" if most == INT32_MAX else f" and at most {most}"
    try:
        number = operator.index(value)
    except TypeError:  # no whole number, or traced
        number = None
    if number is None or isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} is {reprlib.repr(value)}: it must be {want}, known before jit")
    if number < least or (most is not None and number > most):
        raise ValueError(f"{name} is {number}: {hint or 'it must be ' + want}")
    return number


def static_fields(container: Any, *names: str, least: int = 1) -> None:
    """Make fields of a new frozen dataclass Python's whole numbers; ValueError below `least`.

    NumPy's numbers of few bits, or without a sign, would wrap in what is computed with them.
    """
    for name in names:
        object.__setattr__(container, name, static_int(name, getattr(container, name), least))


def static_float(
    name: str,
    value: Any,
    low: float = -FLOAT32_MAX,
    high: float = FLOAT32_MAX,
    *,
    open_low: bool = False,
) -> float:
    """The static real number `value`; ValueError unless in [low, high], or (low, high]."""
    want = f"in {'(' if open_low else '['}{low}, {high}], known before jit"
    given = _host(name, value, want) if is_concrete(value) else np.zeros(2)
    if given.ndim:
        raise ValueError(f"{name} is {reprlib.repr(value)}: it must be one number {want}")
    try:
        number = float(given)
    except OverflowError:  # Python's integer beyond float64
        number = math.inf if given > 0 else -math.inf
    if not low <= number <= high or (open_low and number == low):
        raise ValueError(f"{name} is {number}: it must be {want}")
    return number


def floats(name: str, x: Any, ndim: int | tuple[int, ...], shape_hint: str) -> Any:
    """`x` as a floating-point array in its own type; ValueError for others, float64 becomes float32."""
    x = x if isinstance(x, jax.Array) else _host(name, x, f"floating point, {shape_hint}")
    floating(name, x)
    rank(name, x, ndim, shape_hint)
    if isinstance(x, jax.Array):
        return x
    return finite(name, x) if x.dtype.itemsize > 4 else x.astype(x.dtype.newbyteorder("="))


def booleans(name: str, x: Any, shape: tuple[int, ...], shape_hint: str) -> Any:
    """`x` as an array of truth values; ValueError for others, or for another shape."""
    rank(name, x, len(shape), shape_hint)
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    if x.dtype != bool or x.shape != shape:
        raise ValueError(
            f"{name} has dtype {x.dtype} and shape {x.shape}: it must be bool {shape_hint} = {shape}"
        )
    return x


def floating(name: str, x: Any) -> None:
    """ValueError unless `x` is real floating-point numbers."""
    dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{name} has dtype {dtype}: it must be real floating-point numbers; dequantize first"
        )


@jax.jit
def _largest_magnitude(x):
    """[]; NaN where any entry is, which XLA's maximum for CPUs loses in some thousand entries."""
    return jnp.where(jnp.any(jnp.isnan(x)), jnp.nan, jnp.max(jnp.abs(x)))


def largest_finite(name: str, x: Any, most: float = FLOAT32_MAX) -> None:
    """`finite` of a large array, up to `most`: only its largest magnitude leaves the device."""
    if np.size(x):
        largest = _largest_magnitude(jnp.asarray(x))
        finite(f"the largest |{name}|", largest)
        if most < FLOAT32_MAX:
            in_range(f"the largest |{name}|", largest, 0, most)
