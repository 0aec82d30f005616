"""Greedy transcripts over a cross-attention memory of any kind, and what they lose against another.

A memory is the dense keys and values (k, v) [L, B, S, H, D] or a `KVCache` that was written once.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from experiments.models.whisper import CrossAttention, Whisper, attend_dense
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


def attend(memory: Memory) -> CrossAttention:
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
    given, size = len(PROMPT), len(PROMPT) + MOST_TOKENS
    tokens = jnp.full((requests, size), END).at[:, :given].set(jnp.array(PROMPT))

    def step(carry):
        i, tokens, kept = carry
        last = lax.dynamic_slice_in_dim(tokens, i, 1, axis=1)
        logits, kept, _ = model.decode(last, i, kept, cross)
        text = logits[:, 0, :FIRST_SPECIAL]  # no timestamps, languages or tasks
        said = text.at[:, jnp.array([SPACE, END])].set(-jnp.inf)  # the first token says something
        new = jnp.argmax(jnp.where(i + 1 == given, said, text), axis=-1)
        new = jnp.where(last[:, 0] == END, END, new)
        new = jnp.where(i + 1 < given, tokens[:, i + 1], new)
        return i + 1, lax.dynamic_update_slice_in_dim(tokens, new[:, None], i + 1, axis=1), kept

    def going(carry):
        i, tokens, _ = carry
        last = lax.dynamic_slice_in_dim(tokens, i, 1, axis=1)
        return (i + 1 < size) & jnp.any(last != END)

    begun = jnp.int32(0), tokens, model.empty(requests, size)
    return lax.while_loop(going, step, begun)[1][:, given:]


def padded(transcripts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T] behind the prompt, which END fills, and how many of each to look at [B]."""
    rows = np.full((len(transcripts), len(PROMPT) + MOST_TOKENS), END)
    rows[:, : len(PROMPT)] = PROMPT
    for row, own in zip(rows, transcripts, strict=True):
        row[len(PROMPT) : len(PROMPT) + len(own)] = own
    return rows, np.array([len(own) + 1 for own in transcripts])


def read(speech: Speech, memory: Memory, tokens: np.ndarray) -> tuple[Array, Array]:
    """Of given tokens [B, T]: log-probabilities [B, T, text], and the queries [L, B, T, H, D]."""
    return _read(speech.graph, speech.state, memory, jnp.asarray(tokens))


@functools.partial(jax.jit, static_argnums=0)
def _read(graph, state, memory, tokens):
    model = nnx.merge(graph, state)
    logits, _, queries = model.decode(tokens, 0, model.empty(*tokens.shape), attend(memory))
    return jax.nn.log_softmax(logits[..., :FIRST_SPECIAL]), queries


def divergence(full: Array, other: Array, count: np.ndarray) -> np.ndarray:
    """[B] mean KL from the full memory to another, over the first `count` tokens behind the prompt."""
    kl = jnp.sum(jnp.exp(full) * (full - other), axis=-1)[:, len(PROMPT) - 1 :]
    there = np.arange(kl.shape[1]) < count[:, None]
    return np.asarray(jnp.sum(jnp.where(there, kl, 0), axis=1)) / count
