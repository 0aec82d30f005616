"""The basis of a unit's keys and values: channels in scales of their own, the keys' less their mean.

Queries read the channels of keys with very different energy: one's error counts by its energy K in the
keys times its energy Q in the queries. Keys are stored in two halves of unequal bits (`_layout`), so
those that matter more come first. And a half has one error for all of its coordinates, so keys are
stored times s, and queries over s ask for them: the logits stay, and their squared error, in proportion
to (sum of s² K) (sum of Q / s²), would be least for s = (Q / K)^(1/4) if all keys were alike. Of the
energy of what reads the values nothing is known here: a channel's is taken for the inverse of its own
energy V, so that s = V^(-1/2). Half of these exponents was measured to be best, and all of them for what
is beyond: some models have a few channels tens of times louder than the others, read by weights as
much smaller, whose errors would drown the rest. Tokens count by their worth: what nobody asks for may
err.

Method: Xiao et al., SmoothQuant (arXiv:2211.10438), a scale moved from one factor to the other; bits by
variance as in any transform coder.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance.cache import _codec
from jbalance.cache._cache import KVCache
from jbalance.importance.token_worth import NUM_SINKS

_PER_OCTAVE = 4  # codes of a scale
# Loud channels may be scaled down by what int8 holds, less the bit that keys have beside it. Quiet ones
# are scaled up less: a later token may be loud there, and the errors of the others would grow with it.
_LEAST, _MOST = -12 * _PER_OCTAVE, 4 * _PER_OCTAVE
_LEFT = 0.75  # octaves that a scale may lack


class Basis(NamedTuple):
    """Of the keys and values of N units."""

    mean: jax.Array  # [N, D] bfloat16, of the keys
    # [N, D] int8: whether the key channel is of those that come first, and twice log2 s in quarters
    channels: jax.Array
    value_scale: jax.Array  # [N, D] int8: log2 s of the values in quarters

    def stored(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [N, S, D] float32 as arena and centroids hold them."""
        keys = self._turned(k - self.mean.astype(jnp.float32)[:, None], 1)
        return keys, v.astype(jnp.float32) * _power(self.value_scale, 1)[:, None]

    def asked(self, q: jax.Array) -> jax.Array:
        """Queries [N, T, D] float32 for stored keys: their logits lack the product with the mean."""
        return self._turned(q, -1)

    def answered(self, y: jax.Array) -> jax.Array:
        """Attention [N, T, D] float32 over stored values, as it is over the values that came."""
        return y * _power(self.value_scale, -1)[:, None]

    def _turned(self, x, power):
        """x [N, S, D] times a power of s, its channels in their order."""
        factor = _power(self.channels >> 1, power)
        first = (self.channels & 1).astype(jnp.int32)
        before = jnp.sum(first, axis=1, keepdims=True)
        place = jnp.where(
            first == 1, jnp.cumsum(first, axis=1) - 1, before + jnp.cumsum(1 - first, axis=1) - 1
        )
        # A product with ones and zeros: exact, where a gather would be slow.
        moved = (place[..., None] == np.arange(x.shape[-1])) * factor[..., None]
        return jnp.einsum("nsd,nde->nse", x, moved, precision=lax.Precision.HIGHEST)


def of_units(cache: KVCache, units: jax.Array) -> Basis:
    """The basis of units [N]; any, where there is no such unit."""
    held = cache.key_mean, cache.key_channels, cache.value_scale
    return Basis(*(x.at[units].get(mode="clip") for x in held))


def with_units(cache: KVCache, units: jax.Array, basis: Basis) -> KVCache:
    """The cache with the basis of units [N]."""
    mean = cache.key_mean.at[units].set(basis.mean, mode="drop")
    channels = cache.key_channels.at[units].set(basis.channels, mode="drop")
    scale = cache.value_scale.at[units].set(basis.value_scale, mode="drop")
    return dataclasses.replace(cache, key_mean=mean, key_channels=channels, value_scale=scale)


def untouched(cache: KVCache, units: jax.Array) -> jax.Array:
    """[N] bool, whether no token has entered the unit since it was made or released."""
    tables = cache.arena.count, cache.centroids.count
    held = [jnp.sum(x.at[units].get(mode="clip"), axis=1) for x in tables]
    return jnp.sum(jnp.stack(held), axis=0) == 0


