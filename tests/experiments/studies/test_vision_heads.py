"""Heads of a vision transformer: arms keep their number of them, and what is exported is the model."""

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.vision import data, heads, tokens
from experiments.vision.export import exported
from jbalance import adapters


def test_arms_keep_their_number_of_heads():
    worth = [np.arange(8.0) * scale for scale in (1, 1, 1, 5)]
    kept = heads.uniform(worth, 16)
    assert [x.sum() for x in kept] == [4, 4, 4, 4]
    assert kept[0].tolist() == [False] * 4 + [True] * 4
    assert [x.sum() for x in heads.proportional(worth, 16)] == [3, 3, 2, 8]


def test_the_export_is_the_pruned_model():
    model = heads.Classifier(nnx.Rngs(0))
    pixels = np.random.default_rng(0).random((70, tokens.FINE, tokens.PATCH**2), np.float32)
    _, whole, bytes_of_all = exported(model, pixels, np.zeros(70, np.int32), heads.BATCH)
    worth = [jax.numpy.arange(8.0)] * heads.LAYERS
    adapters.prune_heads(model, adapters.heads_to_keep(model, worth, 0.5))
    labels = np.asarray(model(pixels).argmax(-1)).astype(np.int32)
    labels[::2] = (labels[::2] + 1) % data.CLASSES
    hits, flops, size = exported(model, pixels, labels, heads.BATCH)
    assert hits.tolist() == [False, True] * 35
    assert size < bytes_of_all
    # A head takes 4 projections of 64 x 8 for each of 64 tokens, two products over all tokens, and some
    # five operations a weight for their softmax.
    head = 64 * 2 * (4 * heads.WIDTH * heads.HEAD_DIM + 2 * 64 * heads.HEAD_DIM) + 5 * 64 * 64
    assert whole - flops == pytest.approx(heads.BATCH * 16 * head, rel=0.01)
