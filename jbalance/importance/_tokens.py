"""What the token scorers share: checked q, k, v, norms and the fold over blocks of queries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbalance import _axes, checks

QUERY_BLOCK_TOKENS = 128
HIDDEN = -1e30  # logit of what a query cannot see; finite, so that gradients are
LARGEST = 1e8  # entry of q, k and v that scores of attention compare
HIGHEST = jax.lax.Precision.HIGHEST


def tokens(q: ArrayLike, k: ArrayLike, v: ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`heads` of the last T of S tokens: ValueError for more queries than keys."""
    q, k, v = heads(q, k, v)
    if q.shape[0] > k.shape[0]:
        raise ValueError(
            f"q has {q.shape[0]} queries but k has {k.shape[0]} keys: the queries are the last "
            f"tokens of the keys' sequence, so give at most {k.shape[0]}"
        )
    return q, k, v


def heads(q: ArrayLike, k: ArrayLike, v: ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [T, H, D], k [S, K, D] and v [S, K, Dv], checked and in float32."""
    _axes.unsplit(q=q, k=k, v=v)
    q, k, v = (
        _float32(name, checks.floats(name, x, 3, hint))
        for name, x, hint in (("q", q, "[T, H, D]"), ("k", k, "[S, K, D]"), ("v", v, "[S, K, D]"))
    )
    checks.same_length("v", v, "k", k)
    checks.same_length("v", v, "k", k, axis=1)
    checks.same_length("q", q, "k", k, axis=2)
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads but k has {k.shape[1]}: "
            f"the heads of q must be a multiple of {k.shape[1]}"
        )
    return q, k, v


def _float32(name: str, x: Any) -> jax.Array:
    checks.non_empty(name, x)
    x = jnp.asarray(x).astype(jnp.float32)
    checks.largest_finite(name, x)
    return x


def comparable(**arrays: jax.Array) -> None:
    """ValueError for concrete entries of which products of four, summed, may leave float32.

    Logits, their variances and squared errors are such. Under jit these may be NaN beyond `LARGEST`.
    """
    for name, x in arrays.items():
        checks.in_range(f"the largest |{name}|", jnp.max(jnp.abs(x)), 0, LARGEST)


def unit_scale(x: jax.Array) -> jax.Array:
    """x [K, S, D] with largest entry 1 per head: what does not depend on it would overflow."""
    largest = jnp.abs(jax.lax.stop_gradient(x)).max(axis=(1, 2), keepdims=True)
    return x / jnp.where(largest > 0, largest, 1.0)


def norm(x: jax.Array) -> jax.Array:
    """Euclidean norm along the last axis, with gradient 0 at 0."""
    squared = jnp.sum(x**2, axis=-1)
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)


def by_group(q: jax.Array, kv_heads: int) -> jax.Array:
    """q [T, H, D] -> [T, K, G, D]: query head h reads key/value head h // G."""
    return q.reshape(q.shape[0], kv_heads, -1, q.shape[-1])


def keep_first(w: jax.Array, kept: jax.Array) -> jax.Array:
    """w [K, S] with the tokens where kept [S] set to the largest w of the row's other tokens."""
    return jnp.where(kept, jnp.max(jnp.where(kept, 0.0, w), axis=1, keepdims=True), w)


def sum_queries(attention: jax.Array) -> jax.Array:
    """[K, G, t, S] summed over the group and the queries, [K, S].

    A product with ones: XLA's own reduction over the middle axes takes three times as long on CPU.
    """
    by_query = attention.reshape(attention.shape[0], -1, attention.shape[-1])
    return jnp.einsum(
        "n,kns->ks", jnp.ones(by_query.shape[1], jnp.float32), by_query, precision=HIGHEST
    )


def fold_attention(
    step: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    q: jax.Array,
    k: jax.Array,
    *,
    start: jax.Array | None = None,
) -> jax.Array:
    """Fold causal attention over blocks of queries, so that memory is linear in S.

    Args:
      step: (w [K, S], attention [K, G, t, S], position of the queries [t]) -> new w [K, S].
      q: [T, H, D] queries of neighboring tokens; k: [S, K, D]; `comparable` ones.
      start: [] int32 position of the first of them; None for S - T, the last T tokens.

    Returns:
      w [K, S] after the last block, from 0. The backward pass computes the blocks again.
    """
    block = min(QUERY_BLOCK_TOKENS, q.shape[0])
    blocks = math.ceil(q.shape[0] / block)
    padding = blocks * block - q.shape[0]
    queries = by_group(jnp.pad(q, ((0, padding), (0, 0), (0, 0))), k.shape[1])
    first = k.shape[0] - q.shape[0] if start is None else start
    position = first + jnp.arange(blocks * block)

    @jax.checkpoint
    def one_block(w, at):
        queries, position = at
        return step(w, _attention(queries, k, position), position), None

    by_block = queries.reshape(blocks, block, *queries.shape[1:]), position.reshape(blocks, block)
    zero = 0.0 * (k[:, :, 0].T + queries[0, :, 0, :1])  # varies over the same mesh axes as q and k
    return jax.lax.scan(one_block, zero, by_block)[0]


@jax.jit  # once for all eager calls of equal shapes
def received(q: jax.Array, k: jax.Array) -> jax.Array:
    """Sum over the queries [T, H, D] of the mean attention of the group's heads, [K, S]."""
    group = q.shape[1] // k.shape[1]
    return fold_attention(lambda w, attention, _: w + sum_queries(attention) / group, q, k)


def _attention(q: jax.Array, k: jax.Array, position: jax.Array) -> jax.Array:
    """Causal attention [K, G, t, S] of queries [t, K, G, D]; 0 for padding behind the keys."""
    logits = jnp.einsum("tkgd,skd->kgts", q, k) / math.sqrt(q.shape[-1])
    position = position[:, None]
    visible = (jnp.arange(k.shape[0]) <= position) & (position < k.shape[0])
    return jax.nn.softmax(jnp.where(visible, logits, HIDDEN), axis=-1) * visible
