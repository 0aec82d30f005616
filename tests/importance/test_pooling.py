"""METHOD's importance figures, sums of scores, and pooling with a prior and feedback."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import checkify

from jbalance import importance
from tests.support.examples import few

A = [[0.6, 0.4], [0.4, 0.6]]
COMPLEXITY = [0.5, 0.3]


def test_method_figures():
    w = importance.weighted(A, COMPLEXITY)
    np.testing.assert_allclose(w, [0.42, 0.38], rtol=1e-6)
    # Printed: w = (0.54, 0.46), which the formula does not give, and (0.6, 0.4): a's first column.
    assert not np.allclose(w, [0.54, 0.46], atol=0.05)
    np.testing.assert_allclose(importance.weighted(A, [1.0, 0.0]), [0.6, 0.4], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32])
def test_weighted_under_transformations(dtype):
    rng = np.random.default_rng(0)
    a = jnp.asarray(rng.integers(0, 9, (4, 5, 3)), dtype)
    c = jnp.asarray(rng.integers(0, 9, 3), dtype)
    w = jax.jit(jax.vmap(importance.weighted, in_axes=(0, None)))(a, c)
    assert w.dtype == jnp.float32
    np.testing.assert_array_equal(w, np.asarray(a, np.float32) @ np.asarray(c, np.float32))
    gradient = jax.grad(lambda c: importance.weighted(a[0], c).sum())(c.astype(jnp.float32))
    np.testing.assert_array_equal(gradient, np.asarray(a[0], np.float32).sum(0))


@few(20)
@given(st.integers(0, 10**6))
def test_distribution_shift_is_that_of_scipy(seed):
    rng = np.random.default_rng(seed)
    before, after = rng.integers(0, 5, (2, 4, 7))
    before[:, 0] += 1
    after[:, 1] += 1
    want = scipy.spatial.distance.jensenshannon(before, after, base=2, axis=1) ** 2
    np.testing.assert_allclose(importance.distribution_shift(before, after), want, atol=2e-6)
    np.testing.assert_allclose(importance.distribution_shift(after, 3 * before), want, atol=2e-6)


def test_distribution_shift_at_its_ends():
    large = np.full((2, 3), 3e38, np.float32)
    ends = importance.distribution_shift(
        large * [[1, 1, 1], [1, 0, 0]], large * [[1, 1, 1], [0, 1, 1]]
    )
    np.testing.assert_allclose(ends, [0, 1], atol=1e-6)
    nothing = jax.jit(importance.distribution_shift)(jnp.zeros((1, 3)), jnp.ones((1, 3)))
    np.testing.assert_array_equal(nothing, [0])
    with pytest.raises(ValueError, match=r"the least sum of before is 0.0"):
        importance.distribution_shift(np.zeros((1, 3)), np.ones((1, 3)))
    with pytest.raises(ValueError, match=r"after has 2 entries along axis 1 but before has 3"):
        importance.distribution_shift(np.ones((1, 3)), np.ones((1, 2)))


# Sums of scores.

SCORES = jnp.array([[[4.0, 1.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]], [[2.0, 2.0, 0.0, 4.0]] * 2])
NORMALIZED = {
    "sum": [[4 / 8, 1 / 8, 3 / 8, 0], [0, 0, 0, 0], [2 / 8, 2 / 8, 0, 4 / 8]],
    "max": [[1, 1 / 4, 3 / 4, 0], [0, 0, 0, 0], [1 / 2, 1 / 2, 0, 1]],
    "rank": [
        np.array([1, 1 / 3, 1 / 2, 1 / 4]) / (25 / 12),
        [1 / 4] * 4,
        np.array([1 / 2, 1 / 2, 1 / 4, 1]) / (9 / 4),
    ],
}


@pytest.mark.parametrize("normalize", NORMALIZED)
def test_combine(normalize):
    first, zero, second = np.asarray(NORMALIZED[normalize])
    for m, rows in enumerate([[first, zero], [second, second]]):
        alone = importance.combine(SCORES, np.eye(2)[m], normalize=normalize)
        np.testing.assert_allclose(alone, rows, rtol=1e-6)
    w = importance.combine(SCORES, [2.0, 0.5], normalize=normalize)
    np.testing.assert_allclose(w, [2 * first + second / 2, 2 * zero + second / 2], rtol=1e-6)
    gradient = jax.grad(
        lambda s: (importance.combine(s, [2.0, 0.5], normalize=normalize) ** 2).sum()
    )
    assert jnp.isfinite(gradient(SCORES)).all()


@pytest.mark.parametrize("normalize", NORMALIZED)
def test_combine_is_float32_with_64_bits_enabled(normalize):
    with jax.enable_x64(True):
        rows = jax.eval_shape(
            lambda w: importance.combine(w, jnp.ones(2), normalize=normalize), jnp.ones((2, 3))
        )
    assert rows.dtype == jnp.float32


def test_combined_takes_other_scorers_and_a_normalisation_for_each():
    row = jnp.array([[1.0, 3.0, 0.0]])
    scorers = {"one": lambda q, k, v: row, "two": lambda q, k, v: 7 * row}
    weights = {"one": 1.0, "two": 2.0}
    scorer = importance.combined(weights, normalize={"two": "max"}, scorers=scorers)
    np.testing.assert_allclose(scorer(row, row, row), row / 4 + 2 * row / 3, rtol=1e-6)


# Pooling.

UNITS = 6
amounts = st.one_of(st.just(0.0), st.floats(2**-10, 2**10, width=32))
rows = st.lists(amounts, min_size=UNITS, max_size=UNITS).map(lambda x: np.array(x, np.float32))
feedbacks = st.lists(st.floats(-1, 1, width=32), min_size=UNITS, max_size=UNITS)
feedbacks = feedbacks.map(lambda x: np.array(x, np.float32))
blend = jax.jit(importance.blend)
relaxed = few(60)


@relaxed
@given(rows, rows, st.floats(0, 1, width=32), feedbacks, st.floats(0, 20, width=32))
def test_pool_keeps_the_sum_and_stays_finite(w, prior, beta, feedback, eta):
    got = blend(w, prior, beta, feedback, eta)
    assert jnp.isfinite(got).all()
    assert (got >= 0).all()
    np.testing.assert_allclose(got.sum(), w.sum(), rtol=1e-5)


@relaxed
@given(rows, rows, feedbacks)
def test_pool_at_zero_changes_no_bit(w, prior, feedback):
    np.testing.assert_array_equal(blend(w, prior, 0.0, feedback, 0.0), w)


@relaxed
@given(rows, rows)
def test_pool_at_one_is_the_prior(w, prior):
    if prior.sum() > 0:
        want = prior / prior.sum() * w.sum()
        np.testing.assert_allclose(blend(w, prior, 1.0), want, rtol=1e-4, atol=1e-30)


@relaxed
@given(rows, rows, st.floats(0, 1, width=32), feedbacks, st.floats(0, 20, width=32))
def test_pool_matches_the_formula(w, prior, beta, feedback, eta):
    w64, p64 = w.astype(np.float64), prior.astype(np.float64)  # numpy too says 0^0 = 1
    raw = w64 ** (1.0 - beta) * p64**beta * np.exp(eta * (feedback.astype(np.float64) - 1))
    want = raw * w64.sum() / raw.sum() if raw.sum() > 0 else w64
    got = blend(w, prior, beta, feedback, eta)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-6 * w64.sum())


@relaxed
@given(rows, rows, st.floats(0, 1, width=32), feedbacks, st.floats(0, 20, width=32))
def test_pool_gradients_are_finite(w, prior, beta, feedback, eta):
    for gradient in _gradients(w, prior, beta, feedback, eta):
        assert jnp.isfinite(gradient).all()


_gradients = jax.jit(
    jax.grad(lambda *a: (importance.blend(*a) * jnp.arange(UNITS)).sum(), argnums=(0, 1, 2, 3, 4))
)


def test_pool_gradient_matches_differences():
    w, prior, feedback = (np.array(x, np.float32) for x in ([3, 1, 2], [1, 5, 2], [1, -1, 0]))
    slope = jax.jit(jax.grad(lambda eta: blend(w, prior, 0.3, feedback, eta)[0]))(0.5)
    low, high = (blend(w, prior, 0.3, feedback, 0.5 + d)[0] for d in (-0.01, 0.01))
    np.testing.assert_allclose(slope, (high - low) / 0.02, rtol=1e-3)


def test_strengths_can_be_learned_from_zero():
    w, prior, feedback = (jnp.array(x) for x in ([3.0, 1, 2], [1.0, 5, 2], [1.0, -1, 0]))
    by_beta, by_eta = jax.jacobian(blend, argnums=(2, 4))(w, prior, 0.0, feedback, 0.0)
    for slope, tilt in ((by_beta, jnp.log(prior / w)), (by_eta, feedback)):
        np.testing.assert_allclose(slope, w * (tilt - w @ tilt / w.sum()), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(jax.grad(lambda w: importance.blend(w)[0])(0 * w), [1, 0, 0])


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_pool_over_a_mesh(beta):
    shards = 2 if len(jax.devices()) > 1 else 1
    mesh = jax.make_mesh((shards,), ("u",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    w, prior = (rng.exponential(size=8).astype(np.float32) for _ in range(2))
    feedback = rng.uniform(-1, 1, 8).astype(np.float32)

    def local(w, prior, feedback):
        return importance.blend(w, prior, beta, feedback, 0.7, axis_name="u")

    split = jax.shard_map(local, mesh=mesh, in_specs=(jax.P("u"),) * 3, out_specs=jax.P("u"))
    args = w, prior, feedback
    want = blend(w, prior, beta, feedback, 0.7)
    np.testing.assert_allclose(jax.jit(split)(*args), want, rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda *a: (split(*a) ** 2).sum()))(*args)
    alone = jax.jit(jax.grad(lambda w: (blend(w, prior, beta, feedback, 0.7) ** 2).sum()))(w)
    np.testing.assert_allclose(gradient, alone, rtol=1e-4, atol=1e-5)


def test_pool_of_rows_is_row_by_row():
    w = np.arange(12, dtype=np.float32).reshape(2, 6)
    prior = np.arange(6, 0, -1, dtype=np.float32)
    want = jnp.stack([blend(row, prior, 0.5) for row in w])
    np.testing.assert_allclose(blend(w, prior, 0.5), want, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda w: blend(w, prior, 0.5))(w), want, rtol=1e-6)


def test_feedback_moves_importance_and_decays():
    w, f = jnp.ones(2), importance.decay_feedback([0.0, 0.0], 0.5, [1.0, 0.0])
    ratio = []
    for _ in range(3):
        blended = importance.blend(w, feedback=f, eta=1.0)
        ratio.append(float(blended[0] / blended[1]))
        f = importance.decay_feedback(f, 0.5)
    np.testing.assert_allclose(ratio, np.exp([1.0, 0.5, 0.25]), rtol=1e-5)
    np.testing.assert_array_equal(importance.decay_feedback([0.9, -0.9], 1.0, [1.0, -1.0]), [1, -1])


W, P2 = [1.0, 2.0], [0.5, 0.5]
BAD = {
    "a vector": (
        importance.weighted,
        (A[0], COMPLEXITY),
        {},
        r"association must have shape \[N, K\]",
    ),
    "complexity too long": (importance.weighted, (A, [1, 2, 3]), {}, "complexity has 3 .* has 2"),
    "negative association": (
        importance.weighted,
        ([[1, -2]], P2),
        {},
        r"association\[\(0, 1\)\] is -2",
    ),
    "complexity NaN": (importance.weighted, (A, [1, np.nan]), {}, r"complexity\[1\] is nan"),
    "no units": (importance.weighted, (np.ones((0, 2)), P2), {}, "association is empty"),
    "negative w": (importance.blend, ([1.0, -2.0],), {}, r"w\[1\] is -2.0"),
    "w scalar": (importance.blend, (1.0,), {}, r"w must have shape \[..., U\]"),
    "beta above one": (importance.blend, (W, P2, 1.5), {}, r"beta is 1.5.*\[0.0, 1.0\]"),
    "beta of each": (
        importance.blend,
        (W, P2, P2),
        {},
        r"beta must have shape \[\], got shape \(2,\)",
    ),
    "beta without prior": (importance.blend, (W,), {"beta": 0.5}, "beta is 0.5 but prior is None"),
    "eta without feedback": (
        importance.blend,
        (W,),
        {"eta": 2.0},
        "eta is 2.0 but feedback is None",
    ),
    "negative eta": (importance.blend, (W,), {"feedback": P2, "eta": -1.0}, "eta is -1.0"),
    "feedback too strong": (
        importance.blend,
        (W,),
        {"feedback": [0, 3], "eta": 1.0},
        r"feedback\[1\] is 3",
    ),
    "prior too long": (
        importance.blend,
        (W, [1, 1, 1], 0.5),
        {},
        r"prior has shape \(3,\).*\(2,\)",
    ),
    "negative prior": (importance.blend, (W, [-1, 1], 0.5), {}, r"prior\[0\] is -1"),
    "nothing shared": (importance.blend, ([1, 0], [0, 1], 0.5), {}, "w and prior share no unit"),
    "decay": (importance.decay_feedback, (P2, 1.5), {}, r"decay is 1.5.*\[0.0, 1.0\]"),
    "new": (importance.decay_feedback, (P2, 0.5, [2.0, 0.0]), {}, r"new\[0\] is 2.0"),
    "normalize": (
        importance.combine,
        ([W], [1.0]),
        {"normalize": "mean"},
        "normalize is 'mean'.*'sum', 'max', 'rank'",
    ),
    "scores": (importance.combine, ([W], [1.0, 2.0]), {}, "weights has 2 entries.*scores has 1"),
    "scorer": (importance.combined, ({"widow": 1.0},), {}, "is 'widow'.*'window'"),
    "weight": (importance.combined, ({"window": -1.0},), {}, r"weights\['window'\] is -1.0"),
    "no weights": (importance.combined, ({},), {}, "weights is empty"),
    "normalize whom": (
        importance.combined,
        ({"window": 1.0},),
        {"normalize": {"leverage": "max"}},
        "a name in normalize is 'leverage'.*'window'",
    ),
    "normalize how": (
        importance.combined,
        ({"window": 1.0},),
        {"normalize": "l2"},
        "normalize is 'l2'",
    ),
}


@pytest.mark.parametrize(("function", "args", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(function, args, options, message):
    with pytest.raises(ValueError, match=message):
        function(*args, **options)


def test_traced_values_are_checked_by_checkify():
    error, _ = checkify.checkify(jax.jit(importance.blend))(jnp.array([1.0, -1.0]))
    with pytest.raises(checkify.JaxRuntimeError, match="w must be finite and >= 0"):
        error.throw()


def test_traced_beta_needs_a_prior():
    with pytest.raises(ValueError, match="prior is None"):
        jax.jit(lambda beta: importance.blend(jnp.ones(2), beta=beta))(0.0)
