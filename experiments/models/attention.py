"""Dense attentions for the model: the causal default, and those of prefill and decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

QUERY_BLOCK_TOKENS = 256
SEGMENTS = 4


class Scoring(NamedTuple):
    """How a layer's attention weighs what it sees.

    Attributes:
      scale: of the logits; None for 1 / sqrt(D).
      soft_cap: c of c tanh(logit / c); None for none.
      window: how many of the latest tokens a token sees, an integer that may be traced; None for all.
    """

    scale: float | None = None
    soft_cap: float | None = None
    window: Array | int | None = None


PLAIN = Scoring()


def attention_weights(logits: Array, distance: Array, scoring: Scoring, head_dim: int) -> Array:
    """Softmax of float32 q k [..., T, S] over the keys at distances 0 to window - 1 [..., T, S]."""
    logits = logits * (head_dim**-0.5 if scoring.scale is None else scoring.scale)
    if scoring.soft_cap is not None:
        logits = scoring.soft_cap * jnp.tanh(logits / scoring.soft_cap)
    visible = distance >= 0
    if scoring.window is not None:
        visible &= distance < scoring.window
    return jax.nn.softmax(jnp.where(visible, logits, -jnp.inf))


def causal_attention(
    q: Array, k: Array, v: Array, state: Any = None, *, scoring: Scoring = PLAIN
) -> tuple[Array, Any]:
    """Token t attends to tokens 0..t, or the latest of them.

    q [B, T, H, D], k and v [B, T, K, D] -> (y [B, T, H, D], state unchanged). Blocks of queries go
    one after the other, so that the logits take B·H·256·T floats, not B·H·T·T, in the gradient too.
    """
    batch, tokens, kv_heads, head_dim = k.shape
    block = min(QUERY_BLOCK_TOKENS, tokens)
    blocks = -(-tokens // block)
    # Heads before tokens: one plain matrix product per key/value head, several times as fast on CPU
    # as jax.nn.dot_product_attention, which keeps tokens first.
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    q = jnp.pad(q, ((0, 0), (0, blocks * block - tokens), (0, 0), (0, 0)))
    q = jnp.einsum("bnskgd->nbkgsd", q.reshape(batch, blocks, block, kv_heads, -1, head_dim))
    starts = jnp.arange(blocks) * block
    done = []
    # A quarter of the blocks at a time against the keys up to the quarter's end: 5/8 of the full
    # square's operations. Unrolling every block would come to half, but XLA then keeps all of their
    # logits at once.
    for part in np.array_split(np.arange(blocks), min(SEGMENTS, blocks)):
        first, last = part[0], part[-1] + 1
        visible = k[:, :, : last * block], v[:, :, : last * block]
        attend = jax.checkpoint(functools.partial(_attend_block, visible, scoring))
        done.append(jax.lax.map(attend, (starts[first:last], q[first:last])))
    y = jnp.einsum("nbkgsd->bnskgd", jnp.concatenate(done))
    return y.reshape(batch, blocks * block, -1, head_dim)[:, :tokens], state


def _attend_block(
    keys_values: tuple[Array, Array],
    scoring: Scoring,
    queries: tuple[Array, Array],
) -> Array:
    """Queries (first position, q [B, K, H/K, T, D]) over k and v [B, K, S, D] -> y of q's shape."""
    (k, v), (start, q) = keys_values, queries
    logits = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32)
    distance = start + jnp.arange(q.shape[3])[:, None] - jnp.arange(k.shape[2])
    weights = attention_weights(logits, distance, scoring, q.shape[-1])
    return jnp.einsum("bkgts,bksd->bkgtd", weights.astype(v.dtype), v)


def prefill_attention(
    q: Array, k: Array, v: Array, state: Any = None, *, scoring: Scoring = PLAIN
) -> tuple[Array, tuple[Array, Array]]:
    """Causal attention whose new state is the layer's keys and values, each [B, T, K, D]."""
    return causal_attention(q, k, v, scoring=scoring)[0], (k, v)


def decode_attention(positions: Array) -> Callable[..., tuple[Array, tuple[Array, Array]]]:
    """Attention of one new token per sequence, at `positions` [B], over a dense cache.

    The returned function takes q [B, 1, H, D], k and v [B, 1, K, D] and the layer's cache
    (keys, values), each [B, S, K, D]; it writes k and v at each sequence's position and attends to
    positions 0..position, or the latest of them. A position >= S is not written.
    """

    def attention(
        q: Array, k: Array, v: Array, cache: tuple[Array, Array], *, scoring: Scoring = PLAIN
    ) -> tuple[Array, tuple[Array, Array]]:
        row = jnp.arange(q.shape[0])
        keys = cache[0].at[row, positions].set(k[:, 0], mode="drop")
        values = cache[1].at[row, positions].set(v[:, 0], mode="drop")
        grouped = q.reshape(q.shape[0], k.shape[2], -1, q.shape[-1])
        logits = jnp.einsum("bkgd,bskd->bkgs", grouped, keys, preferred_element_type=jnp.float32)
        distance = (positions[:, None] - jnp.arange(keys.shape[1]))[:, None, None]
        weights = attention_weights(logits, distance, scoring, q.shape[-1])
        y = jnp.einsum("bkgs,bskd->bkgd", weights.astype(values.dtype), values)
        return y.reshape(q.shape), (keys, values)

    return attention
