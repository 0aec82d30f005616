"""Fashion-MNIST with a part of the channels: those whose excitations the loss needs least go.

    python -m experiments.vision.channels [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

A small convolutional network with squeeze-and-excitation is trained once for each seed; every arm takes
channels out of it, trains what is left a little longer, and exports it. Some 10 minutes on one core;
runs that the file holds are not run again.
"""

from __future__ import annotations

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

from experiments.harness import logs, study, training
from experiments.vision import data
from experiments.vision.export import judged
from jbalance import allocate, shares

BATCH, PEAK_RATE, LATER_RATE = 64, 3e-3, 1e-3
CHANNELS, STRIDES = (16, 32, 48, 64), (2, 1, 2, 1)
POOLED = 4  # places of a side that are told apart in the end
SQUEEZED = 8  # inner width of squeeze-and-excitation
SCORED = 20  # batches of which the excitations' gradients are taken
UNIT = 1 << 10  # multiplications that a channel's cost is counted in


class Sizes(NamedTuple):
    """Of a study."""

    train: int  # pictures
    epochs: int
    test: int  # pictures


WHOLE, SMOKE = Sizes(12_000, 3, 10_000), Sizes(1280, 1, 640)
ARMS = study.at_parts("full", ("uniform", "proportional", "ladder"))

# An arm: the channels' worth of each layer, a budget in units of cost -> channels of each layer.
Amounts = Callable[[Sequence[np.ndarray], int], list[int]]


class Layer(nnx.Module):
    """Convolution, then every channel by its excitation (Hu et al., arXiv:1709.01507)."""

    def __init__(self, inward: int, outward: int, stride: int, rngs: nnx.Rngs):
        start = nnx.initializers.he_normal()
        self.conv = nnx.Conv(inward, outward, (3, 3), stride, kernel_init=start, rngs=rngs)
        self.squeeze = nnx.Linear(outward, SQUEEZED, rngs=rngs)
        self.excite = nnx.Linear(SQUEEZED, outward, rngs=rngs)

    def __call__(self, x: Array, gate: Array | None = None) -> Array:
        x = jax.nn.relu(self.conv(x))
        inner = jax.nn.relu(self.squeeze(x.mean(axis=(1, 2))))
        excitation = 2 * jax.nn.sigmoid(self.excite(inner))  # 1 at first
        if gate is not None:
            excitation = excitation * gate
        return x * excitation[:, None, None]


class Classifier(nnx.Module):
    """[B, SIDE, SIDE] gray values -> logits [B, CLASSES]."""

    def __init__(self, channels: Sequence[int], rngs: nnx.Rngs):
        inward = (1, *channels)
        self.layers = nnx.List([
            Layer(inward[i], channels[i], stride, rngs) for i, stride in enumerate(STRIDES)
        ])  # fmt: skip
        self.out = nnx.Linear(POOLED**2 * channels[-1], data.CLASSES, rngs=rngs)

    def __call__(self, pixels: Array, gates: Sequence[Array] | None = None) -> Array:
        """With `gates` [B, channels] of each layer, its excitations times these."""
        x = pixels[..., None] - 0.3  # their mean
        for layer, gate in zip(self.layers, gates or (None,) * len(STRIDES), strict=True):
            x = layer(x, gate)
        pool = x.shape[1] // POOLED
        x = nnx.avg_pool(x, (pool, pool), (pool, pool))
        return self.out(x.reshape(len(x), -1))


def loss_of(model: Classifier, batch: tuple[Array, Array], key: Array) -> Array:
    """Mean cross-entropy."""
    del key
    pixels, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(pixels), labels).mean()


