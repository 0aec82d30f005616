"""Attention over tiles is dense masked attention: values, gradients, and nothing where nothing is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import attention, rescale
from jbalance.attention import EMPTY
from tests.support.attention_cases import CASES, Case, assert_near, loss, problem


@functools.cache
def value_and_grad(options, backend):
    function = functools.partial(loss, backend=backend, **dict(options))
    return jax.jit(jax.value_and_grad(function, has_aux=True))


def results(case, seed, backend, dtype=jnp.float32):
    """What `attend` returns, and the gradients."""
    floats, rest = problem(case, seed, dtype)
    (_, out), gradients = value_and_grad(case.options, backend)(floats, rest)
    return out, gradients


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_dense_masked_attention(name):
    empty = 0
    for seed in range(4):
        out, gradients = results(CASES[name], seed, "xla")
        want, want_gradients = results(CASES[name], seed, "reference")
        nothing = np.asarray(want.lse == EMPTY)
        empty += nothing.sum()
        np.testing.assert_array_equal(out.lse == EMPTY, nothing)
        assert_near(out.y, want.y, 1e-5)
        assert_near(np.where(nothing, 0, out.lse), np.where(nothing, 0, want.lse), 1e-5)
        assert_near(gradients, want_gradients, 1e-4)
        assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(
            jnp.shape, problem(CASES[name], seed)[0]
        )
    assert empty > 0 or CASES[name].one_plan or name in ("whole blocks", "soft cap")


@pytest.mark.parametrize(
    ("dtype", "value", "gradient"), [(jnp.bfloat16, 8e-3, 2e-2), (jnp.float16, 1e-3, 3e-3)]
)
def test_low_precision_is_that_of_its_inputs_and_outputs(dtype, value, gradient):
    case = CASES["causal"]
    out, gradients = results(case, 0, "xla", dtype)
    want, want_gradients = results(case, 0, "reference", dtype)
    assert out.y.dtype == dtype
    assert out.lse.dtype == jnp.float32
    assert {x.dtype for x in gradients.values()} == {np.dtype(dtype)}
    assert_near(out.lse, want.lse, 1e-5)
    assert_near(out.y, want.y, value)
    assert_near(gradients, want_gradients, gradient)


def by_definition(floats, plan, causal=True):
    """Sum of y and of lse over queries that see something, in float64 and by loops over heads."""
    q, k, v = (np.asarray(floats[name], np.float64) for name in "qkv")
    tiles = np.asarray(attention.to_mask(plan))
    tiles = tiles.repeat(plan.block_q, axis=2).repeat(plan.block_k, axis=3)
    total = 0.0
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        group = h * k.shape[2] // q.shape[2]
        logits = q[b, :, h] @ k[b, :, group].T / np.sqrt(q.shape[-1]) + floats["bias"][0, 0]
        seen = tiles[b, h, : q.shape[1], : k.shape[1]].copy()
        late = np.arange(k.shape[1]) > np.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        seen &= ~(late & causal)
        some = seen.any(axis=1)
        weight = np.where(seen, np.exp(logits), 0)[some]
        mass = weight.sum(axis=1)
        total += (weight / mass[:, None] @ v[b, :, group]).sum() + np.log(mass).sum()
    return total


def test_gradient_to_a_key_bias_is_that_of_finite_differences():
    case = Case(40, 50, bias=(1, 1, 1, None), options=(("causal", True),))
    floats, rest = problem(case, 3)

    def total(bias):
        out = attention.attend(**(floats | {"bias": bias}), **rest, causal=True)
        return jnp.sum(out.y) + jnp.sum(jnp.where(out.lse == EMPTY, 0, out.lse))

    got = jax.jit(jax.grad(total))(floats["bias"])
    bias = np.asarray(floats["bias"], np.float64)
    for s in range(0, case.keys, 7):
        step = np.zeros_like(bias)
        step[..., s] = 1e-5
        values = [
            by_definition(floats | {"bias": x}, rest["plan"]) for x in (bias + step, bias - step)
        ]
        np.testing.assert_allclose(got[0, 0, 0, s], (values[0] - values[1]) / 2e-5, atol=1e-4)


GRID = attention.Tiling(90, 100, 16, 32, causal=False)  # of a Case


def test_dense_plans_are_attention_of_jax():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 70, 4, 16))
    for causal, blocks in ((False, (32, 16)), (True, (128, 128))):
        plan = attention.dense(attention.Tiling(70, 70, *blocks, causal))
        got = jax.jit(functools.partial(attention.attend, causal=causal))(q, k, v, plan)
        want = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
        np.testing.assert_allclose(got.y, want, atol=1e-5)


def test_the_bias_of_shares_is_their_rule_and_has_gradients_to_them():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 60, 2, 16))
    alpha, association = jnp.array([0.3, 0.7]), jax.random.uniform(jax.random.key(1), (2, 60))
    plan = attention.dense(attention.Tiling(60, 60, 32, 16, causal=False))

    def tiled(alpha):
        bias = rescale.logit_bias(alpha, association)[None, None, None]
        return attention.attend(q, k, v, plan, bias=bias).y

    def dense(alpha):
        weight = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / 4)
        weight = rescale.renormalize(alpha, association, weight)
        return jnp.einsum("bhts,bshd->bthd", weight, v)

    np.testing.assert_allclose(jax.jit(tiled)(alpha), dense(alpha), atol=1e-5)
    gradients = [jax.jit(jax.jacobian(f))(alpha) for f in (tiled, dense)]
    np.testing.assert_allclose(*gradients, atol=1e-4)


def test_shares_divide_the_attention_of_one_pass():
    floats, rest = problem(CASES["tasks"], 1)
    run = jax.jit(lambda floats: attention.attend(**floats, **rest))
    out, plain = run(floats), run(floats | {"task_shares": None})
    assert out.y.shape == (2, 90, 3, 2, 16)
    np.testing.assert_allclose(jnp.sum(out.y, axis=2), plain.y, atol=1e-5)
    np.testing.assert_array_equal(out.lse, plain.lse)


def test_parts_merge_to_the_whole_and_so_do_their_gradients():
    floats, rest = problem(CASES["plain"], 2)
    plan = rest["plan"]
    even = jnp.arange(plan.num_key_blocks) % 2 == 0
    masks = (attention.to_mask(plan) & half for half in (even, ~even))
    plans = [attention.from_mask(mask, GRID) for mask in masks]

    def whole(floats):
        return jnp.sum(jnp.sin(attention.attend(**floats, plan=plan).y))

    def merged(floats):
        parts = [attention.attend(**floats, plan=p) for p in plans]
        return jnp.sum(jnp.sin(attention.merge(*parts).y))

    got, want = (jax.jit(jax.value_and_grad(f))(floats) for f in (merged, whole))
    assert_near(got, want, 1e-5)


def test_a_query_without_keys_gives_zero_and_no_gradient():
    floats, _ = problem(Case(bias=(1, 1, 1, None)), 0)
    mask = jnp.zeros((1, 1, 6, 4), bool).at[:, :, 2:, 1].set(True)
    rest = {"plan": attention.from_mask(mask, GRID)}
    (_, out), gradients = value_and_grad((), "xla")(floats, rest)
    np.testing.assert_array_equal(out.y[:, :32], 0)
    np.testing.assert_array_equal(out.lse[:, :32], np.float32(EMPTY))
    np.testing.assert_array_equal(gradients["q"][:, :32], 0)
    np.testing.assert_array_equal(gradients["k"][:, :32], 0)
    assert all(jnp.isfinite(x).all() for x in gradients.values())
    # A bias of -infinity everywhere is nothing, too.
    floats["bias"] = jnp.full_like(floats["bias"], -jnp.inf)
    (_, out), gradients = value_and_grad((), "xla")(floats, rest)
    np.testing.assert_array_equal(out.y, 0)
    assert all((x == 0).all() for x in gradients.values())


def test_large_logits_do_not_overflow():
    floats, rest = problem(Case(bias=(1, 1, 1, None)), 0)
    floats["q"], floats["bias"] = floats["q"] * 100, floats["bias"] * 300
    out, want = (value_and_grad((), name)(floats, rest)[0][1] for name in ("xla", "reference"))
    assert_near(out, want, 2e-4)  # the logits, of about a thousand, have no more digits


BAD = {
    "q": (jnp.ones((2, 90, 16)), ("q", "[B, T, H, D]")),
    "k": (jnp.ones((2, 100, 1, 8)), ("k has shape (2, 100, 1, 8)", "(2, 90, 2, 16)")),
    "v": (jnp.ones((2, 99, 1, 16)), ("v has shape (2, 99, 1, 16)", "(2, 100, 1, 16)")),
    "plan": (attention.dense(attention.Tiling(90, 99)), ("90 queries and 99 keys", "100")),
    "bias": (jnp.ones((1, 3, 1, 100)), ("bias has shape (1, 3, 1, 100)", "(2, 2, 90, 100)")),
    "relative_bias": (jnp.ones((2, 190)), ("relative_bias has shape (2, 190)", "189")),
    "window": (0, ("window is 0", "at least 1")),
    "soft_cap": (-1.0, ("soft_cap is -1.0", "(0, ")),
    "segment_ids": ((jnp.ones((2, 90)), jnp.ones((2, 90))), ("segment_ids", "(2, 100)")),
    "task_shares": (jnp.ones((3, 90)), ("task_shares has shape (3, 90)", "100")),
    "backend": ("cuda", ("backend is 'cuda'", "'xla'", "'reference'")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    value, parts = BAD[name]
    floats, rest = problem(Case(), 0)
    with pytest.raises(ValueError, match="must") as error:
        attention.attend(**(floats | rest | {name: value}))
    for part in parts:
        assert part in str(error.value), error.value


def test_more_bad_input_is_named():
    floats, rest = problem(Case(heads=3, kv_heads=3), 0)
    for change, part in (
        ({"k": floats["k"][:, :, :2], "v": floats["v"][:, :, :2]}, "multiple of the 2"),
        ({"k": floats["k"].astype(jnp.bfloat16)}, "bfloat16"),
        ({x: floats[x].astype(int) for x in "qkv"}, "int32"),
        ({"bias": jnp.ones((1, 1, 1, 1), int)}, "floating point"),
        ({"task_shares": jnp.full((1, 100), -1.0)}, "task_shares[(0, 0)] is -1.0"),
        ({"plan": problem(Case(heads=2), 0)[1]["plan"]}, "(2, 3, 6)"),
    ):
        with pytest.raises(ValueError, match="must") as error:
            attention.attend(**(floats | rest | change))
        assert part in str(error.value), error.value
