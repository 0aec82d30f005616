"""The choice of tiles over a mesh: one price for the heads of an example, wherever they are."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jbalance import checks
from jbalance.attention import TilePlan
from jbalance.attention import choose as choose_tiles
from jbalance.sharded._layout import Dims, shapes, sizes_of, spread


def choose(
    value: jax.Array,
    num_tiles: jax.Array | int,
    *,
    mesh: Mesh,
    batch: str | None = None,
    heads: str | None = None,
    **options: Any,
) -> TilePlan:
    """`attention.choose` over a mesh: one price for the tiles of all heads of an example.

    Over heads a pass of the search exchanges one scalar an example; over examples nothing is.

    Args:
      value: [B, H, I, J] of computing each tile.
      num_tiles: [] or [B] int, for all heads and query blocks of an example.
      mesh: of the devices.
      batch: the mesh axis that examples are split over, or None.
      heads: that of query heads.
      **options: those of `attention.choose`: num_queries, num_keys, block_q, block_k, ...

    Returns:
      The plan of one device: the same tiles.

    Raises:
      ValueError: those of `attention.choose`; an axis that the mesh does not have.
    """
    if checks.is_concrete(num_tiles):  # too few for any values
        jax.eval_shape(lambda x: choose_tiles(x, num_tiles, **options), shapes(value))
    return _choose(value, num_tiles, tuple(options.items()), mesh, batch, heads)


@functools.partial(jax.jit, static_argnames=("options", "mesh", "batch", "heads"))
def _choose(value, num_tiles, options, mesh, batch, heads):
    run: Any = functools.partial(choose_tiles, **dict(options))
    want = jax.eval_shape(run, *shapes((value, num_tiles)))
    num_heads = value.shape[1]
    sizes = sizes_of(mesh, batch, heads, value.shape[0], num_heads, num_heads)
    axis_of = {"B": batch, "H": heads}
    there = jnp.arange(sizes["H"]) < num_heads
    lists = ("blocks", "count", "dropped")

    def of_device(args):
        value, num_tiles, there = args
        plan = run(value, num_tiles, where=there, axis_name=heads)
        return tuple(getattr(plan, name) for name in lists)

    out = spread(
        of_device,
        mesh,
        axis_of,
        sizes,
        (value, jnp.broadcast_to(jnp.asarray(num_tiles, jnp.int32), value.shape[:1]), there),
        (Dims("BHIJ"), Dims("B"), Dims("H")),
        (Dims("BHIC"), Dims("BHI"), Dims("BHI")),
        tuple(getattr(want, name).shape for name in lists),
    )
    return dataclasses.replace(want, **dict(zip(lists, out, strict=True)))
