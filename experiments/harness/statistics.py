"""Statistics of few runs: means, and intervals of differences between paired runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


class Interval(NamedTuple):
    """A mean and half of its two-sided interval."""

    mean: float
    half: float

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Of the mean of a sample, by Student's t.

    Raises:
      ValueError: fewer than two values, or a confidence outside its range.
    """
    return paired_interval(values, [0.0] * len(values), confidence)


def paired_interval(
    ours: Sequence[float], theirs: Sequence[float], confidence: float = 0.95
) -> Interval:
    """Of the differences ours - theirs of runs that share seeds, by Student's t.

    Args:
      ours, theirs: one figure for each seed, in the same order.
      confidence: in (0, 1).

    Raises:
      ValueError: different numbers of runs, fewer than two, or a confidence outside its range.
    """
    if len(ours) != len(theirs) or len(ours) < 2:
        raise ValueError(
            f"ours and theirs have {len(ours)} and {len(theirs)} runs: give the same number, 2 or more"
        )
    _check_confidence(confidence)
    apart = np.asarray(ours, float) - np.asarray(theirs, float)
    error = apart.std(ddof=1) / np.sqrt(apart.size)
    quantile = stats.t.ppf((1 + confidence) / 2, apart.size - 1)
    return Interval(float(apart.mean()), float(quantile * error))


def crossed_interval(ours: ArrayLike, theirs: ArrayLike, confidence: float = 0.95) -> Interval:
    """Of the mean difference ours - theirs over seeds and held-out cases, both of them samples.

    The variance is the sum of that of the seeds' means and that of the cases' means, each over its own
    number, which counts what is left of both twice: it errs to the wide side (A. Owen, "The pigeonhole
    bootstrap", Annals of Applied Statistics 2007, section 3). Degrees of freedom by Satterthwaite.

    Args:
      ours, theirs: [S, N] a figure of each seed and case, whose mean over both is the result.
      confidence: in (0, 1).

    Raises:
      ValueError: different shapes, fewer than two seeds or cases, or a confidence outside its range.
    """
    one, other = np.asarray(ours, float), np.asarray(theirs, float)
    if one.ndim != 2 or one.shape != other.shape or min(one.shape) < 2:
        raise ValueError(
            f"ours and theirs have the shapes {one.shape} and {other.shape}: give [seeds, cases] of the "
            f"same runs, two of each or more"
        )
    _check_confidence(confidence)
    apart = one - other
    parts = [
        (np.var(means, ddof=1) / means.size, means.size - 1)
        for means in (apart.mean(axis=1), apart.mean(axis=0))
    ]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return Interval(float(apart.mean()), 0.0)
    freedom = variance**2 / sum(part**2 / count for part, count in parts)
    quantile = stats.t.ppf((1 + confidence) / 2, freedom)
    return Interval(float(apart.mean()), float(quantile * np.sqrt(variance)))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: it must be in (0, 1)")


class Range(NamedTuple):
    """A mean, and the ends of its two-sided interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    ours: Sequence[float] | np.ndarray,
    theirs: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray,
    *,
    confidence: float = 0.95,
    repeats: int = 5000,
) -> Range:
    """Of the difference of two rates over the same cases, by drawing the cases anew.

    A rate is the sum of its counts over the sum of the weights: word errors over words, say. The
    percentile bootstrap of Efron (1979), of pairs, with a fixed seed.

    Args:
      ours, theirs: counts of each case, in the same order.
      weights: of each case, > 0.
      confidence: in (0, 1).
      repeats: how often the cases are drawn.

    Raises:
      ValueError: different numbers of cases, fewer than two, a weight that is not above 0, or a
        confidence outside its range.
    """
    if not len(ours) == len(theirs) == len(weights) or len(ours) < 2:
        raise ValueError(
            f"ours, theirs and weights have {len(ours)}, {len(theirs)} and {len(weights)} cases: give "
            f"the same number, 2 or more"
        )
    _check_confidence(confidence)
    apart, size = np.asarray(ours, float) - np.asarray(theirs, float), np.asarray(weights, float)
    if not (size > 0).all():
        raise ValueError(f"weights holds {size.min()}: every one must be above 0")
    drawn = np.random.default_rng(0).integers(len(size), size=(repeats, len(size)))
    rates = apart[drawn].sum(axis=1) / size[drawn].sum(axis=1)
    low, high = np.quantile(rates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Range(float(apart.sum() / size.sum()), float(low), float(high))
