"""One run: attention over remembered films, trained and tested within an arm's budget."""

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

from experiments.harness import logs, runs, training
from experiments.models.packed_encoder import Encoder, Packed, pack, places
from experiments.recommendation import data, histories
from experiments.recommendation.data import Ratings
from experiments.recommendation.histories import Worth
from jbalance import audit

BATCH, PEAK_RATE, WIDTH, HEADS, HIDDEN, LAYERS = 64, 3e-3, 48, 4, 96, 1
LEAST = 5  # films of a history that is trained on
SHOWN = 10  # films that are recommended
PIECES = 8  # histories of each person in an epoch


class Sizes(NamedTuple):
    """Of a study."""

    epochs: int
    people: int


class Material(NamedTuple):
    """What all runs read: `known` is all but everyone's last film."""

    ratings: Ratings
    known: Ratings
    worth: Worth


@functools.cache
def prepare(sizes: Sizes) -> Material:
    """The ratings, and what films are worth by all but the last of each person.

    Raises:
      ValueError: a wheel that cannot be fetched.
    """
    ratings = data.read()
    few = slice(sizes.people)
    ratings = ratings._replace(
        items=ratings.items[few], stars=ratings.stars[few], woman=ratings.woman[few]
    )
    known = ratings.before(1)
    return Material(ratings, known, Worth.of(known))


class Recommender(nnx.Module):
    """Packed histories to logits [B, films]."""

    def __init__(self, num_items: int, rngs: nnx.Rngs):
        start = nnx.initializers.normal(0.1)
        self.item = nnx.Embed(num_items, WIDTH, embedding_init=start, rngs=rngs)
        self.stars = nnx.Embed(6, WIDTH, embedding_init=start, rngs=rngs)
        self.age = nnx.Embed(histories.AGES, WIDTH, embedding_init=start, rngs=rngs)
        self.encoder = Encoder(WIDTH, HEADS, HIDDEN, LAYERS, rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(num_items))
        self.dropout = nnx.Dropout(0.3)

    def __call__(self, batch: Packed, key: Array | None = None) -> Array:
        rngs = None if key is None else nnx.Rngs(dropout=key)

        def drop(x: Array) -> Array:
            return self.dropout(x, deterministic=key is None, rngs=rngs)

        fields = batch.fields
        x = self.item(fields["item"]) + self.stars(fields["stars"]) + self.age(fields["age"])
        pooled = self.encoder(drop(x), batch.example, len(batch.labels), drop)
        return self.item.attend(drop(self.out(pooled))) + self.bias[...]


def loss_of(model: Recommender, batch: Packed, key: Array) -> Array:
    """Mean cross-entropy of the next film."""
    there = batch.labels >= 0
    said = model(batch, key)
    each = optax.softmax_cross_entropy_with_integer_labels(said, jnp.maximum(batch.labels, 0))
    return jnp.sum(jnp.where(there, each, 0)) / jnp.sum(there)


def run(
    arm: str, part: float, seed: int, sizes: Sizes, advance: Callable[[], None]
) -> Mapping[str, Any]:
    """What is recommended to everyone for the last film, by the films that the arm remembers."""
    material = prepare(sizes)
    known = material.known
    examples, targets = [], []
    rng = np.random.default_rng(seed)
    for _ in range(PIECES * sizes.epochs):  # a cut of each history, the same for all arms
        cuts = [int(rng.integers(min(LEAST, len(x) - 1), len(x))) for x in known.items]
        items, stars = (
            [x[:cut] for x, cut in zip(side, cuts, strict=True)]
            for side in (known.items, known.stars)
        )
        examples += histories.budgeted(items, stars, material.worth, arm, part)
        targets += [x[cut] for x, cut in zip(known.items, cuts, strict=True)]
    test = histories.budgeted(known.items, known.stars, material.worth, arm, part)
    labels = np.array(targets, np.int32)
    steps = training.orders(len(examples), BATCH, 1, seed)
    rows = training.rows(len(test), BATCH)
    size = max(places(examples, steps), places(test, rows))

    model = Recommender(known.num_items, nnx.Rngs(seed))
    batches = (pack([examples[i] for i in row], labels[row], size, BATCH) for row in steps)
    with logs.writer("recommendation", f"{arm}-{part}", seed) as log:
        training.train(
            model, loss_of, batches, len(steps), PEAK_RATE, seed, log, advance, weight_decay=0.1
        )
    graph, parameters = nnx.split(model)
    predict = jax.jit(lambda parameters, batch: nnx.merge(graph, parameters)(batch))
    last = np.array([x[-1] for x in material.ratings.items], np.int32)
    packed = [pack([test[i] for i in row], last[row], size, BATCH) for row in rows]
    logits = np.concatenate([
        np.array(predict(parameters, x))[: len(r)] for x, r in zip(packed, rows, strict=True)
    ])  # fmt: skip
    flops = training.flops_of(predict.lower(parameters, packed[0]).compile())
    return measure(material, logits, last, [len(x["item"]) for x in test], flops / BATCH)


def measure(
    material: Material, logits: np.ndarray, last: np.ndarray, remembered: list[int], flops: float
) -> Mapping[str, Any]:
    """NDCG and recall of the last film among all that a person has not seen; who gets what."""
    for user, seen in enumerate(material.known.items):
        logits[user, seen] = -np.inf
    own = logits[np.arange(len(last)), last]
    rank = (logits > own[:, None]).sum(axis=1)
    # A film that was seen before is never recommended again.
    hit = (rank < SHOWN) & np.isfinite(own)
    ndcg = np.where(hit, 1 / np.log2(rank + 2), 0)
    shown = np.argsort(-logits, axis=1)[:, :SHOWN]
    groups = material.ratings.woman.astype(np.int32)
    fared = audit.by_group(np.asarray(remembered, np.float32), groups, 2, 1 - hit)
    return {
        "figures": {
            "NDCG@10": float(ndcg.mean()),
            "recall@10": float(hit.mean()),
            "coverage": len(np.unique(shown)) / material.known.num_items,
            "diversity": diversity(shown, material.ratings.genres),
            "women's gap in recall": float(fared.error[1] - fared.error[0]),
            "films a person": float(np.mean(remembered)),
            "MFLOP a person": flops / 1e6,
        },
        "cases": {"NDCG@10": runs.packed(ndcg), "recall@10": runs.packed(hit)},
    }


def diversity(shown: np.ndarray, genres: np.ndarray) -> float:
    """Mean over people of 1 - the cosine of two recommended films' genres."""
    own = genres[shown].astype(float)  # [people, SHOWN, genres]
    own /= np.maximum(np.linalg.norm(own, axis=-1, keepdims=True), 1e-9)
    alike = own @ own.swapaxes(1, 2)
    pairs = shown.shape[1] * (shown.shape[1] - 1)
    return float(1 - ((alike.sum(axis=(1, 2)) - np.trace(alike, axis1=1, axis2=2)) / pairs).mean())
