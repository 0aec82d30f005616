"""The study of scorers: what is hidden is what is summed, unit by unit, and the command's table."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.explain import allocations, experiment, parts
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


def test_claims_are_tried_at_their_budget_and_one_below():
    """A unit gets one more at every third of its device's budget; claims that are off do not hold."""
    device_of, budgets = np.array([0, 1]), np.array([6, 9], np.int32)
    given = allocations.Problem(np.zeros((2, 2)), np.array([1, 2]), device_of, budgets)
    got = np.array([2, 3])

    def solved(budgets):
        return np.asarray(budgets) // 3

    assert allocations._claims(given, np.array([9, 12]), got, solved) == 1
    assert allocations._claims(given, np.array([10, 12]), got, solved) == 0.5
    assert allocations._claims(given, np.array([8, -1]), got, solved) == 0
    assert allocations._nearest(given, np.array([9, 12])) == pytest.approx(1 / 3)


@pytest.mark.parametrize("rule", allocations.RULES)
def test_what_explanations_say_of_heads_holds(rule):
    rng = np.random.default_rng(2)
    costs = allocations.measure.counts(64)
    scale = rng.random((9, 1))
    error = scale * np.exp(-np.asarray(costs) / (5 + 30 * rng.random((9, 1))))
    given = allocations.problem(error, 64, 0.4)
    assert given.budgets.sum() <= int(0.4 * 64 * 9)
    assert given.budgets[0] == pytest.approx(2 * given.budgets[1], abs=2)
    found = allocations.RULES[rule](given)
    assert found["claims that hold"] == 1
    assert 0 < found["output error"] < 1
    if rule == "ladder":
        assert found["foretold of a half"] >= 1


def test_a_table_of_coalitions_is_the_game_and_counts_what_is_asked():
    own = np.array([1.0, 2.0, 4.0])
    every = (np.arange(8)[:, None] >> np.arange(3)) & 1
    game = parts.Table(every @ own)
    found = parts.figures(game, 0, 0)
    assert found["coalitions"] == 4
    for name in ("rank correlation", "sum over all"):
        assert found[name] == pytest.approx(1)
    assert found["off by"] == pytest.approx(0, abs=1e-6)
    together = parts.Table(every @ own + 8.0 * every.all(axis=1))  # worth more only as a whole
    assert parts.figures(together, 0, 0)["sum over all"] == pytest.approx((7 + 24) / 15)
    assert parts.figures(together, 4, 0)["sum over all"] == pytest.approx(1, rel=1e-5)
