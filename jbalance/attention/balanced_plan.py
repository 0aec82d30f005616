"""Block-sparse attention by tile importance: score the tiles, choose within a budget."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jbalance import checks, importance
from jbalance.attention.choose import choose
from jbalance.attention.plan import TilePlan
from jbalance.tiling import Tiling
from jbalance.types import TileScorer


def balanced_plan(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    budget_tiles: jax.Array | int,
    tiling: Tiling,
    *,
    scorer: TileScorer = importance.tile_error,
    rows: int = 8,
    **options: Any,
) -> TilePlan:
    """Block-sparse attention plan: the tiles without which the output would change most.

    Args:
      q: [B, T, H, D] float queries, after the rotary embedding.
      k: [B, S, K, D] float keys; H a multiple of K.
      v: [B, S, K, D] float values.
      budget_tiles: [] or [B] int, tiles of all heads of an example together; all would be
        H `tiling.num_tiles`. It may be traced.
      tiling: the tiles, for T queries and S keys.
      scorer: `importance.tile_error`, or `importance.tile_sketch` for a third of its cost.
      rows: queries of a block that the scorer looks at.
      **options: those of `choose`: floor, capacity, ...

    Returns:
      A plan of budget_tiles tiles; no gradient flows through the choice.

    Raises:
      ValueError: those of the scorer and of `choose`.
    """
    hint = "[B, T, H, D] or [B, S, K, D]"
    q, k, v = (
        jax.lax.stop_gradient(checks.floats(name, x, 4, hint))
        for name, x in (("q", q), ("k", k), ("v", v))
    )
    checks.rank("budget_tiles", budget_tiles, (0, 1), "[] or [B]")
    if np.ndim(budget_tiles):
        checks.length("budget_tiles", budget_tiles, q.shape[0], "B")
    budget_tiles = checks.whole("budget_tiles", budget_tiles)
    return choose(scorer(q, k, v, tiling, rows=rows), budget_tiles, tiling, **options)
