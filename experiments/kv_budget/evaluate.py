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
from experiments.kv_budget.decode import Decoder, DeviceCache, Layout, place_caches
from experiments.kv_budget.measure import Measured
from experiments.kv_budget.policies import Plan
from experiments.models import Llama


class Quality(NamedTuple):
    """Over the predicted tokens of one continuation."""

    nll: float  # mean negative log-likelihood, nats
    nll_full: float  # that of the full cache
    kl: float  # mean KL(full || reduced), nats
    top1: float  # how often both have the same most likely token


def log_probs(
    decoder: Decoder, plan: Plan, caches: list[DeviceCache], tokens: np.ndarray
) -> jax.Array:
    """Log-probabilities [T, V] after each of the tokens [T] that follow the context."""
    layout = Layout.of(plan.device_of, plan.kept.shape[:2])
    logits, _ = decoder.forward(tokens, plan.kept.shape[2], caches, layout, 0)
    return jax.nn.log_softmax(logits)


def reference(decoder: Decoder, measured: Measured, tokens: np.ndarray) -> jax.Array:
    """Log-probabilities [T, V] over the full cache in float32, on the first device."""
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
    caches: list[DeviceCache],
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


class Generation(NamedTuple):
    """Greedy decoding, token by token."""

    tokens: np.ndarray
    tokens_per_s: float
    caches: list[DeviceCache]


def generate(
    decoder: Decoder, plan: Plan, caches: list[DeviceCache], query: np.ndarray, steps: int
) -> Generation:
    """The question, then `steps` greedy tokens, over the caches and into their room.

    The first token after the question is not timed: it compiles.
    """
    layout = Layout.of(plan.device_of, plan.kept.shape[:2])
    position, tail = plan.kept.shape[2], len(query)
    logits, caches = decoder.forward(query, position, caches, layout, 0)
    found = [int(jnp.argmax(logits[-1]))]
    start = time.perf_counter()
    for step in range(steps - 1):
        new = np.array([found[-1]], np.int32)
        logits, caches = decoder.forward(new, position + tail, caches, layout, tail)
        found.append(int(jnp.argmax(logits[-1])))
        tail += 1
        if step == 0:
            start = time.perf_counter()
    seconds = time.perf_counter() - start
    rate = (steps - 2) / seconds if steps > 2 else 0.0
    return Generation(np.asarray(found, np.int32), rate, caches)
