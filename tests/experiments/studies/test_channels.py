"""Channels: a smaller network is the whole one without them, budgets by counting multiplications."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.vision import channels
from experiments.vision.channels import CHANNELS, STRIDES, Classifier
from experiments.vision.data import SIDE

said = nnx.jit(lambda model, pixels, gates=None: model(pixels, gates))


def worths():
    rng = np.random.default_rng(0)
    return [rng.random(n) * scale for n, scale in zip(CHANNELS, (3, 1, 0.5, 2), strict=True)]


@pytest.fixture(scope="module")
def whole():
    return nnx.jit(lambda: Classifier(CHANNELS, nnx.Rngs(0)))()


def counted(widths):
    """Places times inputs times outputs of each convolution, from the shapes of its result."""

    def shapes(x):
        found = [x]
        for layer in Classifier(widths, nnx.Rngs(0)).layers:
            found.append(layer(found[-1]))
        return found

    found = jax.eval_shape(shapes, jax.ShapeDtypeStruct((1, SIDE, SIDE, 1), jnp.float32))
    pairs = itertools.pairwise(found)
    return sum(9 * y.shape[1] * y.shape[2] * x.shape[3] * y.shape[3] for x, y in pairs)


def test_multiplications_are_those_of_the_convolutions():
    for widths in (CHANNELS, (3, 7, 5, 2)):
        assert channels.multiplications(widths) == counted(widths)


@pytest.mark.parametrize("part", [0.5, 0.25])
@pytest.mark.parametrize("arm", list(channels.AMOUNTS))
def test_a_budget_is_nearly_spent_and_never_exceeded(arm, part):
    found = channels.channels_of(arm, worths(), part)
    assert all(1 <= n <= most for n, most in zip(found, CHANNELS, strict=True))
    assert (
        0.85 * part < channels.multiplications(found) / channels.multiplications(CHANNELS) <= part
    )


def test_the_ladder_takes_what_is_worth_most_for_its_cost():
    worth, each = worths(), channels.costs()
    found = channels.ladder(worth, int(0.5 * np.dot(each, CHANNELS)))
    taken, left = [], []
    for w, n, cost in zip(worth, found, each, strict=True):
        prices = np.sort(w)[::-1] / cost
        taken += prices[1:n].tolist()
        left += prices[n:].tolist()
    # All of one price order but for the last step, which may not fit.
    assert min(taken) >= sorted(left)[-2] * (1 - 1e-5)
    assert sum(n * cost for n, cost in zip(found, each, strict=True)) <= 0.5 * np.dot(
        each, CHANNELS
    )


def test_a_pruned_network_says_what_the_whole_one_says_without_these_channels(whole):
    worth, model = worths(), nnx.clone(whole)
    widths = (5, 9, 20, 11)
    keep = [np.sort(np.argsort(-w)[:n]) for w, n in zip(worth, widths, strict=True)]
    pixels = np.random.default_rng(1).random((2, SIDE, SIDE)).astype(np.float32)
    found = said(channels.pruned(model, worth, widths), pixels)
    # In the whole network, a channel is gone whose outward weights are zero.
    for i in range(len(STRIDES)):
        gone = np.setdiff1d(np.arange(CHANNELS[i]), keep[i])
        last = i + 1 == len(STRIDES)
        after = model.out if last else model.layers[i + 1].conv
        places = np.arange(channels.POOLED**2)[:, None] * CHANNELS[-1]
        inputs = (places + gone).ravel() if last else gone
        for part, rows in ((model.layers[i].squeeze, gone), (after, (..., inputs, slice(None)))):
            kernel = np.array(part.kernel[...])
            kernel[rows] = 0
            part.kernel[...] = jnp.asarray(kernel)
    np.testing.assert_allclose(found, said(model, pixels), rtol=1e-4, atol=1e-5)


def test_worth_is_the_mean_square_of_what_gates_do_to_each_pictures_loss(whole):
    rng = np.random.default_rng(2)
    pixels = rng.random((3, SIDE, SIDE)).astype(np.float32)
    labels = np.array([1, 5, 8], np.int32)
    found = channels.worths(whole, [(pixels, labels)])

    def loss(picture, size):
        gates = [np.ones((1, n), np.float32) for n in CHANNELS]
        gates[1][0, 4] += size
        y = np.asarray(said(whole, pixels[picture : picture + 1], gates), np.float64)[0]
        return np.log(np.exp(y - y.max()).sum()) + y.max() - y[labels[picture]]

    slopes = [(loss(b, 0.5) - loss(b, -0.5)) for b in range(3)]
    assert found[1][4] == pytest.approx(np.mean(np.square(slopes)), rel=0.05)
    assert [x.shape for x in found] == [(n,) for n in CHANNELS]
