"""Coordinate search of settings around training: train, validate, adjust, train again.

Training alone lowers the loss, so a setting is judged by what it changes about that: the settings as
they are and those with one change both train from the same state, and their validation losses are
compared.

The last step of METHOD section 1's second source. It runs on the host: what is inside of `train` is
jitted, and settings are data there, so nothing compiles anew. For a search over many settings from
nothing, take a library for it; this follows one run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jbalance import checks

STEP = 1.5  # settings are multiplied or divided by it at first


class Trial(NamedTuple):
    """One round of `tune`."""

    settings: dict[str, float]
    loss: float
    against: float  # loss of the settings as they were, trained from the same state
    kept: bool  # the change lowers the loss


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

    Each round trains twice from the same state: with the settings as they are, and with one of them
    larger or smaller by a factor of 1.5, at most to the end of its range. The change that validates
    better is kept and tried again when its turn comes; else that setting goes the other way next, and by
    the root of the factor once neither way was better. The next round starts from whichever state
    validated better, if it is better than the one before. Ends after `patience` rounds in a row in which
    no change was better. (Paired comparisons in a pattern search: Hooke and Jeeves, J. ACM 8, 1961.)

    Args:
      train: (state, settings) -> state, of one round: as many steps whatever the settings, best over the
        same data from the same state.
      validate: (state, settings) -> loss on data that `train` never sees. NaN is worse than any number.
      state: parameters, optimizer and what else a round changes; never changed in place.
      settings: to begin with, such as temperature, floor and budget.
      ranges: least and greatest value of each setting that may change; the others stay. Without any,
        rounds only train on, and one that does not validate better is undone.
      max_rounds: at most; all but the first train twice where settings may change.
      patience: rounds without improvement before it stops.

    Returns:
      The state that validated best with its loss, the settings that won, and every round.

    Raises:
      ValueError: a range without its setting, a setting outside its range, numbers below 1.
    """
    checks.static_int("max_rounds", max_rounds, 1)
    checks.static_int("patience", patience, 1)
    checks.mapping("settings", settings, "numbers by name")
    checks.mapping("ranges", ranges, "least and greatest by name")
    for name, value in settings.items():
        checks.static_float(f"settings[{name!r}]", value)
    for name, ends in ranges.items():
        checks.rank(f"ranges[{name!r}]", ends, 1, "[2]")
        checks.length(f"ranges[{name!r}]", ends, 2, "least and greatest")
        low, high = (checks.static_float(f"ranges[{name!r}]", x) for x in ends)
        if name not in settings:
            raise ValueError(f"ranges has {name!r}, settings has only {', '.join(settings)}")
        if not 0 < low <= settings[name] <= high < math.inf:
            raise ValueError(
                f"settings[{name!r}] is {settings[name]}: it must be in ranges' {low}..{high}, above 0 "
                f"and finite"
            )

    def trained(settings: dict[str, float]) -> tuple[Any, float]:
        new = train(state, settings)
        return new, float(validate(new, settings))

    best = dict(settings)
    state, loss = trained(best)
    rounds = [Trial(best, loss, loss, True)]
    turns, failed = [_Turn(name, *ranges[name]) for name in ranges], 0
    while len(rounds) < max_rounds and failed < patience:
        turn = turns[(len(rounds) - 1) % len(turns)] if turns else None
        tried, as_it_is = (best, (state, loss)) if turn is None else (turn.of(best), trained(best))
        changed = trained(tried)
        kept = _better(changed[1], as_it_is[1])
        rounds.append(Trial(tried, changed[1], as_it_is[1], kept))
        failed = 0 if kept else failed + 1
        if turn is not None:
            turn.learn(kept)
        if kept:
            best = tried
        winner = changed if kept else as_it_is
        if _better(winner[1], loss):
            state, loss = winner
    return Tuned(state, best, loss, tuple(rounds))


@dataclasses.dataclass
class _Turn:
    """How a setting is changed when its turn comes."""

    name: str
    low: float
    high: float
    factor: float = STEP
    missed: bool = False  # the other way was no better

    def of(self, settings: Mapping[str, float]) -> dict[str, float]:
        """The settings with this one changed, the other way at the end of its range."""
        value = settings[self.name]
        if self._within(value * self.factor) == value:
            self.factor, self.missed = self.factor ** (-0.5 if self.missed else -1), True
        return {**settings, self.name: self._within(value * self.factor)}

    def _within(self, value: float) -> float:
        return min(max(value, self.low), self.high)

    def learn(self, kept: bool) -> None:
        """Go on, or the other way, or by less once neither way was better."""
        if not kept:
            self.factor = self.factor ** (-0.5 if self.missed else -1)
        self.missed = not kept and not self.missed


def _better(loss: float, than: float) -> bool:
    """Whether a loss is lower; any number is better than NaN."""
    return loss < than or (math.isnan(than) and not math.isnan(loss))
