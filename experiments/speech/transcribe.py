"""Greedy transcripts over a cross-attention memory of any kind, and what they lose against another.

A memory is the dense keys and values (k, v) [L, B, S, H, D] or a `KVCache` that was written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from experiments.models.whisper import Whisper, attend_dense
from jbalance import cache
from jbalance.cache import KVCache

Memory = tuple[Array, Array] | KVCache
END, START, NO_TIMESTAMPS, FIRST_SPECIAL, SPACE = 50256, 50257, 50362, 50257, 220
PROMPT = (START, NO_TIMESTAMPS)
MOST_TOKENS = 160  # of 30 s; a transcript that repeats itself ends there


class Speech(NamedTuple):
    """A model's parts that programs take."""

    graph: Any  # static
    state: Any

    @classmethod
    def of(cls, model: Whisper) -> Speech:
        return cls(*nnx.split(model))

    @property
    def model(self) -> Whisper:
        return nnx.merge(self.graph, self.state)


def attend(memory: Memory) -> Callable[[int, Array], Array]:
    """Cross-attention over a memory."""
    if isinstance(memory, KVCache):
        return lambda layer, q: cache.attend(memory, layer, q)
    k, v = memory
    return lambda layer, q: attend_dense(q, k[layer], v[layer])


def listen(speech: Speech, mels: np.ndarray) -> tuple[Array, Array]:
    """Keys and values [L, B, S, H, D] of the frames of spectrograms [B, 3000, mels]."""
    return _listen(speech.graph, speech.state, jnp.asarray(mels))


@functools.partial(jax.jit, static_argnums=0)
def _listen(graph, state, mels):
    model = nnx.merge(graph, state)
    return model.memory(model.encode(mels))


def transcribe(speech: Speech, memory: Memory, requests: int) -> list[np.ndarray]:
    """The most likely token after token of each recording, without the prompt and the end."""
    tokens = np.asarray(_transcribe(speech.graph, speech.state, memory, requests))
    return [row[: np.argmax(np.append(row, END) == END)] for row in tokens]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _transcribe(graph, state, memory, requests):
    model, cross = nnx.merge(graph, state), attend(memory)
    prompt = jnp.tile(jnp.array(PROMPT), (requests, 1))
    kept = model.empty(requests, len(PROMPT) + MOST_TOKENS)
    logits, kept = model.decode(prompt, 0, kept, cross)
    first = logits[:, -1].at[:, jnp.array([SPACE, END])].set(-jnp.inf)  # something is said
    tokens = jnp.full((requests, MOST_TOKENS), END).at[:, 0].set(_best(first))

    def step(carry):
        i, tokens, kept = carry
        last = lax.dynamic_slice_in_dim(tokens, i - 1, 1, axis=1)
        logits, kept = model.decode(last, len(PROMPT) + i - 1, kept, cross)
        new = jnp.where(last[:, 0] == END, END, _best(logits[:, 0]))
        return i + 1, lax.dynamic_update_slice_in_dim(tokens, new[:, None], i, axis=1), kept

    def going(carry):
        i, tokens, _ = carry
        last = lax.dynamic_slice_in_dim(tokens, i - 1, 1, axis=1)
        return (i < MOST_TOKENS) & jnp.any(last != END)

    return lax.while_loop(going, step, (jnp.int32(1), tokens, kept))[1]


def _best(logits: Array) -> Array:
    """The likeliest text token or the end [B]; no timestamps, languages or tasks."""
    return jnp.argmax(logits[:, :FIRST_SPECIAL], axis=-1)


def padded(transcripts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T] behind the prompt, which END fills, and how many of each to look at [B]."""
    rows = np.full((len(transcripts), len(PROMPT) + MOST_TOKENS), END)
    rows[:, : len(PROMPT)] = PROMPT
    for row, own in zip(rows, transcripts, strict=True):
        row[len(PROMPT) : len(PROMPT) + len(own)] = own
    return rows, np.array([len(own) + 1 for own in transcripts])


def read(speech: Speech, memory: Memory, tokens: np.ndarray) -> tuple[Array, Array]:
    """Of given tokens [B, T]: log-probabilities [B, T, text], and the queries [L, B, T, H, D] of frames."""
    return _read(speech.graph, speech.state, memory, jnp.asarray(tokens))


@functools.partial(jax.jit, static_argnums=0)
def _read(graph, state, memory, tokens):
    model, cross, queries = nnx.merge(graph, state), attend(memory), []

    def recorded(layer, q):
        queries.append(q)
        return cross(layer, q)

    kept = model.empty(*tokens.shape)
    logits, _ = model.decode(tokens, 0, kept, recorded)
    return jax.nn.log_softmax(logits[..., :FIRST_SPECIAL]), jnp.stack(queries)


def divergence(full: Array, other: Array, count: np.ndarray) -> np.ndarray:
    """[B] mean KL from the full memory to another, over the first `count` tokens behind the prompt."""
    kl = jnp.sum(jnp.exp(full) * (full - other), axis=-1)[:, len(PROMPT) - 1 :]
    there = np.arange(kl.shape[1]) < count[:, None]
    return np.asarray(jnp.sum(jnp.where(there, kl, 0), axis=1)) / count
