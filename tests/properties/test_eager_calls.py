"""Without jit: a second call of equal shapes compiles nothing, of any public function."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import jbalance
from tests.support.calls import CALLS
from tests.support.compilations import compilations
from tests.support.more_calls import MORE_CALLS

ALL_CALLS = CALLS | MORE_CALLS
ONCE_A_MODEL = {"quantize_weights"}  # which calls the model's own functions, to compare them


def check(name):
    fn, good, _ = ALL_CALLS[name]
    jax.block_until_ready(jax.tree.leaves(fn(**good)))
    with compilations() as compiled:
        fn(**good)
    assert not compiled


# Of each kind of those that did.
@pytest.mark.parametrize("name", ["choose", "attend", "tile_error", "fair", "window", "imply"])
def test_a_function(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ALL_CALLS.keys() - ONCE_A_MODEL))
def test_every_function(name):
    check(name)


def test_later_steps_of_a_balancer():
    """Whose state counts the steps: a power of a known number would be a program of its own."""
    balancer = jbalance.balance.balancer()
    state, w = balancer.init(4), jnp.arange(4.0)
    for step in range(4):
        with compilations() as compiled:
            _, state = balancer.update(w, state, 8)
        assert step < 2 or not compiled
