"""How the studies' small models are trained, and what their programs compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax import Array

from experiments.harness import optimisers

LOGGED = 20  # steps between two points of a training curve


def orders(number: int, batch: int, epochs: int, seed: int) -> list[np.ndarray]:
    """Indices of each step's examples, the same for all arms of a seed; an epoch's rest is left out."""
    rng = np.random.default_rng(seed)
    steps = number // batch
    return [
        row
        for _ in range(epochs)
        for row in rng.permutation(number)[: steps * batch].reshape(steps, batch)
    ]


def rows(number: int, batch: int) -> list[np.ndarray]:
    """Indices of examples in their order, `batch` at a time; the last ones may be fewer."""
    return [np.arange(i, min(i + batch, number)) for i in range(0, number, batch)]


def train(
    model: Any,
    loss_of: Callable[[Any, Any, Array], Any],
    batches: Iterable[Any],
    steps: int,
    peak: float,
    seed: int,
    log: Any,
    advance: Callable[[], None],
    *,
    weight_decay: float = 0.01,
    observe: Callable[[Any], None] | None = None,
) -> list[float]:
    """Train a module in place by AdamW, in one program.

    Args:
      model: an nnx module.
      loss_of: (model, batch, key) -> the loss that is lowered.
      batches: arrays of the same shapes.
      steps: how many there are.
      peak: the largest rate.
      seed: of the keys.
      log: a TensorBoard writer.
      advance: called after each step.
      weight_decay: of AdamW.
      observe: called after each step with what `loss_of` then returns beside the loss, before the next
        batch is asked for.

    Returns:
      The loss of each step.
    """
    optimiser = optimisers.adamw(steps, peak, weight_decay=weight_decay)
    graph, parameters, *others = nnx.split(model, nnx.Param, ...)
    rest = others[0]

    @jax.jit
    def step(parameters: Any, rest: Any, state: Any, batch: Any, key: Array) -> Any:
        def of(parameters: Any) -> tuple[Array, Any]:
            found = loss_of(nnx.merge(graph, parameters, rest), batch, key)
            return (found, None) if observe is None else found

        (value, beside), gradient = jax.value_and_grad(of, has_aux=True)(parameters)
        updates, state = optimiser.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, value, beside

    state, losses = optimiser.init(parameters), []
    for i, batch in enumerate(batches):
        key = jax.random.key(100_000 * seed + i)
        parameters, state, loss, beside = step(parameters, rest, state, batch, key)
        losses.append(loss)
        if observe is not None:
            observe(beside)
        if i % LOGGED == 0:
            log.add_scalar("loss", float(loss), i)
        advance()
    nnx.update(model, parameters)
    return [float(x) for x in losses]


def flops_of(compiled: Any) -> float:
    """What a program computes, as its compiler counts; the bodies of loops once."""
    found = compiled.cost_analysis()
    return float((found[0] if isinstance(found, list) else found)["flops"])
