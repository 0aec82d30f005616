"""Rank correlation against SciPy's."""

import jax
import numpy as np
from scipy import stats

from jbalance import explain


def test_it_is_spearmans_with_and_without_ties():
    rng = np.random.default_rng(0)
    run = jax.jit(explain.rank_correlation)
    for top in (3, 10, 10**6):
        for _ in range(5):
            x, y = rng.integers(0, top, (2, 30)).astype(np.float32)
            want = stats.spearmanr(x, y).statistic
            np.testing.assert_allclose(run(x, y), want, atol=1e-6)
            np.testing.assert_allclose(run(x, x + 0 * y), 1, atol=1e-6)
            np.testing.assert_allclose(run(-x, x), -1, atol=1e-6)


def test_units_that_are_all_alike_say_nothing():
    assert explain.rank_correlation(np.ones(4), np.arange(4.0)) == 0
