"""Importance of tokens and tiles over a mesh: of examples, and of heads with those that share keys."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from jbalance import checks
from jbalance.sharded._layout import Dims, operands, shapes, sizes_of, spread
from jbalance.tiling import Tiling
from jbalance.types import TileScorer


def token_importance(
    scorer: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mesh: Mesh,
    batch: str | None = None,
    heads: str | None = None,
) -> jax.Array:
    """A scorer of `importance.TOKEN_SCORERS` for a batch over a mesh; nothing is exchanged.

    Args:
      scorer: q [T, H, D], k and v [S, K, D] -> [K, S]. A new function compiles anew.
      q: [B, T, H, D].
      k: [B, S, K, D].
      v: [B, S, K, D].
      mesh: of the devices.
      batch: the mesh axis that examples are split over, or None.
      heads: that of key/value heads, with the query heads that share them.

    Returns:
      [B, K, S].

    Raises:
      ValueError: shapes; an axis that the mesh does not have.
    """
    checks.function("scorer", scorer)
    return _scores(*operands(q, k, v), scorer, (), True, mesh, batch, heads)


def tile_importance(
    scorer: TileScorer,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tiling: Tiling,
    *,
    mesh: Mesh,
    batch: str | None = None,
    heads: str | None = None,
    rows: int = 8,
) -> jax.Array:
    """`importance.tile_error` or `tile_sketch` over a mesh; nothing is exchanged.

    Args:
      scorer: one of the two.
      q: [B, T, H, D].
      k: [B, S, K, D].
      v: [B, S, K, D].
      tiling: the tiles, for T queries and S keys.
      mesh: of the devices.
      batch: the mesh axis that examples are split over, or None.
      heads: that of key/value heads, with the query heads that share them.
      rows: queries of a block that the scorer looks at.

    Returns:
      [B, H, I, J].

    Raises:
      ValueError: shapes; an axis that the mesh does not have.
    """
    checks.function("scorer", scorer)
    checks.instance("tiling", tiling, Tiling)
    options = ("tiling", tiling), ("rows", checks.static_int("rows", rows, 1))
    return _scores(*operands(q, k, v), scorer, options, False, mesh, batch, heads)


@functools.partial(
    jax.jit, static_argnames=("scorer", "options", "by_example", "mesh", "batch", "heads")
)
def _scores(q, k, v, scorer, options, by_example, mesh, batch, heads):
    """[B, K, S] of a scorer of one example, or [B, H, I, J] of one of a batch."""
    run = functools.partial(scorer, **dict(options))
    run = jax.vmap(run) if by_example else run
    # Its errors, of the shapes that the caller knows.
    want = jax.eval_shape(run, *shapes((q, k, v)))
    num_heads = q.shape[2], k.shape[2]
    sizes = sizes_of(mesh, batch, heads, q.shape[0], *num_heads, whole_groups=by_example)
    axis_of = {"B": batch, "H": heads, "K": heads}
    dims, out_dims = (Dims("BTHD"), *[Dims("BSKD")] * 2), (Dims("BKS" if by_example else "BHIJ"),)
    (out,) = spread(
        lambda x: (run(*x),), mesh, axis_of, sizes, (q, k, v), dims, out_dims, (want.shape,)
    )
    return out
