"""What a remembered film is worth, and which films of all histories a budget remembers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.recommendation.data import Ratings
from jbalance import allocate, shares

MOST = 64  # films of a history; older ones are forgotten by every arm
AGES = 16  # of films by how long ago, each spanning 1.5 times as many as the one before
WEIGHTS = (0.6, 0.3, 0.1)  # of relevance by age, discrimination of the film, stars


def age_of(length: int) -> np.ndarray:
    """[length] class of age of each film of a history; 0 for the latest."""
    back = np.arange(length)[::-1]
    return np.minimum(np.log(back / 2 + 1) / np.log(1.5), AGES - 1).astype(np.int32)


class Worth(NamedTuple):
    """What films of a history say of the next one, learned from the training part.

    Attributes:
      by_age: [AGES] how much more often than by its popularity the next film was seen by those who saw a
        film of this age: relevance.
      by_film: [films] how far the films seen after it are from the popular ones, in nats, by what a
        small count says of it: discrimination.
    """

    by_age: np.ndarray
    by_film: np.ndarray

    @classmethod
    def of(cls, known: Ratings) -> Worth:
        number = known.num_items
        seen = np.zeros((len(known.items), number))
        for user, own in enumerate(known.items):
            seen[user, own] = 1
        popular = seen.mean(axis=0)
        together = seen.T @ seen / len(seen)
        lift = together / np.maximum(np.outer(popular, popular), 1e-12)
        total, count = np.zeros(AGES), np.zeros(AGES)
        for own in known.items:
            history, ages = own[:-1][-MOST:], age_of(len(own[:-1][-MOST:]))
            np.add.at(total, ages, np.log(np.maximum(lift[history, own[-1]], 0.5)))
            np.add.at(count, ages, 1)
        counts = popular * len(seen)
        given = together / np.maximum(popular, 1e-12)[:, None]
        given /= np.maximum(given.sum(axis=1, keepdims=True), 1e-12)
        base = popular / popular.sum()
        apart = np.sum(given * np.log(np.maximum(given, 1e-12) / np.maximum(base, 1e-12)), axis=1)
        trusted = counts / (counts + 10)
        by_age = np.maximum(total / np.maximum(count, 1), 0)
        return cls(by_age, np.maximum(apart, 0) * trusted)

    def of_films(self, items: np.ndarray, stars: np.ndarray) -> np.ndarray:
        """[n] w of each film of a history: METHOD section 1, w = sum of indicators by their weights."""
        indicators = np.stack([self.by_age[age_of(len(items))], self.by_film[items], stars / 5])
        tops = np.array([self.by_age.max(), self.by_film.max(), 1.0])
        return np.asarray(WEIGHTS) / tops @ indicators


def full(scored: Sequence[np.ndarray], total: int) -> list[np.ndarray]:
    """Every film."""
    del total
    return [np.ones(len(x), bool) for x in scored]


def uniform(scored: Sequence[np.ndarray], total: int) -> list[np.ndarray]:
    """The same part of every history, its latest films."""
    lengths = np.array([len(x) for x in scored])
    amount = _whole(lengths, total, lengths)
    return [np.arange(n)[::-1] < a for n, a in zip(lengths, amount, strict=True)]


def proportional(scored: Sequence[np.ndarray], total: int) -> list[np.ndarray]:
    """Each history's share is that of its films' worth, alpha = w / sum w; in it the best films."""
    alpha = shares.proportional(np.array([x.sum() for x in scored], np.float32))
    amount = _whole(np.asarray(alpha), total, np.array([len(x) for x in scored]))
    return [_best(x, a) for x, a in zip(scored, amount, strict=True)]


def ladder(scored: Sequence[np.ndarray], total: int) -> list[np.ndarray]:
    """One price for the films of all histories: a history's k-th best film adds its worth over k.

    What attention pools is a mean, and one more of k films moves it by a k-th. The best film of each
    history stays.
    """
    # Room for histories of any length, so that one program serves all: what is not there has no value.
    steps = np.zeros((len(scored) * MOST, 2), np.float32)
    ends = np.cumsum([len(x) for x in scored])
    for x, end in zip(scored, ends, strict=True):
        rank = np.argsort(np.argsort(-x, kind="stable"), kind="stable")
        steps[end - len(x) : end, 1] = np.where(rank > 0, x / (rank + 1), 0)
    out = allocate.ladder(jnp.asarray(steps), jnp.array([0, 1]), jnp.asarray(total - len(scored)))
    kept = np.split(np.array(out.level == 1)[: ends[-1]], ends[:-1])
    for mask, x in zip(kept, scored, strict=True):
        mask[np.argmax(x)] = True
    return kept


Arm = Callable[[Sequence[np.ndarray], int], list[np.ndarray]]
ARMS: dict[str, Arm] = {
    "full": full,
    "uniform": uniform,
    "proportional": proportional,
    "ladder": ladder,
}


def _best(x: np.ndarray, number: int) -> np.ndarray:
    mask = np.zeros(len(x), bool)
    mask[np.argsort(-x, kind="stable")[:number]] = True
    return mask


def _whole(w: np.ndarray, total: int, cap: np.ndarray) -> np.ndarray:
    """Whole amounts, one for each history at least."""
    given = allocate.whole(jnp.asarray(w, jnp.float32), total, 1, jnp.asarray(cap, jnp.int32))
    return np.asarray(given.amount)


def budgeted(
    items: Sequence[np.ndarray], stars: Sequence[np.ndarray], worth: Worth, arm: str, part: float
) -> list[dict[str, np.ndarray]]:
    """The films of each history that `part` of all of them pays for, oldest first."""
    items, stars = ([x[-MOST:] for x in side] for side in (items, stars))
    scored = [worth.of_films(i, s) for i, s in zip(items, stars, strict=True)]
    masks = ARMS[arm](scored, max(int(part * sum(map(len, items))), len(items)))
    return [
        {"item": i[m], "stars": s[m], "age": age_of(len(i))[m]}
        for i, s, m in zip(items, stars, masks, strict=True)
    ]
