"""Context reconstruction: tokens that repeating the context would attend to, without repeating it."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbalance import checks
from jbalance._bits import in_32_bits
from jbalance.importance import _rotary, _tokens


@in_32_bits
def reconstruction(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    frequencies: ArrayLike | None = None,
    shift: jax.Array | int | None = None,
    reach: int = 2,
    samples: int = 64,
    num_sinks: int = 4,
    start: jax.Array | int | None = None,
    num_tokens: jax.Array | int | None = None,
) -> jax.Array:
    """Squared attention that a repetition of the context would give each token, estimated.

    A model that repeats its context reads at each token that token's first occurrence and what follows
    it. Its query there is, but for the rotary embedding, much like the one it had in the first pass.
    So the prefill's own queries are turned `shift` positions ahead and asked about the keys around
    their own position, backwards and forwards:
    w_s = Σ over |t - s| <= reach, and the heads of the group, of p_ts², with
    p_ts = exp(l_ts) / Σ_u exp(l_tu), l = (R_shift q_t)·k_u / √D. The sum over all u is estimated from
    the first tokens, the ones in reach, and `samples` evenly spaced ones for the rest: the cost is
    linear in S, a few per cent of the prefill.

    Unlike scores from past queries, it also keeps tokens that no query has attended to yet.

    Args:
      q: [T, H, D] the queries of T tokens, after the rotary embedding: of all S, or of a chunk of them,
        whose part of the sum over t this is then.
      k: [S, K, D] the keys of all tokens; H a multiple of K.
      v: [S, K, D] values, only checked.
      frequencies: [D/2] of the model's rotary embedding, radians per position of each pair of features
        (half-split convention); None for no rotary embedding.
      shift: [] positions between a token and its repetition; None for num_tokens.
      reach: static, >= 0; 2 sees the token itself, two before and two after.
      samples: keys that stand for all others, static; all keys are asked where S is at most that.
      num_sinks: first tokens that are always in the sum, static.
      start: [] int32 position of the first query, at most S - T; None only where T = S.
      num_tokens: [] int32 <= S, how many of the S tokens there are, the others being padding behind
        them; None for S.

    Returns:
      w, [K, S] float32 >= 0, on the scale of `attention_energy`.

    Raises:
      ValueError: shapes or dtypes that do not fit, T < S without `start`, D odd with a rotary
        embedding, a negative number, or a value that is not finite.

    Reference: Kim et al., KVzip, arXiv 2505.23416, which runs the repetition.
    """
    q, k, _ = _tokens.tokens(q, k, v)
    _tokens.comparable(q=q, k=k)
    size = k.shape[0]
    if q.shape[0] != size and start is None:
        raise ValueError(
            f"q has {q.shape[0]} queries: every one of the {size} tokens needs its own, or give start"
        )
    reach, num_sinks = (
        checks.static_int(name, value, 0, size - 1)
        for name, value in (("reach", reach), ("num_sinks", num_sinks))
    )
    samples = checks.static_int("samples", samples, 1)
    frequencies = _rotary.check(frequencies, q.shape[-1])
    number = size
    if num_tokens is not None:
        number = checks.one_int("num_tokens", num_tokens, 0, size)
    if shift is not None:
        shift = checks.one_int("shift", shift)
    if start is not None:
        start = checks.one_int("start", start, 0, checks.INT32_MAX)
    if frequencies is not None:
        frequencies = jnp.asarray(frequencies, jnp.float32)
    return _reconstruction(q, k, frequencies, number, shift, start, reach, samples, num_sinks)


@functools.partial(jax.jit, static_argnames=("reach", "samples", "num_sinks"))
def _reconstruction(q, k, frequencies, number, shift, start, reach, samples, num_sinks):
    """`reconstruction` of arguments that are checked, by one program."""
    size = k.shape[0]
    if frequencies is not None:
        ahead = jnp.asarray(number if shift is None else shift, jnp.float32)
        q = _rotary.turn(q, ahead * frequencies)
    heads = jnp.moveaxis(_tokens.by_group(q / math.sqrt(q.shape[-1]), k.shape[1]), 0, 2)
    keys = jnp.moveaxis(k, 1, 0)  # [K, S, D]; heads are [K, G, T, D]
    first = jnp.int32(0 if start is None else start)
    position = first + jnp.arange(q.shape[0])
    band = _beside(heads, keys, first, reach, number)
    rest = _of_samples(heads, keys, position, reach, samples, num_sinks, number)
    total = jnp.logaddexp(rest, jax.nn.logsumexp(band, axis=0))
    energy = jnp.sum(jnp.exp(2 * (band - total)), axis=2)  # [2 reach + 1, K, T], by query
    return _received(jnp.where(position < number, energy, 0), first, reach, size)


def _of_samples(heads, keys, position, reach, samples, num_sinks, number):
    """log Σ exp over the sampled keys [K, G, T], each for as many as it stands for."""
    chosen, stands_for = _samples_of(number, min(samples, keys.shape[1] - num_sinks), num_sinks)
    asked = jnp.einsum("kgtd,ksd->kgts", heads, keys[:, chosen])
    # A sample that is in reach is counted there; one that stands for nothing is none.
    near = jnp.abs(position[:, None] - chosen) <= reach
    asked = asked + jnp.log(jnp.maximum(stands_for, 1))
    return jax.nn.logsumexp(jnp.where(near | (stands_for == 0), _tokens.HIDDEN, asked), axis=-1)


def _samples_of(number, samples: int, num_sinks: int):
    """Positions of the keys in the sum, and how many keys each stands for: 0 for a key too many."""
    rest = jnp.maximum(jnp.asarray(number) - num_sinks, 0)
    taken = jnp.minimum(samples, rest)
    index = np.arange(samples)
    middle = num_sinks + (2 * index + 1) * rest // jnp.maximum(2 * taken, 1)
    weight = jnp.where(index < taken, rest / jnp.maximum(taken, 1), 0)
    sinks = np.arange(num_sinks)
    return (
        jnp.concatenate([sinks, jnp.minimum(middle, jnp.asarray(number) - 1)]),
        jnp.concatenate([(sinks < jnp.asarray(number)).astype(jnp.float32), weight]),
    )


def _beside(heads, keys, start, reach, number):
    """Logits [2 reach + 1, K, G, T] of each query for the keys around its own position."""
    size = heads.shape[2]
    padded = jnp.pad(keys, ((0, 0), (reach, reach), (0, 0)))
    ones = jnp.ones(heads.shape[-1], jnp.float32)
    band = []
    for step in range(2 * reach + 1):
        near = jax.lax.dynamic_slice_in_dim(padded, start + step, size, axis=1)
        # A product with ones: XLA's own reduction of the last axis is slower on CPU.
        logits = jnp.matmul(heads * near[:, None], ones, precision=_tokens.HIGHEST)
        index = start + step - reach + jnp.arange(size)
        band.append(jnp.where((index >= 0) & (index < number), logits, _tokens.HIDDEN))
    return jnp.stack(band)


def _received(energy: jax.Array, start: jax.Array, reach: int, size: int) -> jax.Array:
    """[K, S]: energy [2 reach + 1, K, T] by query, given to the keys around; outside it is 0 already."""
    out = jnp.zeros((energy.shape[1], size + 2 * reach))
    for step, row in enumerate(energy):
        before = jax.lax.dynamic_slice_in_dim(out, start + step, row.shape[1], axis=1)
        out = jax.lax.dynamic_update_slice_in_dim(out, before + row, start + step, axis=1)
    return out[:, reach : reach + size]
