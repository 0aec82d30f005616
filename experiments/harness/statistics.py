"""Statistics of few runs: means, and intervals of differences between paired runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean and half of its two-sided interval."""

    mean: float
    half: float

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half


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
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: it must be in (0, 1)")
    apart = np.asarray(ours, float) - np.asarray(theirs, float)
    error = apart.std(ddof=1) / np.sqrt(apart.size)
    quantile = stats.t.ppf((1 + confidence) / 2, apart.size - 1)
    return Interval(float(apart.mean()), float(quantile * error))
