"""Block-sparse attention within a layer's budget of tiles, and the balancer that moves budgets."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import attention, checks, importance
from jbalance.adapters.attention_fn import attention_fn
from jbalance.attention import TilePlan, Tiling
from jbalance.balance import Balancer, BalanceState, balancer
from jbalance.importance import CURVE_BINS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileBudget:
    """Tile budget of one layer (or of L, stacked), and the scores of its tiles in the last call."""

    fraction: jax.Array  # [] float32 part of the tiles of all heads
    curve: jax.Array  # [M] float32 `importance.worth_curve` of the last call, of one example
    limits: jax.Array  # [2] int32 fewest and most tiles of all heads in the last call; 0 before any

    @classmethod
    def of(cls, fraction: float) -> TileBudget:
        """Before the first call."""
        return cls(jnp.float32(fraction), jnp.zeros(CURVE_BINS), jnp.zeros(2, jnp.int32))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a layer's tiles are made and weighed; static.

    Attributes:
      block_q: queries of a tile.
      block_k: keys of a tile.
      rows: queries of a block that are looked at. More of them, and smaller blocks of keys, choose
        better and cost more: docs/design.md has the figures.
      causal: whether masks that are traced, such as those made inside of a jitted function, are causal:
        nothing in them can be looked at, and a budget is a part of the visible tiles. None where no mask
        comes traced; `is_causal` and masks with values speak for themselves.
    """

    block_q: int = 64
    block_k: int = 16
    rows: int = 8
    causal: bool | None = None

    def __post_init__(self) -> None:
        checks.positive("block_q", self.block_q)
        checks.positive("block_k", self.block_k)
        checks.in_range("rows", self.rows, 1, self.block_q)

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

    y = attention_fn(plan_of)(query, key, value, **given)
    energy = jnp.mean(jnp.square(jax.lax.stop_gradient(y).astype(jnp.float32)))
    energy *= y.shape[-1] * y.shape[-2]  # of a query, all heads together
    score = seen["score"] / jnp.maximum(energy, jnp.finfo(jnp.float32).tiny)
    visible = np.broadcast_to(seen["visible"], score.shape[1:]).reshape(-1)
    curve = importance.worth_curve(score.reshape(score.shape[0], -1), visible)
    return y, TileBudget(budget.fraction, curve, jnp.asarray(seen["limits"]))


@dataclasses.dataclass(frozen=True)
class TileBalancer:
    """Moves tiles between layers inside of a training step: `init` and `update`, as in optax.

    Attributes:
      rule: "priced" (one price for the tiles of all layers), or a rule of `shares.SHARE_RULES` for
        layers that weigh what all of their tiles together do.
      decay: of the moving average over steps.
    """

    rule: str = "priced"
    decay: float = 0.9

    def __post_init__(self) -> None:
        self._balancer(0, 0)  # which checks both

    def init(self, budgets: Any) -> BalanceState:
        """The state for a pytree of `TileBudget`, such as linen's collection "balance"."""
        return self._balancer(0, 0).init(_stacked(budgets).fraction.size)

    def update(
        self, budgets: Any, state: BalanceState, density: jax.Array | float
    ) -> tuple[Any, BalanceState]:
        """The layers' fractions anew, from what they saw in their last call.

        Args:
          budgets: a pytree of `TileBudget`, of a layer each or of several (a scan's, stacked).
          state: of `init` or the last update.
          density: [] part of all layers' tiles together, in 0..1.

        Returns:
          Budgets whose tiles sum to floor(density x all of them); and the state. A layer that has not
          been called yet keeps its fraction.

        Raises:
          ValueError: a concrete density outside 0..1.
        """
        checks.in_range("density", density, 0, 1)
        all_layers = _stacked(budgets)
        least, most = all_layers.limits[:, 0], all_layers.limits[:, 1]
        total = jnp.floor(density * jnp.sum(most)).astype(jnp.int32)
        w = all_layers.curve if self.rule == "priced" else _worth(all_layers.curve)
        out, state = self._balancer(least, most).update(w, state, total)
        given = out.allocation.amount / jnp.maximum(most, 1)
        fraction = jnp.where(most > 0, given, all_layers.fraction).astype(jnp.float32)
        each, tree = jax.tree.flatten(budgets, is_leaf=_is_budget)
        ends = np.cumsum([x.fraction.size for x in each])[:-1]
        parts = [
            part.reshape(x.fraction.shape)
            for part, x in zip(jnp.split(fraction, ends), each, strict=True)
        ]
        new = [dataclasses.replace(x, fraction=part) for x, part in zip(each, parts, strict=True)]
        return jax.tree.unflatten(tree, new), state

    def _balancer(self, floor: jax.Array | int, cap: jax.Array | int) -> Balancer:
        return balancer(decay=self.decay, rule=self.rule, floor=floor, cap=cap)


def _is_budget(x: Any) -> bool:
    return isinstance(x, TileBudget)


def _stacked(budgets: Any) -> TileBudget:
    """All layers of a pytree as one, each field with a leading axis L."""
    each = jax.tree.leaves(budgets, is_leaf=_is_budget)
    if not each or not all(map(_is_budget, each)):
        raise ValueError(
            "budgets holds no TileBudget, or other things: it must be a pytree of them"
        )
    fields = {"fraction": (-1,), "curve": (-1, CURVE_BINS), "limits": (-1, 2)}
    return TileBudget(
        **{
            name: jnp.concatenate([getattr(x, name).reshape(shape) for x in each])
            for name, shape in fields.items()
        }
    )


def _worth(curves: jax.Array) -> jax.Array:
    """[L] what all tiles of a layer together are worth: each that of its half octave's lower end."""
    ends = np.arange(CURVE_BINS, dtype=np.int32) << 22
    return curves @ jnp.asarray(ends.view(np.float32))
