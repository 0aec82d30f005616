"""A cache of few heads and small pages, its calls compiled once, and dense attention to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance import cache
from jbalance.cache import _centroids, _pages

B, L, K, G, D, R, S = 2, 2, 2, 2, 16, 8, 24
BITS, PAGE = (8, 3), 264  # two levels: less to compile; 7 or 15 tokens of a page
H, PROTECTED = K * G, 12
BUDGET = 21_000
MANY = np.full(B, 10**6, np.int32)  # pages, more than there are
ALL = np.array([True] * B)
ORDER = np.arange(L)
FREQUENCIES = 1e4 ** -np.linspace(0, 1, D // 2, endpoint=False)


def create(budget=BUDGET, **changes):
    """`cache.create` of small pages and recent buffers."""
    good = {"num_layers": L, "num_kv_heads": K, "head_dim": D, "num_requests": B}
    good |= {"page_bytes": PAGE, "recent_tokens": R, "bits": BITS}
    return cache.create(budget, **(good | changes))


def just(num_pages):
    """A cache of one request and so many pages."""
    one = create(num_requests=1)
    out = create(one.nbytes - (one.arena.num_pages - num_pages) * (PAGE + 4), num_requests=1)
    assert out.arena.num_pages == num_pages
    return out


class Calls(NamedTuple):
    """The two calls for all layers, of caches of one shape."""

    prefill: (
        object  # (cache, q, k, v [L, B, S, ...], lengths, allowance) to y [L, B, S, H, D], cache
    )
    step: (
        Callable  # (cache, q, k, v [L, B, ...], allowance, active, order) to y [L, B, H, D], cache
    )


def compiled(name, jit=jax.jit, scale=None) -> Calls:
    """`Calls` that raise if values make them compile anew; every other name has its own."""

    def once(f):
        f.__name__ += f" of {name}"  # by which chex tells them apart
        return jit(chex.assert_max_traces(f, n=1), donate_argnums=0)

    @once
    def prefill(held, q, k, v, lengths, allowance):
        def one(held, x):
            layer, q, k, v = x
            y, held = cache.prefill(
                held,
                layer,
                q,
                k,
                v,
                frequencies=FREQUENCIES,
                lengths=lengths,
                scale=scale,
                allowance_pages=allowance,
            )
            return held, y

        held, y = lax.scan(one, held, (jnp.arange(L), q, k, v))
        return y, held

    @once
    def step(held, q, k, v, allowance, active, order, context=None):
        def one(held, layer):
            x = q[layer], k[layer], v[layer]
            y, held = cache.step(
                held,
                layer,
                *x,
                context=context,
                scale=scale,
                active=active,
                allowance_pages=allowance,
            )
            return held, y

        held, y = lax.scan(one, held, order)
        return jnp.zeros_like(y).at[order].set(y), held

    return Calls(prefill, step)


def drawn(rng, requests=B, size=None):
    """q, k, v [L, B, ...] of a token, or [L, B, size, ...] of prompts; keys with a mean of their own."""
    lead = (L, requests) if size is None else (L, requests, size)
    q, k, v = (rng.normal(size=(*lead, n, D)).astype(np.float32) for n in (H, K, K))
    return q, k + 1.5, v


def attention(q, keys, values):
    """y and weights of q [H, D] over [S, K, D] in float64."""
    keys, values = (np.repeat(np.asarray(x, float), G, axis=1) for x in (keys, values))
    logits = np.einsum("hd,shd->hs", np.asarray(q, float), keys) / np.sqrt(D)
    weight = np.exp(logits - logits.max(axis=1, keepdims=True))
    weight /= weight.sum(axis=1, keepdims=True)
    return np.einsum("hs,shd->hd", weight, values), weight


def rounded(x):
    """As the recent buffer stores it."""
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)


def given_back(held, unit, keys, values):
    """Keys and values [..., D] as they came, of those that arena and centroids hold."""
    channels = np.asarray(held.key_channels[unit], int)
    scale = np.asarray(held.value_scale[unit], int)
    order = np.argsort(1 - channels % 2, kind="stable")
    out = np.empty(np.shape(keys))
    out[..., order] = np.asarray(keys, float) / 2.0 ** (channels // 2 / 4)[order]
    keys = out + np.asarray(held.key_mean[unit], float)
    return keys, np.asarray(values, float) / 2.0 ** (scale / 4)


def of_parts(held, layer, q, k, v):
    """y of request 0's query [H, D], and what its first recent token gains, over decoded parts."""
    out, gained, there = [], [], int(held.recent_count[0])
    for head in range(K):
        unit = layer * K + head
        parts = [_pages.read(held.arena, unit, m) for m in range(len(BITS))]
        left = jax.tree.map(lambda x: x[0], _centroids.load(held.centroids, np.array([unit])))
        many = np.asarray(left.count)
        parts = [(x.k[x.valid], x.v[x.valid]) for x in parts] + [
            tuple(np.repeat(x, many, axis=0) for x in (left.keys, left.values))
        ]
        parts = [given_back(held, unit, k, v) for k, v in parts]
        recent = (held.recent_keys[unit, :there], held.recent_values[unit, :there])
        parts += [tuple(np.asarray(x).view(jnp.bfloat16) for x in recent)]
        parts += [(rounded(k[head])[None], rounded(v[head])[None])]
        keys, values = (np.concatenate([np.asarray(x[i], float) for x in parts]) for i in range(2))
        own = q[head * G : (head + 1) * G].astype(float)
        weight = np.exp(own @ keys.T / np.sqrt(D))
        weight /= weight.sum(axis=1, keepdims=True)
        out.append(weight @ values)
        gained.append(np.square(weight[:, -1 - there]).sum())
    return np.concatenate(out), np.array(gained)
