"""Errors for bad input: each names the argument, its value and what would fit.

Shapes are checked always. Values are checked where they are concrete; a tracer has none, so under
jit the functions report a `Status`, and `debug_check` states the same conditions for
`jax.experimental.checkify`: wrap the caller in `checkify.checkify` to turn them on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

INT32_MAX = 2**31 - 1


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
    x = np.asarray(x)
    if x.ndim == 0:
        raise ValueError(f"{name} is {x.item()}: it must be {want}")
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    index = at[0] if len(at) == 1 else at
    raise ValueError(
        f"{name}[{index}] is {x[at].item()} ({int(bad.sum())} such of {x.size}): "
        f"every entry must be {want}"
    )


def _values(name: str, x: Any, want: str, bad: Callable[[Any, Any], Any], message: str) -> None:
    """Check values now if they are there, else leave a debug check for checkify."""
    dtype = np.asarray(x).dtype if is_concrete(x) else x.dtype
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise ValueError(f"{name} is {x!r} (dtype {dtype}): it must be numbers, {want}")
    if is_concrete(x):
        _where(name, x, np.asarray(bad(np, np.asarray(x))), want)
    else:
        checkify.debug_check(~jnp.any(bad(jnp, x)), message)


def finite(name: str, x: Any) -> None:
    """ValueError if `x` holds NaN or infinity."""
    _values(name, x, "finite", lambda np_, x: ~np_.isfinite(x), f"{name} must be finite")


def non_negative(name: str, x: Any) -> None:
    """ValueError if `x` holds NaN, infinity or a negative number."""
    _values(
        name,
        x,
        "finite and >= 0",
        lambda np_, x: ~(np_.isfinite(x) & (x >= 0)),
        f"{name} must be finite and >= 0",
    )


def positive(name: str, x: Any) -> None:
    """ValueError if `x` holds NaN, infinity, zero or a negative number."""
    _values(
        name,
        x,
        "finite and > 0",
        lambda np_, x: ~(np_.isfinite(x) & (x > 0)),
        f"{name} must be finite and > 0",
    )


def in_range(name: str, x: Any, low: float, high: float) -> None:
    """ValueError if `x` holds NaN or anything outside [low, high]."""
    _values(
        name,
        x,
        f"in [{low}, {high}]",
        lambda np_, x: ~((x >= low) & (x <= high)),
        f"{name} must be in [{low}, {high}]",
    )


def index_below(name: str, x: Any, bound: int) -> None:
    """ValueError unless `x` is integer and in 0..bound-1."""
    dtype = np.asarray(x).dtype if is_concrete(x) else x.dtype
    if not np.issubdtype(dtype, np.integer):
        raise ValueError(f"{name} has dtype {dtype}: it must be integers in 0..{bound - 1}")
    in_range(name, x, 0, bound - 1)


def not_above(name: str, x: Any, other_name: str, other: Any) -> None:
    """ValueError where `x` > `other`, entry by entry, if both are concrete."""
    if not is_concrete(x, other):
        checkify.debug_check(jnp.all(x <= other), f"{name} must not exceed {other_name}")
        return
    x, other = np.broadcast_arrays(np.asarray(x), np.asarray(other))
    bad = x > other
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name}{list(at) if at else ''} is {x[at].item()}, above {other_name}, "
            f"which is {other[at].item()} there: {name} must not exceed {other_name}"
        )


def whole(name: str, x: Any) -> None:
    """ValueError unless `x` is whole numbers in 0..2^31-1 (count blocks, not bytes, above that)."""
    dtype = np.asarray(x).dtype if is_concrete(x) else x.dtype
    if not np.issubdtype(dtype, np.integer):
        raise ValueError(
            f"{name} has dtype {dtype}: it must be whole numbers (int32); "
            f"count in blocks, entries or pages"
        )
    _values(
        name,
        x,
        f"in 0..{INT32_MAX}: count larger amounts in blocks (resources.blocks)",
        lambda np_, x: (x < 0) | (x > INT32_MAX),
        f"{name} must be in 0..2^31-1",
    )


def at_least(name: str, value: Any, least: int, hint: str) -> None:
    """ValueError unless the static `value` is whole and >= `least`; `hint` says what would fit."""
    if value != int(value):
        raise ValueError(f"{name} is {value}: it must be a whole number")
    if value < least:
        raise ValueError(f"{name} is {value}: {hint}")


def device_budgets(name: str, budgets: Any, device_of: Any, units_name: str, units: Any) -> None:
    """ValueError unless `budgets` [] or [G] are whole and `device_of` [U] says whose each unit is."""
    rank(name, budgets, (0, 1), "[] or [G]")
    non_empty(name, budgets)
    whole(name, budgets)
    if device_of is not None:
        rank("device_of", device_of, 1, "[U]")
        same_length("device_of", device_of, units_name, units)
        index_below("device_of", device_of, np.size(budgets))
    elif np.size(budgets) > 1:
        raise ValueError(
            f"device_of is None, but {name} has {np.size(budgets)} entries: say which unit is where"
        )


def choice(name: str, value: str, table: Any) -> Any:
    """The entry of `table` called `value`; ValueError that lists the names otherwise."""
    try:
        return table[value]
    except (KeyError, TypeError):
        raise ValueError(
            f"{name} is {value!r}: it must be one of {', '.join(map(repr, table))}"
        ) from None


def floating(name: str, x: Any) -> None:
    """ValueError unless `x` is real floating-point numbers."""
    dtype = np.asarray(x).dtype if is_concrete(x) else x.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {dtype}: it must be real floating-point numbers")


def largest_finite(name: str, x: Any) -> None:
    """`finite` of a large array: only its largest magnitude leaves the device."""
    if np.size(x):
        finite(f"the largest |{name}|", jnp.max(jnp.abs(jnp.asarray(x))))
