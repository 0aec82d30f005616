"""Online k-means of evicted tokens: a few centroids per unit, each of which answers for many tokens.

Attention over n tokens with nearly the same key is attention over one key with log n added to its
logit, and the mean of their values. So a token that leaves joins the entry of its unit whose key is
nearest: the entry's key and value are the means of its tokens, weighted by their worth, and its count
is their plain number. The first tokens that leave become the entries. Nothing is ever looked at again:
tokens arrive in any number of chunks, and the bytes stay.

An entry is stored at 8 bits. At 4 bits a mean of many tokens would stop following new ones, whose part
in it is less than half a step of the codec.

Method: the running means of MacQueen (1967), weighted, in chunks.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance import checks
from jbalance.attention import EMPTY, Partial
from jbalance.cache import _codec
from jbalance.cache._codec import Codes
from jbalance.cache._sight import Sight

NUM_ENTRIES = 4  # c, of each unit
BITS = 8
CHUNK_TOKENS = 64  # so many find their entries at once, before the means move


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Centroids:
    """The entries of U units, c each; those that are not in use are the last."""

    keys: Codes  # [U, c]
    values: Codes  # [U, c]
    count: jax.Array  # [U, c] int32, tokens that the entry stands for; 0 where it is not in use
    weight: jax.Array  # [U, c] float32, their worth

    @property
    def nbytes(self) -> int:
        """Bytes that stay resident."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    @property
    def head_dim(self) -> int:
        """D."""
        return self.keys.packed.shape[-1] * 8 // BITS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entries:
    """The entries of N units, decoded; zeros where not in use."""

    keys: jax.Array  # [N, c, D] float32
    values: jax.Array  # [N, c, D] float32
    count: jax.Array  # [N, c] int32
    weight: jax.Array  # [N, c] float32


def unit_bytes(head_dim: int) -> int:
    """Bytes of one unit's entries.

    >>> unit_bytes(64)
    560
    """
    return NUM_ENTRIES * (2 * _codec.codes_bytes(head_dim, BITS) + 8)


def create(num_units: int, head_dim: int) -> Centroids:
    """Of U units from which no token has left: num_units * unit_bytes(head_dim) bytes.

    Raises:
      ValueError: a `head_dim` that the codec does not know.
    """
    width = _codec.codes_bytes(head_dim, BITS) - 2
    shape = (num_units, NUM_ENTRIES)

    def nothing():  # of its own for keys and values, or the cache could not be donated
        return Codes(jnp.zeros((*shape, width), jnp.uint8), jnp.zeros(shape, jnp.float16))

    return Centroids(
        nothing(), nothing(), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
    )


def load(centroids: Centroids, units: jax.Array) -> Entries:
    """The entries of units [N]; any, where there is no such unit."""
    codes = jax.tree.map(lambda x: x[units], (centroids.keys, centroids.values))
    # Both at once: half to compile.
    both = jax.tree.map(lambda *x: jnp.stack(x), *codes)
    keys, values = _codec.dequantize(both, centroids.head_dim, BITS)
    return Entries(keys, values, centroids.count[units], centroids.weight[units])


def store(centroids: Centroids, units: jax.Array, entries: Entries) -> Centroids:
    """Entries put back into units [N], different ones; those that no token joined keep their bytes."""
    joined = jnp.any(entries.count != centroids.count[units], axis=1)
    at = jnp.where(joined, units, centroids.count.shape[0])
    both = _codec.quantize(jnp.stack([entries.keys, entries.values]), BITS)
    keys, values = (jax.tree.map(lambda x, i=i: x[i], both) for i in range(2))
    new = Centroids(keys, values, entries.count, entries.weight)
    return jax.tree.map(lambda old, x: old.at[at].set(x, mode="drop"), centroids, new)


