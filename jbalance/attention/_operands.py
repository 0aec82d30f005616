"""Operands, masks and rules: the contract between `attend` and its back ends."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jbalance.attention.plan import TilePlan


class Operands(NamedTuple):
    """The arrays with gradients. None is absent, at no cost."""

    q: jax.Array  # [B, T, H, D]
    k: jax.Array  # [B, S, K, D]
    v: jax.Array  # [B, S, K, E]: E is N D with task_shares, else D
    bias: jax.Array | None  # [B|1, H|1, T|1, S|1] float32
    relative_bias: jax.Array | None  # [H|1, T + S - 1] float32


class Visibility(NamedTuple):
    """Which query sees which key: the tiles, the documents, and the position of the queries."""

    plan: TilePlan
    q_ids: jax.Array | None  # [B, T] int32
    k_ids: jax.Array | None  # [B, S] int32
    offset: jax.Array | None  # [] int32, the position of query 0 among the keys; None for S - T


class Rules(NamedTuple):
    """Static rules: what is known when a program is compiled."""

    scale: float
    soft_cap: float | None
    causal: bool
    window: int | None


def first_position(where: Visibility) -> jax.Array | int:
    """The position of query 0 among the keys."""
    if where.offset is None:
        return where.plan.num_keys - where.plan.num_queries
    return where.offset


def visible(rules: Rules, q_at: jax.Array, k_at: jax.Array) -> jax.Array | bool:
    """Whether queries at `q_at` [bq, 1] see keys at `k_at` [bk], by their positions among the keys."""
    seen: jax.Array | bool = True
    if rules.causal:
        seen = k_at <= q_at
    if rules.window is not None:
        near = k_at > q_at - rules.window
        near = near if rules.causal else near & (k_at < q_at + rules.window)
        seen = seen & near
    return seen


def soft_capped(x: jax.Array, cap: float | None) -> jax.Array:
    """cap tanh(x / cap), or x."""
    return x if cap is None else cap * jnp.tanh(x / cap)
