"""TF-IDF features, their scores, and attention over them: evaluate, adjust, weighted sum, classify."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from experiments.text_classification.data import Part, Split
from jbalance import checks, importance, shares

# Of relevance, discrimination and complexity. With any weight on the third, tokens that are kept by it
# say less of the class (validation texts).
WEIGHTS = (0.5, 0.5, 0.0)
_CHUNK = 1024  # features that are scored together
WIDTH = 16  # of a feature's vector
BATCH = 128


class Settings(NamedTuple):
    """What a search may choose."""

    rate: float
    weight_decay: float
    dropout: float  # of features
    temperature: float  # of the softmax
    epochs: int


def vectoriser() -> TfidfVectorizer:
    """Words and pairs of neighbours that two texts share."""
    return TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)


def logistic_regression(split: Split) -> float:
    """The baseline's accuracy: scikit-learn on the same features, with the usual weak penalty."""
    vectors = vectoriser()
    known = [*split.train.texts, *split.validation.texts]
    labels = np.concatenate([split.train.positive, split.validation.positive])
    model = LogisticRegression(C=10, max_iter=1000).fit(vectors.fit_transform(known), labels)
    return float(model.score(vectors.transform(split.test.texts), split.test.positive))


def scores(x: sparse.spmatrix, positive: np.ndarray) -> np.ndarray:
    """w [N] of the columns, in 0..1: relevance, discrimination and complexity, each by its largest.

    What a word says of the class is a few hundredths of what it could, its entropy up to 0.6: without a
    common scale the most frequent words would be the most important ones.
    """
    x, number = x.tocsc(), x.shape[1]
    scored = []
    for start in range(0, number, _CHUNK):
        columns = np.zeros((x.shape[0], _CHUNK), np.float32)  # one shape, one program
        part = x[:, start : start + _CHUNK].toarray()
        columns[:, : part.shape[1]] = part
        scored.append(np.asarray(_association(columns, positive)))
    association = np.concatenate(scored)[:number]
    return np.asarray(importance.combine(association.T, jnp.array(WEIGHTS), normalize="max"))


_association = jax.jit(functools.partial(importance.feature_association, num_classes=2))


def attention(w: np.ndarray, rule: str, temperature: float) -> Array:
    """a [N] by a name in `shares.SHARE_RULES`, times N: one for each feature where it is uniform.

    Raises:
      ValueError: an unknown rule.
    """
    share = checks.choice("rule", rule, shares.SHARE_RULES)
    if rule == "softmax":
        return shares.softmax(jnp.asarray(w), temperature) * w.size
    return share(jnp.asarray(w)) * w.size


class Rows(NamedTuple):
    """Features of texts, in lists of equal length."""

    at: Any  # [B, L] int32 columns; N for none
    x: Any  # [B, L] float32


def rows_of(x: sparse.spmatrix) -> Rows:
    """The non-zero entries of each row."""
    x = x.tocsr()
    lengths = np.diff(x.indptr)
    there = np.arange(max(lengths.max(), 1)) < lengths[:, None]
    at, value = np.full(there.shape, x.shape[1], np.int32), np.zeros(there.shape, np.float32)
    at[there], value[there] = x.indices, x.data
    return Rows(at, value)


def logits(parameters: Any, weight: Array, at: Array, x: Array) -> Array:
    """y = sum_i a_i x_i v_i over a text's features, then a linear classifier: [B]."""
    vectors = parameters["vectors"].at[at].get(mode="fill", fill_value=0)
    a = weight.at[at].get(mode="fill", fill_value=0)
    y = jnp.einsum("bl,blw->bw", a * x, vectors)
    return jax.nn.relu(y + parameters["shift"]) @ parameters["out"] + parameters["bias"]


def _optimiser(settings: Settings) -> optax.GradientTransformation:
    return optax.adamw(settings.rate, weight_decay=settings.weight_decay)


@functools.partial(jax.jit, static_argnums=0)
def _epoch(
    settings: Settings, carry: Any, weight: Array, batches: tuple[Array, Array, Array], key: Array
) -> Any:
    """One pass over batches [steps, B, ...]."""
    optimiser = _optimiser(settings)

    def step(carry: Any, batch: tuple[Array, ...]) -> Any:
        (parameters, state), (at, x, y, key) = carry, batch
        kept = jax.random.bernoulli(key, 1 - settings.dropout, x.shape)
        x = jnp.where(kept, x / (1 - settings.dropout), 0)

        def loss(p: Any) -> Array:
            return jnp.mean(optax.sigmoid_binary_cross_entropy(logits(p, weight, at, x), y))

        value, gradient = jax.value_and_grad(loss)(parameters)
        updates, state = optimiser.update(gradient, state, parameters)
        return (optax.apply_updates(parameters, updates), state), value

    keys = jax.random.split(key, batches[0].shape[0])
    return jax.lax.scan(step, carry, (*batches, keys))


class Fit(NamedTuple):
    """What training ended with."""

    parameters: Any
    weight: Array
    losses: list[float]


def fit(x: Rows, positive: np.ndarray, weight: Array, settings: Settings, seed: int) -> Fit:
    """Trained on all rows."""
    rng, size = np.random.default_rng(seed), weight.size
    start = {
        "vectors": jnp.asarray(rng.normal(0, 0.1, (size, WIDTH)), jnp.float32),
        "shift": jnp.zeros(WIDTH),
        "out": jnp.asarray(rng.normal(0, WIDTH**-0.5, WIDTH), jnp.float32),
        "bias": jnp.zeros(()),
    }
    carry = start, _optimiser(settings).init(start)
    steps, losses = len(positive) // BATCH, []
    for epoch in range(settings.epochs):
        order = rng.permutation(len(positive))[: steps * BATCH].reshape(steps, BATCH)
        batches = x.at[order], x.x[order], positive[order].astype(np.float32)
        key = jax.random.key(1000 * seed + epoch)
        carry, values = _epoch(settings, carry, weight, batches, key)
        losses.append(float(values.mean()))
    return Fit(carry[0], weight, losses)


def hits(fitted: Fit, x: Rows, positive: np.ndarray) -> np.ndarray:
    """[texts] bool, whether the classifier tells each right."""
    return np.asarray(logits(fitted.parameters, fitted.weight, x.at, x.x) > 0) == positive


class Scored(NamedTuple):
    """Features of a split, and their scores by its training part."""

    w: np.ndarray  # [N]
    train: Rows
    validation: Rows
    test: Rows


def scored(split: Split) -> Scored:
    """Vectors, and importance of the features, from the training part alone."""
    vectors = vectoriser()
    train = vectors.fit_transform(split.train.texts)
    held: list[Part] = [split.validation, split.test]
    w = scores(train, split.train.positive)
    return Scored(w, rows_of(train), *(rows_of(vectors.transform(p.texts)) for p in held))
