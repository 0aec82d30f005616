"""New tokens go on from what the devices hold: a question, the next turn of a chat, a given text.

They go through the model a piece at a time. The tokens of a piece see all that is held, and each other
causally; then they are kept at what they are worth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import attention, importance
from jbalance.attention import Partial, merge
from jbalance.cache import _prefill, _step
from jbalance.cache._channels import query_energy
from jbalance.decode import devices as over
from jbalance.decode.devices import Caches
from jbalance.decode.model import Functions, Model

PIECE_TOKENS = 64


def tokens_of(
    model: Model,
    devices: Sequence[jax.Device],
    caches: Caches,
    contexts: Caches | None,
    request: int,
    tokens: np.ndarray,
    position: int,
    allowances: Sequence[Any],
) -> tuple[Caches, jax.Array]:
    """New tokens [S] of a request from `position` on enter its caches; logits [V] after the last."""
    logits = jnp.zeros(0)
    for first in range(0, len(tokens), PIECE_TOKENS):
        piece, start = tokens[first : first + PIECE_TOKENS], position + first
        caches, logits = _piece(model, devices, caches, contexts, request, piece, start, allowances)
    return caches, logits


def _piece(model, devices, caches, contexts, request, tokens, position, allowances):
    """`tokens_of` for at most `PIECE_TOKENS`."""
    number = len(tokens)
    padded = np.zeros(PIECE_TOKENS, np.int32)
    padded[:number] = tokens

    def attend(layer, qkv):
        nonlocal caches
        f = model.functions(layer)
        held = over.held(devices, caches, contexts, request, layer, qkv[0], position, f.limits)
        new = *qkv[1:], *_worth(f, *qkv, number)
        caches = over.admit(devices, caches, request, layer, new, number, allowances, position)
        return held

    logits = _through(model, padded, position, attend)
    return caches, logits[number - 1]


def log_probs(
    model: Model,
    devices: Sequence[jax.Device],
    caches: Caches | None,
    contexts: Caches | None,
    tokens: np.ndarray,
    position: int,
    *,
    request: int = 0,
) -> jax.Array:
    """Log-probabilities [T, V] after each of the tokens [T] from `position` on, which enter nothing.

    They see a context, what a request holds, or both, and each other causally.
    """

    def attend(layer, qkv):
        limits = model.functions(layer).limits
        return over.held(devices, caches, contexts, request, layer, qkv[0], position, limits)

    return jax.nn.log_softmax(_through(model, np.asarray(tokens, np.int32), position, attend))


def _through(
    model: Model,
    tokens: np.ndarray,
    position: int,
    attend: Callable[[int, tuple[jax.Array, ...]], Partial],
) -> jax.Array:
    """Logits [T, V] of tokens [T] from `position` on, which see what `attend(layer, qkv)` gives them."""
    layers, last = model.layers, model.num_layers - 1
    f = model.functions(0)
    positions = position + jnp.arange(len(tokens))
    x, qkv = _first_layer(f, model.params, layers[0], tokens, positions)
    for layer, weights in enumerate(layers):
        held = attend(layer, qkv)
        after = min(layer + 1, last)
        kinds = model.functions(layer), model.functions(after)
        x, qkv = _next_layer(kinds, weights, layers[after], x, qkv, held, positions)
    return logits_of(model, x)


@functools.partial(jax.jit, static_argnums=0)
def _first_layer(model: Functions, params, weights, tokens, positions):
    x = model.embed(params, tokens[None], positions[None])
    return x, _qkv(model, weights, x, positions)


@functools.partial(jax.jit, static_argnums=0)
def _next_layer(kinds, weights, following, x, qkv, held: Partial, positions):
    """Attention merged, the layer finished, and the q, k, v of the following one, by their functions."""
    model, next_model = kinds
    q, k, v = qkv
    size, kv_heads = q.shape[0], k.shape[1]
    plan = _prefill.causal_plan(size)
    own = attention.attend(q[None], k[None], v[None], plan, causal=True, **model.limits._asdict())
    own = Partial(*(_prefill.by_kv_head(part[0], kv_heads) for part in own))
    y = _prefill.by_token(merge(own, held).y, size)[None].astype(x.dtype)
    x = model.finish(weights, x, y)
    return x, _qkv(next_model, following, x, positions)


def _qkv(model: Functions, weights, x, positions):
    """[T, H, D] and [T, K, D] of one request, the queries scaled, in float32."""
    q, k, v = model.qkv(weights, x, positions[None])
    q, k, v = (part[0].astype(jnp.float32) for part in (q, k, v))
    return _step.scaled(q, model.spec.scale), k, v


@functools.partial(jax.jit, static_argnums=0)
def _worth(model: Functions, q, k, v, number):
    """Worth of the tokens, and the energy of their queries."""
    number = jnp.asarray(number)
    w = importance.token_worth(q, k, v, frequencies=model.spec.rotary, num_tokens=number)
    return w, query_energy(q, k.shape[1], number)


def logits_of(model: Model, x: jax.Array) -> jax.Array:
    """[T, V] float32 of x [1, T, E], the residual stream behind the last layer."""
    return _logits(model.functions(0), model.params, x)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Functions, params, x):
    return model.logits(params, x)[0].astype(jnp.float32)
