"""Shares: the rules, floors, caps and groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import softmax

from jbalance import shares

RULES = pytest.mark.parametrize("rule", shares.SHARE_RULES)
reals = st.floats(0, 100, width=32, allow_subnormal=False)


@RULES
@given(w=arrays(np.float32, 9, elements=reals))
def test_rules_share_out_the_whole(rule, w):
    alpha = np.asarray(shares.SHARE_RULES[rule](w))
    assert (alpha >= 0).all()
    np.testing.assert_allclose(alpha.sum(), 1, rtol=1e-5)
    assert alpha.dtype == np.float32


@RULES
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.int32])
def test_rules_under_transformations(rule, dtype):
    w = jnp.asarray([[1, 2, 5], [0, 0, 0], [7, 7, 7]], dtype)
    batched = jax.jit(jax.vmap(shares.SHARE_RULES[rule]))(w)
    loop = [shares.SHARE_RULES[rule](row) for row in w]
    np.testing.assert_allclose(batched, loop, rtol=1e-6)
    np.testing.assert_allclose(batched[1:], 1 / 3, rtol=1e-6)


def test_extreme_weights():
    want = [0.25, 0.75]
    for size in (1e-37, 1.0, 1e38):
        w = jnp.array([1.0, 3.0]) * size
        np.testing.assert_allclose(jax.jit(shares.proportional)(w), want, rtol=1e-6)
    np.testing.assert_allclose(shares.softmax(jnp.array([-1e38, 3e38])), [0, 1])
    w = np.array([900.0, 901.0, -5.0])
    np.testing.assert_allclose(shares.softmax(w, 2.0), softmax(w / 2), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("rule", ["proportional", "softmax"])
def test_gradients_are_finite_differences(rule):
    mix = jnp.array([1.0, -2.0, 0.5])

    def f(w):
        return mix @ shares.SHARE_RULES[rule](w)

    w, step = jnp.array([0.5, 2.0, 1.1]), 0.01
    numeric = [(f(w + d) - f(w - d)) / (2 * step) for d in step * jnp.eye(3)]
    np.testing.assert_allclose(jax.grad(f)(w), numeric, atol=1e-3)


def test_constrained_keeps_floors_and_caps():
    alpha = jnp.array([0.7, 0.2, 0.1, 0.0])
    got = shares.constrained(alpha, floor=0.05, cap=0.5)
    np.testing.assert_allclose(got, [0.5, 0.3, 0.15, 0.05], rtol=1e-5)
    np.testing.assert_allclose(shares.constrained(alpha), alpha, atol=1e-6)


def test_groups_are_lifted_to_their_floor():
    """The group of units 2 and 3 would have 0.3; it gets phi = 0.6 and keeps its proportions."""
    alpha = jnp.array([0.4, 0.3, 0.2, 0.1])
    got = shares.constrained(alpha, group_of=[0, 0, 1, 1], group_floor=[0.0, 0.6])
    np.testing.assert_allclose(got, [0.4 * 4 / 7, 0.4 * 3 / 7, 0.4, 0.2], rtol=1e-5)
    same = shares.constrained(alpha, group_of=[0, 0, 1, 1], group_floor=[0.1, 0.3])
    np.testing.assert_allclose(same, alpha, atol=1e-6)


@given(
    w=arrays(np.float32, 9, elements=st.integers(1, 50)),
    phi=arrays(np.float32, 3, elements=st.integers(0, 10).map(lambda x: x / 32)),
)
def test_no_group_is_below_its_floor(w, phi):
    group_of = np.arange(9) % 3
    got = np.asarray(GROUPED(shares.proportional(w), group_of, phi))
    assert (np.bincount(group_of, got) >= phi - 1e-5).all()
    np.testing.assert_allclose(got.sum(), 1, rtol=1e-5)
    for g in range(3):  # proportions within a group are alpha's
        inside = got[group_of == g] * w[group_of == g].sum()
        np.testing.assert_allclose(inside, w[group_of == g] * got[group_of == g].sum(), rtol=1e-4)


GROUPED = jax.jit(lambda a, of, phi: shares.constrained(a, group_of=of, group_floor=phi))
