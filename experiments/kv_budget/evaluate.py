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
from experiments.models import Transformer
from jbalance import decode
from jbalance.decode import Context, Model, State, extend


class Quality(NamedTuple):
    """Over the predicted tokens of one continuation."""

    nll: float  # mean negative log-likelihood, nats
    nll_full: float  # that of the full cache
    kl: float  # mean KL(full || reduced), nats
    top1: float  # how often both have the same most likely token


def log_probs(model: Model, context: Context, devices, tokens: np.ndarray) -> jax.Array:
    """Log-probabilities [T, V] after each of the tokens [T] that follow the context."""
    return extend.log_probs(model, devices, None, context.caches, tokens, context.num_tokens)


def reference(model: Transformer, context: np.ndarray, tokens: np.ndarray) -> jax.Array:
    """Log-probabilities [T, V] after each of the tokens [T] by dense attention over everything."""
    graph, state = nnx.split(model)
    return _reference(graph, state, jnp.concatenate([context, tokens]), len(tokens))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _reference(graph, state, tokens, number):
    model = nnx.merge(graph, state)
    hidden, _ = model.hidden(tokens[None])
    return jax.nn.log_softmax(model.logits(hidden[:, -number:])[0])


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


def answers(model: Model, context: Context, devices, query: np.ndarray, answer: np.ndarray) -> bool:
    """Whether every token of the answer is the most likely one, given the query and those before it."""
    fed = np.concatenate([query, answer[:-1]])
    predicted = np.argmax(log_probs(model, context, devices, fed), axis=-1)
    return bool((predicted[-len(answer) :] == answer).all())


def answers_with_everything(model: Transformer) -> Callable[[Case], bool]:
    """Whether the model, with nothing reduced, finds every token of a case's answer."""

    def accept(case: Case) -> bool:
        fed = np.concatenate([case.query, case.answer[:-1]])
        predicted = np.argmax(reference(model, case.context, fed), axis=-1)
        return bool((predicted[-len(case.answer) :] == case.answer).all())

    return accept


class Generation(NamedTuple):
    """Greedy decoding, token by token."""

    tokens: np.ndarray
    tokens_per_s: float
    most_bytes: np.ndarray  # [G] that each device held after any step; 0 for other processes'


def generate(
    model: Model,
    context: Context,
    devices: list[jax.Device],
    budgets_bytes: list[int],
    query: np.ndarray,
    steps: int,
    at_half: Callable[[State, list[int]], object] = lambda state, tokens: None,
) -> Generation:
    """The question, then `steps` greedy tokens, by a request that reads the context.

    `at_half` is called when half of them are there. The rate is that of the median step: some compile.
    """
    state = decode.create(model, budgets_bytes, context=context, devices=devices)
    state = decode.join(model, state, 0, query)
    tokens, most = [int(state.tokens[0])], np.array(state.nbytes)
    seconds: list[float] = []
    while len(tokens) < steps:
        start = time.perf_counter()
        new, state = decode.step(model, state)
        tokens.append(int(new[0]))
        seconds.append(time.perf_counter() - start)
        most = np.maximum(most, state.nbytes)
        if len(tokens) == steps // 2:
            at_half(state, tokens)
    return Generation(np.array(tokens, np.int32), rate_of(seconds), most)


def rate_of(seconds: list[float]) -> float:
    """Steps a second, by the median of what each took; 0 of none."""
    return float(1 / np.median(seconds)) if seconds else 0.0
