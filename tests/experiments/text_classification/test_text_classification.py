"""Text classification: real texts, budgets met exactly, texts that do not see each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import sparse

from experiments.models.packed_encoder import pack
from experiments.text_classification import data, experiment, features, search, tokens, transformer
from experiments.text_classification.__main__ import main
from experiments.text_classification.tokens import BUDGETS, Kept, Worth
from experiments.text_classification.transformer import Classifier, Config, Regularisation
from jbalance import importance

CONFIG = Config(vocabulary=50, width=16, heads=2, hidden=16)


@functools.cache
def tweets():
    return data.split(data.read("tweets"))


@functools.cache
def some_ids():
    tokenizer = tokens.train_tokenizer(tweets().train.texts[:300])
    ids = tokens.encode(tokenizer, tweets().train.texts[:300])
    return tokenizer, ids, tweets().train.positive[:300]


def test_the_baseline_is_datas():
    """TF-IDF of words and pairs, logistic regression: 0.852 of the tweets."""
    assert features.logistic_regression(tweets()) > 0.852 - 0.02


def test_parts_are_disjoint_and_as_positive_as_all():
    parts = tweets()
    sides = [set(part.texts) for part in parts]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]
    shares = [part.positive.mean() for part in parts]
    np.testing.assert_allclose(shares, shares[0], atol=0.01)


def test_an_unknown_source_is_an_error():
    with pytest.raises(ValueError, match="source is 'news': it must be one of film, product"):
        data.read("news")


@pytest.mark.parametrize("name", list(BUDGETS))
def test_every_budget_keeps_as_many_tokens(name):
    _, ids, positive = some_ids()
    worth = Worth.of(ids, positive, tokens.VOCABULARY)
    total = sum(len(x) for x in ids)
    part = experiment.part_of(name)
    kept = tokens.budgeted(ids, worth, name, part)
    assert sum(len(x.ids) for x in kept) == int(part * total)
    assert all(len(x.ids) for x in kept)
    for own, text in zip(kept, ids, strict=True):
        np.testing.assert_array_equal(own.ids, text[own.position])


def test_the_ladder_keeps_what_is_worth_most():
    _, ids, positive = some_ids()
    worth = Worth.of(ids, positive, tokens.VOCABULARY)
    scored = worth.of_tokens(ids)
    total = sum(len(x) for x in ids) // 2
    kept = {
        name: sum(
            float(s[m].sum()) for s, m in zip(scored, BUDGETS[name](scored, total), strict=True)
        )
        for name in ("uniform", "proportional", "ladder")
    }
    assert kept["ladder"] > kept["proportional"] > kept["uniform"]


def test_token_scores_are_the_librarys_tfidf_times_importance():
    _, ids, positive = some_ids()
    ids = ids[:40]
    worth = Worth.of(ids, positive[:40], tokens.VOCABULARY)
    counts = tokens.counts(ids, tokens.VOCABULARY).toarray()
    tfidf = np.asarray(importance.tfidf(counts))
    found = importance.feature_association(tfidf, positive[:40], num_classes=2)
    w = importance.combine(found.T, jnp.array(features.WEIGHTS), normalize="max")
    np.testing.assert_allclose(worth.w, w, atol=2e-5)
    for row, (text, scored) in enumerate(zip(ids, worth.of_tokens(ids), strict=True)):
        want = worth.w[text] * tfidf[row, text] / np.bincount(text)[text]  # shared by repetitions
        np.testing.assert_allclose(scored, want, rtol=1e-4)


def test_augmentation_is_other_subwords_of_the_same_text():
    tokenizer, ids, _ = some_ids()
    other = tokens.encode(tokens.with_dropout(tokenizer, 0.5), tweets().train.texts[:300])
    assert sum(len(x) for x in other) > 1.1 * sum(len(x) for x in ids)
    assert max(x.max() for x in other) < tokens.VOCABULARY


def packed(texts, size=128, number=4, positive=None):
    kept = [Kept(np.asarray(text, np.int32), np.arange(len(text)))._asdict() for text in texts]
    labels = np.arange(len(texts)) % 2 if positive is None else positive
    return pack(kept, labels, size, number)


def test_texts_do_not_see_each_other():
    _, parameters = nnx.split(Classifier(CONFIG, nnx.Rngs(0)))
    step = transformer.make_step(CONFIG, Regularisation(), 10, 1e-2)
    a, b = [3, 4, 5, 6], [7, 8, 9, 10, 11]
    alone = step.logits(parameters, packed([a]))[0]
    beside = step.logits(parameters, packed([b, a, b]))[1]
    np.testing.assert_allclose(beside, alone, rtol=1e-5)


def test_training_lowers_the_loss_in_one_program():
    step = transformer.make_step(CONFIG, experiment.REGULARISED["all"], 30, 1e-2)
    _, parameters = nnx.split(Classifier(CONFIG, nnx.Rngs(0)))
    batch, state, losses = packed([[1, 2, 3], [4, 5, 6], [1, 3], [5, 4]]), step.init(parameters), []
    for i in range(30):
        parameters, state, loss = step.train(parameters, state, batch, jax.random.key(i))
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert len(step.traces) == 1
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(parameters))


def test_attention_over_features_learns_and_uniform_is_one():
    rng = np.random.default_rng(0)
    x = rng.random((256, 12)) * (rng.random((256, 12)) < 0.5)
    positive = (x[:, 0] > 0).astype(np.int32)
    w = features.scores(sparse.csr_matrix(x), positive)
    assert w.argmax() == 0
    np.testing.assert_allclose(features.attention(w, "uniform", 1.0), 1.0, rtol=1e-6)
    soft = features.attention(w, "softmax", 0.1)
    np.testing.assert_allclose(soft.sum(), 12, rtol=1e-5)
    assert soft.argmax() == 0
    rows = features.rows_of(sparse.csr_matrix(x))
    fitted = features.fit(rows, positive, soft, features.Settings(0.05, 0.0, 0.3, 0.1, 30), 0)
    assert features.hits(fitted, rows, positive).mean() > 0.95


def test_an_unknown_rule_is_an_error():
    with pytest.raises(ValueError, match="rule is 'hard'"):
        features.attention(np.ones(3), "hard", 1.0)


def test_a_search_needs_a_trial():
    with pytest.raises(ValueError, match="trials is 0: at least 1"):
        search.search("softmax", ["tweets"], 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arms", "nothing"], "--arms is 'nothing'"),
        (["regularise", "--seeds", "x"], "--seeds is 'x'"),
    ],
)
def test_a_bad_option_is_one_line(options, message, capsys):
    assert main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_lexicon_as_prior_moves_worth_towards_its_words():
    tokenizer, ids, positive = some_ids()
    worth = Worth.of(ids, positive, tokens.VOCABULARY)
    own = np.asarray(worth.w, float)
    prior = np.full(own.size, 0.5)
    lexicon = {"good": 1.9, "love": 3.2, "bad": -2.5, "the": 0.1}
    for word, valence in lexicon.items():
        prior[tokenizer.token_to_id(tokens.WORD_START + word)] = max(abs(valence), 0.5)
    found = worth.with_prior(tokenizer, lexicon, 0.5).w
    pooled = np.sqrt(own * prior)  # the geometric mean, METHOD section 4
    np.testing.assert_allclose(found, pooled * own.sum() / pooled.sum(), rtol=1e-4)
