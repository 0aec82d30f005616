"""The study of scorers: what is hidden is what is summed, unit by unit, and the command's table."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.explain import experiment
from experiments.explain.__main__ import SMOKE, WHOLE
from experiments.explain.experiment import Sizes
from jbalance import explain

LAYERS, HEADS, INNER = 5, 3, 50


@pytest.mark.parametrize("sizes", [Sizes(86, 4, 5), Sizes(86, 4, 3)])
def test_a_scorer_that_knew_the_effects_would_order_every_kind_of_units(sizes):
    """Where hiding costs just the sum of w over what is hidden, the sums are the effects."""
    w = np.random.default_rng(0).random((LAYERS, HEADS, INNER))

    def kl(hidden):
        assert hidden.shape[1:] == w.shape
        return (w * hidden).sum(axis=(1, 2, 3))

    effects = experiment._effects(kl, w.shape, sizes)
    said = experiment.sums(w, sizes)
    assert said.keys() == effects.keys()
    for kind, effect in effects.items():
        np.testing.assert_allclose(said[kind], effect, rtol=1e-5)
        assert np.ptp(effect) > 0
    assert len(effects["heads"]) == HEADS * len(effects["layers"]) == HEADS * sizes.layers


def test_a_run_correlates_the_scorer_that_it_names(monkeypatch):
    w = np.random.default_rng(1).random((LAYERS, HEADS, INNER))
    sizes = Sizes(86, 4, 5)
    effects = experiment.sums(w, sizes)
    monkeypatch.setattr(
        experiment, "scored", lambda seed, sizes: experiment.Scored(effects, {"a": w, "b": -w})
    )
    for arm, sign in (("a", 1), ("b", -1)):
        figures = experiment.run(arm, 0, sizes)["figures"]
        np.testing.assert_allclose(list(figures.values()), sign, atol=1e-6)
    assert explain.rank_correlation(effects["tokens"], effects["tokens"]) == 1


def test_sizes_are_those_that_scorers_accept():
    """The context is longer than the queries that scorers look at, and its inner part divides."""
    for sizes in (WHOLE, SMOKE):
        assert sizes.context > experiment.measure.PROBE_TOKENS
        inner = sizes.context - experiment.measure.NUM_SINKS - experiment.measure.NUM_RECENT
        assert inner % experiment.GROUP == 0
