"""What a cached token is worth, in one currency for all layers, heads, precisions and ages.

The worth of a token is the root of the squared attention that it is expected to receive: from a
repetition of the context (`reconstruction`), which stands for questions about any part of it, and with
a small weight from the last queries (`attention_energy`), which alone would keep little but what was
just asked for. A token that is written while decoding has its attention measured instead.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbalance import checks
from jbalance._bits import in_32_bits
from jbalance.importance._tokens import tokens
from jbalance.importance.attention_energy import attention_energy
from jbalance.importance.reconstruction import reconstruction

NUM_SINKS = 4  # first tokens, on which attention rests that has nowhere to go: always kept
NUM_RECENT = 8  # latest tokens of a prompt, which every later query sees: always kept, judged later
NUM_QUERIES = 64  # last queries that are asked
LATER_WEIGHT = 0.02  # of what they ask for, beside what a repetition would


@in_32_bits
def token_worth(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    frequencies: ArrayLike | None,
    num_tokens: jax.Array | int | None = None,
) -> jax.Array:
    """Root of the squared attention expected by each token of a prompt.

    w = sqrt(reconstruction + 0.02 attention_energy), the latter over the last 64 queries and the keys
    at least 8 positions before them.

    Args:
      q: [S, H, D] the queries of all tokens of one layer, after the rotary embedding.
      k: [S, K, D] their keys; H a multiple of K.
      v: [S, K, D] values, only checked.
      frequencies: [D/2] of the model's rotary embedding, radians per position of each pair of features;
        None for no rotary embedding.
      num_tokens: [] int32, how many of the S tokens there are; None for S.

    Returns:
      w [K, S] float32 >= 0; 0 for padding.

    Raises:
      ValueError: shapes, dtypes or frequencies that do not fit, or a value that is not finite.
    """
    q, k, v = tokens(q, k, v)
    size = q.shape[0]
    last = min(NUM_QUERIES, size)
    repeated = repeated_energy(q, k, v, 0, frequencies=frequencies, num_tokens=num_tokens)
    if num_tokens is not None:
        num_tokens = checks.one_int("num_tokens", num_tokens, 0, size)
        first = jnp.clip(jnp.asarray(num_tokens) - last, 0, size - last)
        q = jax.lax.dynamic_slice_in_dim(q, first, last)
    return worth_of(repeated, later_energy(q[-last:], k, v, num_tokens=num_tokens))


def repeated_energy(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    start: jax.Array | int,
    *,
    frequencies: ArrayLike | None,
    num_tokens: jax.Array | int | None = None,
) -> jax.Array:
    """The first part of `token_worth`, due to a chunk of the queries; chunks add up.

    Args:
      q: [T, H, D] the queries of the chunk.
      k: [S, K, D] keys of all tokens.
      v: [S, K, D] values, only checked.
      start: [] int32 position of the chunk's first token.
      frequencies: of `token_worth`.
      num_tokens: of `token_worth`.

    Returns:
      [K, S] float32 >= 0.
    """
    sinks = min(NUM_SINKS, jnp.shape(k)[0] - 1)
    return reconstruction(
        q,
        k,
        v,
        frequencies=frequencies,
        reach=min(2, jnp.shape(k)[0] - 1),
        num_sinks=sinks,
        start=start,
        num_tokens=num_tokens,
    )


def later_energy(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, num_tokens: jax.Array | int | None = None
) -> jax.Array:
    """The second part of `token_worth`, due to the last queries [T, H, D], T at most `NUM_QUERIES`."""
    return attention_energy(
        q, k, v, queries=jnp.shape(q)[0], min_distance=NUM_RECENT, num_tokens=num_tokens
    )


def worth_of(repeated: jax.Array, later: jax.Array) -> jax.Array:
    """Worth from the two parts' energies."""
    return jnp.sqrt(repeated + LATER_WEIGHT * later)


def decoded_worth(received: jax.Array, queries: jax.Array) -> jax.Array:
    """Worth of tokens by the attention measured since they were written, as that of `NUM_QUERIES`.

    Args:
      received: [...] float32 >= 0, sum over later queries and the group's heads of attention².
      queries: [...] int32, how many queries that were; below 1 counts as 1.

    Returns:
      [...] float32, in the currency of `token_worth`.
    """
    return worth_of(jnp.zeros(()), received * NUM_QUERIES / jnp.maximum(queries, 1))
