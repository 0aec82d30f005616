"""A small encoder over the tokens that a budget kept, packed; what was dropped is not computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jbalance import attention

BLOCK = 64  # tokens of a tile's side


class Packed(NamedTuple):
    """Tokens of some examples in a row of N places, and one label for each example.

    Attributes:
      fields: [N, ...] what a token is, by name; zero where there is none.
      example: [N] int32, which of the examples; their number where there is no token.
      labels: [B, ...]; -1 where there is no example.
    """

    fields: Mapping[str, Any]
    example: Any
    labels: Any


def pack(
    examples: Sequence[Mapping[str, np.ndarray]], labels: np.ndarray, size: int, number: int
) -> Packed:
    """Up to `number` examples in `size` places, in their order.

    Args:
      examples: each with the same names, and arrays of its own length.
      labels: one for each.

    Raises:
      ValueError: more tokens or examples than there are places.
    """
    lengths = np.array([len(next(iter(x.values()))) for x in examples])
    used = int(lengths.sum())
    if used > size or len(examples) > number:
        raise ValueError(
            f"{len(examples)} examples of {used} tokens do not fit into {number} examples and {size} "
            f"places"
        )
    fields = {}
    for name in examples[0]:
        given = np.concatenate([x[name] for x in examples])
        fields[name] = np.zeros((size, *given.shape[1:]), given.dtype)
        fields[name][:used] = given
    example = np.full(size, number, np.int32)
    example[:used] = np.repeat(np.arange(len(examples)), lengths)
    own = np.full((number, *labels.shape[1:]), -1, labels.dtype)
    own[: len(labels)] = labels
    return Packed(fields, example, own)


def places(
    examples: Sequence[Mapping[str, np.ndarray]], rows: Sequence[np.ndarray], multiple: int = BLOCK
) -> int:
    """How many the tokens of any of these rows of examples need, in whole tiles."""
    lengths = np.array([len(next(iter(x.values()))) for x in examples])
    return -(-max(int(lengths[row].sum()) for row in rows) // multiple) * multiple


class Layer(nnx.Module):
    """Attention among the tokens of each example, and a feed-forward layer."""

    def __init__(self, width: int, heads: int, hidden: int, rngs: nnx.Rngs):
        self.heads = heads
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.inward = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.second_norm = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(
        self, x: Array, plan: attention.TilePlan, example: Array, drop: Callable[[Array], Array]
    ) -> Array:
        parts = jnp.split(self.inward(self.norm(x)), 3, axis=-1)
        q, k, v = (part.reshape(1, x.shape[0], self.heads, -1) for part in parts)
        y = attention.attend(q, k, v, plan, segment_ids=(example[None], example[None])).y
        x = x + drop(self.out(y.reshape(x.shape)))
        return x + drop(self.down(jax.nn.relu(self.up(self.second_norm(x)))))


class Encoder(nnx.Module):
    """Embedded tokens to the mean of what the layers make of each example's."""

    def __init__(self, width: int, heads: int, hidden: int, layers: int, rngs: nnx.Rngs):
        self.layers = nnx.List([Layer(width, heads, hidden, rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)

    def __call__(
        self,
        x: Array,
        example: Array,
        number: int,
        drop: Callable[[Array], Array] = lambda y: y,
        weight: Array | None = None,
    ) -> Array:
        """[N, width] and the tokens' examples -> [number, width]; zero where there are no tokens.

        Args:
          x: embedded tokens.
          example: [N] int32.
          number: of examples.
          drop: of what layers add.
          weight: [N] of tokens in the mean, by what each stands for; None where they count alike.
        """
        tiling = attention.Tiling(example.size, example.size, BLOCK, BLOCK, causal=False)
        plan = attention.segments(example[None], example[None], tiling)
        for layer in self.layers:
            x = layer(x, plan, example, drop)
        x = self.norm(x)
        weight = jnp.ones(example.shape) if weight is None else weight
        total = jax.ops.segment_sum(x * weight[:, None], example, number)
        tokens = jax.ops.segment_sum(weight, example, number)
        return total / jnp.maximum(tokens, 1)[:, None]
