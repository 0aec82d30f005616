"""A driver's attention over the vehicles that a budget kept; what was dropped is not computed.

It says what each action loses beside the best, by the expert's judgement, and the least loss is chosen.
The expert knows everyone's route, which is not seen: the mean over what may be is what counts, and an
action that is mostly the expert's can be a bad one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from experiments.models.packed_encoder import Packed
from experiments.robotics.crossing import ACTIONS, FEATURES

WIDTH, HEADS, HIDDEN = 64, 2, 128
UNIT = 2.0  # rewards
# Places of 10 m and speeds of 5 m/s are about 1.
SCALE = np.array([1, 10, 10, 4, 4, 1, 1], np.float32)


def embedder(rngs: nnx.Rngs) -> nnx.Sequential:
    """[..., FEATURES] -> [..., WIDTH]."""
    first, *rest = (nnx.Linear(a, WIDTH, rngs=rngs) for a in (len(FEATURES), WIDTH, WIDTH))
    return nnx.Sequential(first, nnx.relu, rest[0], nnx.relu, rest[1], nnx.relu)


class Driver(nnx.Module):
    """Drivers and the packed vehicles around them to what actions lose [B, ACTIONS]."""

    def __init__(self, rngs: nnx.Rngs):
        self.own, self.others = embedder(rngs), embedder(rngs)
        self.query = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.key_value = nnx.Linear(WIDTH, 2 * WIDTH, use_bias=False, rngs=rngs)
        self.mix = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.out = nnx.Linear(HIDDEN, ACTIONS, rngs=rngs)

    def __call__(self, batch: Packed) -> Array:
        """In units of `UNIT`; `batch.labels` [B, ACTIONS + FEATURES]: losses, and the driver's row."""
        own = self.own(batch.labels[:, ACTIONS:] * SCALE)
        others = self.others(batch.fields["seen"] * SCALE)
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
    """Mean square error of what each action loses, in units of `UNIT`."""
    del key
    lost = batch.labels[:, :ACTIONS]
    there = lost[:, :1] >= 0
    error = model(batch) - lost / UNIT
    return jnp.sum(jnp.where(there, error**2, 0)) / jnp.sum(there)
