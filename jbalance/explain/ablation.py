"""Interventions on a decoder: what its predictions lose when tokens, heads or layers are taken away.

The context is read by the whole model; what is taken away is missing while the text goes on, as are
tokens that a cache has evicted. So the effect is causal, where a score only guesses it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jbalance import checks
from jbalance._bits import in_32_bits
from jbalance.cache._sight import NO_WINDOW
from jbalance.cache._step import scaled
from jbalance.decode import prefill
from jbalance.decode.model import Functions, Model, check_model, check_numbers, token_ids

_NONE = -1e30  # a logit whose weight is 0


class Effect(NamedTuple):
    """Of N interventions, against none."""

    kl: jax.Array  # [N] nats a token, of the predictions with everything to those without
    nll_rise: jax.Array  # [N] nats a token, of the text that really follows


class _Kept(NamedTuple):
    """Of one batch of interventions; bool."""

    tokens: jax.Array  # [N, L, K, S']
    heads: jax.Array  # [N, L, H]
    layers: jax.Array  # [N, L]


@in_32_bits
def ablate(
    model: Model,
    context: ArrayLike,
    continuation: ArrayLike,
    *,
    tokens: ArrayLike | None = None,
    heads: ArrayLike | None = None,
    layers: ArrayLike | None = None,
    batch: int = 8,
) -> Effect:
    """The causal effect of N interventions on how a text goes on after its context.

    Args:
      model: the decoder.
      context: [S] ids.
      continuation: [T + 1] ids that follow; T of them are predicted.
      tokens: [N, S], or by layer and key/value head [N, L, K, S]: bool, the context's tokens that the
        continuation sees.
      heads: [N, L, H] bool, the query heads whose output is there; that of the others is 0.
      layers: [N, L] bool, the layers that are there; the residual stream passes the others.
      batch: interventions that are computed together, static.

    Returns:
      `Effect`; of an intervention that takes nothing away it is 0.

    Raises:
      ValueError: nothing to take away, masks of other shapes or of different N, ids that are no whole
        numbers or outside of the vocabulary, a continuation of one token, a model that gives NaN.
    """
    check_model(model)
    context, continuation = (
        token_ids(name, x, model, least)
        for name, x, least in (("context", context, 1), ("continuation", continuation, 2))
    )
    batch = checks.static_int("batch", batch, 1)
    number, kept = _kept(model, context.size, {"tokens": tokens, "heads": heads, "layers": layers})
    held = [layer for _, layer in prefill.layers_of(model, context)]
    shown = functools.partial(_log_probs, model, held, context.size, continuation[:-1])
    full = shown(_batch(model, held, batch, [None] * len(kept)))[0]
    check_numbers("for the continuation", full)
    effects = []
    for start in range(0, number, batch):
        rows = min(batch, number - start)
        part = [None if x is None else x[start : start + rows] for x in kept]
        found = shown(_batch(model, held, batch, part))
        effects.append([x[:rows] for x in _effect(found, full, continuation[1:])])
    return Effect(*(jnp.concatenate(x) for x in zip(*effects, strict=True)))


def _kept(model: Model, size: int, given: dict[str, Any]) -> tuple[int, list[np.ndarray | None]]:
    """N, and the masks in the order of `_Kept`."""
    sizes = model.num_layers, model.num_kv_heads, model.attention[0].num_heads
    shapes = {
        "tokens": ("[N, S] or [N, L, K, S]", (*sizes[:2], size)),
        "heads": ("[N, L, H]", (sizes[0], sizes[2])),
        "layers": ("[N, L]", (sizes[0],)),
    }
    for name, (hint, rest) in shapes.items():
        if given[name] is not None:
            checks.rank(name, given[name], tuple({2, 1 + len(rest)}), hint)
    known = {name: np.asarray(x) for name, x in given.items() if x is not None}
    if not known:
        raise ValueError("tokens, heads and layers are None: say what is taken away")
    first, number = next(iter(known)), next(iter(known.values())).shape[:1]
    for name, x in known.items():
        hint, rest = shapes[name]
        short = name == "tokens" and x.ndim == 2
        checks.booleans(name, x, (*number, *(rest[2:] if short else rest)), f"{hint}, N of {first}")
        known[name] = x[:, None, None] if short else x
    return number[0], [known.get(name) for name in shapes]


def _batch(model: Model, held: list, number: int, given: list[np.ndarray | None]) -> _Kept:
    """The masks of some interventions, and rows up to `number` that take nothing away."""
    layers, heads = model.num_layers, model.attention[0].num_heads
    shapes = (layers, model.num_kv_heads, held[0].k.shape[0]), (layers, heads), (layers,)
    masks = [np.ones((number, *shape), bool) for shape in shapes]
    for mask, own in zip(masks, given, strict=True):
        if own is not None:
            mask[: len(own), ..., : own.shape[-1]] = own
    return _Kept(*map(jnp.asarray, masks))


def _log_probs(model: Model, held: list, number: int, tokens: np.ndarray, kept: _Kept) -> jax.Array:
    """[N, T, V] after each of the tokens [T] that follow, under N interventions."""
    size = kept.layers.shape[0]
    positions = jnp.broadcast_to(number + jnp.arange(len(tokens)), (size, len(tokens)))
    ids = jnp.broadcast_to(jnp.asarray(tokens), positions.shape)
    x = _embed(model.functions(0), model.params, ids, positions)
    for i, (weights, layer) in enumerate(zip(model.layers, held, strict=True)):
        f, own = model.functions(i), jax.tree.map(lambda a, i=i: a[:, i], kept)
        x = _layer(f, weights, x, layer.k, layer.v, positions, number, own)
    return _logits(model.functions(0), model.params, x)


@functools.partial(jax.jit, static_argnums=0)
def _embed(f: Functions, params: Any, ids: jax.Array, positions: jax.Array) -> jax.Array:
    return f.embed(params, ids, positions)


@functools.partial(jax.jit, static_argnums=0)
def _logits(f: Functions, params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(f.logits(params, x))


@functools.partial(jax.jit, static_argnums=0)
def _layer(f: Functions, weights, x, k, v, positions, number, kept: _Kept) -> jax.Array:
    """x [N, T, E] through a layer that holds k and v [S', K, D] of `number` tokens."""
    q, new_k, new_v = f.qkv(weights, x, positions)
    size, count = x.shape[:2]
    q = scaled(q, f.spec.scale) / np.float32(np.sqrt(q.shape[-1]))
    q = q.reshape(size, count, k.shape[1], -1, q.shape[-1])
    at = jnp.arange(k.shape[0])
    age = positions[0][:, None] - jnp.concatenate([at, positions[0]])  # [T, S' + T]
    there = (age >= 0) & (age < (NO_WINDOW if f.spec.window is None else f.spec.window))
    held = kept.tokens & (at < number)  # [N, K, S']
    seen = (
        there & jnp.pad(held, ((0, 0), (0, 0), (0, count)), constant_values=True)[:, :, None, None]
    )
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    logits = jnp.concatenate(
        [
            product("ntkgd,skd->nkgts", q, k.astype(jnp.float32)),
            product("ntkgd,nskd->nkgts", q, new_k.astype(jnp.float32)),
        ],
        axis=-1,
    )
    if f.spec.soft_cap is not None:
        logits = f.spec.soft_cap * jnp.tanh(logits / f.spec.soft_cap)
    weight = jax.nn.softmax(jnp.where(seen, logits, _NONE))
    y = product("nkgts,skd->ntkgd", weight[..., : k.shape[0]], v.astype(jnp.float32))
    y += product("nkgts,nskd->ntkgd", weight[..., k.shape[0] :], new_v.astype(jnp.float32))
    y = y.reshape(size, count, -1, y.shape[-1]) * kept.heads[:, None, :, None]
    passed = f.finish(weights, x, y.astype(x.dtype))
    return jnp.where(kept.layers[:, None, None], passed, x)


@jax.jit
def _effect(found: jax.Array, full: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """KL and rise in nats a token, [N] each, of log-probabilities [N, T, V] against full [T, V]."""
    kl = jnp.sum(jnp.exp(full) * (full - found), axis=-1).mean(axis=1)
    said, before = (x[..., jnp.arange(labels.size), labels] for x in (found, full))
    return kl, (before - said).mean(axis=1)
