"""A driver at a crossing that attends to a part of the vehicles: fixed ones, or those that matter.

    python -m experiments.robotics [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

Every arm trains a small driver from nothing to imitate a planner, on the vehicles that its budget keeps;
then it drives with the same budget, which is set for one scene at a time. Some 20 minutes on one core,
most of them in the simulator; runs that the file holds are not run again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from experiments.harness import study
from experiments.robotics import crossing, data, experiment, expert, foresight, policy, vehicles
from experiments.robotics.experiment import BATCH, Sizes

WHOLE, SMOKE = Sizes(400, 80, 15, 30), Sizes(8, 2, 2, 1)
ARMS = study.at_parts("full", vehicles.ARMS[1:])


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("robotics", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    sizes = SMOKE if smoke else WHOLE
    about = {
        "title": "Robotics",
        "notes": NOTES,
        "settings": {
            "sizes": sizes._asdict(),
            "batch": BATCH,
            "rate": experiment.PEAK_RATE,
            "weight decay": experiment.WEIGHT_DECAY,
            "model": [policy.WIDTH, policy.HEADS, policy.HIDDEN, foresight.FORESEEN],
            "expert": expert.settings(),
            "stray": data.STRAY,
            "crossing": crossing.CONFIG,
            "noise": list(experiment.NOISE),
            "missing": experiment.MISSING,
            "covered": vehicles.COVERED,
        },
        "baselines": experiment.baselines(sizes.drives),
        "drawn": ["always faster", "the expert"],
        "compare": [
            [f"ladder, {part}", other]
            for part in study.PARTS
            for other in (
                "full",
                f"uniform, {part}",
                f"nearest, {part}",
                f"proportional, {part}",
            )
        ],
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        name, part = ARMS[arm]
        return experiment.run(name, part, arm in experiment.TRIED, seed, sizes, advance)

    scenes = len(experiment.prepare(sizes).train.value)
    steps = sizes.epochs * (scenes // BATCH) + sizes.drives
    return study.Study(about, list(ARMS), steps, one)


NOTES = "."

if __name__ == "__main__":
    sys.exit(main())
