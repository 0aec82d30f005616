"""Budgets under noise, loss, attack and stuffing, and how the groups of texts fare.

    python -m experiments.robustness [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

Every arm trains a classifier of sentiment on texts of four sources at its budget of tokens. Some 10
minutes on one core; runs that the file holds are not run again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from experiments.harness import study
from experiments.robustness import arms, experiment
from experiments.robustness.experiment import Sizes

WHOLE, SMOKE = Sizes(3, 1500, 500), Sizes(1, 200, 100)
ARMS = study.at_parts("full", ("uniform", "proportional", "ladder")) | {
    f"{arm}, quarter": (arm, 0.25)
    for arm in (
        "ladder with floors",
        "ladder with a fair loss",
        "proportional with caps",
        "ladder with caps",
    )
}


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("robustness", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    sizes = SMOKE if smoke else WHOLE
    about = {
        "title": "Robustness and fairness",
        "notes": _NOTES,
        "settings": {
            "sizes": sizes._asdict(),
            "rate": experiment.PEAK_RATE,
            "radius": experiment.RADIUS,
            "floor, cap": [arms.FLOOR, arms.CAP],
            "fairness": experiment.FAIRNESS,
            "margin, eta": [experiment.MARGIN, experiment.ETA],
        },
        "compare": [
            ["ladder, half", "full"],
            ["ladder, half", "uniform, half"],
            ["ladder, quarter", "uniform, quarter"],
            ["ladder with floors, quarter", "ladder, quarter"],
            ["ladder with a fair loss, quarter", "ladder, quarter"],
            ["ladder with caps, quarter", "ladder, quarter"],
            ["proportional with caps, quarter", "proportional, quarter"],
        ],
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        name, part = ARMS[arm]
        return experiment.run(name, part, seed, sizes, advance)

    steps = sizes.epochs * (4 * sizes.train // experiment.BATCH)
    return study.Study(about, list(ARMS), steps, one)


_NOTES = (
    "Sign of sentiment of texts of four sources (films, products, tweets, editorials), 500 held "
    "out of each."
)


if __name__ == "__main__":
    sys.exit(main())
