"""A driver's attention over the vehicles that a budget kept; what was dropped is not computed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from experiments.models.packed_encoder import Packed
from experiments.robotics.crossing import ACTIONS, FEATURES
from experiments.robotics.foresight import FORESEEN

WIDTH, HEADS, HIDDEN = 64, 2, 128
# Places of 10 m and speeds of 5 m/s are about 1.
SCALE = np.array([1, 10, 10, 4, 4, 1, 1, 1, 1], np.float32)


def embedder(inward: int, rngs: nnx.Rngs) -> nnx.Sequential:
    """[..., inward] -> [..., WIDTH]."""
    first, *rest = (nnx.Linear(a, WIDTH, rngs=rngs) for a in (inward, WIDTH, WIDTH))
    return nnx.Sequential(first, nnx.relu, rest[0], nnx.relu, rest[1], nnx.relu)


class Driver(nnx.Module):
    """Drivers and the packed vehicles around them to logits of the actions [B, ACTIONS]."""

    def __init__(self, rngs: nnx.Rngs):
        self.own = embedder(len(FEATURES), rngs)
        self.others = embedder(len(FEATURES) + FORESEEN, rngs)
        self.query = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.key_value = nnx.Linear(WIDTH, 2 * WIDTH, use_bias=False, rngs=rngs)
        self.mix = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.out = nnx.Linear(HIDDEN, ACTIONS, rngs=rngs)

    def __call__(self, batch: Packed) -> Array:
        """`batch.labels` [B, ACTIONS + FEATURES]: what actions lose, and the driver's row."""
        own = self.own(batch.labels[:, ACTIONS:] * SCALE)
        others = self.others(batch.fields["seen"] * np.append(SCALE, np.ones(FORESEEN, np.float32)))
        # A driver is among those that it attends to, so that nobody has nobody.
        number = len(own)
        example = jnp.concatenate([jnp.arange(number), batch.example])
        among = jnp.concatenate([own, others])
        query = self.query(own).reshape(number, HEADS, -1)
        keys, values = (
            part.reshape(len(among), HEADS, -1)
            for part in jnp.split(self.key_value(among), 2, axis=-1)
        )
        attended = attend(query, keys, values, example)
        x = own + self.mix(attended.reshape(number, WIDTH))
        return self.out(jax.nn.relu(self.up(x)))


def attend(query: Array, keys: Array, values: Array, example: Array) -> Array:
    """Softmax attention of one query for each example over the keys of its own.

    Args:
      query: [B, H, D].
      keys, values: [N, H, D].
      example: [N] int32, of each key; B where there is none.

    Returns:
      [B, H, D].
    """
    number = len(query)
    there, place = example < number, jnp.minimum(example, number - 1)
    logits = jnp.sum(query[place] * keys, axis=-1) / np.sqrt(query.shape[-1])
    top = jax.lax.stop_gradient(jax.ops.segment_max(logits, example, number))
    weight = jnp.exp(jnp.where(there[:, None], logits - top[place], -jnp.inf))
    total = jax.ops.segment_sum(weight, example, number)
    return jax.ops.segment_sum(weight[..., None] * values, example, number) / total[..., None]


def loss_of(model: Driver, batch: Packed, key: Array) -> Array:
    """Mean of -log p(any of the best actions)."""
    del key
    lost = batch.labels[:, :ACTIONS]
    logits = model(batch)
    best = jax.nn.logsumexp(jnp.where(lost <= 0, logits, -jnp.inf), axis=1)
    each = jax.nn.logsumexp(logits, axis=1) - best
    there = lost[:, 0] >= 0
    return jnp.sum(jnp.where(there, each, 0)) / jnp.sum(there)
