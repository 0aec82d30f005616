"""Budgeted top-k over tiles on a mesh: one price for the heads of an example, wherever they are."""

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
from jbalance.tiling import Tiling


def choose(
    score: jax.Array,
    num_tiles: jax.Array | int,
    tiling: Tiling,
    *,
    mesh: Mesh,
    batch: str | None = None,
    heads: str | None = None,
    **options: Any,
) -> TilePlan:
    """`attention.choose` over a mesh: one price for the tiles of all heads of an example.

    Over heads a pass of the search exchanges one scalar an example; over examples nothing is.

    Args:
      score: [B, H, I, J], what computing each tile gains.
      num_tiles: [] or [B] int, for all heads and query blocks of an example.
      tiling: the tiles.
      mesh: of the devices.
      batch: the mesh axis that examples are split over, or None.
      heads: that of query heads.
      **options: those of `attention.choose`: floor, capacity.

    Returns:
      The plan of one device: the same tiles.

    Raises:
      ValueError: those of `attention.choose`; an axis that the mesh does not have.
    """
    checks.instance("tiling", tiling, Tiling)
    checks.rank("score", score, 4, "[B, H, I, J]")
    checks.non_empty("score", score)
    score = checks.non_negative("score", score)
    checks.rank("num_tiles", num_tiles, (0, 1), "[] or [B]")
    num_tiles = checks.whole("num_tiles", num_tiles)
    if checks.is_concrete(num_tiles):  # too few for any values
        jax.eval_shape(lambda x: choose_tiles(x, num_tiles, tiling, **options), shapes(score))
    return _choose(score, num_tiles, tiling, tuple(options.items()), mesh, batch, heads)


@functools.partial(jax.jit, static_argnames=("tiling", "options", "mesh", "batch", "heads"))
def _choose(score, num_tiles, tiling, options, mesh, batch, heads):
    run: Any = functools.partial(choose_tiles, tiling=tiling, **dict(options))
    want = jax.eval_shape(run, *shapes((score, num_tiles)))
    num_heads = score.shape[1]
    sizes = sizes_of(mesh, batch, heads, score.shape[0], num_heads, num_heads)
    axis_of = {"B": batch, "H": heads}
    valid = jnp.arange(sizes["H"]) < num_heads
    lists = ("blocks", "count", "dropped")

    def of_device(args):
        score, num_tiles, valid = args
        plan = run(score, num_tiles, where=valid, axis_name=heads)
        return tuple(getattr(plan, name) for name in lists)

    out = spread(
        of_device,
        mesh,
        axis_of,
        sizes,
        (score, jnp.broadcast_to(jnp.asarray(num_tiles, jnp.int32), score.shape[:1]), valid),
        (Dims("BHIJ"), Dims("B"), Dims("H")),
        (Dims("BHIC"), Dims("BHI"), Dims("BHI")),
        tuple(getattr(want, name).shape for name in lists),
    )
    return dataclasses.replace(want, **dict(zip(lists, out, strict=True)))
