"""Classes with a long tail: examples of each class in a step, by importance with floors.

    python -m experiments.long_tail [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

Fashion-MNIST with Zipf's law over its classes. Every arm trains the same small transformer for the same
steps of 64 pictures. Some 5 minutes on one core; runs that the file holds are not run again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from experiments.harness import study
from experiments.long_tail import experiment
from experiments.long_tail.experiment import ARMS, BATCH, Sizes

WHOLE, SMOKE = Sizes(600, experiment.MOST, 10_000), Sizes(20, 200, 640)


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("long_tail", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    sizes = SMOKE if smoke else WHOLE
    counts = experiment.prepare(sizes).counts
    ours = ARMS[-1]
    about = {
        "title": "Long tail",
        "notes": (
            f"Fashion-MNIST with {counts[0]:,} pictures of the most frequent class and {counts[-1]} of "
            f"the least; {sizes.test:,} of the test, whose classes count alike. Steps of {BATCH} "
            "pictures: `natural` as they come, `reweighted` with losses by the inverse of the "
            "frequency (scikit-learn's class weights), `resampled` every class alike, `importance` as "
            "many of each class as its importance says (how scarce it is, how hard it was), and with "
            f"floors and caps ({experiment.FLOOR} to {experiment.CAP}). The tail is the "
            f"{experiment.TAIL} least frequent classes. Where it does not help: importance is as good "
            "as resampling and reweighting, not better, and its floors and caps hardly ever bind."
        ),
        "settings": {
            "sizes": sizes._asdict(),
            "rate": experiment.PEAK_RATE,
            "weights": list(experiment.WEIGHTS),
            "bounds": [experiment.FLOOR, experiment.CAP, experiment.DECAY],
        },
        "compare": [[ours, other] for other in ARMS if other != ours],
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        return experiment.run(arm, seed, sizes, advance)

    return study.Study(about, list(ARMS), sizes.steps, one)


if __name__ == "__main__":
    sys.exit(main())
