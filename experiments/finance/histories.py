"""A year of days at three resolutions, what each is worth, and which of them a budget remembers.

A month of 21 days is remembered as nothing, by one mean, by four means of about a week, or day by day:
levels of 0, 1, 4 and 21 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from experiments.finance.data import YEAR, Market
from jbalance import allocate, importance, shares

MONTH = 21
MONTHS = YEAR // MONTH
WEEKS = ((0, 6), (6, 11), (11, 16), (16, 21))  # days of a month, the latest last
COSTS = (0, 1, len(WEEKS), MONTH)
_SPANS: tuple[list[tuple[int, int]], ...] = (
    [],
    [(0, MONTH)],
    list(WEEKS),
    [(i, i + 1) for i in range(MONTH)],
)


class Worth(NamedTuple):
    """What days say of the forecast, learned from the training part.

    Attributes:
      w: [YEAR] importance of a day by how long ago, the latest last: how well it alone forecasts.
      mean: what a day is taken for that is not remembered.
    """

    w: np.ndarray
    mean: float

    @classmethod
    def of(cls, market: Market) -> Worth:
        days = market.days(test=False)
        history = of_days(market, days)
        # Terciles of what comes: the scorers of METHOD section 1 ask for classes.
        levels = np.quantile(market.y[days], (1 / 3, 2 / 3))
        classes = np.digitize(market.y[days], levels).astype(np.int32)
        w = importance.correlation(history.astype(np.float32), classes, num_classes=3)
        return cls(np.asarray(w, float), float(history.mean()))


def of_days(market: Market, days: np.ndarray) -> np.ndarray:
    """[days, YEAR] the year up to each of the days, the latest last."""
    return sliding_window_view(market.x, YEAR)[days - YEAR + 1]


def values(history: np.ndarray, worth: Worth) -> np.ndarray:
    """[days, MONTHS, levels] weighted squares of a month that are no longer guessed."""
    months = history.reshape(-1, MONTHS, MONTH)
    w = worth.w.reshape(MONTHS, MONTH)
    lost = []
    for spans in _SPANS:
        shown = np.full_like(months, worth.mean)
        for start, end in spans:
            shown[..., start:end] = months[..., start:end].mean(axis=-1, keepdims=True)
        lost.append((w * (months - shown) ** 2).sum(-1))
    # A coarser mean can by chance lie farther off than the long mean: it then tells nothing.
    error = np.minimum.accumulate(np.stack(lost, axis=-1), axis=-1)
    return error[..., :1] - error


def tokens_of(history: np.ndarray, level: np.ndarray) -> dict[str, np.ndarray]:
    """[YEAR] and [MONTHS] -> what is remembered: values, spans in days, and days ago (of the middle)."""
    value, span, ago = [], [], []
    for month, chosen in enumerate(level):
        for start, end in _SPANS[chosen]:
            first, last = month * MONTH + start, month * MONTH + end
            value.append(history[first:last].mean())
            span.append(last - first)
            ago.append(YEAR - (first + last) / 2)
    return _token_arrays(value, span, ago)


def _days_of(history: np.ndarray, kept: np.ndarray) -> dict[str, np.ndarray]:
    """[YEAR] and a mask -> the days that are remembered one by one."""
    at = np.flatnonzero(kept)
    return _token_arrays(history[at], np.ones(len(at)), YEAR - at - 0.5)


def _token_arrays(*columns: Any) -> dict[str, np.ndarray]:
    names = ("value", "span", "ago")
    return {n: np.asarray(c, np.float32) for n, c in zip(names, columns, strict=True)}


# An arm: histories [days, YEAR], worth, tokens of all of them together -> the tokens of each.
Arm = Callable[[np.ndarray, Worth, int], list[dict[str, np.ndarray]]]


def full(history: np.ndarray, worth: Worth, total: int) -> list[dict[str, np.ndarray]]:
    """Every day."""
    del worth, total
    return [_days_of(x, np.ones(YEAR, bool)) for x in history]


def uniform(history: np.ndarray, worth: Worth, total: int) -> list[dict[str, np.ndarray]]:
    """Every second day, or every fourth, the latest among them."""
    del worth
    each = total // len(history)
    kept = np.zeros(YEAR, bool)
    kept[YEAR - 1 - np.arange(each) * YEAR // each] = True
    return [_days_of(x, kept) for x in history]


def latest(history: np.ndarray, worth: Worth, total: int) -> list[dict[str, np.ndarray]]:
    """The latest days of each history."""
    del worth
    kept = np.arange(YEAR) >= YEAR - total // len(history)
    return [_days_of(x, kept) for x in history]


def proportional(history: np.ndarray, worth: Worth, total: int) -> list[dict[str, np.ndarray]]:
    """Each month's share is that of its importance, alpha = w / sum w; in it the best days."""
    scored = worth.w * (history - worth.mean) ** 2
    of_months = scored.reshape(len(history), MONTHS, MONTH)
    alpha = shares.proportional(of_months.sum(-1).reshape(-1).astype(np.float32))
    amount = np.asarray(allocate.whole(alpha, total, 0, MONTH).amount)
    rank = np.argsort(np.argsort(-of_months, axis=-1, kind="stable"), axis=-1)
    kept = (rank < amount.reshape(len(history), MONTHS, 1)).reshape(len(history), YEAR)
    return [_days_of(x, mask) for x, mask in zip(history, kept, strict=True)]


def ladder(history: np.ndarray, worth: Worth, total: int) -> list[dict[str, np.ndarray]]:
    """One price for the levels of all months; the latest has four means at least."""
    steps = values(history, worth).astype(np.float32).reshape(-1, len(COSTS))
    costs = np.tile(np.asarray(COSTS, np.int32), (len(steps), 1))
    last = np.arange(MONTHS - 1, len(steps), MONTHS)
    # What every history keeps is paid for before: its last month begins at the weekly means.
    least = COSTS.index(len(WEEKS))
    steps[last, :least] = steps[last, least : least + 1]
    costs[last] = [0, 1, 2, MONTH - len(WEEKS)]
    budget = total - len(WEEKS) * len(history)
    out = allocate.ladder(jnp.asarray(steps), jnp.asarray(costs), jnp.asarray(budget))
    level = np.array(out.level)
    level[last] = np.maximum(level[last], least)
    return [tokens_of(x, own) for x, own in zip(history, level.reshape(-1, MONTHS), strict=True)]


ARMS: dict[str, Arm] = {
    "full": full,
    "uniform": uniform,
    "latest": latest,
    "proportional": proportional,
    "ladder": ladder,
}
