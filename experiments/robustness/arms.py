"""Budgets over texts with floors of groups and caps of texts, and who is near the price."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.harness import budgets
from experiments.text_classification.data import SOURCES
from experiments.text_classification.tokens import uniform
from jbalance import shares

FLOOR = 0.95  # of a group's tokens as one of its size has them: its least part of the budget
CAP = 1.5  # times a text's even part of the budget: its most

Arm = Callable[[Sequence[np.ndarray], np.ndarray, int], list[np.ndarray]]
"""Worth of the tokens of each text, its group [B], tokens in all -> which are kept."""


def plain(budget: budgets.Budget) -> Arm:
    """A budget that asks for no groups."""
    return lambda scored, group, total: budget(scored, total)


def floored(budget: budgets.Budget) -> Arm:
    """A budget of each group's own: what it gets of a common one, lifted to its floor."""

    def arm(scored: Sequence[np.ndarray], group: np.ndarray, total: int) -> list[np.ndarray]:
        size = len(SOURCES)
        lengths = np.array([len(x) for x in scored])
        took = np.array([m.sum() for m in budget(scored, total)])
        got, whole = (np.bincount(group, x, size) for x in (took, lengths))
        alpha = shares.constrained(
            (got / got.sum()).astype(np.float32),
            floor=(FLOOR * whole / whole.sum()).astype(np.float32),
        )
        amount = budgets.whole(np.asarray(alpha), total, whole.astype(int))
        kept: list[np.ndarray] = [np.zeros(0, bool)] * len(scored)
        for g in range(size):
            own = np.flatnonzero(group == g)
            masks = budget([scored[i] for i in own.tolist()], int(amount[g]))
            for i, mask in zip(own.tolist(), masks, strict=True):
                kept[i] = mask
        return kept

    return arm


def capped(budget: budgets.Budget) -> Arm:
    """A budget that is offered no more of a text than its cap, the best of it."""

    def arm(scored: Sequence[np.ndarray], group: np.ndarray, total: int) -> list[np.ndarray]:
        del group
        cap = max(1, int(CAP * total / len(scored)))
        offered = [np.sort(np.argsort(-x, kind="stable")[:cap]) for x in scored]
        masks = budget([x[at] for x, at in zip(scored, offered, strict=True)], total)
        kept = []
        for x, at, mask in zip(scored, offered, masks, strict=True):
            kept.append(np.isin(np.arange(len(x)), at[mask]))
        return kept

    return arm


ARMS: dict[str, Arm] = {
    "full": plain(budgets.full),
    "uniform": plain(uniform),
    "proportional": plain(budgets.proportional),
    "ladder": plain(budgets.ladder),
    "ladder with floors": floored(budgets.ladder),
    "ladder with a fair loss": plain(budgets.ladder),
    "proportional with caps": capped(budgets.proportional),
    "ladder with caps": capped(budgets.ladder),
}


class Near(NamedTuple):
    """Tokens near the price, kept or not."""

    text: np.ndarray  # [n] which text
    at: np.ndarray  # [n] which of its tokens
    margin: np.ndarray  # [n] log of what it adds over the price, the least first


def near_the_price(scored: Sequence[np.ndarray], kept: Sequence[np.ndarray], margin: float) -> Near:
    """Tokens that add at most so much more or less than the price of the ladder, in logs.

    A text's k-th best token adds its score over k (`budgets.ladder`); the best of each is no choice.
    """
    ranks = [np.argsort(np.argsort(-x, kind="stable"), kind="stable") for x in scored]
    adds = np.concatenate([x / (rank + 1) for x, rank in zip(scored, ranks, strict=True)])
    open_ = np.concatenate(ranks) > 0
    taken = np.concatenate(kept)
    price = adds[taken & open_].min()
    apart = np.log(np.maximum(adds, np.finfo(float).tiny) / price)
    text = np.repeat(np.arange(len(scored)), [len(x) for x in scored])
    at = np.concatenate([np.arange(len(x)) for x in scored])
    found = np.flatnonzero(open_ & (np.abs(apart) <= margin))
    found = found[np.argsort(np.abs(apart[found]), kind="stable")]
    return Near(text[found], at[found], apart[found])
