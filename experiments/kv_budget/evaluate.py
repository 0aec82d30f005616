"""How well the model continues over a reduced cache, against the full one."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.kv_budget.data import Case
from experiments.kv_budget.decode import Caches, Decoder, Layout, live_bytes, place_caches
from experiments.kv_budget.measure import Measured
from experiments.kv_budget.policies import Plan
from experiments.models import Llama


class Quality(NamedTuple):
    """Over the predicted tokens of one continuation."""

    nll: float  # mean negative log-likelihood, nats
    nll_full: float  # that of the full cache
    kl: float  # mean KL(full || reduced), nats
    top1: float  # how often both have the same most likely token


def log_probs(decoder: Decoder, plan: Plan, caches: Caches, tokens: np.ndarray) -> jax.Array:
    """Log-probabilities [T, V] after each of the tokens [T] that follow the context."""
    layout = Layout.of(plan.device_of, plan.kept.shape[:2])
    logits, _ = decoder.forward(tokens, plan.kept.shape[2], caches, layout, 0)
    return jax.nn.log_softmax(logits)


def reference(decoder: Decoder, measured: Measured, tokens: np.ndarray) -> jax.Array:
    """Log-probabilities [T, V] over the full cache in float32, on each process's first device."""
    decoder = decoder.alone()
    layers, heads, _ = measured.w.shape
    device_of = np.zeros(layers * heads, np.int32)
    plan = Plan(np.zeros(measured.w.shape, np.int8), (16,), device_of, None)
    caches = place_caches(measured, plan, decoder.devices, dtype=jnp.float32)
    return log_probs(decoder, plan, caches, tokens)


def quality(reduced: jax.Array, full: jax.Array, labels: np.ndarray) -> Quality:
    """Compare log-probabilities [T, V] on the tokens [T] that really follow."""
    at = jnp.asarray(labels)[:, None]
    kl = jnp.sum(jnp.exp(full) * (full - reduced), axis=-1)
    same = jnp.argmax(reduced, axis=-1) == jnp.argmax(full, axis=-1)
    return Quality(
        nll=float(-jnp.take_along_axis(reduced, at, axis=1).mean()),
        nll_full=float(-jnp.take_along_axis(full, at, axis=1).mean()),
        kl=float(kl.mean()),
        top1=float(same.mean()),
    )


def answers(
    decoder: Decoder,
    plan: Plan,
    caches: Caches,
    query: np.ndarray,
    answer: np.ndarray,
) -> bool:
    """Whether every token of the answer is the most likely one, given the query and those before it."""
    fed = np.concatenate([query, answer[:-1]])
    predicted = np.argmax(log_probs(decoder, plan, caches, fed), axis=-1)
    return bool((predicted[-len(answer) :] == answer).all())


def answers_with_everything(model: Llama) -> Callable[[Case], bool]:
    """Whether the model, with nothing reduced, finds every token of a case's answer."""
    graph, state = nnx.split(model)

    @functools.partial(jax.jit, static_argnums=2)
    def predicted(state, tokens, number):
        model = nnx.merge(graph, state)
        hidden, _ = model.hidden(tokens[None])
        return jnp.argmax(model.logits(hidden[:, -number:])[0], axis=-1)

    def accept(case: Case) -> bool:
        tokens = np.concatenate([case.context, case.query, case.answer[:-1]])
        return bool((predicted(state, jnp.asarray(tokens), len(case.answer)) == case.answer).all())

    return accept


class Progress(NamedTuple):
    """Greedy decoding so far: all that goes on from here."""

    caches: Caches
    layout: Layout
    context_tokens: int
    tail_tokens: int  # that the caches hold behind the context
    tokens: tuple[int, ...]  # generated; the last one is not in the caches yet

    def fed(self, decoder: Decoder, new: np.ndarray) -> Progress:
        """After new tokens, with the one that is most likely after them."""
        position = self.context_tokens + self.tail_tokens
        logits, caches = decoder.forward(new, position, self.caches, self.layout, self.tail_tokens)
        tokens = (*self.tokens, int(jnp.argmax(logits[-1])))
        tail = self.tail_tokens + len(new)
        return Progress(caches, self.layout, self.context_tokens, tail, tokens)

    def next(self, decoder: Decoder) -> Progress:
        """After one more token."""
        return self.fed(decoder, np.array([self.tokens[-1]], np.int32))


class Generation(NamedTuple):
    """Greedy decoding, token by token."""

    tokens: np.ndarray
    tokens_per_s: float
    most_bytes: np.ndarray  # [G] that each device held after any step; 0 for other processes'


def generate(
    decoder: Decoder,
    plan: Plan,
    caches: Caches,
    query: np.ndarray,
    steps: int,
    at_half: Callable[[Progress], object] = lambda progress: None,
) -> Generation:
    """The question, then `steps` greedy tokens, over the caches and into their room.

    `at_half` is called when half of them are there. The first token after the question is not timed:
    it compiles.
    """
    layout = Layout.of(plan.device_of, plan.kept.shape[:2])
    progress = Progress(caches, layout, plan.kept.shape[2], 0, ()).fed(decoder, query)
    most, seconds = live_bytes(progress.caches), 0.0
    while len(progress.tokens) < steps:
        start = time.perf_counter()
        progress = progress.next(decoder)
        if len(progress.tokens) > 2:
            seconds += time.perf_counter() - start
        most = np.maximum(most, live_bytes(progress.caches))
        if len(progress.tokens) == steps // 2:
            at_half(progress)
    rate = (steps - 2) / seconds if steps > 2 else 0.0
    return Generation(np.array(progress.tokens, np.int32), rate, most)
