"""Ways to hold the frames that a decoder attends to in a part of the bytes; the rules of the arms.

All but `full` are caches of the same budget, written by `cache.write` at levels and with worths of their
own. Evicted frames join centroids in those of `ladder`, and are lost in the others.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.speech.transcribe import Memory
from jbalance import allocate, cache, importance, shares
from jbalance.cache import KVCache
from jbalance.cache._cache import BITS
from jbalance.cache._layout import token_bytes

WIDE_PAGE_TOKENS = 8  # of pages at 16 bits, as in the experiments with prompts
_IN, _OUT = 1.0, 0.0  # worths of frames that a rule chose, and of the others


class Frames(NamedTuple):
    """Of B recordings, and queries of other recordings."""

    k: Array  # [L, B, S, H, D]
    v: Array  # [L, B, S, H, D]
    asked: Array  # [L, T, H, D]


def full_bytes(frames: Frames) -> int:
    """Of one recording at 16 bits."""
    k = frames.k
    return 4 * k.size // k.shape[1]


@jax.jit
def sampled_worth(frames: Frames) -> Array:
    """[L, B, H, S] worth by the sample queries, times the leverage: of frames that none asks for."""
    asked = jax.vmap(jax.vmap(importance.cross_worth, (None, 0)))(frames.asked, frames.k)
    return asked * key_leverage(frames)


@jax.jit
def key_leverage(frames: Frames) -> Array:
    """[L, B, H, S] leverage of the keys over its mean, which asks no query."""

    def one(k):
        return importance.leverage(k[:1], k, k)

    w = jax.vmap(jax.vmap(one))(frames.k)
    return w / jnp.mean(w, axis=-1, keepdims=True)


def write(rule: str, fraction: float, frames: Frames) -> Memory:
    """The memory of a rule within a part of the full bytes.

    Raises:
      ValueError: a rule that there is not, or one that cannot keep to so few bytes.
    """
    if rule == "full":
        return frames.k, frames.v
    if rule == "ladder":
        held = _empty(frames, fraction, BITS)
        return cache.write(held, frames.k, frames.v, sampled_worth(frames))
    if rule == "ladder, no queries":
        held = _empty(frames, fraction, BITS)
        return cache.write(held, frames.k, frames.v, 0.01 * jnp.sqrt(key_leverage(frames)))
    if rule == "uniform bits":
        return _without_centroids(_uniform_bits(frames, fraction))
    if rule == "subsample":
        return _without_centroids(_wide(frames, fraction, _evenly))
    if rule == "proportional":
        return _without_centroids(_wide(frames, fraction, _proportionally))
    raise ValueError(f"rule is {rule!r}: it must be full or one of {', '.join(RULES)}")


RULES = ("uniform bits", "subsample", "proportional", "ladder", "ladder, no queries")


UNIFORM_BITS = (8, 4, 3, 2, 1)


def is_too_little(head_dim: int, fraction: float) -> bool:
    """Whether not even one bit for every frame can be had for this part of their bytes."""
    return token_bytes(head_dim, UNIFORM_BITS[-1]) > fraction * token_bytes(head_dim, 16)


def _empty(frames: Frames, fraction: float, bits: tuple[int, ...], page_bytes=None) -> KVCache:
    layers, requests, _, heads, head_dim = frames.k.shape
    budget = int(fraction * requests * full_bytes(frames))
    sizes = {"bits": bits, "page_bytes": page_bytes, "num_requests": requests}
    return cache.create(budget, layers, heads, head_dim, recent_tokens=0, **sizes)


def _without_centroids(held: KVCache) -> KVCache:
    """As rules without them have it; the bytes stay counted."""
    empty = jax.tree.map(jnp.zeros_like, held.centroids)
    return dataclasses.replace(held, centroids=empty)


def _uniform_bits(frames: Frames, fraction: float) -> KVCache:
    """All frames at the most bits at which all fit."""
    layers, requests, size, heads, _ = frames.k.shape
    for bits in UNIFORM_BITS:
        held = _empty(frames, fraction, (bits,))
        if layers * heads * math.ceil(size / held.arena.page_tokens[0]) <= held.even_pages:
            w = jnp.ones((layers, requests, heads, size))
            return cache.write(held, frames.k, frames.v, w)
    raise ValueError(f"fraction is {fraction}: one bit for every frame takes more")


def _wide(frames: Frames, fraction: float, chosen) -> KVCache:
    """Frames that a rule chose, at 16 bits."""
    page_bytes = WIDE_PAGE_TOKENS * token_bytes(frames.k.shape[-1], 16)
    held = _empty(frames, fraction, (16,), page_bytes)
    w = jnp.where(chosen(frames, held.even_pages), _IN, _OUT)
    return cache.write(held, frames.k, frames.v, w)


def _evenly(frames: Frames, pages: int) -> np.ndarray:
    """[L, B, H, S]: every unit the same frames, evenly spaced."""
    layers, requests, size, heads, _ = frames.k.shape
    number = min(pages // (layers * heads) * WIDE_PAGE_TOKENS, size)
    at = np.floor((np.arange(number) + 0.5) * size / number).astype(int)
    return np.broadcast_to(np.isin(np.arange(size), at), (layers, requests, heads, size))


def _proportionally(frames: Frames, pages: int) -> np.ndarray:
    """[L, B, H, S]: METHOD step 3: units share the pages by their worth, and keep their first frames."""
    w = np.asarray(sampled_worth(frames))
    layers, requests, heads, size = w.shape
    rank = np.argsort(np.argsort(-w, axis=-1, kind="stable"), axis=-1)
    most = math.ceil(size / WIDE_PAGE_TOKENS)
    number = np.zeros((layers, requests, heads), int)
    for b in range(requests):
        alpha = shares.proportional(w[:, b].sum(axis=-1).reshape(-1))
        amount = allocate.whole(alpha, pages, 1, most).amount
        number[:, b] = np.asarray(amount).reshape(layers, heads)
    return rank < WIDE_PAGE_TOKENS * number[..., None]
