"""Which parts of texts or histories a budget keeps, of what each part is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from jbalance import allocate, shares

# An arm: what the parts of each text are worth, how many of all are kept -> which of each.
Budget = Callable[[Sequence[np.ndarray], int], list[np.ndarray]]


def full(scored: Sequence[np.ndarray], total: int) -> list[np.ndarray]:
    """Every part."""
    del total
    return [np.ones(len(x), bool) for x in scored]


def proportional(scored: Sequence[np.ndarray], total: int) -> list[np.ndarray]:
    """Each text's share is that of its scores, alpha = w / sum w; in it the best parts."""
    alpha = shares.proportional(np.array([x.sum() for x in scored], np.float32))
    amount = whole(np.asarray(alpha), total, np.array([len(x) for x in scored]))
    return [best(x, int(number)) for x, number in zip(scored, amount, strict=True)]


def best(scores: np.ndarray, number: int) -> np.ndarray:
    """[N] bool: the parts of the largest scores, the earlier of equal ones."""
    kept = np.zeros(len(scores), bool)
    kept[np.argsort(-scores, kind="stable")[:number]] = True
    return kept


def ladder(scored: Sequence[np.ndarray], total: int) -> list[np.ndarray]:
    """One price for the parts of all texts: a text's k-th best part adds its score over k.

    What reads a text is a mean of its parts, which one more of k moves by a k-th. The best part of each
    text stays.
    """
    ranks = [np.argsort(np.argsort(-x, kind="stable"), kind="stable") for x in scored]
    least = np.finfo(np.float32).tiny  # what says nothing is kept before there is nothing
    adds = [np.maximum(x / (rank + 1), least) for x, rank in zip(scored, ranks, strict=True)]
    first = np.concatenate(ranks) == 0
    # Room up to a power of two, so that one program serves texts of other lengths.
    steps = np.zeros((1 << (first.size - 1).bit_length(), 2), np.float32)
    steps[: first.size, 1] = np.where(first, 0, np.concatenate(adds))
    out = allocate.ladder(jnp.asarray(steps), jnp.array([0, 1]), jnp.asarray(total - len(scored)))
    kept = first | np.array(out.level == 1)[: first.size]
    return np.split(kept, np.cumsum([len(x) for x in scored])[:-1])


def whole(w: np.ndarray, total: int, cap: np.ndarray) -> np.ndarray:
    """Whole amounts, one for each text at least."""
    given = allocate.whole(jnp.asarray(w, jnp.float32), total, 1, jnp.asarray(cap, jnp.int32))
    return np.asarray(given.amount)
