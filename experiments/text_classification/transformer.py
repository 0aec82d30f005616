"""A classifier of texts by the tokens that a budget kept, and how it is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from optax import projections

from experiments.harness import optimisers
from experiments.models.packed_encoder import Encoder, Packed
from experiments.text_classification.tokens import MOST_TOKENS


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model."""

    vocabulary: int
    width: int = 64
    heads: int = 4
    hidden: int = 128
    layers: int = 1


class Regularisation(NamedTuple):
    """What keeps it from learning the texts by heart."""

    dropout: float = 0.0  # of what layers add
    weight_decay: float = 0.0
    token_dropout: float = 0.0  # of merges of subwords (`tokens.with_dropout`)
    adversarial: float = 0.0  # length of the perturbation of a batch's embeddings, of their own


class Classifier(nnx.Module):
    """Packed tokens to one logit for each text."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        start = nnx.initializers.normal(0.1)
        self.embed = nnx.Embed(config.vocabulary, config.width, embedding_init=start, rngs=rngs)
        self.place = nnx.Embed(MOST_TOKENS, config.width, embedding_init=start, rngs=rngs)
        self.encoder = Encoder(config.width, config.heads, config.hidden, config.layers, rngs)
        self.out = nnx.Linear(config.width, 1, rngs=rngs)

    def embedded(self, batch: Packed) -> Array:
        """[N, width]."""
        return self.embed(batch.fields["ids"]) + self.place(batch.fields["position"])

    def __call__(self, x: Array, batch: Packed, drop: Any) -> Array:
        """Embedded tokens -> logits [B]."""
        return self.out(drop(self.encoder(x, batch.example, len(batch.labels), drop)))[:, 0]


class Step(NamedTuple):
    """Compiled functions."""

    init: Callable[[Any], Any]
    train: Callable[..., Any]  # (parameters, state, batch, key) -> both, loss
    logits: Callable[..., Array]  # (parameters, batch) -> [B]
    traces: list[int]


def make_step(
    config: Config,
    regularisation: Regularisation,
    steps: int,
    peak: float,
) -> Step:
    """Training by AdamW, warm-up and cosine; adversarial as Miyato et al. (arXiv:1605.07725)."""
    traces: list[int] = []
    graph, _ = nnx.split(Classifier(config, nnx.Rngs(0)))
    optimiser = optimisers.adamw(steps, peak, weight_decay=regularisation.weight_decay)
    dropout = nnx.Dropout(regularisation.dropout)

    def of_embedded(parameters: Any, x: Array, batch: Packed, key: Array | None) -> Array:
        rngs = None if key is None else nnx.Rngs(dropout=key)

        def drop(y: Array) -> Array:
            return dropout(y, deterministic=rngs is None, rngs=rngs)

        return nnx.merge(graph, parameters)(x, batch, drop)

    def loss(parameters: Any, shift: Array, batch: Packed, key: Array) -> Array:
        x = nnx.merge(graph, parameters).embedded(batch) + shift
        said = of_embedded(parameters, x, batch, key)
        each = optax.sigmoid_binary_cross_entropy(said, batch.labels)
        return jnp.sum(jnp.where(batch.labels >= 0, each, 0)) / jnp.sum(batch.labels >= 0)

    @jax.jit
    def train(parameters: Any, state: Any, batch: Packed, key: Array) -> Any:
        traces.append(1)
        none = jnp.zeros((batch.example.shape[0], config.width))
        value, gradient = jax.value_and_grad(loss)(parameters, none, batch, key)
        if regularisation.adversarial:
            x = nnx.merge(graph, parameters).embedded(batch)
            worst = jax.grad(loss, argnums=1)(parameters, none, batch, key)
            length = regularisation.adversarial * jnp.linalg.norm(x)
            shift = jax.lax.stop_gradient(projections.projection_l2_sphere(worst, length))
            other = jax.grad(loss)(parameters, shift, batch, key)
            gradient = jax.tree.map(lambda a, b: (a + b) / 2, gradient, other)
        updates, state = optimiser.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    def logits(parameters: Any, batch: Packed) -> Array:
        x = nnx.merge(graph, parameters).embedded(batch)
        return of_embedded(parameters, x, batch, None)

    return Step(optimiser.init, train, jax.jit(logits), traces)
