"""Dense attentions for the model: the causal default, and those of prefill and decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

QUERY_BLOCK_TOKENS = 256
SEGMENTS = 4


def causal_attention(q: Array, k: Array, v: Array, state: Any = None) -> tuple[Array, Any]:
    """Token t attends to tokens 0..t.

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
        attend = functools.partial(_attend_block, visible)
        done.append(jax.lax.map(attend, (starts[first:last], q[first:last])))
    y = jnp.einsum("nbkgsd->bnskgd", jnp.concatenate(done))
    return y.reshape(batch, blocks * block, -1, head_dim)[:, :tokens], state


@jax.checkpoint
def _attend_block(keys_values: tuple[Array, Array], queries: tuple[Array, Array]) -> Array:
    """Queries (first position, q [B, K, H/K, T, D]) over k and v [B, K, S, D] -> y of q's shape."""
    (k, v), (start, q) = keys_values, queries
    logits = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32)
    visible = jnp.arange(k.shape[2]) <= start + jnp.arange(q.shape[3])[:, None]
    logits = jnp.where(visible, logits * q.shape[-1] ** -0.5, -jnp.inf)
    return jnp.einsum("bkgts,bksd->bkgtd", jax.nn.softmax(logits).astype(v.dtype), v)


def prefill_attention(
    q: Array, k: Array, v: Array, state: Any = None
) -> tuple[Array, tuple[Array, Array]]:
    """Causal attention whose new state is the layer's keys and values, each [B, T, K, D]."""
    return causal_attention(q, k, v)[0], (k, v)


def decode_attention(positions: Array) -> Callable[..., tuple[Array, tuple[Array, Array]]]:
    """Attention of one new token per sequence, at `positions` [B], over a dense cache.

    The returned function takes q [B, 1, H, D], k and v [B, 1, K, D] and the layer's cache
    (keys, values), each [B, S, K, D]; it writes k and v at each sequence's position and attends to
    positions 0..position. A position >= S is not written.
    """

    def attention(
        q: Array, k: Array, v: Array, cache: tuple[Array, Array]
    ) -> tuple[Array, tuple[Array, Array]]:
        row = jnp.arange(q.shape[0])
        keys = cache[0].at[row, positions].set(k[:, 0], mode="drop")
        values = cache[1].at[row, positions].set(v[:, 0], mode="drop")
        visible = jnp.arange(keys.shape[1]) <= positions[:, None]
        return jax.nn.dot_product_attention(q, keys, values, mask=visible[:, None, None]), (
            keys,
            values,
        )

    return attention
