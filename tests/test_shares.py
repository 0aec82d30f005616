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

from jbalance import Status, importance, shares

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


def test_equal_shares_of_those_that_there_are():
    np.testing.assert_allclose(shares.uniform(4), 0.25)
    where = np.array([True, False, True])
    got = shares.SHARE_RULES["uniform"](jnp.ones(3), where=where)
    np.testing.assert_allclose(got, [0.5, 0, 0.5])


@pytest.mark.parametrize("where", [None, np.arange(12) % 5 > 0])
@pytest.mark.parametrize("rule", [*shares.SHARE_RULES, "priced"])
def test_rules_over_a_mapped_axis(rule, where):
    """Four units on each of three: the shares of all twelve together."""
    rng = np.random.default_rng(2)
    if rule == "priced":
        if where is not None:
            return
        x, run = rng.poisson(0.2, (12, 30)), lambda x, **k: shares.priced(x, 21.0, **k)
    else:
        x, run = rng.uniform(0, 3, 12), shares.SHARE_RULES[rule]
    want = run(x) if where is None else run(x, where=where)
    parts = jnp.asarray(x, jnp.float32).reshape(3, 4, *x.shape[1:])
    options = {} if where is None else {"where": jnp.asarray(where).reshape(3, 4)}
    got = jax.vmap(lambda x, o: run(x, axis_name="all", **o), axis_name="all")(parts, options)
    np.testing.assert_allclose(got.reshape(-1), want, rtol=1e-5)


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


