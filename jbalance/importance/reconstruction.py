"""Reconstruction: tokens that repeating the context would attend to, without repeating it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbalance import checks
from jbalance.importance import _rotary, _tokens


def reconstruction(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    rotary_base: float | None = 10_000.0,
    shift: int | None = None,
    reach: int = 2,
    samples: int = 64,
    num_sinks: int = 4,
) -> jax.Array:
    """Energy of the attention that a repetition of the context would give each token, sketched.

    A model that repeats its context reads at each token that token's first occurrence and what follows
    it. Its query there is, but for the rotary embedding, much like the one it had in the first pass.
    So the prefill's own queries are turned `shift` positions ahead and asked about the keys around
    their own position, backwards and forwards:
    w_s = Σ over |t - s| <= reach, and the heads of the group, of p_ts², with
    p_ts = exp(l_ts) / Σ_u exp(l_tu), l = (R_shift q_t)·k_u / √D. The sum over all u is estimated from
    the first tokens, the ones in reach, and `samples` evenly spaced ones for the rest: the cost is
    linear in S, a few per cent of the prefill.

    Nobody need have asked for a token: it is what remembers a fact that no query has used.

    Args:
      q: [S, H, D] the queries of all tokens, after the rotary embedding.
      k: [S, K, D] their keys; H a multiple of K.
      v: [S, K, D] values, only checked.
      rotary_base: the model's own (theta); None for no rotary embedding. Static.
      shift: positions between a token and its repetition; None for S. Static.
      reach: static, >= 0; 2 sees the token itself, two before and two after.
      samples: keys that stand for all others, static; all keys are asked where S is at most that.
      num_sinks: first tokens that are always in the sum, static.

    Returns:
      w, [K, S] float32 >= 0, on the scale of `attention_energy`.

    Raises:
      ValueError: shapes or dtypes that do not fit, fewer queries than keys, D odd with a rotary
        embedding, a negative number, or a value that is not finite.

    Reference: Kim et al., KVzip, arXiv 2505.23416, which runs the repetition.
    """
    q, k, _ = _tokens.tokens(q, k, v)
    size = k.shape[0]
    if q.shape[0] != size:
        raise ValueError(
            f"q has {q.shape[0]} queries: every one of the {size} tokens needs its own"
        )
    for name, value in (("reach", reach), ("num_sinks", num_sinks)):
        checks.in_range(name, value, 0, size - 1)
    checks.positive("samples", samples)
    if rotary_base is not None:
        ahead = size if shift is None else shift
        angle = ahead * _rotary.frequencies(rotary_base, q.shape[-1]).astype(np.float64)
        cos, sin = (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
        q = _rotary.turn(q, cos, sin)
    heads = jnp.moveaxis(_tokens.by_group(q / math.sqrt(q.shape[-1]), k.shape[1]), 0, 2)
    keys = jnp.moveaxis(k, 1, 0)  # [K, S, D]; heads are [K, G, S, D]

    chosen, stands_for = _samples_of(size, samples, num_sinks)
    asked = jnp.einsum("kgtd,ksd->kgts", heads, keys[:, chosen])
    # A sample that is in reach is counted there.
    near = jnp.abs(np.arange(size)[:, None] - chosen) <= reach
    asked = jnp.where(near, _tokens.HIDDEN, asked + np.log(stands_for).astype(np.float32))
    band = jnp.stack([_beside(heads, keys, step) for step in range(-reach, reach + 1)])
    total = jnp.logaddexp(jax.nn.logsumexp(asked, axis=-1), jax.nn.logsumexp(band, axis=0))
    energy = jnp.sum(jnp.exp(2 * (band - total)), axis=2)  # [2 reach + 1, K, S], by query
    received = [_moved(energy[i], step) for i, step in enumerate(range(-reach, reach + 1))]
    return jnp.sum(jnp.stack(received), axis=0)


def _samples_of(size: int, samples: int, num_sinks: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the keys in the sum, and how many keys each stands for."""
    rest = size - num_sinks
    number = min(samples, rest)
    middle = num_sinks + ((np.arange(number) + 0.5) * rest / number).astype(np.int64)
    weight = np.concatenate([np.ones(num_sinks), np.full(number, rest / number)])
    return np.concatenate([np.arange(num_sinks), middle]), weight


def _beside(heads: jax.Array, keys: jax.Array, step: int) -> jax.Array:
    """Logits [K, G, S] of each query for the key `step` behind its own position."""
    there = jnp.arange(keys.shape[1]) + step
    inside = (there >= 0) & (there < keys.shape[1])
    product = heads * jnp.roll(keys, -step, axis=1)[:, None]
    # A product with ones: XLA's own reduction of the last axis is slower on CPU.
    logits = jnp.matmul(
        product, jnp.ones(product.shape[-1], jnp.float32), precision=_tokens.HIGHEST
    )
    return jnp.where(inside, logits, _tokens.HIDDEN)


def _moved(energy: jax.Array, step: int) -> jax.Array:
    """Energy [K, S] by query, given to the key `step` behind it; outside it is 0 already."""
    return jnp.roll(energy, step, axis=1)
