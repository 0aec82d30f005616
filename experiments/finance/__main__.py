"""The variance of tomorrow by attention over a year, of which a budget remembers half or a quarter.

    python -m experiments.finance [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

Every arm trains a forecaster for each of three markets on what its budget remembers of every year, and
is tested on the last fifth of the days. Some 8 minutes on one core; runs that the file holds are not run
again. `python -m experiments.finance.sentiment` is the study of texts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from experiments.finance import data, experiment, histories
from experiments.harness import study

EPOCHS = 15
ARMS = study.at_parts("full", ("uniform", "latest", "proportional", "ladder"))
ALERTS = "sp500"  # the market whose alerts are shown


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("finance", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    markets = (ALERTS,) if smoke else data.MARKETS
    epochs = 1 if smoke else EPOCHS
    materials = {market: experiment.prepare(market).market for market in markets}
    about = {
        "title": "Financial monitoring",
        "notes": (
            "Log variance of the next day (S&P 500, Nasdaq) or week (crude oil): R² on the last fifth "
            "of the days, against the mean of the others. `full` attends to "
            f"{data.YEAR} days; `half` and `quarter` of them are remembered: `uniform` every second or "
            "fourth, `latest` the latest, `ladder` each month by its days, by four means, by one or not "
            "at all, at one price. There are as many alerts as surges (above nine tenths of the year "
            "before), so precision is recall; the lead counts the days of alert before surges that "
            f"follow {experiment.ONSET} days without one. Where it does not help: the latest quarter of "
            "the days holds all that these markets' variance depends on, so `latest` is as good as "
            "`ladder`, and for oil a little better; and no arm and no baseline foretells a surge after "
            "calm days, alerts say that a surge goes on."
        ),
        "settings": {
            "epochs": epochs,
            "batch": experiment.BATCH,
            "rate": experiment.PEAK_RATE,
            "levels": list(histories.COSTS),
        },
        "baselines": {
            name: {
                figure: value
                for market, own in materials.items()
                for figure, value in _named(market, baseline(own)).items()
            }
            for name, baseline in (
                ("HAR regression", experiment.har),
                ("the last value", experiment.last_value),
            )
        },
        "drawn": ["HAR regression"],
        "compare": [
            [f"ladder, {part}", other]
            for part in study.PARTS
            for other in ("full", *(f"{x}, {part}" for x in ("uniform", "latest", "proportional")))
        ],
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        found: dict[str, dict[str, Any]] = {"figures": {}, "cases": {}}
        for market in markets:
            own = experiment.run(*ARMS[arm], seed, market, epochs, advance)
            for kind in found:
                found[kind] |= _named(market, own[kind])
        return found

    steps = epochs * sum(len(x.days(test=False)) // experiment.BATCH for x in materials.values())
    return study.Study(about, study.arms_of(ARMS, smoke), steps, one)


def _named(market: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """With the market's name; alerts and tokens of one market alone."""
    return {
        f"{name} {market}" if name == "R²" else name: value
        for name, value in figures.items()
        if name == "R²" or market == ALERTS
    }


if __name__ == "__main__":
    sys.exit(main())
