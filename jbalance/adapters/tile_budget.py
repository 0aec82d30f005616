"""Block-sparse attention of a Flax layer within its budget of tiles."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import attention, checks, importance
from jbalance.adapters.attention_fn import attention_fn
from jbalance.attention import TileBudget, TilePlan, Tiling


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a layer's tiles are made and weighed; static.

    Attributes:
      block_q: queries of a tile.
      block_k: keys of a tile.
      rows: queries of a block that are looked at. More of them, and smaller blocks of keys, choose
        better and cost more: docs/notes/tiles.md has the figures.
      causal: whether masks that are traced, such as those made inside of a jitted function, are causal:
        nothing in them can be looked at, and a budget is a part of the visible tiles. None where no mask
        comes traced; `is_causal` and masks with values speak for themselves.
      backend: of `attention.attend`; None for the platform's. An export for several platforms at once
        must name "xla".
    """

    block_q: int = 64
    block_k: int = 16
    rows: int = 8
    causal: bool | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        checks.static_fields(self, "block_q", "block_k", "rows")
        checks.static_int("rows", self.rows, 1, self.block_q)

    def tiling(self, num_queries: int, num_keys: int, causal: bool | None) -> Tiling:
        """The grid of a call, whose mask is causal, is not, or cannot be looked at (None).

        Raises:
          ValueError: a mask of which nothing is known, or one that is not what `causal` says.
        """
        known = self.causal if causal is None else causal
        if known is None:
            raise ValueError(
                "mask is traced: whether it is causal cannot be seen, and so neither how many tiles the "
                "budget is a part of. Give is_causal=True in its place (flax.nnx), make it outside of "
                "the jitted function, or say Tiles(causal=True) or Tiles(causal=False)"
            )
        if self.causal and not known:
            raise ValueError(
                "tiles.causal is True, but there is no mask or it shows keys after a query: give "
                "is_causal=True or a causal mask, or leave tiles.causal None"
            )
        return Tiling(num_queries, num_keys, self.block_q, self.block_k, known)


def attend_within(
    budget: TileBudget,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tiles: Tiles,
    **given: Any,
) -> tuple[jax.Array, TileBudget]:
    """Block-sparse `attention_fn`: the tiles of highest score within a layer's budget.

    Args:
      budget: the layer's.
      query: [..., T, H, D].
      key: [..., S, K, D].
      value: [..., S, K, D].
      tiles: how they are made.
      given: what Flax's modules hand to an attention function besides.

    Returns:
      [..., T, H, D], of round(fraction x all tiles) for each example, all heads together; and the
      budget with the scores. A score is the squared error of the layer's output without a tile,
      relative to that output's square, so that layers compare.

    Raises:
      ValueError: a traced mask, unless `tiles.causal` says whether it is causal.
    """
    seen: dict[str, Any] = {}

    def plan_of(q: jax.Array, k: jax.Array, v: jax.Array, /, *, causal: bool | None) -> TilePlan:
        tiling = tiles.tiling(q.shape[1], k.shape[1], causal)
        visible, always = attention.candidates(tiling)
        limits = np.array([always.sum(), visible.sum()], np.int32) * q.shape[2]
        seen.update(visible=visible, limits=limits)

        def scorer(*args: Any, **options: Any) -> jax.Array:
            seen["score"] = importance.tile_sketch(*args, **options)
            return seen["score"]

        number = jnp.round(budget.fraction * int(limits[1])).astype(jnp.int32)
        return attention.balanced_plan(q, k, v, number, tiling, scorer=scorer, rows=tiles.rows)

    y = attention_fn(plan_of, backend=tiles.backend)(query, key, value, **given)
    energy = jnp.mean(jnp.square(jax.lax.stop_gradient(y).astype(jnp.float32)))
    energy *= y.shape[-1] * y.shape[-2]  # of a query, all heads together
    score = seen["score"] / jnp.maximum(energy, jnp.finfo(jnp.float32).tiny)
    visible = np.broadcast_to(seen["visible"], score.shape[1:]).reshape(-1)
    curve = importance.worth_curve(score.reshape(score.shape[0], -1), visible)
    return y, TileBudget(budget.fraction, curve, jnp.asarray(seen["limits"]))
