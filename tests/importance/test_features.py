"""Every feature scorer and tf-idf: oracles (scikit-learn, SciPy) and shared properties."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn import feature_selection, metrics
from sklearn.feature_extraction.text import TfidfTransformer

from jbalance import importance
from jbalance.importance import FEATURE_SCORERS
from tests.support import traced

B, N, C = 120, 6, 3
every_scorer = pytest.mark.parametrize("name", FEATURE_SCORERS)


def data(seed=0, classes=C):
    """Amounts >= 0 that depend on the class more and more from feature to feature."""
    rng = np.random.default_rng(seed)
    y = rng.choice(classes, size=B, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    x = rng.exponential(size=(B, N)) * (1 + np.linspace(0, 4, N) * y[:, None])
    return x.astype(np.float32), y


@cache
def jitted(name):
    return jax.jit(partial(FEATURE_SCORERS[name], num_classes=C))


def bin_of(x, bins=16):
    """Equal-width bins by numpy's own rule."""
    edges = [np.linspace(c.min(), c.max(), bins + 1)[1:-1] for c in x.T]
    return np.stack([np.digitize(c, e) for c, e in zip(x.T, edges, strict=True)], axis=1)


def mutual_information(x, y):
    h_y = scipy.stats.entropy(np.bincount(y))
    return [metrics.mutual_info_score(y, c) / h_y for c in bin_of(x).T]


def correlation(x, y):
    return [abs(scipy.stats.pearsonr(c, y).statistic) for c in x.T]


def anova(x, y):
    f, _ = feature_selection.f_classif(x, y)
    classes = len(np.unique(y))
    return f * (classes - 1) / (f * (classes - 1) + len(y) - classes)


def chi_squared(x, y):
    chi2, _ = feature_selection.chi2(x, y)
    rarest = np.unique(y, return_counts=True)[1].min() / len(y)
    return np.sqrt(chi2 / x.sum(0) * rarest / (1 - rarest))


def entropy(x, y):
    counts = [np.bincount(c, minlength=16) for c in bin_of(x).T]
    return [scipy.stats.entropy(c) / np.log(16) for c in counts]


@every_scorer
@pytest.mark.parametrize("seed", [0, 1])
def test_matches_oracle(name, seed):
    x, y = data(seed)
    want = globals()[name](x.astype(np.float64), y)
    np.testing.assert_allclose(jitted(name)(x, y), want, rtol=1e-4, atol=1e-5)


@every_scorer
def test_absent_classes_do_not_count(name):
    x, y = data()
    got = jax.jit(partial(FEATURE_SCORERS[name], num_classes=C + 4))(x, y)
    np.testing.assert_allclose(got, jitted(name)(x, y), rtol=1e-4, atol=1e-6)


@every_scorer
def test_range_and_equivariance(name):
    x, y = data(2)
    w = jitted(name)(x, y)
    assert w.shape == (N,)
    assert w.dtype == jnp.float32
    assert ((w >= 0) & (w <= 1)).all()
    rows, columns = np.random.default_rng(1).permutation(B), np.arange(N)[::-1]
    shuffled = jitted(name)(x[rows][:, columns], y[rows])
    np.testing.assert_allclose(shuffled, w[columns], rtol=1e-4, atol=1e-5)


@every_scorer
def test_constant_features_and_a_single_class(name):
    x, y = data()
    x[:, 0], x[:, 1] = 0.1, 0.0
    w = jitted(name)(x, y)
    np.testing.assert_allclose(w[:2], 0.0, atol=1e-3 if name == "chi_squared" else 0)
    assert (w[2:] > 0).all()
    one = jitted(name)(x, np.zeros_like(y))
    assert jnp.isfinite(one).all()
    assert name == "entropy" or (one == 0).all()


@every_scorer
def test_vmap_equals_loop(name):
    pairs = data(3), data(4)
    want = jnp.stack([jitted(name)(*pair) for pair in pairs])
    batch = [np.stack(xs) for xs in zip(*pairs, strict=True)]
    got = jax.jit(jax.vmap(partial(FEATURE_SCORERS[name], num_classes=C)))(*batch)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["anova", "entropy"])
def test_eager_reads_the_classes(name):
    want = jitted(name)(*data(3))
    np.testing.assert_allclose(FEATURE_SCORERS[name](*data(3)), want, rtol=1e-4, atol=1e-6)


@every_scorer
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_input_is_computed_in_float32(name, dtype):
    x, y = data()
    arrays = traced.intermediates(
        partial(FEATURE_SCORERS[name], num_classes=C), jnp.asarray(x, dtype), y
    )
    assert arrays[-1].dtype == jnp.float32
    assert not any(array.dtype == dtype for array in arrays)


@pytest.mark.parametrize("name", ["correlation", "anova", "chi_squared"])
def test_gradients_are_finite(name):
    x, y = data()
    x[:, 0], x[:, 1] = 0.5, 0.0
    gradient = jax.jit(jax.grad(lambda x: FEATURE_SCORERS[name](x, y, num_classes=C).sum()))(x)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("scale", [1e-15, 1e15])
@pytest.mark.parametrize("name", ["mutual_information", "correlation", "anova", "chi_squared"])
def test_the_unit_of_a_feature_does_not_matter(name, scale):
    x, y = data()
    got = jitted(name)(x * np.float32(scale), y)
    np.testing.assert_allclose(got, jitted(name)(x, y), rtol=1e-3, atol=1e-4)


