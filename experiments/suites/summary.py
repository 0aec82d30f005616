"""What the rows say: retained fractions with intervals, likelihoods, and distances over prose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.harness import runs
from experiments.harness.statistics import Range, paired_bootstrap
from experiments.suites import prose
from experiments.suites.run import FULL, Row

OUTSIDE = 0.05  # of an interval


class Retained(NamedTuple):
    """Of the strings that the full cache's answers hold, those that a smaller one's hold too."""

    contexts: int  # in which the full cache finds any
    strings: int
    part: Range | None  # None of fewer than two contexts


def screened(cases: Sequence[Row]) -> float:
    """The full cache's score: the part of all reference strings that its answers hold."""
    found, strings = (sum(case[FULL][x] for case in cases) for x in ("found", "strings"))
    return found / strings


def retained(cases: Sequence[Row], arm: str) -> Retained:
    """With an interval over whole contexts, of 95 %.

    It is the wider one of the percentile bootstrap's, which sees no spread in few contexts that are
    alike, and of Clopper's and Pearson's (1934) for as many trials as there are contexts, as if each
    kept all of its strings or none.
    """
    pairs = [(case[arm]["kept"], case[FULL]["found"]) for case in cases if case[FULL]["found"]]
    if len(pairs) < 2:
        return Retained(len(pairs), sum(found for _, found in pairs), None)
    kept, found = np.array(pairs, float).T
    part = paired_bootstrap(kept, np.zeros(len(kept)), found, confidence=1 - OUTSIDE)
    number, hits = len(kept), part.mean * len(kept)
    low = stats.beta.ppf(OUTSIDE / 2, hits, number - hits + 1) if hits else 0.0
    high = stats.beta.ppf(1 - OUTSIDE / 2, hits + 1, number - hits) if hits < number else 1.0
    part = Range(part.mean, min(part.low, float(low)), max(part.high, float(high)))
    return Retained(number, int(found.sum()), part)


class Likelihood(NamedTuple):
    """Of the right answers' tokens, whether the model would have given them or not."""

    less: float  # nats a token that a smaller cache loses
    agreement: float  # how often both have the same most likely token in the answer's place


def likelihood(cases: Sequence[Row], arm: str) -> Likelihood:
    """Over all tokens of all answers."""
    tokens = sum(case[FULL]["tokens"] for case in cases)
    lost = sum(case[FULL]["log_likelihood"] - case[arm]["log_likelihood"] for case in cases)
    return Likelihood(lost / tokens, sum(case[arm]["agreed"] for case in cases) / tokens)


def over_prose(cases: Sequence[Row], arm: str) -> dict[str, float]:
    """KL by mean and percentiles, and top-1 agreement, over all predicted tokens."""
    kl = np.concatenate([runs.unpacked(arm, case[arm]["kl"]) for case in cases]).astype(float)
    found = {"mean": float(kl.mean())}
    found |= {name: float(np.percentile(kl, q)) for name, q in prose.PERCENTILES.items()}
    agreed = sum(case[arm]["agreed"] for case in cases)
    return found | {"top-1": agreed / kl.size, "tokens": kl.size}
