"""Fashion-MNIST with a part of the tokens: four fine ones or a coarse one for each cell.

    python -m experiments.vision [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

Every arm trains a small vision transformer from nothing on the tokens that its budget keeps, and tests
it with the same budget; what is not kept is not computed. Some 15 minutes on one core; runs that the
file holds are not run again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from sklearn.linear_model import LogisticRegression

from experiments.harness import study
from experiments.vision import experiment
from experiments.vision.experiment import BATCH, Sizes

WHOLE, SMOKE = Sizes(24_000, 3, 10_000), Sizes(1280, 1, 640)
ARMS = study.at_parts("full", ("uniform", "proportional", "ladder"))


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("vision", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    sizes = SMOKE if smoke else WHOLE
    material = experiment.prepare(sizes)
    known = material.train.part(10_000)
    flat = (x.pixels.reshape(len(x.labels), -1) for x in (known, material.test))
    regression = LogisticRegression(C=0.05, max_iter=1000).fit(next(flat), known.labels)
    about = {
        "title": "Vision",
        "notes": (
            f"Fashion-MNIST, {sizes.train:,} pictures for training and {sizes.test:,} for the test. A "
            "whole picture is 64 tokens of 4 x 4 pixels; `half` and `quarter` of them are computed, "
            "over all layers: `uniform` the same ones of every picture, `proportional` the most "
            "important, `ladder` four tokens or one coarse one for a cell of 8 x 8 pixels, at one price "
            "for the pictures of a batch. At a quarter that is the coarse one for every cell, which is "
            "as good as the whole picture. Where it does not help: what half of the tokens buys beyond "
            "that, details of some cells by their contrast, costs about a hundredth of the pictures, "
            "and every second fine token is better; pixels' squares are no measure of what details say."
        ),
        "settings": {
            "sizes": sizes._asdict(),
            "batch": BATCH,
            "rate": experiment.PEAK_RATE,
            "model": [experiment.WIDTH, experiment.HEADS, experiment.HIDDEN, experiment.LAYERS],
        },
        "baselines": {
            "logistic regression on 10,000 pictures": {
                "accuracy": float(regression.score(next(flat), material.test.labels))
            }
        },
        "drawn": ["logistic regression on 10,000 pictures"],
        "compare": [
            ["ladder, half", "full"],
            ["ladder, half", "uniform, half"],
            ["ladder, half", "proportional, half"],
            ["ladder, quarter", "full"],
            ["ladder, quarter", "uniform, quarter"],
            ["ladder, quarter", "proportional, quarter"],
        ],
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        name, part = ARMS[arm]
        return experiment.run(name, part, seed, sizes, advance)

    steps = sizes.epochs * (sizes.train // BATCH)
    return study.Study(about, study.arms_of(ARMS, smoke), steps, one)


if __name__ == "__main__":
    sys.exit(main())
