"""One run: a small language model that learns recall over the tiles of an arm."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from experiments.harness import logs, progress, runs, training
from experiments.recall import data
from experiments.recall.data import Batch
from experiments.tiles.model import Config, LanguageModel
from jbalance import adapters, allocate, attention, importance
from jbalance.attention import TilePlan, Tiling

CONFIG = Config(data.VOCABULARY, num_layers=2, width=64, num_heads=2, head_dim=32, hidden=128)
BLOCK_Q, BLOCK_K = 16, 8
ROWS = BLOCK_Q  # all of a block: every second one, or fourth, would be values alone and no key
BATCH, TEST = 16, 16  # sequences of a step, steps of the test
BASE_RATE, ARM_RATE = 4e-3, 1e-3
SHORT = 4  # parts of the length and half the pairs that the base begins with


class Sizes(NamedTuple):
    """Of a study."""

    short_steps: int  # of the base over short sequences, in which recall is learned
    base_steps: int  # of the base over whole ones
    steps: int  # of each arm from there
    length: int
    pairs: int


# An arm: q, k, v, part of the causal tiles -> which tiles are computed.
Arm = Callable[[Array, Array, Array, float], TilePlan]


def dense(q: Array, k: Array, v: Array, part: float) -> TilePlan:
    """All causal tiles."""
    return attention.dense(_tiling(q))


def window(q: Array, k: Array, v: Array, part: float) -> TilePlan:
    """Sliding window and the first key block, the widest within the part."""
    tiling = _tiling(q)
    most = int(part * tiling.num_tiles)
    with jax.ensure_compile_time_eval():
        sizes = range(q.shape[1], 0, -BLOCK_K)
        plans = (attention.window(size, tiling, num_sinks=BLOCK_K) for size in sizes)
        return next(plan for plan in plans if int(plan.num_tiles.max()) <= most)


def uniform(q: Array, k: Array, v: Array, part: float) -> TilePlan:
    """Most attention, as large a part of each query block's tiles and each head's."""
    tiling = _tiling(q)
    score = importance.tile_error(q, k, v, tiling, rows=ROWS)
    seen = tiling.visible()
    every = seen.sum(axis=1).astype(np.int32)
    least = np.minimum(
        every, BLOCK_Q // BLOCK_K + 1
    )  # its own positions' tiles, and the first keys'
    total = int(part * tiling.num_tiles)
    number = allocate.whole(every.astype(np.float32), total, least, every).amount
    own = jnp.asarray(_own(tiling))
    rank = jnp.argsort(jnp.argsort(-jnp.where(own, jnp.inf, jnp.where(seen, score, -1.0))))
    return attention.from_mask((rank < number[:, None]) & seen, tiling)


def ladder(q: Array, k: Array, v: Array, part: float) -> TilePlan:
    """One price for the tiles of all heads and query blocks of a layer."""
    tiling = _tiling(q)
    total = int(part * tiling.num_tiles) * q.shape[2]
    return attention.balanced_plan(q, k, v, total, tiling, rows=ROWS, floor=0.0)


ARMS: dict[str, Arm] = {"dense": dense, "window": window, "uniform": uniform, "ladder": ladder}


def _tiling(q: Array) -> Tiling:
    return Tiling(q.shape[1], q.shape[1], BLOCK_Q, BLOCK_K)


def _own(tiling: Tiling) -> np.ndarray:
    """[I, J] the tiles that every query block has."""
    at = tiling.positions()
    own = (at.last_key >= at.first_query) | (at.first_key == 0)
    return own & tiling.visible()


def loss_of(model: LanguageModel, batch: Batch, key: Array) -> Array:
    """Mean cross-entropy of the values that are asked for."""
    del key
    asked = batch.target >= 0
    said = model(jnp.asarray(batch.tokens))
    each = optax.softmax_cross_entropy_with_integer_labels(said, jnp.maximum(batch.target, 0))
    return jnp.sum(jnp.where(asked, each, 0)) / jnp.sum(asked)


@functools.lru_cache(maxsize=1)
def start(seed: int, sizes: Sizes) -> LanguageModel:
    """The model that all arms of a seed go on from: all tiles, short sequences before whole ones.

    On whole sequences alone nothing is recalled after a thousand steps: of so many keys few are asked
    for. The short ones hold as many tokens in a step.
    """
    model = LanguageModel(CONFIG, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    short = sizes.length // SHORT, sizes.pairs // 2
    stages = (
        ("short", sizes.short_steps, SHORT * BATCH, *short),
        ("whole", sizes.base_steps, BATCH, sizes.length, sizes.pairs),
    )
    for name, steps, number, length, pairs in stages:
        batches = (data.draw(rng, number, length, pairs) for _ in range(steps))
        with (
            logs.writer("recall", f"base-{name}", seed) as log,
            progress.bar(f"base over {name} sequences, seed {seed}", steps) as advance,
        ):
            training.train(model, loss_of, batches, steps, BASE_RATE, seed, log, advance)
    return model


def run(
    arm: str, part: float, seed: int, sizes: Sizes, advance: Callable[[], None]
) -> Mapping[str, Any]:
    """Values that are recalled, of sequences that were not trained on."""
    model = nnx.clone(start(seed, sizes))

    def plan_of(q: Array, k: Array, v: Array, /, *, causal: bool | None) -> TilePlan:
        return ARMS[arm](*jax.lax.stop_gradient((q, k, v)), part)

    adapters.set_attention_fn(model, adapters.attention_fn(plan_of))
    rng = np.random.default_rng(seed + 1000)
    batches = (data.draw(rng, BATCH, sizes.length, sizes.pairs) for _ in range(sizes.steps))
    with logs.writer("recall", f"{arm}-{part}", seed) as log:
        losses = training.train(model, loss_of, batches, sizes.steps, ARM_RATE, seed, log, advance)
    held = np.random.default_rng(10_000)  # the same for all seeds and arms
    predict = nnx.jit(lambda model, tokens: jnp.argmax(model(tokens), axis=-1))
    hits = []
    for _ in range(TEST):
        batch = data.draw(held, BATCH, sizes.length, sizes.pairs)
        said = np.asarray(predict(model, jnp.asarray(batch.tokens)))
        asked = batch.target >= 0
        hits.append((said == batch.target)[asked].reshape(BATCH, -1).mean(axis=1))
    recalled = np.concatenate(hits)
    figures = {"recalled": float(recalled.mean()), "training loss": float(np.mean(losses[-50:]))}
    return {"figures": figures, "cases": {"recalled": runs.packed(recalled)}}
