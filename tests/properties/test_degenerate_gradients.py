"""Hostile numbers for every aggregator, share rule, scorer and loop: finite and sensible, or an error.

Zero, negative, equal, opposed, huge, tiny and NaN, of one shape, so that every program compiles once and
an example is drawn for all of them.
`--hypothesis-profile=long` draws 20,000 examples of each.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jbalance import Status, balancer, importance, multitask, shares, tasks
from jbalance.attention import Tiling

K, N, B, F = 3, 4, 6, 3
AGGREGATORS = {
    "mean": multitask.mean(),
    "random": multitask.random(jax.random.key(0)),
    "dwa": multitask.dwa(),
    "importance": multitask.by_importance(np.eye(K)),
    "uncertainty": multitask.uncertainty(),
    "gradnorm": multitask.gradnorm(),
    "famo": multitask.famo(),
    "pcgrad": multitask.pcgrad(jax.random.key(0)),
    "upgrad": multitask.upgrad(),
    "mgda": multitask.fair(np.inf),
    "nash": multitask.fair(1.0),
    "fair0.1": multitask.fair(0.1),
    "fair20": multitask.fair(20.0),
}
# Far apart, but products with a few numbers stay within float32.
exponents = st.one_of(st.just(0), st.integers(-30, 30))
plain = st.one_of(st.integers(-3, 3).map(float), st.floats(-10, 10, width=32))
positive = st.one_of(st.just(0.0), st.just(1.0), exponents.map(lambda e: 10.0**e))
bad = st.sampled_from([np.nan, np.inf, -np.inf])


@st.composite
def gradients(draw):
    """[K, N]: rows of any directions, the same or opposed, each times its own power of ten."""
    rows = draw(arrays(np.float32, (K, N), elements=plain))
    like = draw(st.sampled_from([None, (0, 1, 2), (0, 0, 0), (0, 0, 1)]))
    rows = rows if like is None else rows[list(like)]
    signs = draw(st.tuples(*[st.sampled_from([1.0, -1.0, 1e-6, 0.0])] * K))
    scale = 10.0 ** np.array(draw(st.tuples(*[exponents] * K)))
    scale = scale if draw(st.booleans()) else scale[:1]
    return (rows * (np.array(signs) * scale)[:, None]).astype(np.float32)


@functools.cache
def stepped(name):
    """Weights and updates of three steps [3, ...]; compiled once."""
    made = multitask.aggregator(AGGREGATORS[name], K)

    def run(grads, losses):
        def step(state, given):
            update, state = made.update(given[0], state, losses=given[1])
            return state, (state.weights, update)

        return jax.lax.scan(step, made.init(None), (grads, losses))[1]

    return jax.jit(run)


@given(first=gradients(), second=gradients(), losses=arrays(np.float32, (3, K), elements=positive))
def test_aggregators_stay_finite(first, second, losses):
    for name in AGGREGATORS:
        weights, update = stepped(name)(np.stack([first, second, first]), losses)
        weights, update = np.asarray(weights, float), np.asarray(update, float)
        assert np.isfinite(weights).all()
        assert (weights >= 0).all()
        longest = np.linalg.norm(np.stack([first, second, first]).astype(float), axis=2).max(axis=1)
        if name not in ("uncertainty", "gradnorm"):  # whose weights sum to more than one
            length = np.linalg.norm(update, axis=1)
            assert (length <= longest * (1 + 1e-4) + 1e-37).all()


@given(grads=gradients(), losses=arrays(np.float32, K, elements=positive), data=st.data())
def test_aggregators_recover_from_one_bad_step(grads, losses, data):
    spoiled, spoiled_losses = grads.copy(), losses.copy()
    spoiled[data.draw(st.integers(0, K - 1)), 0] = data.draw(bad)
    spoiled_losses[data.draw(st.integers(0, K - 1))] = data.draw(bad)
    for name in AGGREGATORS:
        weights, update = stepped(name)(
            np.stack([grads, spoiled, grads]), np.stack([losses, spoiled_losses, losses])
        )
        assert not np.isfinite(update[1]).all()
        assert np.isfinite(weights[2]).all()
        assert np.isfinite(update[2]).all() or name == "uncertainty"


@functools.cache
def ruled(name):
    return jax.jit(shares.SHARE_RULES[name])


@given(w=arrays(np.float32, 6, elements=st.one_of(positive, st.just(3.4e38))))
def test_share_rules_share_out_the_whole(w):
    for name in shares.SHARE_RULES:
        alpha = np.asarray(ruled(name)(w), float)
        assert (alpha >= 0).all()
        np.testing.assert_allclose(alpha.sum(), 1, rtol=1e-5)


@functools.cache
def scored(name):
    scorer = importance.FEATURE_SCORERS[name]
    return jax.jit(lambda x, y: scorer(x, y, num_classes=3))


any_number = st.one_of(plain, positive, st.sampled_from([3.4e38, -3.4e38, -1e-30]))


@given(
    x=arrays(np.float32, (B, F), elements=any_number.map(np.float32)),
    y=arrays(np.int32, B, elements=st.integers(0, 2)),
)
def test_feature_scores_are_in_range(x, y):
    for name in importance.FEATURE_SCORERS:
        w = np.asarray(scored(name)(abs(x) if name == "chi_squared" else x, y))
        assert ((w >= 0) & (w <= 1)).all()


T, S, D = 3, 6, 4
TOKENS = {
    **importance.TOKEN_SCORERS,
    "window": functools.partial(importance.window, window=2),
    "attention_energy": functools.partial(importance.attention_energy, queries=2, min_distance=1),
    "reconstruction": functools.partial(importance.reconstruction, start=3, num_sinks=1),
}


@functools.cache
def token_scored(name):
    return jax.jit(TOKENS[name])


def entries(*shape):
    """Up to 1e8, the domain of scores that compare."""
    elements = st.one_of(plain, st.sampled_from([0.0, 1e-38, -1e-30, 1e-10, 1e4, -1e8, 1e8]))
    return arrays(np.float32, shape, elements=elements.map(np.float32))


@given(q=entries(T, 2, D), k=entries(S, 1, D), v=entries(S, 1, D))
def test_token_scores_are_finite(q, k, v):
    for name in TOKENS:
        w = np.asarray(token_scored(name)(q, k, v))
        assert np.isfinite(w).all()
        assert (w >= 0).all()


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e20, 1j])
def test_token_scorers_refuse_or_stay_finite(name, value):
    k = np.ones((S, 1, D), complex if value == 1j else np.float32)
    k[2, 0, 1] = value
    call = functools.partial(TOKENS[name], jnp.ones((T, 2, D)), jnp.asarray(k), jnp.ones((S, 1, D)))
    if value == 1e20 and name in ("key_norm", "leverage", "sinks_recent"):
        assert np.isfinite(call()).all()  # which do not depend on the keys' unit
    else:
        with pytest.raises(ValueError, match=r"the largest \|k\| is|k has dtype"):
            call()


TILING = Tiling(T, S, 2, 3)
TILES = {"tile_error": importance.tile_error, "tile_sketch": importance.tile_sketch}


@functools.cache
def tile_scored(name):
    scorer = TILES[name]
    return jax.jit(lambda q, k, v: scorer(q[None], k[None], v[None], TILING, rows=2))


@given(q=entries(T, 2, D), k=entries(S, 1, D), v=entries(S, 1, D))
def test_tile_scores_are_finite(q, k, v):
    for name in TILES:
        score = np.asarray(tile_scored(name)(q, k, v))
        assert np.isfinite(score).all()
        assert (score >= 0).all()


BALANCE = balancer(prior=np.arange(6.0), beta=0.5, eta=0.3, floor=1)
amounts = arrays(np.float32, 6, elements=st.one_of(positive, st.just(3.4e38), bad))


@functools.cache
def balanced():
    """Whole amounts of three updates, and the status of each; compiled once."""

    def run(w, feedback):
        def step(state, given):
            out, state = BALANCE.update(given[0], state, 60, feedback=given[1])
            return state, (out.allocation.amount, out.allocation.status)

        return jax.lax.scan(step, BALANCE.init(6), (w, feedback))[1]

    return jax.jit(run)


@given(first=amounts, second=amounts, feedback=amounts)
def test_the_balancer_meets_its_budget_or_says_invalid(first, second, feedback):
    sane = np.arange(6, dtype=np.float32)
    amount, status = balanced()(np.stack([first, second, sane]), np.stack([feedback, sane, sane]))
    amount = np.asarray(amount, int)
    met = (amount.sum(axis=1) == 60) & (amount >= 1).all(axis=1)
    assert (met | (np.asarray(status) != Status.OK)).all()
    bad_now = ~np.isfinite(np.stack([first, second, sane])).all(axis=1)
    assert (np.asarray(status)[bad_now] == Status.INVALID).all()


@functools.cache
def divided():
    def run(w, active, demand, used):
        return tasks.divide(
            w,
            active,
            batch=32,
            tokens=999,
            capacity=np.array([40, 7]),
            demand=demand,
            used=used,
            floor=0.05,
        )

    return jax.jit(run)


blocks = arrays(np.int32, (2, 6), elements=st.one_of(st.integers(0, 9), st.just(2**31 - 1)))


@given(w=amounts, active=arrays(bool, 6), demand=blocks, used=blocks)
def test_tasks_get_all_of_a_step_or_the_status_says_why(w, active, demand, used):
    out = jax.tree.map(np.asarray, divided()(w, active, demand, used))
    assert (out.status == Status.INVALID) == (not np.isfinite(w[active]).all())
    if out.status != Status.INVALID:
        np.testing.assert_allclose(out.alpha.sum(), float(active.any()), rtol=1e-5)
        assert (out.alpha[active] >= 0.05 * (1 - 1e-5)).all()
        assert out.examples.sum() == 32 * active.any()
        assert out.tokens.sum() == 999 * active.any()
        assert (out.cache.astype(int).sum(axis=1) <= [40, 7]).all()
        assert not out.cache[:, ~active].any()
        assert not out.examples[~active].any()
