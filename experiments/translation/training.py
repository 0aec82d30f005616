"""The training step: two directions as two tasks, attention over the tiles of an arm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from experiments.translation import tiles
from experiments.translation.data import LANGUAGES, MOST_TOKENS, PAD, Batch
from experiments.translation.model import KINDS, Translator
from experiments.translation.tiles import Choice, Seen
from jbalance import multitask

SMOOTHING = 0.1  # of the labels
_TILES_ROUNDED = 256  # so that seeds share a program


class Report(NamedTuple):
    """What attention of one batch did: a number for each kind and layer, in the order of calls."""

    tiles: Array  # [A] int32, computed
    candidates: Array  # [A] int32, the full budget
    level: Array  # [A] float32


class Attending:
    """Attention of packed tokens, over the tiles of an arm; it notes what it did while it is traced."""

    def __init__(self, arm: str, batch: Batch, most: dict[str, int], part: float):
        self.arm, self.most, self.part = tiles.ARMS[arm], most, part
        sides = {"source": batch.source, "target": batch.target}
        self.sides = {
            "encoder": (sides["source"], sides["source"]),
            "decoder": (sides["target"], sides["target"]),
            "cross": (sides["target"], sides["source"]),
        }
        lengths = {name: side.lengths for name, side in sides.items()}
        size = MOST_TOKENS, MOST_TOKENS
        self.seen: dict[str, Seen] = {
            "encoder": tiles.seen_by(lengths["source"], lengths["source"], *size, causal=False),
            "decoder": tiles.seen_by(lengths["target"], lengths["target"], *size, causal=True),
            "cross": tiles.seen_by(lengths["target"], lengths["source"], *size, causal=False),
        }
        at = jnp.arange(MOST_TOKENS)
        source = (at < lengths["source"][:, None])[:, None]
        causal = (at < lengths["target"][:, None])[:, None] & (at <= at[:, None])
        self.visible = {"encoder": source, "decoder": causal, "cross": source}
        self.notes: list[tuple[Array, Array, Array]] = []

    def __call__(self, kind: str, layer: int, q: Array, k: Array, v: Array) -> Array:
        of_queries, of_keys = self.sides[kind]
        q = q.at[of_queries.row].get(mode="fill", fill_value=0)
        k, v = (x.at[of_keys.row].get(mode="fill", fill_value=0) for x in (k, v))
        choice, candidates = self._choose(kind, *jax.lax.stop_gradient((q, k, v)))
        plan = tiles.plan_of(choice.tiles, MOST_TOKENS, MOST_TOKENS)
        y = tiles.attend(q, k, v, plan, self.visible[kind], self.most[kind])
        self.notes.append((plan.num_tiles, candidates, choice.level))
        flat = y.reshape(-1, *y.shape[2:])
        return flat.at[of_queries.place].get(mode="fill", fill_value=0)

    def _choose(self, kind: str, q: Array, k: Array, v: Array) -> tuple[Choice, Array]:
        seen = self.seen[kind]
        candidates = q.shape[2] * jnp.sum(seen.tiles, dtype=jnp.int32)
        values = tiles.tile_values(q[:, :: tiles.BLOCK], k, v, seen.keys)
        # Every list has a tile for sure.
        least = q.shape[2] * jnp.sum(jnp.any(seen.tiles, axis=-1), dtype=jnp.int32)
        total = jnp.maximum(jnp.floor(self.part * candidates).astype(jnp.int32), least)
        return self.arm(values, seen, total), candidates

    def report(self) -> Report:
        return Report(*(jnp.stack(x) for x in zip(*self.notes, strict=True)))


def most_tiles(batches: list[Batch], heads: int, part: float) -> dict[str, int]:
    """The largest budget of each kind of attention over these batches, rounded up."""
    need = dict.fromkeys(KINDS, 0.0)
    for batch in batches:
        blocks = {}
        for name, side in (("source", batch.source), ("target", batch.target)):
            blocks[name] = -(-side.lengths // tiles.BLOCK)
        source, target = blocks["source"], blocks["target"]
        found = {  # the full budget, and one tile for each list
            "encoder": (source * source, source),
            "decoder": (target * (target + 1) // 2, target),
            "cross": (target * source, target),
        }
        for kind, (number, least) in found.items():
            most = np.maximum(part * number.sum(axis=-1), least.sum(axis=-1)).max()
            need[kind] = max(need[kind], float(most))
    return {
        kind: int(-(-heads * number // _TILES_ROUNDED)) * _TILES_ROUNDED
        for kind, number in need.items()
    }


def loss_of(
    graph: nnx.GraphDef[Translator],
    parameters: Any,
    batch: Batch,
    arm: str,
    most: dict[str, int],
    part: float,
) -> tuple[Array, tuple[Array, Report]]:
    """Smoothed loss of a batch, its negative log-likelihood per token and what attention did."""
    model = nnx.merge(graph, parameters)
    attend = Attending(arm, batch, most, part)
    memory = model.encode(batch.source.ids, batch.source.position, attend)
    h = model.decode(batch.target.ids, batch.target.position, memory, attend)
    logp = jax.nn.log_softmax(model.logits(h))
    there = batch.wanted != PAD
    wanted = jnp.take_along_axis(logp, batch.wanted[:, None], axis=1)[:, 0]
    number = jnp.sum(there)
    nll = -jnp.sum(jnp.where(there, wanted, 0)) / number
    even = -jnp.sum(jnp.where(there, jnp.mean(logp, axis=1), 0)) / number
    return (1 - SMOOTHING) * nll + SMOOTHING * even, (nll, attend.report())


class Step(NamedTuple):
    """Compiled functions."""

    init: Callable[[Any], Any]  # parameters -> optimiser state
    train: Callable[
        ..., Any
    ]  # (parameters, state, batches [K, ...]) -> both, losses [K], weights, report
    loss: Callable[..., Any]  # (parameters, batch) -> nll, report
    traces: list[int]


def make_step(
    graph: nnx.GraphDef[Translator],
    arm: str,
    most: dict[str, int],
    weighing: multitask.TaskWeighting,
    optimiser: optax.GradientTransformation,
) -> Step:
    """A step over one batch of each task, whose gradients the weighing adds up."""
    traces: list[int] = []
    tasks, part = len(LANGUAGES), tiles.part_of(arm)
    chain = optax.chain(multitask.aggregator(weighing, tasks), optimiser)

    def train(parameters: Any, state: Any, batches: Batch) -> Any:
        traces.append(1)

        def one(batch: Batch) -> Any:
            def loss(p: Any) -> Any:
                return loss_of(graph, p, batch, arm, most, part)

            (_, (nll, report)), gradient = jax.value_and_grad(loss, has_aux=True)(parameters)
            return gradient, nll, report

        gradients, losses, report = jax.lax.map(one, batches)
        updates, state = chain.update(gradients, state, parameters, losses=losses)
        weights = state[0].weights
        return optax.apply_updates(parameters, updates), state, losses, weights, report

    def loss(parameters: Any, batch: Batch) -> tuple[Array, Report]:
        return loss_of(graph, parameters, batch, arm, most, part)[1]

    return Step(chain.init, jax.jit(train, donate_argnums=(0, 1)), jax.jit(loss), traces)


def stacked(batches: list[Batch]) -> Batch:
    """One batch of each task along a first axis."""
    return jax.tree.map(lambda *x: np.stack(x), *batches)