def test_extremes():
    y = np.arange(90) % 3
    told = np.stack([y, y == 2], axis=1).astype(np.float32)
    for name in ("mutual_information", "anova", "correlation"):
        assert jitted(name)(told, y)[0] == pytest.approx(1, abs=1e-5), name
    assert jitted("chi_squared")(told, y)[1] == pytest.approx(1, abs=1e-5)
    even = np.arange(160, dtype=np.float32)[:, None]
    assert jitted("entropy")(even, np.zeros(160, int))[0] == pytest.approx(1, abs=1e-5)


def test_feature_importance_is_the_weighted_association():
    x, y = data()
    a = importance.feature_association(x, y, relevance="correlation", num_classes=C)
    columns = [FEATURE_SCORERS[n](x, y) for n in ("correlation", "anova", "entropy")]
    np.testing.assert_allclose(a, jnp.stack(columns, axis=1), rtol=1e-4, atol=1e-6)
    weights = jnp.array([0.5, 0.3, 0.2])
    score = partial(importance.feature_importance, relevance="correlation", num_classes=C)
    w = jax.jit(score)(x, y, weights)
    np.testing.assert_allclose(w, a @ weights, rtol=1e-4)
    default = importance.feature_importance(x, y)
    assert ((default >= 0) & (default <= 1)).all()


def test_a_feature_that_tells_the_class_weighs_more():
    x, y = data()
    x[:, 2] = y + x[:, 0] / 100
    score = partial(importance.feature_importance, num_classes=C)
    assert jax.jit(score)(x, y, jnp.array([0.5, 0.5, 0.0])).argmax() == 2


def counts(seed=0):
    x = np.random.default_rng(seed).poisson(0.7, size=(20, 9))
    x[3], x[:, 4] = 0, 0
    return x


@pytest.mark.parametrize("dtype", [np.int32, np.float16, np.float32])
def test_tfidf_matches_scikit_learn(dtype):
    x = counts().astype(dtype)
    want = TfidfTransformer().fit_transform(counts()).toarray()
    np.testing.assert_allclose(jax.jit(importance.tfidf)(x), want, rtol=1e-5, atol=1e-7)


def test_float32_with_64_bits_enabled():
    with jax.enable_x64(True):
        assert jax.eval_shape(importance.tfidf, jnp.asarray(counts())).dtype == jnp.float32
        for scorer in FEATURE_SCORERS.values():
            assert jax.eval_shape(partial(scorer, num_classes=C), *data()).dtype == jnp.float32


def test_tfidf_gradient_is_finite():
    x = counts().astype(np.float32)
    assert jnp.isfinite(jax.jit(jax.grad(lambda x: importance.tfidf(x)[:, :3].sum()))(x)).all()


X, Y = data()
BAD = {
    "x is a vector": (importance.anova, (X[0], Y), {}, r"x must have shape \[B, N\].*\(6,\)"),
    "y is too short": (importance.anova, (X, Y[:7]), {}, "y has 7 entries.*x has 120"),
    "nothing": (importance.entropy, (X[:0], Y[:0]), {}, "x is empty"),
    "NaN": (importance.correlation, (X * np.nan, Y), {}, r"x\[\(0, 0\)\] is nan"),
    "label too large": (importance.anova, (X, Y), {"num_classes": 2}, r"y\[\d+\] is 2"),
    "negative label": (importance.anova, (X, Y - 5), {}, r"y\[\d+\] is -5|y\[\d+\] is -"),
    "labels not whole": (importance.anova, (X, Y * 0.5), {}, "y has dtype float64.*integers"),
    "no classes": (importance.anova, (X, Y), {"num_classes": 0}, "num_classes is 0"),
    "one bin": (importance.entropy, (X, Y), {"bins": 1}, "bins is 1"),
    "no bins": (importance.mutual_information, (X, Y), {"bins": 0}, "bins is 0"),
    "chi-squared of less than nothing": (importance.chi_squared, (-X, Y), {}, r"x\[.*is -"),
    "two weights": (importance.feature_importance, (X, Y, (1, 2)), {}, "weights has 2 .*give 3"),
    "weights beyond float32": (
        importance.feature_importance,
        (X, Y, (3e38, 3e38, 0)),
        {},
        "the sum of weights is inf: it must be finite",
    ),
    "negative weight": (
        importance.feature_importance,
        (X, Y, (1, 2, -3)),
        {},
        r"weights\[2\] is -3",
    ),
    "unknown": (
        importance.feature_importance,
        (X, Y),
        {"relevance": "f"},
        "relevance is 'f'.*anova",
    ),
    "negative counts": (importance.tfidf, (-counts(),), {}, r"counts\[.*is -"),
    "counts of one document": (
        importance.tfidf,
        (counts()[0],),
        {},
        r"counts must .*\[B, N\]",
    ),
}


@pytest.mark.parametrize(("function", "args", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(function, args, options, message):
    with pytest.raises(ValueError, match=message):
        function(*args, **options)


def test_classes_must_be_given_under_jit():
    with pytest.raises(ValueError, match="num_classes is None but y is traced"):
        jax.jit(importance.anova)(X, Y)


def test_timestamps_differ_although_float32_cannot_tell():
    y = (np.arange(100) >= 50).astype(int)
    for x in (1.7e9 + np.arange(100), 17 * 10**17 + np.arange(100), 1e300 * np.arange(100)):
        want = abs(np.corrcoef(np.arange(100), y)[0, 1])
        np.testing.assert_allclose(importance.correlation(x[:, None], y), [want], rtol=1e-5)
        plain = importance.feature_association(np.arange(100.0)[:, None], y)
        np.testing.assert_allclose(importance.feature_association(x[:, None], y), plain, rtol=1e-5)
