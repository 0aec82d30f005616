"""What an encoder's frames are worth to a decoder whose queries are not known yet."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbalance import checks
from jbalance.importance import _tokens


def cross_worth(
    q: ArrayLike,
    k: ArrayLike,
    *,
    scale: float | None = None,
    num_frames: jax.Array | int | None = None,
) -> jax.Array:
    """Root mean squared attention that sample queries give each frame, in cross-attention.

    w_s = sqrt(mean_t Σ_heads of the group A_ts²), the amplitude of `attention_energy` without a causal
    order. The frames are stored before the decoder asks anything, so that the queries are those of
    other recordings: of every layer, drawn once from transcripts of a few minutes of speech. What they
    look for (beginnings of words, silences, certain sounds) they find in new recordings as well.

    Args:
      q: [T, H, D] sample queries of one layer, a few hundred; fewer leave frames unasked for.
      k: [S, K, D] the frames' keys; H a multiple of K.
      scale: of the logits; None for 1 / sqrt(D).
      num_frames: [] int32 <= S, how many frames there are, the others being padding; None for S.

    Returns:
      w, [K, S] float32 in 0..sqrt(H / K); 0 for padding.

    Raises:
      ValueError: shapes or dtypes that do not fit, or a value that is not finite.
    """
    q, k, _ = _tokens.heads(q, k, k)
    _tokens.comparable(q=q, k=k)
    number = k.shape[0]
    if num_frames is not None:
        number = checks.one_int("num_frames", num_frames, 0, k.shape[0])
    factor = (
        1 / math.sqrt(k.shape[2])
        if scale is None
        else checks.static_float("scale", scale, -checks.SCALE_MAX, checks.SCALE_MAX)
    )
    return _received(q, k, number, factor)


@jax.jit  # once for all eager calls of equal shapes
def _received(q: jax.Array, k: jax.Array, number: jax.Array | int, factor: float) -> jax.Array:
    """The root of the mean squared attention [K, S] of so many frames."""
    there = jnp.arange(k.shape[0]) < number
    size = min(_tokens.QUERY_BLOCK_TOKENS, q.shape[0])
    blocks = -(-q.shape[0] // size)
    asked = jnp.pad(q * factor, ((0, blocks * size - q.shape[0]), (0, 0), (0, 0)))
    grouped = _tokens.by_group(asked, k.shape[1]).reshape(blocks, size, k.shape[1], -1, k.shape[2])
    is_query = (jnp.arange(blocks * size) < q.shape[0]).reshape(blocks, 1, 1, size, 1)

    def one_block(w, block):
        q, is_query = block
        logits = jnp.einsum("tkgd,skd->kgts", q, k, precision=_tokens.HIGHEST)
        attention = jax.nn.softmax(jnp.where(there, logits, _tokens.HIDDEN), axis=-1)
        return w + _tokens.sum_queries(jnp.where(there & is_query, attention, 0) ** 2), None

    zero = 0.0 * (k[:, :, 0].T + grouped[0, 0, :, 0, :1])  # varies over the same mesh axes
    energy = jax.lax.scan(one_block, zero, (grouped, is_query))[0] / q.shape[0]
    some = energy > 0  # the gradient at 0 is 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, energy, 1)), 0)
