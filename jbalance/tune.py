"""Coordinate search of settings around training: train, validate, adjust, train again.

The last step of METHOD section 1's second source. It runs on the host: what is inside of `train` is
jitted, and settings are data there, so nothing compiles anew. For a search over many settings from
nothing, take a library for it; this follows one run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jbalance import checks

STEP = 1.5  # settings are multiplied or divided by it


class Trial(NamedTuple):
    """One round of `tune`."""

    settings: dict[str, float]
    loss: float
    kept: bool


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What `tune` found."""

    state: Any
    settings: dict[str, float]
    loss: float
    rounds: tuple[Trial, ...]


def tune(
    train: Callable[[Any, Mapping[str, float]], Any],
    validate: Callable[[Any, Mapping[str, float]], float],
    state: Any,
    settings: Mapping[str, float],
    ranges: Mapping[str, tuple[float, float]],
    *,
    max_rounds: int = 20,
    patience: int = 4,
) -> Tuned:
    """Train in rounds, adjusting one setting after the other by what validation says of it.

    Each round trains on from the best state with one setting larger or smaller by a factor of 1.5, at
    most to the end of its range. What validates better is kept and the same change is tried again when
    its turn comes; else the round is undone and that setting goes the other way next. Ends after
    `patience` rounds in a row that were not better.

    Args:
      train: (state, settings) -> state, of one round.
      validate: (state, settings) -> loss on data that `train` never sees.
      state: parameters, optimizer and what else a round changes; never changed in place.
      settings: to begin with, such as temperature, floor and budget.
      ranges: least and greatest value of each setting that may change; the others stay.
      max_rounds: at most.
      patience: rounds without improvement before it stops.

    Returns:
      The best state with its settings and loss, and every round.

    Raises:
      ValueError: a range without its setting, a setting outside its range, numbers below 1.
    """
    checks.positive("max_rounds", max_rounds)
    checks.positive("patience", patience)
    for name, (low, high) in ranges.items():
        if name not in settings:
            raise ValueError(f"ranges has {name!r}, settings has only {', '.join(settings)}")
        if not 0 < low <= settings[name] <= high:
            raise ValueError(
                f"settings[{name!r}] is {settings[name]}: it must be in ranges' {low}..{high}, above 0"
            )
    best = dict(settings)
    state = train(state, best)
    loss = float(validate(state, best))
    rounds = [Trial(best, loss, True)]
    factor, names, failed = dict.fromkeys(ranges, STEP), list(ranges), 0
    while len(rounds) < max_rounds and failed < patience:
        tried = dict(best)
        if names:
            name = names[(len(rounds) - 1) % len(names)]
            low, high = ranges[name]
            tried[name] = min(max(tried[name] * factor[name], low), high)
        new = train(state, tried)
        new_loss = float(validate(new, tried))
        kept = new_loss < loss
        rounds.append(Trial(tried, new_loss, kept))
        if kept:
            state, best, loss, failed = new, tried, new_loss, 0
        else:
            failed += 1
            if names:
                factor[name] = 1 / factor[name]
    return Tuned(state, best, loss, tuple(rounds))