def worths(model: Classifier, batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """[channels] of each layer: mean square of a picture's gradient of a gate on its excitation.

    What leaving a channel out does to the loss of a picture, to first order, squared.
    """

    @nnx.jit
    def squares(model: Classifier, pixels: Any, labels: Any) -> list[Array]:
        def loss(gates: list[Array]) -> Array:
            said = model(pixels, gates)
            return optax.softmax_cross_entropy_with_integer_labels(said, labels).sum()

        ones = [jnp.ones((len(pixels), layer.conv.out_features)) for layer in model.layers]
        return [jnp.mean(x**2, axis=0) for x in jax.grad(loss)(ones)]

    found = [squares(model, *batch) for batch in batches]
    return [np.mean([np.asarray(x[i]) for x in found], axis=0) for i in range(len(STRIDES))]


def multiplications(channels: Sequence[int]) -> int:
    """Of the convolutions of one picture."""
    inward, side, total = (1, *channels), data.SIDE, 0
    for i, stride in enumerate(STRIDES):
        side //= stride
        total += 9 * side**2 * inward[i] * channels[i]
    return total


def costs() -> list[int]:
    """What a channel of each layer takes, in `UNIT`: its own convolution, and its part of the next."""
    found = []
    for i in range(len(CHANNELS)):
        fewer = [c - (i == j) for j, c in enumerate(CHANNELS)]
        found.append(round((multiplications(CHANNELS) - multiplications(fewer)) / UNIT))
    return found


def uniform(worth: Sequence[np.ndarray], total: int) -> list[int]:
    """The same part of every layer."""
    part = total / np.dot(costs(), CHANNELS)
    return [max(1, int(part * len(w))) for w in worth]


def proportional(worth: Sequence[np.ndarray], total: int) -> list[int]:
    """Each layer's share of the budget is that of its worth, alpha = w / sum w."""
    alpha = shares.proportional(jnp.array([w.sum() for w in worth]))
    each = np.array(costs())
    most = each * np.array(CHANNELS)
    given = allocate.whole(alpha, total, jnp.asarray(each), jnp.asarray(most)).amount
    return (np.asarray(given) // each).tolist()


def ladder(worth: Sequence[np.ndarray], total: int) -> list[int]:
    """One price for the channels of all layers: worth by cost. The best one of each layer stays."""
    values = np.concatenate([[np.sort(w)[::-1][1:]] for w in worth], axis=1)[0]
    layer = np.repeat(np.arange(len(worth)), [len(w) - 1 for w in worth])
    cost = np.array(costs())[layer]
    # A step's value may be tiny: none is below what the ladder takes for worth nothing.
    steps = np.stack([np.zeros_like(values), values / values.max()], axis=1)
    prices = np.stack([np.zeros_like(cost), cost], axis=1)
    out = allocate.ladder(
        jnp.asarray(steps), jnp.asarray(prices), jnp.asarray(total - sum(costs()))
    )
    taken = np.bincount(layer, weights=np.asarray(out.level), minlength=len(worth))
    return [1 + int(n) for n in taken]


AMOUNTS: Mapping[str, Amounts] = {
    "uniform": uniform,
    "proportional": proportional,
    "ladder": ladder,
}


def channels_of(arm: str, worth: Sequence[np.ndarray], part: float) -> list[int]:
    """The most channels of each layer by an arm's rule whose multiplications are within `part`.

    A channel's cost falls with those of its neighbours, so the rule's budget is searched.
    """
    if arm == "full":
        return [len(w) for w in worth]
    low, high = sum(costs()), int(np.dot(costs(), CHANNELS))
    most = part * multiplications(CHANNELS)
    while high - low > 1:
        middle = (low + high) // 2
        fits = multiplications(AMOUNTS[arm](worth, middle)) <= most
        low, high = (middle, high) if fits else (low, middle)
    return AMOUNTS[arm](worth, low)


def pruned(model: Classifier, worth: Sequence[np.ndarray], channels: Sequence[int]) -> Classifier:
    """A smaller network of the channels of most worth in each layer."""
    keep = [
        np.sort(np.argsort(-w, kind="stable")[:number])
        for w, number in zip(worth, channels, strict=True)
    ]
    smaller = nnx.eval_shape(lambda: Classifier(channels, nnx.Rngs(0)))
    inward = [np.arange(1), *keep[:-1]]
    every = np.arange(SQUEEZED)
    for old, new, came, own in zip(model.layers, smaller.layers, inward, keep, strict=True):
        _put(new.conv, old.conv, (slice(None), slice(None), *np.ix_(came, own)), own)
        _put(new.squeeze, old.squeeze, np.ix_(own, every), every)
        _put(new.excite, old.excite, np.ix_(every, own), own)
    classes = np.arange(data.CLASSES)
    # Places, and in each of them the channels.
    inputs = (np.arange(POOLED**2)[:, None] * len(worth[-1]) + keep[-1]).ravel()
    _put(smaller.out, model.out, np.ix_(inputs, classes), classes)
    return smaller


def _put(new: Any, old: Any, kernel: Any, bias: np.ndarray) -> None:
    """A part of a layer's arrays."""
    new.kernel = nnx.Param(jnp.asarray(np.asarray(old.kernel[...])[kernel]))
    new.bias = nnx.Param(jnp.asarray(np.asarray(old.bias[...])[bias]))


@functools.cache
def prepare(sizes: Sizes) -> tuple[data.Pictures, data.Pictures]:
    """For training and for the test.

    Raises:
      ValueError: a package that cannot be fetched.
    """
    return data.read("train").part(sizes.train), data.read("t10k").part(sizes.test)


@functools.cache
def base(seed: int, sizes: Sizes) -> tuple[Classifier, list[np.ndarray]]:
    """The network that all arms of a seed begin with, and what its channels are worth."""
    train = prepare(sizes)[0]
    model = Classifier(CHANNELS, nnx.Rngs(seed))
    orders = training.orders(len(train.labels), BATCH, sizes.epochs, seed)
    fit(model, orders, PEAK_RATE, sizes, seed, "base", lambda: None)
    scored = [(train.pixels[x], train.labels[x]) for x in orders[:SCORED]]
    return model, worths(model, scored)


def fit(
    model: Classifier, orders: Sequence[np.ndarray], rate: float, sizes: Sizes, seed: int, name: str,
    advance: Callable[[], None],
) -> None:  # fmt: skip
    """Train in place."""
    train = prepare(sizes)[0]
    batches = ((train.pixels[x], train.labels[x]) for x in orders)
    with logs.writer("vision.channels", name, seed) as log:
        training.train(model, loss_of, batches, len(orders), rate, seed, log, advance)


def run(
    arm: str, part: float, seed: int, sizes: Sizes, advance: Callable[[], None]
) -> Mapping[str, Any]:
    """Accuracy of what is left on held-out pictures, what a picture takes, and the export's bytes."""
    whole, worth = base(seed, sizes)
    channels = channels_of(arm, worth, part)
    model = pruned(whole, worth, channels)
    orders = training.orders(sizes.train, BATCH, 1, seed + 100)
    fit(model, orders, LATER_RATE, sizes, seed, f"{arm}-{part}", advance)
    test = prepare(sizes)[1]
    return judged(model, test.pixels, test.labels, BATCH, "channels", channels)


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("vision.channels", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    sizes = SMOKE if smoke else WHOLE
    about = {
        "title": "Vision: channels",
        "notes": NOTES,
        "settings": {
            "sizes": sizes._asdict(),
            "model": [list(CHANNELS), list(STRIDES), SQUEEZED, POOLED],
            "rates": [PEAK_RATE, LATER_RATE],
            "scored": SCORED,
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


NOTES = (
    "A convolutional network with squeeze-and-excitation, on pictures of Fashion-MNIST. Channels are "
    "taken out by the squared gradient of a gate on their excitation, over training pictures; what is "
    "left, a smaller dense network, is trained for one more pass over the pictures, the whole one "
    "too. `half` and `quarter` are of the convolutions' multiplications: `uniform` keeps the same "
    "part of every layer's channels, `proportional` gives layers shares by their worth, `ladder` has "
    "one price a multiplication. Every arm keeps the best channels of a layer, and the accuracy is "
    "that of the exported program. Half of the computation costs less than a hundredth of the "
    "pictures. Where it does not help: how the channels are divided among the layers hardly matters. "
    "All arms choose within a layer by the same worth, and a pass of training mends what they leave, "
    "so the same part of every layer does as well as one price."
)

if __name__ == "__main__":
    sys.exit(main())
