"""What the kernels over tiles share, on GPUs and TPUs: what they are given, and the logits of a tile."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbalance._exp2 import LOG2_E
from jbalance.attention import _operands
from jbalance.attention._operands import Operands, Rules, Visibility
from jbalance.attention._slices import pad, padded
from jbalance.attention.partial import EMPTY, NO_TOP, Partial
from jbalance.attention.plan import TilePlan


def unsupported_bias(operands: Operands, plan: TilePlan) -> str | None:
    """Why no kernel can run these biases and this plan, or None."""
    if operands.relative_bias is not None:
        return "relative_bias must be None"
    if operands.bias is not None and operands.bias.shape[2] != 1:
        return f"bias has shape {operands.bias.shape}: it must be that of keys, [B|1, H|1, 1, S|1]"
    if plan.capacity == 0:
        return "plan has capacity 0: it must be at least 1"
    return None


class Inputs(NamedTuple):
    """What every kernel reads: arrays of whole blocks, their specifications, or references."""

    q: Any  # [B, T, H, D]
    k: Any  # [B, S, K, D]
    v: Any  # [B, S, K, E]
    bias: Any  # [B|1, H|1, 1, S] or None
    q_ids: Any  # [B, T] or None
    k_ids: Any  # [B, S] or None
    offset: Any  # [1]
    blocks: Any  # [B|1, H|1, I, C], or of the transposed plan
    count: Any  # [B|1, H|1, I]


class Saved(NamedTuple):
    """What the backward kernels read besides."""

    dy: Any  # [B, T, H, E]
    lse: Any  # [B, H, T] in base 2, infinity where there is nothing
    delta: Any  # [B, H, T], what is subtracted from the gradient of the weights


class Side(NamedTuple):
    """The queries or keys of a tile, along one axis of its scores."""

    at: Any  # positions among the keys
    ids: Any  # or None
    bias: Any = None


def saved_rows(out: Partial, cotangent: Partial, short: int) -> tuple[jax.Array, jax.Array]:
    """lse and delta [B, H, T] of `Saved`; `short` rows behind the end see nothing."""
    lse = jnp.where(out.lse <= NO_TOP, -EMPTY, out.lse * LOG2_E)
    products = cotangent.y.astype(jnp.float32) * out.y.astype(jnp.float32)
    delta = jnp.sum(products, axis=-1) - cotangent.lse
    return jnp.swapaxes(pad(lse, 1, short, -EMPTY), 1, 2), jnp.swapaxes(pad(delta, 1, short), 1, 2)


def cut(operands: Operands, plan: TilePlan, dq, dk, dv, dbias) -> Operands:
    """The gradients without padding; that of the bias from [B, H, S], or None."""
    bias = operands.bias
    if bias is not None:
        dbias = dbias[:, :, None, : plan.num_keys]
        shared = [i for i, (n, m) in enumerate(zip(bias.shape, dbias.shape, strict=True)) if n != m]
        dbias = jnp.sum(dbias, axis=shared, keepdims=True)
    return Operands(
        dq[:, : plan.num_queries, :, : operands.q.shape[3]],
        dk[:, : plan.num_keys, :, : operands.k.shape[3]],
        dv[:, : plan.num_keys, :, : operands.v.shape[3]],
        dbias,
        None,
    )


def inputs_of(operands: Operands, where: Visibility, widen: Any) -> Inputs:
    """Whole blocks, and heads as wide as `widen` makes them."""
    operands, where = padded(operands, where)
    q, k, v, bias, _ = operands
    if bias is not None:
        bias = jnp.broadcast_to(bias, (*bias.shape[:3], k.shape[1]))
    offset = jnp.asarray(_operands.first_position(where), jnp.int32).reshape(1)
    lists = where.plan.blocks, where.plan.count
    return Inputs(widen(q), widen(k), widen(v), bias, where.q_ids, where.k_ids, offset, *lists)


def dot(a: jax.Array, b: jax.Array, turned: bool = False) -> jax.Array:
    """a b, or a b^T, in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = ((1,), (1 if turned else 0,)), ((), ())
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def logits(
    rules: Rules, x: jax.Array, query: Side, key: Side, num_keys: int | None
) -> tuple[jax.Array, jax.Array | None]:
    """Products of a tile as logits in base 2, and the slope of the cap or None.

    Keys from `num_keys` on are masked, if it is given.
    """
    slope = None
    if rules.soft_cap is None:
        x = x * (rules.scale * LOG2_E)
    else:
        x = jnp.tanh(x * (rules.scale / rules.soft_cap))
        slope = 1 - x * x
        x = x * (rules.soft_cap * LOG2_E)
    if key.bias is not None:
        x = x + key.bias * LOG2_E
    seen = _operands.visible(rules, query.at, key.at)
    if num_keys is not None:
        seen = seen & (key.at < num_keys)
    if query.ids is not None:
        seen = seen & (query.ids == key.ids)
    return x if seen is True else jnp.where(seen, x, EMPTY), slope