def add(entries: Entries, k: jax.Array, v: jax.Array, w: jax.Array, valid: jax.Array) -> Entries:
    """Tokens [N, S] join the entries of their units, `CHUNK_TOKENS` at a time.

    The first tokens become entries while there are some not in use; each other one of a chunk joins
    the entry whose key was nearest before the chunk, or is one of its first tokens.

    Args:
      entries: of N units.
      k: [N, S, D] float keys, less whatever all keys of the unit are stored less of.
      v: [N, S, D] float values.
      w: [N, S] float worth, > 0.
      valid: [N, S] bool; the others are not looked at.

    Returns:
      `Entries`.
    """
    size = valid.shape[1]
    chunk = min(CHUNK_TOKENS, size)

    def step(i, entries):
        first = jnp.minimum(i * chunk, size - chunk)  # the last is moved back into the array
        k_i, v_i, w_i, valid_i = (
            lax.dynamic_slice_in_dim(x, first, chunk, axis=1) for x in (k, v, w, valid)
        )
        valid_i &= first + np.arange(chunk) >= i * chunk
        return _add_chunk(entries, k_i, v_i, w_i, valid_i)

    return lax.fori_loop(0, -(-size // chunk), step, entries) if size else entries


def _add_chunk(entries, k, v, w, valid):
    """`add` of one chunk."""
    number = entries.count.shape[1]
    k, v = (jnp.where(valid[..., None], x.astype(jnp.float32), 0) for x in (k, v))
    used = jnp.sum(entries.count > 0, axis=1, keepdims=True, dtype=jnp.int32)
    opened = used + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1  # which entry if it opens one
    opens = (opened[..., None] == np.arange(number)) & valid[..., None]
    opens &= np.arange(number) >= used[..., None]
    keys = entries.keys + _sums(opens.astype(jnp.float32), k)
    there = (entries.count > 0) | jnp.any(opens, axis=1)
    apart = jnp.sum(keys * keys, axis=-1)[:, None] - 2 * _highest("nsd,ncd->nsc", k, keys)
    nearest = jnp.argmin(jnp.where(there[:, None], apart, jnp.inf), axis=-1)
    joined = jnp.where(opened < number, opened, nearest)
    part = (joined[..., None] == np.arange(number)) & valid[..., None]
    mass = jnp.where(part, w[..., None].astype(jnp.float32), 0)
    added = jnp.sum(mass, axis=1)
    weight = entries.weight + added
    share = 1 / jnp.where(weight > 0, weight, 1)[..., None]

    def moved(mean, x):
        return mean + share * (_sums(mass, x) - added[..., None] * mean)

    return Entries(
        moved(entries.keys, k),
        moved(entries.values, v),
        entries.count + jnp.sum(part, axis=1, dtype=jnp.int32),
        weight,
    )


def _sums(mass, x):
    """Sums [N, c, D] of x [N, S, D] by masses [N, S, c]."""
    return _highest("nsc,nsd->ncd", mass, x)


def _highest(spec, x, y):
    """einsum in full float32."""
    return jnp.einsum(spec, x, y, precision=lax.Precision.HIGHEST)


def absorb(
    centroids: Centroids,
    units: jax.Array,
    k: jax.Array,
    v: jax.Array,
    w: jax.Array,
    valid: jax.Array,
) -> Centroids:
    """Tokens that leave join their units' entries; bytes of all other units stay as they are.

    Args:
      centroids: before.
      units: [N] int32, different ones.
      k: [N, S, D] float keys, less whatever all keys of the unit are stored less of.
      v: [N, S, D] float values.
      w: [N, S] float worth, > 0.
      valid: [N, S] bool, which of the tokens leave.

    Returns:
      `Centroids`.

    Raises:
      ValueError: shapes that do not fit.
    """
    checks.rank("units", units, 1, "[N]")
    checks.rank("k", k, 3, "[N, S, D]")
    shape = np.shape(k)
    if np.shape(v) != shape or shape[2] != centroids.head_dim or shape[0] != np.shape(units)[0]:
        raise ValueError(
            f"k has shape {shape} and v {np.shape(v)}: both must be [N, S, D] = "
            f"[{np.shape(units)[0]}, S, {centroids.head_dim}]"
        )
    for name, x in (("w", w), ("valid", valid)):
        if np.shape(x) != shape[:2]:
            raise ValueError(f"{name} has shape {np.shape(x)}: it must be [N, S] = {shape[:2]}")
    units, k, v, w, valid = (jnp.asarray(x) for x in (units, k, v, w, valid))
    return store(centroids, units, add(load(centroids, units), k, v, w, valid))


def attend(
    q: jax.Array, centroids: Centroids, units: jax.Array, sight: Sight | None = None
) -> Partial:
    """Attention of queries over the entries of their units: logits q · key / sqrt(D) + log count.

    Args:
      q: [N, T, D] float queries.
      centroids: what is attended to.
      units: [N] int32; an index that is none of the units has no entries.
      sight: of the queries, for a soft cap of the logits; None for none.

    Returns:
      `Partial` with y [N, T, D] and lse [N, T], to `merge` with attention over the tokens that stayed;
      0 and `EMPTY` for a unit from which none has left.

    Raises:
      ValueError: shapes that do not fit.
    """
    checks.rank("q", q, 3, "[N, T, D]")
    checks.rank("units", units, 1, "[N]")
    checks.same_length("units", units, "q", q)
    if np.shape(q)[-1] != centroids.head_dim:
        raise ValueError(
            f"q has shape {np.shape(q)}: it must be [N, T, D] with D = {centroids.head_dim}"
        )
    units = jnp.asarray(units, jnp.int32)
    known = (units >= 0) & (units < centroids.count.shape[0])
    entries = load(centroids, jnp.where(known, units, 0))
    there = ((entries.count > 0) & known[:, None])[:, None]
    bias = jnp.log(jnp.maximum(entries.count, 1).astype(jnp.float32))
    logits = _highest("ntd,ncd->ntc", q.astype(jnp.float32), entries.keys)
    logits = logits / math.sqrt(q.shape[-1])
    logits = logits if sight is None else sight.capped(logits)
    logits = jnp.where(there, logits + bias[:, None], EMPTY)
    lse = jnp.where(jnp.any(there, axis=-1), jax.nn.logsumexp(logits, axis=-1), EMPTY)
    weight = jnp.where(there, jnp.exp(logits - lse[..., None]), 0)
    return Partial(_highest("ntc,ncd->ntd", weight, entries.values), lse)
