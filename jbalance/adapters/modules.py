"""Adaptive block-sparse attention in Flax models: each layer's budget of tiles moves while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from flax import linen, nnx

from jbalance import checks
from jbalance.adapters.attention_fn import check_module
from jbalance.adapters.tile_budget import Tiles, attend_within
from jbalance.attention import TileBalancer, TileBudget

Model = TypeVar("Model", bound=nnx.Module)
COLLECTION = "balance"  # of linen's variables


class BalanceVariable(nnx.Variable):
    """State of balancing in an nnx model: neither trained nor a part of the stock model's state."""


def set_attention_fn(model: Model, attention_fn: Callable[..., jax.Array]) -> Model:
    """The model, every `nnx.MultiHeadAttention` in it with that `attention_fn`; changed in place.

    Parameters and checkpoints stay as they are. Linen modules take theirs when they are made.

    Args:
      model: an nnx module.
      attention_fn: such as `adapters.attention_fn()`.

    Raises:
      ValueError: no such module in it, or an attention_fn that is no function.
    """
    checks.function("attention_fn", attention_fn)
    for _, module in attentions(model):
        module.attention_fn = attention_fn
    return model


def attentions(model: nnx.Module) -> list[tuple[tuple[Any, ...], nnx.MultiHeadAttention]]:
    """Path and module of each in a model, in the order of its graph; ValueError if there are none."""
    all_ = ((p, x) for p, x in nnx.iter_graph(model) if isinstance(x, nnx.MultiHeadAttention))
    found = [(p, x) for p, x in all_ if x.num_heads]  # `prune_heads` may have left none
    if not found:
        raise ValueError(f"model is a {type(model).__name__} without any nnx.MultiHeadAttention")
    return found


def layer_by_layer(
    model: nnx.Module,
) -> list[tuple[tuple[Any, ...], nnx.MultiHeadAttention]]:
    """`attentions`; ValueError for layers stacked in one module, whose arrays have an axis of layers."""
    found = attentions(model)
    for path, layer in found:
        if np.ndim(layer.query.kernel[...]) != 3:
            raise ValueError(
                f"model has layers stacked in one module at {path}: their attention is not called layer "
                f"by layer; make them one by one, in an nnx.List, or decode them by adapters.decoder"
            )
    return found


def kv_heads_of(layer: nnx.MultiHeadAttention) -> int:
    """K; the module of an older Flax has no groups of heads, and K is that of its queries."""
    return getattr(layer, "num_kv_heads", layer.num_heads)


class BalancedAttention(nnx.Module):
    """An `attention_fn` of one layer, within a budget of tiles; nnx.

    Args:
      fraction: part of the tiles to begin with.
      tiles: how they are made.
    """

    def __init__(self, fraction: float, tiles: Tiles) -> None:
        self.budget = BalanceVariable(TileBudget.of(fraction))
        self.tiles = tiles

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, **given: Any) -> Any:
        y, seen = attend_within(self.budget.get_value(), query, key, value, self.tiles, **given)
        self.budget.set_value(seen)
        return y


def budgets_of(model: nnx.Module) -> list[TileBudget]:
    """Of the layers of an nnx model that `NnxBalance` balances, in the order of its graph."""
    return [attention.budget.get_value() for attention in _balanced(model)]


def _balanced(model: nnx.Module) -> list[BalancedAttention]:
    return [x for _, x in nnx.iter_graph(model) if isinstance(x, BalancedAttention)]


class LinenBalancedAttention(linen.Module):
    """An `attention_fn` of one layer, within a budget of tiles; linen.

    The budget is a variable of the collection "balance", which training steps apply as mutable, like
    batch statistics, and `TileBalancer.update` changes.

    Attributes:
      fraction: part of the tiles to begin with.
      tiles: how they are made.
    """

    fraction: float
    tiles: Tiles = Tiles()

    @linen.compact
    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool = False,
        dtype: Any = None,
        module: Any = None,
    ) -> jax.Array:
        # Linen hands over what is named here and nothing else.
        check_module(module)
        budget = self.variable(COLLECTION, "budget", TileBudget.of, self.fraction)
        y, seen = attend_within(
            budget.value,
            query,
            key,
            value,
            self.tiles,
            bias=bias,
            mask=mask,
            dropout_rng=dropout_rng,
            dropout_rate=dropout_rate,
            broadcast_dropout=broadcast_dropout,
            deterministic=deterministic,
            dtype=dtype,
        )
        if self.is_mutable_collection(COLLECTION):
            budget.value = seen
        return y


class NnxBalance(nnx.Module):
    """Balances the attention of an nnx model in place, and goes on while it trains.

        balance = adapters.NnxBalance(model, density=0.5)
        ...                                  # inside the jitted step, after the gradient:
        balance.update(model)                # or update(model, density), which may be a traced value

    Each layer computes its tiles of most value, chosen in every call from its own queries and keys; how
    many that are, `update` decides from what the layers saw. Nothing compiles anew. A block of queries
    has one choice, so which keys a query sees depends a little on the queries behind it in its block:
    likelihoods of an autoregressive model are strictly its own only with all tiles.

    Args:
      model: an nnx module with `nnx.MultiHeadAttention` in it, whose `attention_fn` is replaced.
      density: part of all tiles, in (0, 1].
      tiles: how they are made and weighed; `Tiles(causal=True)` where the model's causal masks are made
        inside of a jitted function.
      balancer: how they are moved.

    Raises:
      ValueError: no attention in the model, layers stacked in one module, a density outside (0, 1].
    """

    def __init__(
        self,
        model: nnx.Module,
        density: float,
        tiles: Tiles = Tiles(),  # noqa: B008  (frozen)
        balancer: TileBalancer = TileBalancer(),  # noqa: B008
    ) -> None:
        density = checks.static_float("density", density, 0, 1, open_low=True)
        checks.instance("tiles", tiles, Tiles)
        checks.instance("balancer", balancer, TileBalancer)
        for _, layer in layer_by_layer(model):
            layer.attention_fn = nnx.data(BalancedAttention(density, tiles))
        self.density, self.balancer = density, balancer
        self.state = BalanceVariable(balancer.init(budgets_of(model)))

    def update(self, model: nnx.Module, density: jax.Array | float | None = None) -> None:
        """Move tiles between the layers, from what they saw in their last call; changes the model."""
        density = self.density if density is None else density
        budgets, state = self.balancer.update(budgets_of(model), self.state.get_value(), density)
        self.state.set_value(state)
        for attention, budget in zip(_balanced(model), budgets, strict=True):
            attention.budget.set_value(budget)
