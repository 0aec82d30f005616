"""A decoder of pure functions whose layers see windows, through a soft cap, at a scale of their own.

Its oracle is written once more in NumPy, in float64, with dense masks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jbalance.decode import AttentionSpec, Model

VOCAB, EMBED, HEADS, KV_HEADS, DIM = 53, 24, 4, 2, 16
WINDOWS = (12, None, 12)
TURNS = tuple(float(0.3**i) for i in range(DIM // 2))
ROTARY = (TURNS, tuple(x / 8 for x in TURNS), None)  # of each layer
SCALE, CAP = 0.6, 4.0


def specs(*, windows=WINDOWS, soft_cap: float | None = CAP) -> tuple[AttentionSpec, ...]:
    """Turned fast, slowly, and not at all."""
    return tuple(
        AttentionSpec(HEADS, KV_HEADS, DIM, turns, scale=SCALE, window=window, soft_cap=soft_cap)
        for window, turns in zip(windows, ROTARY, strict=True)
    )


def _weights() -> tuple[dict[str, Any], tuple[dict[str, Any], ...]]:
    rng = np.random.default_rng(5)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    params = {"embed": 2 * normal(VOCAB, EMBED), "head": normal(EMBED, VOCAB)}
    layers = tuple(
        {
            "q": normal(EMBED, HEADS, DIM) / EMBED**0.5 * 1.5,
            "k": normal(EMBED, KV_HEADS, DIM) / EMBED**0.5 * 1.5,
            "v": normal(EMBED, KV_HEADS, DIM) / EMBED**0.5,
            "o": normal(HEADS, DIM, EMBED) / DIM**0.5,
            "turns": np.array([0.0] * (DIM // 2) if turns is None else turns, np.float32),
        }
        for turns in ROTARY
    )
    return params, layers


def model(attention: tuple[AttentionSpec, ...] | None = None) -> Model:
    """The decoder; three layers."""
    params, layers = _weights()
    return Model(
        {k: jnp.asarray(x) for k, x in params.items()},
        tuple({k: jnp.asarray(x) for k, x in layer.items()} for layer in layers),
        specs() if attention is None else attention,
        _embed,
        _qkv,
        _finish,
        _logits,
    )


def _embed(params, tokens, positions):
    del positions
    return params["embed"][tokens]


def _normed(x):
    return x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True))


def _qkv(layer, x, positions):
    x = _normed(x)
    q, k, v = (jnp.einsum("bte,ehd->bthd", x, layer[name]) for name in "qkv")
    angle = positions[..., None, None] * layer["turns"]

    def turned(z):
        a, b = jnp.split(z, 2, axis=-1)
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    return turned(q), turned(k), v


def _finish(layer, x, y):
    return x + jnp.einsum("bthd,hde->bte", y, layer["o"])


def _logits(params, x):
    return _normed(x) @ params["head"]


def regret(prompt, found, attention: tuple[AttentionSpec, ...] | None = None) -> float:
    """How far below the oracle's most likely token the worst of the tokens found is, in logits."""
    tokens = np.concatenate([prompt, found]).astype(np.int32)
    logits = dense_logits(tokens[:-1], specs() if attention is None else attention)
    logits = logits[len(prompt) - 1 :]
    return float((logits.max(axis=1) - logits[np.arange(len(found)), np.asarray(found)]).max())


class Kept(NamedTuple):
    """What an intervention on T tokens leaves."""

    seen: np.ndarray  # [L, K, T, T] bool, which query sees which key
    heads: np.ndarray  # [L, T, H] bool
    layers: np.ndarray  # [L, T] bool


def dense_logits(
    tokens: np.ndarray, attention: tuple[AttentionSpec, ...], kept: Kept | None = None
) -> np.ndarray:
    """[T, V] in float64; of what an intervention leaves."""
    if kept is None:
        size, number = len(tokens), len(attention)
        kept = Kept(
            np.ones((number, KV_HEADS, size, size), bool),
            np.ones((number, size, HEADS), bool),
            np.ones((number, size), bool),
        )
    params, layers = _weights()
    params = {k: np.asarray(x, np.float64) for k, x in params.items()}
    x, at = params["embed"][tokens], np.arange(len(tokens))
    for spec, layer, *left in zip(attention, layers, *kept, strict=True):
        h = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True))
        angle = at[:, None, None] * np.asarray(layer["turns"], np.float64)
        q, k, v = (np.tensordot(h, np.asarray(layer[n], np.float64), 1) for n in "qkv")
        q, k = (_turn(z, angle) for z in (q, k))
        seen = (at[None] <= at[:, None]) & (at[:, None] - at[None] < (spec.window or len(tokens)))
        y = np.zeros((len(tokens), HEADS, DIM))
        for head in range(HEADS):
            own = head // (HEADS // KV_HEADS)
            logits = spec.scale * q[:, head] @ k[:, own].T
            if spec.soft_cap is not None:
                logits = spec.soft_cap * np.tanh(logits / spec.soft_cap)
            weight = np.where(seen & left[0][own], np.exp(logits - logits.max()), 0)
            y[:, head] = weight / weight.sum(axis=1, keepdims=True) @ v[:, own]
        y = y * left[1][..., None]
        passed = x + np.einsum("thd,hde->te", y, np.asarray(layer["o"], np.float64))
        x = np.where(left[2][:, None], passed, x)
    h = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True))
    return h @ params["head"]


def _turn(z, angle):
    a, b = np.split(z, 2, axis=-1)
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], axis=-1
    )
