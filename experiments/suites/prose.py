"""Distances between predictions over a kept context and those of dense attention, on real prose."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import texts
from experiments.suites.cases import Writer

NAME = "prose"
TEXTS = ("lcet10", "plrabn12", "alice29", "hamlet")
CONTINUATION_TOKENS = 512  # to predict, of a length
STRIDE = 0.382  # of a text, from one context to the next: they spread over it evenly
PERCENTILES = {"median": 50.0, "99 %": 99.0, "99.9 %": 99.9}


class Passage(NamedTuple):
    """A context of real prose and what follows it."""

    context: np.ndarray  # [S]
    continuation: np.ndarray  # [T + 1]


class Distances(NamedTuple):
    """Of each of the predicted tokens."""

    kl: np.ndarray  # [T] KL(dense || kept), nats
    same: np.ndarray  # [T] whether both have the same most likely token


def passage_of(writer: Writer, index: int) -> Passage:
    """Passage `index`: always the same one; the texts take turns.

    Raises:
      ValueError: a text too short.
    """
    name = TEXTS[index % len(TEXTS)]
    ids = writer.ids(texts.text_of(name))
    last = len(ids) - writer.length - 1
    if last < 0:
        raise ValueError(f"--length is {writer.length}: {name} has {len(ids)} tokens")
    start = int(last * ((0.1 + STRIDE * (index // len(TEXTS))) % 1))
    begin, size = writer.begin, writer.length - CONTINUATION_TOKENS
    context = np.concatenate([begin, ids[start : start + size - len(begin)]])
    behind = start + size - len(begin)
    return Passage(context, ids[behind : behind + CONTINUATION_TOKENS + 1])


def distances(kept: jax.Array, dense: jax.Array) -> Distances:
    """Of log-probabilities [T, V] over a kept context and those over everything."""
    return Distances(*map(np.asarray, _distances(kept, dense)))


@jax.jit
def _distances(kept, dense):
    kl = jnp.sum(jnp.exp(dense) * (dense - kept), axis=-1)
    return kl, jnp.argmax(kept, axis=-1) == jnp.argmax(dense, axis=-1)
