"""Dense masked attention: the definition that every other back end is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jbalance.attention import _operands
from jbalance.attention._operands import Operands, Rules, Visibility
from jbalance.attention.partial import EMPTY, NO_TOP, Partial
from jbalance.attention.plan import to_mask


def attend(operands: Operands, where: Visibility, rules: Rules) -> Partial:
    """`attend` over all T x S scores: y [B, T, H, E] in q's dtype, lse [B, T, H] float32."""
    q, k, v = (x.astype(jnp.float32) for x in operands[:3])
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest") * rules.scale
    logits = _operands.soft_capped(logits, rules.soft_cap)
    if operands.bias is not None:
        logits += operands.bias
    if operands.relative_bias is not None:
        distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])
        logits += operands.relative_bias[:, distance + k.shape[1] - 1]
    seen = jnp.broadcast_to(allowed(where, rules), logits.shape)
    seen &= ~(logits <= NO_TOP)  # a bias of -inf is a mask, too; NaN is not
    some = jnp.any(seen, axis=-1, keepdims=True)
    # Twice `where`, so that rows of nothing have no gradient either.
    logits = jnp.where(seen, logits, -jnp.inf)
    lse = jax.nn.logsumexp(jnp.where(some, logits, 0.0), axis=-1, keepdims=True)
    weight = jnp.where(seen, jnp.exp(jnp.where(seen, logits, 0.0) - lse), 0.0)
    y = jnp.einsum("bhts,bshe->bthe", weight, v, precision="highest")
    lse = jnp.where(some, lse, EMPTY)[..., 0]
    return Partial(y.astype(operands.q.dtype), jnp.swapaxes(lse, 1, 2))


def allowed(where: Visibility, rules: Rules) -> jax.Array:
    """[B|1, H|1, T, S] bool: which query sees which key, by tiles, positions and segments."""
    plan = where.plan
    tiles = jnp.repeat(jnp.repeat(to_mask(plan), plan.block_q, axis=2), plan.block_k, axis=3)
    seen = tiles[:, :, : plan.num_queries, : plan.num_keys]
    q_at = jnp.arange(plan.num_queries)[:, None] + _operands.first_position(where)
    seen &= _operands.visible(rules, q_at, jnp.arange(plan.num_keys))
    if where.q_ids is not None and where.k_ids is not None:
        seen &= (where.q_ids[:, :, None] == where.k_ids[:, None])[:, None]
    return seen
