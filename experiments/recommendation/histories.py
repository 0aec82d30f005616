"""What a remembered film is worth, and which films of all histories a budget remembers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.harness import budgets
from experiments.recommendation.data import Ratings

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


def uniform(scored: Sequence[np.ndarray], total: int) -> list[np.ndarray]:
    """The same part of every history, its latest films."""
    lengths = np.array([len(x) for x in scored])
    amount = budgets.whole(lengths, total, lengths)
    return [np.arange(n)[::-1] < a for n, a in zip(lengths, amount, strict=True)]


ARMS: dict[str, budgets.Budget] = {
    "full": budgets.full,
    "uniform": uniform,
    "proportional": budgets.proportional,
    "ladder": budgets.ladder,
}


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
