"""Rules that move tiles between layers give the same number of them."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tiles import levels
from jbalance.adapters import TileBudget
from jbalance.importance import CURVE_BINS

LAYERS, MOST = 6, 4000


@pytest.mark.parametrize("rule", levels.RULES)
def test_all_rules_cost_the_same(rule):
    rng = np.random.default_rng(0)
    curve = np.zeros((LAYERS, CURVE_BINS), np.float32)
    curve[:, 200:240] = rng.random((LAYERS, 40))
    curve *= MOST / curve.sum(axis=1, keepdims=True)
    limits = jnp.tile(jnp.array([300, MOST]), (LAYERS, 1))
    seen = TileBudget(jnp.ones(LAYERS), jnp.asarray(curve), limits)
    given = np.asarray(levels.RULES[rule](seen, 0.4).fraction) * MOST
    assert abs(given.sum() - 0.4 * LAYERS * MOST) < 2
    assert given.max() <= MOST


def test_bad_arguments_are_one_line(capsys):
    assert levels.main(["--density", "0.9"]) == 2
    assert capsys.readouterr().err.startswith("error: --density is 0.9")
    assert levels.main(["--tokens", "100"]) == 2
    assert capsys.readouterr().err.startswith("error: --tokens is 100")
