"""Fine-tuning with attention over some of its tiles: the step, and the texts in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer

from experiments.harness.texts import encode, text_of
from experiments.models import Transformer
from experiments.tiles.policies import POLICIES
from jbalance import attention
from jbalance.attention import TilePlan, Tiling

HELD_OUT = 0.2  # of every text, at its end: for validation


class Step(NamedTuple):
    """Compiled functions of one policy."""

    init: Callable[[Any], Any]  # parameters -> optimiser state
    train: Callable[..., Any]  # (parameters, optimiser state, ids [T]) -> both anew, loss, tiles
    loss: Callable[..., Any]  # (parameters, ids [T]) -> loss
    traces: list[int]  # one entry for each time that `train` was traced


def policy_plan(policy: str, density: float) -> Callable[..., TilePlan]:
    """What makes a plan from q, k and v; dense attention has the blocks that are fastest for it."""
    if policy == "dense":
        return lambda q, k, v: attention.dense(Tiling(q.shape[1], k.shape[1]))
    return lambda q, k, v: POLICIES[policy](*jax.lax.stop_gradient((q, k, v)), density)


def make_step(
    graph: nnx.GraphDef[Transformer],
    plan_of: Callable[..., TilePlan],
    optimiser: optax.GradientTransformation,
    scored: int | None = None,
    frozen: Sequence[Any] = (),
) -> Step:
    """The training step of a model whose attentions compute the tiles of `plan_of`, no others.

    The plans are made inside of the step, from its own queries and keys. Losses are the mean negative
    log-likelihood of the last `scored` tokens, None for all but the first. `frozen` is the part of the
    model's state that is not trained.
    """
    traces: list[int] = []

    def loss_of(parameters: Any, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, parameters, *frozen)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, _: Any) -> tuple[jax.Array, jax.Array]:
            plan = plan_of(q, k, v)
            of_all = plan.density * (plan.num_query_blocks * plan.num_key_blocks)
            return attention.attend(q, k, v, plan, causal=True).y, of_all

        h, tiles = model.hidden(ids[None], None, attend)
        first = 0 if scored is None else ids.size - scored - 1
        predicted = model.logits(h[:, first:-1])[0]
        losses = optax.softmax_cross_entropy_with_integer_labels(predicted, ids[first + 1 :])
        return jnp.mean(losses), jnp.mean(tiles)

    @jax.jit
    def train(parameters: Any, state: Any, ids: jax.Array) -> Any:
        traces.append(1)
        (loss, tiles), gradient = jax.value_and_grad(loss_of, has_aux=True)(parameters, ids)
        updates, state = optimiser.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss, tiles

    return Step(optimiser.init, train, jax.jit(lambda *x: loss_of(*x)[0]), traces)


def pieces(
    tokenizer: Tokenizer, names: list[str], tokens: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Each text's token ids for training, and in pieces [N, tokens] for validation.

    Raises:
      ValueError: a text too short for one piece in its held-out end.
    """
    train, held = {}, {}
    for name in names:
        ids = encode(tokenizer, text_of(name))
        cut = int(len(ids) * (1 - HELD_OUT))
        number = (len(ids) - cut) // tokens
        if not number:
            raise ValueError(f"--tokens is {tokens}: {name} has {len(ids) - cut} for validation")
        train[name] = ids[:cut]
        held[name] = ids[cut : cut + number * tokens].reshape(number, tokens)
    return train, held


def batches(train: dict[str, np.ndarray], tokens: int, steps: int) -> Iterator[np.ndarray]:
    """One piece [tokens] a step, the texts in turn, begins drawn with a fixed seed."""
    rng, names = np.random.default_rng(0), list(train)
    for step in range(steps):
        ids = train[names[step % len(names)]]
        start = rng.integers(0, len(ids) - tokens + 1)
        yield ids[start : start + tokens]
