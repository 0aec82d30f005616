"""One run: pictures whose classes have a long tail, drawn into the steps as an arm says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from sklearn.utils.class_weight import compute_class_weight

import jbalance
from experiments.harness import logs, runs, training
from experiments.models.packed_encoder import Packed, pack
from experiments.vision import data, tokens
from experiments.vision.data import CLASSES, Pictures
from experiments.vision.experiment import Classifier
from jbalance import importance

BATCH, PEAK_RATE = 64, 2e-3
MOST, EXPONENT = 3000, 1.5  # pictures of the most frequent class, and how fast they become fewer
TAIL = 5  # classes, the least frequent ones
WEIGHTS = (0.5, 0.5)  # of the indicators: how scarce a class is, and how hard
FLOOR, CAP, DECAY = 3, 16, 0.9  # examples of a class in a step; of the average of what is hard


class Sizes(NamedTuple):
    """Of a study."""

    steps: int
    most: int
    test: int  # pictures


class Material(NamedTuple):
    """Classes are numbered from the most frequent to the least."""

    train: list[dict[str, np.ndarray]]
    labels: np.ndarray
    test: list[dict[str, np.ndarray]]
    test_labels: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        return np.bincount(self.labels, minlength=CLASSES)


@functools.cache
def prepare(sizes: Sizes) -> Material:
    """Zipf's law over the classes: the r-th has most / r^1.5 pictures, each of sixteen coarse tokens.

    Raises:
      ValueError: a package that cannot be fetched.
    """
    train, test = data.read("train"), data.read("t10k").part(sizes.test)
    order = np.random.default_rng(0).permutation(CLASSES)
    kept = [
        np.flatnonzero(train.labels == label)[: max(1, int(sizes.most / (rank + 1) ** EXPONENT))]
        for rank, label in enumerate(order)
    ]
    at = np.concatenate(kept)
    rank_of = np.argsort(order).astype(np.int32)

    def shown(pictures: Pictures) -> list[dict[str, np.ndarray]]:
        worth = tokens.Worth(np.ones((data.SIDE, data.SIDE)), np.zeros((data.SIDE, data.SIDE)))
        return tokens.budgeted(pictures, worth, "ladder", 0.25, len(pictures.labels))

    own = Pictures(train.pixels[at], rank_of[train.labels[at]])
    return Material(shown(own), own.labels, shown(test), rank_of[test.labels])


class Drawing:
    """Which pictures the next step learns from; it hears how hard classes were."""

    def __init__(self, arm: str, labels: np.ndarray, seed: int):
        self.arm, self.labels = arm, labels
        self.rng = np.random.default_rng(seed)
        self.of_class = [np.flatnonzero(labels == c) for c in range(CLASSES)]
        counts = np.bincount(labels, minlength=CLASSES)
        self.scarce = 1 - counts / counts.max()
        self.loss = np.full(CLASSES, np.log(CLASSES))
        floor, cap = (FLOOR, CAP) if arm == "importance, floors" else (0, BATCH)
        self.balancer = jbalance.balancer(decay=DECAY, floor=floor, cap=cap)
        self.state = self.balancer.init(CLASSES)

    def heard(self, beside: tuple[Array, Array]) -> None:
        """Losses and numbers by class of the last step."""
        total, number = (np.asarray(x) for x in beside)
        there = number > 0
        self.loss[there] = total[there] / number[there]

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            yield self.next()

    def next(self) -> np.ndarray:
        """[BATCH] indices."""
        if self.arm in ("natural", "reweighted"):
            return self.rng.integers(0, len(self.labels), BATCH)
        if self.arm == "resampled":
            chosen = self.rng.integers(0, CLASSES, BATCH)
        else:
            # Indicators from data (METHOD section 1), on one scale each; the amounts are whole.
            a = np.stack([self.scarce, self.loss / self.loss.max()], axis=1)
            w = importance.weighted(a.astype(np.float32), np.asarray(WEIGHTS, np.float32))
            found, self.state = self.balancer.update(w, self.state, BATCH)
            chosen = np.repeat(np.arange(CLASSES), np.asarray(found.allocation.amount))
        return np.array([self.rng.choice(self.of_class[c]) for c in chosen])


ARMS = ("natural", "reweighted", "resampled", "importance", "importance, floors")


def run(arm: str, seed: int, sizes: Sizes, advance: Callable[[], None]) -> Mapping[str, Any]:
    """Accuracy over classes of equal size, and over the tail of them."""
    material = prepare(sizes)
    weight = np.ones(CLASSES)
    if arm == "reweighted":
        weight = compute_class_weight("balanced", classes=np.arange(CLASSES), y=material.labels)
    of_class = jnp.asarray(weight, jnp.float32)

    def loss_of(model: Classifier, batch: Packed, key: Array) -> tuple[Array, Any]:
        del key
        each = optax.softmax_cross_entropy_with_integer_labels(model(batch), batch.labels)
        by_class = (
            jax.ops.segment_sum(each, batch.labels, CLASSES),
            jax.ops.segment_sum(jnp.ones_like(each), batch.labels, CLASSES),
        )
        return jnp.mean(each * of_class[batch.labels]), by_class

    size = BATCH * tokens.CELLS
    drawing = Drawing(arm, material.labels, seed)
    batches = (
        pack([material.train[i] for i in row], material.labels[row], size, BATCH)
        for _, row in zip(range(sizes.steps), drawing, strict=False)
    )
    model = Classifier(nnx.Rngs(seed))
    with logs.writer("long_tail", arm, seed) as log:
        training.train(
            model, loss_of, batches, sizes.steps, PEAK_RATE, seed, log, advance,
            weight_decay=0.1, observe=drawing.heard,
        )  # fmt: skip
    predict = nnx.jit(lambda model, batch: jnp.argmax(model(batch), axis=-1))
    hits = []
    for row in training.rows(len(material.test), BATCH):
        batch = pack([material.test[i] for i in row], material.test_labels[row], size, BATCH)
        hits.append(np.asarray(predict(model, batch))[: len(row)] == material.test_labels[row])
    hit = np.concatenate(hits)
    # Weighed so that every class counts alike, however many the test has of it.
    number = np.bincount(material.test_labels, minlength=CLASSES)
    balanced = hit * len(hit) / (CLASSES * number[material.test_labels])
    tail = hit[material.test_labels >= CLASSES - TAIL]
    return {
        "figures": {"balanced accuracy": float(balanced.mean()), "tail recall": float(tail.mean())},
        "cases": {"balanced accuracy": runs.packed(balanced), "tail recall": runs.packed(tail)},
    }