def entered(
    cache: KVCache,
    units: jax.Array,
    k: jax.Array,
    v: jax.Array,
    w: jax.Array,
    number: jax.Array | int,
    energy: jax.Array | None = None,
) -> Basis:
    """The basis of units [N] that tokens enter: theirs, or, in one that is untouched, `measured`."""
    first, own = untouched(cache, units)[:, None], of_units(cache, units)

    def new() -> Basis:
        basis = measured(k, v, w, number, energy)
        return jax.tree.map(lambda x, y: jnp.where(first, x, y), basis, own)

    return lax.cond(jnp.any(first), new, lambda: own)  # most tokens enter units that have tokens


def measured(
    k: jax.Array,
    v: jax.Array,
    w: jax.Array,
    number: jax.Array | int,
    energy: jax.Array | None = None,
) -> Basis:
    """The basis for the keys and values of a prompt.

    Its mean is that of the tokens that are finite, without the sinks and the padding.

    Args:
      k: [N, S, D] float32 keys.
      v: [N, S, D] values.
      w: [N, S] worth of the tokens, >= 0.
      number: [] int32, how many of the S tokens there are.
      energy: [N, D] of the queries, `query_energy`; None if it is not known: the keys' alone decides
        what comes first, and s = 1.
    """
    token = np.arange(k.shape[1])
    finite = _codec.usable(k, v)
    counted = finite & (token >= NUM_SINKS) & (token < number)
    k, v = (jnp.where(counted[..., None], x.astype(jnp.float32), 0) for x in (k, v))
    mean = jnp.sum(k, axis=1) / jnp.maximum(jnp.sum(counted, axis=1), 1)[:, None]
    mean = mean.astype(jnp.bfloat16)
    square = jnp.square(k - mean.astype(jnp.float32)[:, None])
    weight = jnp.where(counted, w, 0)
    keys, values = (jnp.einsum("ns,nsd->nd", weight, x) for x in (square, jnp.square(v)))
    asked = jnp.ones_like(keys) if energy is None else energy
    # A channel that is silent (a norm's scale of zero makes one) comes last and has the median's scale.
    known = (keys > 0) & (asked > 0) & jnp.isfinite(asked)
    keys, asked = (
        jnp.where(known, jnp.log2(jnp.where(known, x, 1)), jnp.nan) for x in (keys, asked)
    )
    rank = jnp.argsort(jnp.argsort(-(keys + asked), axis=1, stable=True), axis=1)  # NaN comes last
    first = known & (rank < k.shape[-1] // 2)
    best = jnp.zeros_like(keys) if energy is None else (asked - keys) / 4
    even = jnp.where(values > 0, -jnp.log2(jnp.where(values > 0, values, 1)) / 2, jnp.nan)
    return Basis(mean, 2 * _codes(best) + first.astype(jnp.int8), _codes(even))


def _power(codes: jax.Array, power: int) -> jax.Array:
    """float32 powers of the scales of `_codes`."""
    return jnp.exp2(codes.astype(jnp.float32) * (power / _PER_OCTAVE))


def _codes(octaves: jax.Array) -> jax.Array:
    """int8 codes of half of the scales [N, D], or of all but `_LEFT` octaves of them; 0 for NaN."""
    octaves -= jnp.nanmedian(octaves, axis=1, keepdims=True)
    octaves = jnp.nan_to_num(octaves - jnp.clip(octaves / 2, -_LEFT, _LEFT))
    return jnp.clip(jnp.round(_PER_OCTAVE * octaves), _LEAST, _MOST).astype(jnp.int8)


def query_energy(q: jax.Array, kv_heads: int, number: jax.Array | int | None = None) -> jax.Array:
    """Squares [K, D] of queries [S, H, D] by channel, summed over tokens and each head's group.

    Args:
      q: queries.
      kv_heads: K.
      number: [] int32, how many of the S tokens there are; None for all.
    """
    size, _, head_dim = q.shape
    square = jnp.square(q.astype(jnp.float32)).reshape(size, kv_heads, -1, head_dim)
    if number is not None:
        square = jnp.where((np.arange(size) < number)[:, None, None, None], square, 0)
    return jnp.sum(square, axis=(0, 2))
