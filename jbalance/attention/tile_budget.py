"""Budgets of tiles that adapt: what each layer may compute, and the balancer that moves budgets."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import checks
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
        """Before the first call; `fraction` in 0..1."""
        checks.rank("fraction", fraction, 0, "[]")
        fraction = checks.in_range("fraction", fraction, 0, 1)
        return cls(
            jnp.float32(fraction), jnp.zeros(CURVE_BINS, jnp.float32), jnp.zeros(2, jnp.int32)
        )


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
        density = checks.in_range("density", density, 0, 1)
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
