"""Arrays onto a mesh: padded to what divides, laid out, and cut again."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding

from jbalance import checks


class Padding(NamedTuple):
    """What a number of units takes on devices that all hold as many."""

    size: int  # with the padding
    waste: float  # the part of it that is padding


def padding(num_units: int, num_devices: int) -> Padding:
    """The least number that divides by the devices, and how much of it is padding.

    >>> padding(9, 8)
    Padding(size=16, waste=0.4375)

    Raises:
      ValueError: a number below 1.
    """
    num_units = checks.static_int("num_units", num_units, 1)
    num_devices = checks.static_int("num_devices", num_devices, 1)
    size = -(-num_units // num_devices) * num_devices
    return Padding(size, 1 - num_units / size)


def operands(q: Any, k: Any, v: Any) -> list[Any]:
    """Heads' arrays in their own type; ValueError for others, or concrete ones that are not finite."""
    hints = {"q": "[B, T, H, D]", "k": "[B, S, K, D]", "v": "[B, S, K, D]"}
    out = [
        checks.floats(name, x, 4, hint)
        for (name, hint), x in zip(hints.items(), (q, k, v), strict=True)
    ]
    for name, x in zip(hints, out, strict=True):
        checks.non_empty(name, x)
        checks.largest_finite(name, x)
    return out


def axis_size(mesh: Mesh, name: str, axis_name: str | None) -> int:
    """Devices along an axis of the mesh, 1 for None; `name` is that of the argument, for errors."""
    if axis_name is None:
        return 1
    checks.instance("mesh", mesh, Mesh)
    if not isinstance(axis_name, str) or axis_name not in mesh.shape:
        raise ValueError(
            f"{name} is {reprlib.repr(axis_name)}: the mesh has the axes {tuple(mesh.axis_names)}"
        )
    return mesh.shape[axis_name]


def sizes_of(
    mesh: Mesh,
    batch: str | None,
    heads: str | None,
    num_examples: int,
    num_heads: int,
    num_kv_heads: int,
    whole_groups: bool = False,
) -> dict[str, int]:
    """What examples and heads are filled up to.

    Query heads that share keys stay together, unless all do: then every device has the one key/value
    head, and `whole_groups` says whether the query heads must stay together even so.
    """
    num_devices = axis_size(mesh, "heads", heads)
    unit = 1 if num_kv_heads == 1 and not whole_groups else num_heads // num_kv_heads
    size = padding(num_heads // unit, num_devices).size
    return {
        "B": padding(num_examples, axis_size(mesh, "batch", batch)).size,
        "K": size,
        "H": size * unit,
    }


def lay_out(x: jax.Array, mesh: Mesh, spec: Sequence[str | None]) -> jax.Array:
    """x under jit with its axes on those of the mesh, be they of type Auto or Explicit."""
    type_of = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))

    def sharding(kind: AxisType) -> NamedSharding:
        return NamedSharding(mesh, jax.P(*(n if n and type_of[n] == kind else None for n in spec)))

    if AxisType.Explicit in type_of.values():
        x = jax.sharding.reshard(x, sharding(AxisType.Explicit))
    if AxisType.Auto in type_of.values():
        x = lax.with_sharding_constraint(x, sharding(AxisType.Auto))
    return x


def shapes(tree: Any) -> Any:
    """What `jax.eval_shape` needs of arrays, without where they lie."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


def padded(x: jax.Array, sizes: Mapping[int, int]) -> jax.Array:
    """x with zeros at the end of axes, to the sizes given for some."""
    width = [(0, sizes.get(axis, n) - n) for axis, n in enumerate(x.shape)]
    return jnp.pad(x, width) if any(w for _, w in width) else x


def cut(x: jax.Array, mesh: Mesh, spec: Sequence[str | None], sizes: Mapping[int, int]) -> Any:
    """x without the padding of some axes. What was padded comes to every device of its axis: as many
    as before do not divide by them."""
    sizes = {axis: n for axis, n in sizes.items() if x.shape[axis] != n}
    if not sizes:
        return x
    x = lay_out(x, mesh, [None if axis in sizes else name for axis, name in enumerate(spec)])
    for axis, n in sizes.items():
        x = lax.slice_in_dim(x, 0, n, axis=axis)
    return x


class Dims(NamedTuple):
    """What the axes of an array are: a letter each, `BTHD`. Axes of size 1 are shared, not split."""

    letters: str

    def spec(self, shape: Sequence[int], axis_of: Mapping[str, str | None]) -> list[str | None]:
        """The mesh axis of each axis of an array of this shape."""
        named = zip(self.letters, shape, strict=True)
        return [axis_of.get(letter) if n > 1 else None for letter, n in named]


def spread(
    function: Callable[..., Any],
    mesh: Mesh,
    axis_of: Mapping[str, str | None],
    sizes: Mapping[str, int],
    args: Any,
    dims: Any,
    out_dims: tuple[Dims, ...],
    out_shapes: tuple[tuple[int, ...], ...],
) -> tuple[jax.Array, ...]:
    """`function` of every device's part of some arrays, under jit.

    Args:
      function: of a pytree like `args`, with a tuple of results.
      mesh: of the devices.
      axis_of: the mesh axis of each letter that is split.
      sizes: what each letter that is split is filled up to; those that do not divide must be here.
      args: a pytree of arrays.
      dims: their `Dims`, a pytree of the same structure.
      out_dims: those of its results.
      out_shapes: their shapes, without padding.

    Returns:
      The results, a tuple of arrays.
    """

    def place(x, d):
        target = {
            axis: sizes[letter]
            for axis, letter in enumerate(d.letters)
            if letter in sizes and x.shape[axis] > 1
        }
        x = padded(x, target)
        return lay_out(x, mesh, d.spec(x.shape, axis_of))

    def is_dims(d):
        return isinstance(d, Dims)

    args = jax.tree.map(lambda d, x: place(x, d), dims, args, is_leaf=is_dims)
    specs = jax.tree.map(lambda d, x: jax.P(*d.spec(x.shape, axis_of)), dims, args, is_leaf=is_dims)
    outs = [[axis_of.get(letter) for letter in d.letters] for d in out_dims]
    out_specs = tuple(jax.P(*out) for out in outs)
    results = jax.shard_map(function, mesh=mesh, in_specs=(specs,), out_specs=out_specs)(args)
    parts = zip(results, outs, out_shapes, strict=True)
    return tuple(cut(x, mesh, out, dict(enumerate(shape))) for x, out, shape in parts)
