"""One run: a small vision transformer, trained and tested on the tokens that an arm keeps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from experiments.harness import logs, runs, training
from experiments.models.packed_encoder import Encoder, Packed, pack, places
from experiments.vision import data, tokens
from experiments.vision.data import Pictures
from experiments.vision.tokens import Worth

BATCH, PEAK_RATE = 64, 2e-3
WIDTH, HEADS, HIDDEN, LAYERS = 64, 4, 128, 2


class Sizes(NamedTuple):
    """Of a study."""

    train: int  # pictures
    epochs: int
    test: int  # pictures


class Material(NamedTuple):
    """What all runs read."""

    train: Pictures
    test: Pictures
    worth: Worth


@functools.cache
def prepare(sizes: Sizes) -> Material:
    """Both parts, and what pixels are worth by the first.

    Raises:
      ValueError: a package that cannot be fetched.
    """
    train = data.read("train").part(sizes.train)
    return Material(train, data.read("t10k").part(sizes.test), Worth.of(train))


class Classifier(nnx.Module):
    """Packed tokens of pictures to logits [B, CLASSES]."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Linear(tokens.PATCH**2, WIDTH, rngs=rngs)
        start = nnx.initializers.normal(0.1)
        self.place = nnx.Embed(tokens.PLACES, WIDTH, embedding_init=start, rngs=rngs)
        self.encoder = Encoder(WIDTH, HEADS, HIDDEN, LAYERS, rngs)
        self.out = nnx.Linear(WIDTH, data.CLASSES, rngs=rngs)

    def __call__(self, batch: Packed) -> Array:
        x = self.embed(batch.fields["pixels"]) + self.place(batch.fields["place"])
        # A coarse token stands for the pixels of four.
        area = jnp.where(batch.fields["place"] < tokens.FINE, 1.0, 4.0)
        return self.out(self.encoder(x, batch.example, len(batch.labels), weight=area))


def loss_of(model: Classifier, batch: Packed, key: Array) -> Array:
    """Mean cross-entropy of the pictures that are there."""
    del key
    there = batch.labels >= 0
    each = optax.softmax_cross_entropy_with_integer_labels(model(batch), batch.labels)
    return jnp.sum(jnp.where(there, each, 0)) / jnp.sum(there)


def run(
    arm: str, part: float, seed: int, sizes: Sizes, advance: Callable[[], None]
) -> Mapping[str, Any]:
    """Accuracy on held-out pictures at the arm's budget, and what a picture took."""
    material = prepare(sizes)
    kept, test = (
        tokens.budgeted(x, material.worth, arm, part, BATCH)
        for x in (material.train, material.test)
    )
    orders = training.orders(len(kept), BATCH, sizes.epochs, seed)
    rows = training.rows(len(test), BATCH)
    size = max(places(kept, orders), places(test, rows))

    def batches() -> Any:
        for order in orders:
            yield _batch(kept, material.train.labels, order, size)

    model = Classifier(nnx.Rngs(seed))
    with logs.writer("vision", f"{arm}-{part}", seed) as log:
        training.train(model, loss_of, batches(), len(orders), PEAK_RATE, seed, log, advance)
    graph, parameters = nnx.split(model)
    predict = jax.jit(lambda parameters, batch: jnp.argmax(nnx.merge(graph, parameters)(batch), -1))
    hits = np.concatenate([
        (np.asarray(predict(parameters, batch)) == batch.labels)[batch.labels >= 0]
        for batch in (_batch(test, material.test.labels, row, size) for row in rows)
    ])  # fmt: skip
    number = np.mean([len(x["place"]) for x in test])
    compiled = predict.lower(parameters, _batch(test, material.test.labels, rows[0], size))
    flops = training.flops_of(compiled.compile())
    return {
        "figures": {
            "accuracy": float(hits.mean()),
            "tokens a picture": float(number),
            "MFLOP a picture": flops / BATCH / 1e6,
        },
        "cases": {"accuracy": runs.packed(hits)},
    }


def _batch(
    kept: Sequence[Mapping[str, np.ndarray]], labels: np.ndarray, index: np.ndarray, size: int
) -> Packed:
    return pack([kept[i] for i in index], labels[index], size, BATCH)
