"""Recommendation: what budgets remember, and figures by brute force."""

import numpy as np
import pytest

from experiments.recommendation import experiment, histories
from experiments.recommendation.data import Ratings
from experiments.recommendation.histories import Worth

FILMS = 40


def some():
    rng = np.random.default_rng(0)
    items = [rng.permutation(FILMS)[: rng.integers(8, 30)].astype(np.int32) for _ in range(12)]
    stars = [rng.integers(1, 6, len(x)).astype(np.int32) for x in items]
    genres = rng.random((FILMS, 5)) < 0.4
    genres[:, 0] |= ~genres.any(axis=1)
    return Ratings(items, stars, np.arange(12) % 2 == 0, genres)


@pytest.mark.parametrize("part", [0.5, 0.25])
@pytest.mark.parametrize("arm", list(histories.ARMS))
def test_a_budget_is_spent_and_every_person_has_a_film(arm, part):
    ratings = some()
    worth = Worth.of(ratings)
    kept = histories.budgeted(ratings.items, ratings.stars, worth, arm, part)
    every = sum(map(len, ratings.items))
    total = sum(len(x["item"]) for x in kept)
    assert total == (every if arm == "full" else int(part * every))
    assert min(len(x["item"]) for x in kept) >= 1
    for own, x in zip(ratings.items, kept, strict=True):
        places = [list(own).index(item) for item in x["item"]]
        assert places == sorted(places)
        np.testing.assert_array_equal(x["age"], histories.age_of(len(own))[places])


def test_the_ladder_takes_what_adds_most():
    """No film that is kept adds less than one that is not, beside each history's best."""
    ratings = some()
    worth = Worth.of(ratings)
    scored = [worth.of_films(i, s) for i, s in zip(ratings.items, ratings.stars, strict=True)]
    kept = histories.ARMS["ladder"](scored, 100)
    adds = []
    for x in scored:
        order = sorted(range(len(x)), key=lambda i, x=x: -x[i])
        adds.append({i: x[i] / (rank + 1) for rank, i in enumerate(order) if rank})
    taken = [a[i] for a, m in zip(adds, kept, strict=True) for i in a if m[i]]
    left = [a[i] for a, m in zip(adds, kept, strict=True) for i in a if not m[i]]
    assert min(taken) >= max(left) * (1 - 1e-6)


def test_figures_by_brute_force():
    ratings = some()
    known = ratings.before(1)
    material = experiment.Material(ratings, known, Worth.of(known))
    rng = np.random.default_rng(1)
    logits, last = rng.random((12, FILMS)), np.array([x[-1] for x in ratings.items])
    found = experiment.measure(material, logits.copy(), last, [1] * 12, 0.0)["figures"]
    gains, hits, shown, unlike = [], [], set(), []
    for user in range(12):
        ranked = sorted(set(range(FILMS)) - set(known.items[user].tolist()),
                        key=lambda film, user=user: -logits[user, film])[:10]  # fmt: skip
        hits.append(last[user] in ranked)
        gains.append(1 / np.log2(ranked.index(last[user]) + 2) if hits[-1] else 0.0)
        shown |= set(ranked)
        own = ratings.genres.astype(float)
        unlike += [
            1 - own[a] @ own[b] / np.linalg.norm(own[a]) / np.linalg.norm(own[b])
            for a in ranked for b in ranked if a != b
        ]  # fmt: skip
    assert found["NDCG@10"] == pytest.approx(np.mean(gains))
    assert found["recall@10"] == pytest.approx(np.mean(hits))
    assert found["coverage"] == len(shown) / FILMS
    assert found["diversity"] == pytest.approx(np.mean(unlike))
    women = np.array(hits)[ratings.woman]
    men = np.array(hits)[~ratings.woman]
    assert found["women's gap in recall"] == pytest.approx(men.mean() - women.mean(), abs=1e-6)
