"""Eviction error of a head: how far its output moves, measured at each number of tokens kept.

Scores of different heads are not in one currency: a head that spreads its attention over everything
may lose half of it unnoticed, another needs each of its few tokens. The error of the output is: it is
what the layers above receive.
"""

from __future__ import annotations

import functools
import itertools
import math
import reprlib

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbalance import _axes, checks
from jbalance.importance import _tokens


def protected(w: ArrayLike, *, num_sinks: int = 4, num_recent: int = 32) -> jax.Array:
    """w [..., S] with the first and the last tokens above all others, in every row.

    The first tokens take attention that heads have no use for (StreamingLLM, arXiv 2309.17453); the
    last ones have been seen by too few queries to be judged.

    Args:
      w: [..., S], finite.
      num_sinks: first tokens to keep, static.
      num_recent: last tokens to keep, static.

    Returns:
      [..., S] float32; protected tokens keep their order among themselves.

    Raises:
      ValueError: w not finite, or fewer than num_sinks + num_recent tokens.
    """
    checks.rank("w", w, tuple(range(1, 9)), "[..., S]")
    w = checks.finite("w", w)
    w = jnp.asarray(w, jnp.float32)
    num_sinks, num_recent = (
        checks.static_int(name, number, 0, w.shape[-1])
        for name, number in (("num_sinks", num_sinks), ("num_recent", num_recent))
    )
    if num_sinks + num_recent > w.shape[-1]:
        raise ValueError(
            f"num_sinks + num_recent is {num_sinks + num_recent}: "
            f"w has only {w.shape[-1]} tokens to keep"
        )
    position = jnp.arange(w.shape[-1])
    kept = (position < num_sinks) | (position >= w.shape[-1] - num_recent)
    above = 1.0 + jnp.max(jnp.abs(w), axis=-1, keepdims=True)
    return jnp.where(kept, w + 2.0 * above, w)


def output_error(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    w: ArrayLike,
    counts: tuple[int, ...],
    *,
    num_local: int = 32,
) -> jax.Array:
    """Squared error of a head's output when only its best tokens are kept, for each number of them.

    E_km = sum over the group's query heads of mean_t ||y_t(counts_m) - y_t||^2, y(n) the attention over
    the n tokens of largest w and the `num_local` tokens before each query, renormalized. One pass over
    the queries measures all counts: the tokens are taken in the order of w, and numerator and
    denominator of the softmax are running sums.

    Args:
      q: [T, H, D] the last T queries, standing for those to come.
      k: [S, K, D] keys.
      v: [S, K, Dv] values.
      w: [K, S] importance: the order in which a head gives up its tokens.
      counts: rising numbers of tokens kept, in 1..S, static.
      num_local: tokens before each query that are always there, as the latest are while decoding.

    Returns:
      E [K, M] float32 >= 0, in the square of the values' unit. Its negative is the `values` of
      `allocate.ladder` with costs `counts`.

    Raises:
      ValueError: shapes that do not fit, counts that do not rise or leave 1..S.
    """
    q, k, v = _tokens.tokens(q, k, v)
    _tokens.comparable(q=q, k=k, v=v)
    _axes.unsplit(w=w)
    checks.rank("w", w, 2, "[K, S]")
    checks.finite("w", w)
    w = jnp.asarray(w, jnp.float32)
    if w.shape != (k.shape[1], k.shape[0]):
        raise ValueError(f"w must have shape {(k.shape[1], k.shape[0])} ([K, S]), got {w.shape}")
    if not isinstance(counts, tuple | list):
        raise ValueError(
            f"counts is {reprlib.repr(counts)}: it must be rising whole numbers, a tuple"
        )
    counts = tuple(
        checks.static_int(f"counts[{i}]", x, 1, k.shape[0]) for i, x in enumerate(counts)
    )
    if not counts or any(b <= a for a, b in itertools.pairwise(counts)):
        raise ValueError(f"counts must rise, got {counts}")
    num_local = checks.static_int("num_local", num_local)
    return _errors(q, k, v, w, counts, num_local)


@functools.partial(jax.jit, static_argnames=("counts", "num_local"))  # once for all eager calls
def _errors(q, k, v, w, counts, num_local) -> jax.Array:
    """`output_error` without its checks."""
    groups = jnp.moveaxis(_tokens.by_group(q, k.shape[1]), 0, 2)  # [K, G, T, D]

    def one_head(at):
        q, k, v, w = at
        return _head_error(q, k, v, jnp.argsort(-w, stable=True), counts, num_local)

    return jax.lax.map(one_head, (groups, jnp.moveaxis(k, 1, 0), jnp.moveaxis(v, 1, 0), w))


def _head_error(q, k, v, order, counts, num_local) -> jax.Array:
    """E [M] of one key/value head: q [G, T, D], k and v [S, D], order [S] of giving up, best first."""
    position = k.shape[0] - q.shape[1] + jnp.arange(q.shape[1])[:, None]
    k, v = k[order], v[order]
    logits = jnp.einsum("gtd,sd->gts", q, k) / math.sqrt(q.shape[-1])
    logits = jnp.where(order <= position, logits, _tokens.HIDDEN)
    weight = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    local = position - order < num_local
    near, far = jnp.where(local, weight, 0.0), jnp.where(local, 0.0, weight)
    top, mass = near @ v, jnp.sum(near, axis=-1, keepdims=True)
    full = (top + far @ v) / (mass + jnp.sum(far, axis=-1, keepdims=True))
    errors = []
    for start, stop in zip((0, *counts[:-1]), counts, strict=True):
        part = far[..., start:stop]
        top, mass = top + part @ v[start:stop], mass + jnp.sum(part, axis=-1, keepdims=True)
        # A query that sees none of what is kept gives 0, as attention over nothing does here.
        y = jnp.where(mass > 0, top / jnp.where(mass > 0, mass, 1.0), 0.0)
        errors.append(jnp.mean(jnp.sum((y - full) ** 2, axis=-1), axis=-1).sum())
    return jnp.stack(errors)
