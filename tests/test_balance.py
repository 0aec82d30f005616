"""The steps composed: what a balancer remembers, and that new data never compiles again."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbalance as jb
from jbalance import allocate, importance, shares

W = jnp.array([4.0, 1.0, 0.0, 3.0])
UPDATES = 100


def test_the_average_is_exponential_and_unbiased():
    balance = jb.balancer(decay=0.8)
    state = balance.init(4)
    rng = np.random.default_rng(0)
    seen = rng.random((6, 4)).astype(np.float32)
    for t, w in enumerate(seen, 1):
        out, state = balance.update(w, state, 100)
        weight = 0.8 ** np.arange(t)[::-1]
        want = weight @ seen[:t] / weight.sum()
        np.testing.assert_allclose(out.w, want, rtol=1e-5)
        np.testing.assert_allclose(out.alpha, want / want.sum(), rtol=1e-5)
        assert out.allocation.amount.sum() == 100
    assert state.step == 6


@pytest.mark.parametrize("rule", shares.SHARE_RULES)
def test_the_steps_are_the_stages(rule):
    prior, feedback = jnp.array([1.0, 1.0, 1.0, 5.0]), jnp.array([0.0, 1.0, 0.0, -1.0])
    balance = jb.balancer(decay=0.0, rule=rule, floor=1, cap=9, prior=prior, beta=0.3, eta=0.5)
    out, _ = balance.update(W, balance.init(4), 20, feedback=feedback)
    w = importance.blend(W, prior, 0.3, feedback, 0.5)
    alpha = shares.SHARE_RULES[rule](w)
    np.testing.assert_array_equal(out.w, w)
    np.testing.assert_array_equal(out.alpha, alpha)
    want = allocate.whole(alpha, 20, 1, 9)
    jax.tree.map(np.testing.assert_array_equal, out.allocation, want)


def test_nothing_known_is_uniform():
    balance = jb.balancer()
    out, _ = balance.update(jnp.zeros(4), balance.init(4), 8)
    np.testing.assert_array_equal(out.alpha, 0.25)
    np.testing.assert_array_equal(out.allocation.amount, 2)


def test_a_balancer_in_a_scan():
    balance = jb.balancer(decay=0.5)

    def step(state, w):
        out, state = balance.update(w, state, jnp.array([7, 9]), jnp.array([0, 1, 0, 1]))
        return state, out.allocation.amount

    _, amounts = jax.jit(lambda s, w: jax.lax.scan(step, s, w))(balance.init(4), jnp.stack([W] * 5))
    np.testing.assert_array_equal(amounts, [[7, 2, 0, 7]] * 5)


def updates():
    """Functions of (w [U], budget [G]), each given new data 100 times."""
    device_of = jnp.arange(24) % 3
    balance = jb.balancer(decay=0.5, prior=jnp.ones(24), beta=0.2)

    def of_balancer(w, budget):
        return balance.update(w, balance.init(24), budget, device_of)

    def of_ladder(w, budget):
        values = w[:, None] * jnp.array([0.0, 0.7, 1.0])
        return allocate.ladder(
            values, jnp.array([0, 1, 3]), budget, device_of, total_budget=budget.sum() - 3
        )

    def of_water(w, budget):
        return allocate.water_fill(
            w, budget.sum(), 1, 500, segment_of=device_of, segment_cap=budget
        )

    def of_whole(w, budget):
        return allocate.whole(w, budget, 1, 500, device_of)

    return {"balancer": of_balancer, "ladder": of_ladder, "water_fill": of_water, "whole": of_whole}


@pytest.mark.parametrize("name", updates())
def test_new_data_never_compiles_again(name):
    update, traces = updates()[name], []

    @jax.jit
    def step(w, budget):
        traces.append(name)
        return update(w, budget)

    rng = np.random.default_rng(1)
    for _ in range(UPDATES):
        w = rng.lognormal(0, 2, 24).astype(np.float32)
        jax.block_until_ready(step(w, rng.integers(30, 900, 3).astype(np.int32)))
    assert len(traces) == 1
    assert step._cache_size() == 1


SOLVERS = {
    "ladder": ("jbalance.allocate.ladder", "_solve"),
    "water_fill": ("jbalance._water_fill", "_solve"),
    "whole": ("jbalance.allocate.whole", "_rounded"),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_calls_outside_jit_compile_once_too(name):
    """Concrete values are looked at for errors, but are data to the compiled part."""
    module, function = SOLVERS[name]
    solver = getattr(importlib.import_module(module), function)
    update = updates()[name]
    update(W.repeat(6) + 1, jnp.array([50, 60, 70]))
    before = solver._cache_size()
    for budget in range(71, 80):
        update(W.repeat(6) + budget, jnp.array([budget, 60, 70]))
    assert solver._cache_size() == before


def test_one_step_of_no_importance_is_invalid_and_the_next_is_as_if_it_were_the_average():
    balance = jb.balancer(decay=0.5)
    update = jax.jit(lambda w, state: balance.update(w, state, 60))
    w = jnp.array([1.0, 2.0, 3.0])
    _, state = update(w, balance.init(3))
    for bad in (jnp.nan, jnp.inf, -1.0):
        out, after = update(w.at[1].set(bad), state)
        assert out.allocation.status == jb.Status.INVALID
        out, _ = update(w, after)
        assert out.allocation.status == jb.Status.OK
        np.testing.assert_array_equal(out.allocation.amount, [10, 20, 30])
