"""Interventions against a dense model in float64 whose masks are written once more."""

from __future__ import annotations

import numpy as np
import pytest

from jbalance import explain
from tests.support.window_models import (
    HEADS,
    KV_HEADS,
    VOCAB,
    WINDOWS,
    Kept,
    dense_logits,
    model,
    specs,
)

SIZE, AFTER, LAYERS = 30, 9, len(WINDOWS)
RNG = np.random.default_rng(0)
TEXT = RNG.integers(0, VOCAB, SIZE + AFTER + 1)
CONTEXT, CONTINUATION = TEXT[:SIZE], TEXT[SIZE:]


def kept(tokens=None, heads=None, layers=None):
    """Of the whole text, where only what follows the context lacks anything."""
    number = len(TEXT) - 1
    seen = np.ones((LAYERS, KV_HEADS, number, number), bool)
    if tokens is not None:
        seen[:, :, SIZE:, :SIZE] = np.broadcast_to(tokens, (LAYERS, KV_HEADS, SIZE))[:, :, None]
    all_heads, all_layers = np.ones((LAYERS, number, HEADS), bool), np.ones((LAYERS, number), bool)
    if heads is not None:
        all_heads[:, SIZE:] = heads[:, None]
    if layers is not None:
        all_layers[:, SIZE:] = layers[:, None]
    return Kept(seen, all_heads, all_layers)


def effect_of(what):
    """(KL, rise of the NLL) in float64."""

    def log_probs(left):
        logits = dense_logits(TEXT[:-1], specs(), left)[SIZE:]
        logits = logits - logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    full, found = log_probs(None), log_probs(what)
    labels = np.arange(AFTER), CONTINUATION[1:]
    kl = (np.exp(full) * (full - found)).sum(axis=1).mean()
    return kl, (full[labels] - found[labels]).mean()


def interventions():
    """Ten of each kind: more than a batch, and no multiple of it."""
    some = np.random.default_rng(1)
    return (
        some.random((10, SIZE)) > 0.5,
        some.random((10, LAYERS, KV_HEADS, SIZE)) > 0.5,
        some.random((10, LAYERS, HEADS)) > 0.4,
        some.random((10, LAYERS)) > 0.4,
    )


@pytest.mark.parametrize("kind", ["tokens", "tokens of heads", "heads", "layers", "all"])
def test_what_is_taken_away_is_missing_in_the_oracle_too(kind):
    tokens, of_heads, heads, layers = interventions()
    given = {
        "tokens": {"tokens": tokens},
        "tokens of heads": {"tokens": of_heads},
        "heads": {"heads": heads},
        "layers": {"layers": layers},
        "all": {"tokens": of_heads, "heads": heads, "layers": layers},
    }[kind]
    found = explain.ablate(model(), CONTEXT, CONTINUATION, **given)
    want = np.array([effect_of(kept(**{k: x[i] for k, x in given.items()})) for i in range(10)])
    assert (want[:, 0] > 1e-3).sum() >= 8
    np.testing.assert_allclose(found.kl, want[:, 0], rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(found.nll_rise, want[:, 1], rtol=2e-3, atol=1e-4)


def test_nothing_taken_away_has_no_effect():
    found = explain.ablate(model(), CONTEXT, CONTINUATION, layers=np.ones((3, LAYERS), bool))
    np.testing.assert_allclose(found.kl, np.zeros(3), atol=1e-6)
    np.testing.assert_array_equal(found.nll_rise, np.zeros(3))


def test_tokens_beyond_every_window_are_seen_by_the_layers_without_one():
    """What no window reaches any more matters to the layer that sees everything, and to no other."""
    hidden = np.ones((2, LAYERS, KV_HEADS, SIZE), bool)
    old = SIZE - max(w for w in WINDOWS if w is not None)
    for row, has_window in enumerate((True, False)):
        for layer, window in enumerate(WINDOWS):
            if (window is not None) == has_window:
                hidden[row, layer, :, :old] = False
    found = explain.ablate(model(), CONTEXT, CONTINUATION, tokens=hidden)
    assert found.kl[0] < 1e-6 < 1e-3 < found.kl[1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "tokens, heads and layers are None"),
        ({"tokens": np.ones((2, SIZE + 1), bool)}, r"tokens has .* \(2, 31\)"),
        ({"heads": np.ones((2, LAYERS, HEADS))}, "heads has dtype float64"),
        (
            {"layers": np.ones((2, LAYERS), bool), "tokens": np.ones((3, SIZE), bool)},
            "N of tokens",
        ),
        ({"layers": np.ones((2, LAYERS), bool), "continuation": [3]}, "continuation has 1 tokens"),
        ({"layers": np.ones((2, LAYERS), bool), "context": [0.5]}, "context has dtype float"),
    ],
)
def test_bad_input_is_named(given, words):
    given = {"context": CONTEXT, "continuation": CONTINUATION} | given
    with pytest.raises(ValueError, match=words):
        explain.ablate(model(), given.pop("context"), given.pop("continuation"), **given)