@pytest.mark.parametrize(
    ("alpha", "groups", "want"),
    [
        ([1, 0, 0], [0, 1, 1], [0.7, 0.15, 0.15]),
        ([0, 0, 1], [0, 0, 1], [0.1, 0.1, 0.8]),
        ([0, 0, 1], [0, 1, 1], [0.2, 0, 0.8]),
        ([0, 0, 0], [0, 1, 1], [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_a_group_without_weight_gets_its_floor_evenly(alpha, groups, want):
    got = shares.constrained(alpha, group_of=groups, group_floor=[0.2, 0.3])
    np.testing.assert_allclose(got, want, atol=1e-6)


GROUPED = jax.jit(lambda a, of, phi: shares.constrained(a, group_of=of, group_floor=phi))


def test_floors_that_do_not_fit_have_a_status_under_jit():
    alpha = np.float32([0.5, 0.3, 0.2])
    run = jax.jit(
        lambda floor, cap: shares.constrained(alpha, floor=floor, cap=cap, with_status=True)
    )
    got, status = run(0.5, 1.0)  # 1.5 in all
    assert status == Status.INFEASIBLE
    np.testing.assert_allclose(got, 1 / 3, rtol=1e-6)
    got, status = run(0.0, 0.25)  # 0.75 in all
    assert status == Status.INFEASIBLE
    np.testing.assert_allclose(got, 0.25, rtol=1e-6)
    got, status = run(0.25, 0.4)
    assert status == Status.OK
    np.testing.assert_allclose(got, [0.4, 0.35, 0.25], rtol=1e-6)
    assert run(np.nan, 1.0)[1] == Status.INVALID
    # What is no tracer can be refused, whatever else is one.
    for bounds, message in (({"floor": 0.5}, ": 0.5 is missing"), ({"cap": 0.25}, "0.25 in sum")):
        with pytest.raises(ValueError, match=message):
            jax.jit(lambda a, bounds=bounds: shares.constrained(a, **bounds))(alpha)


def curve(*values):
    return importance.worth_curve(np.float32(values))


def test_priced_takes_what_is_worth_the_price():
    """One owner of four units worth 8 and one of two worth 8 and six worth 2."""
    curves = jnp.stack([curve(8, 8, 8, 8), curve(8, 8, 2, 2, 2, 2, 2, 2)])
    curves *= jnp.array([[4.0], [8.0]]) / curves.sum(axis=1, keepdims=True)
    for amount, taken in (
        (3, [2, 1]),  # in the half octave of the price: the same part of its own
        (6, [4, 2]),
        (9, [4, 5]),
        (12, [4, 8]),
        (13, [4, 8]),  # more than there is: as of all there is
        (1e30, [4, 8]),
        (0, [6, 6]),
    ):
        want = np.array(taken) / sum(taken)
        np.testing.assert_allclose(shares.priced(curves, amount), want, rtol=1e-6)


BAD = {
    "no units": (lambda: shares.uniform(0), "num_units is 0"),
    "table for w": (lambda: shares.proportional(np.ones((2, 2))), r"w must have shape \[U\]"),
    "number for w": (lambda: shares.softmax(1.0), r"w must have shape \[U\]"),
    "nothing for w": (lambda: shares.proportional([]), "w is empty"),
    "several temperatures": (lambda: shares.softmax([1.0], [1.0, 2.0]), "temperature must have"),
    "NaN to softmax": (lambda: shares.softmax([1.0, np.nan]), r"w\[1\] is nan"),
    "infinity to softmax": (lambda: shares.softmax([1.0, np.inf]), r"w\[1\] is inf"),
    "complex to softmax": (lambda: shares.softmax([1j]), "must be numbers"),
    "no temperature": (lambda: shares.softmax([1.0], 0.0), "temperature is 0.0"),
    "table for alpha": (
        lambda: shares.constrained(np.ones((2, 2))),
        r"alpha must have shape \[U\]",
    ),
    "floors of others": (
        lambda: shares.constrained([0.5, 0.5], floor=[0.1]),
        "floor has 1 entries",
    ),
    "more floors": (lambda: shares.constrained([0.5, 0.5], floor=[0.1] * 3), "floor has 3 entries"),
    "floor below 0": (lambda: shares.constrained([1.0], floor=-0.1), r"floor is -0.1.*in \[0, 1\]"),
    "cap above 1": (lambda: shares.constrained([1.0], cap=1.5), r"cap is 1.5.*in \[0, 1\]"),
    "phi above 1": (
        lambda: shares.constrained([1.0], group_of=[0], group_floor=[1.5]),
        r"group_floor\[0\] is 1.5",
    ),
    "no such group": (
        lambda: shares.constrained([1.0], group_of=[1], group_floor=[0.5]),
        r"group_of\[0\] is 1",
    ),
    "table of caps": (lambda: shares.constrained([0.5, 0.5], cap=[[1.0]]), "cap must have shape"),
    "group above its caps": (
        lambda: shares.constrained([0.5, 0.5], cap=0.6, group_of=[0, 1], group_floor=[0.7, 0.1]),
        r"group_floor\[0\] is 0.7, .*caps of its units .group_of == 0. sum to 0.6: lower it by 0.1",
    ),
    "groups above the whole": (
        lambda: shares.constrained([0.5, 0.5], group_of=[0, 1], group_floor=[0.7, 0.5]),
        "group_floor: .*floors sum to 1.2, above the whole: 0.2 is missing",
    ),
    "a group and a unit above the whole": (
        lambda: shares.constrained(
            [0.5, 0.5], floor=[0.0, 0.4], group_of=[0, 1], group_floor=[0.7, 0.1]
        ),
        "group_floor: .*floors sum to 1.1, above the whole: 0.1 is missing",
    ),
    "phi": (
        lambda: shares.constrained([1.0], group_of=[0], group_floor=0.5),
        r"group_floor must have shape \[P\]",
    ),
    "one curve": (lambda: shares.priced(np.ones(3), 1), r"curves must have shape \[U, M\]"),
    "no curves": (lambda: shares.priced(np.ones((0, 3)), 1), "curves is empty"),
    "NaN in curves": (lambda: shares.priced([[np.nan]], 1), "curves.* is nan"),
    "amounts": (lambda: shares.priced(np.ones((2, 3)), [1, 2]), r"amount must have shape \[\]"),
    "negative amount": (lambda: shares.priced(np.ones((2, 3)), -1), "amount is -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
