"""A driver at a crossing that attends to a part of the vehicles: fixed ones, or those that matter.

    python -m experiments.robotics [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

Every arm trains a small driver from nothing to imitate a planner, on the vehicles that its budget keeps;
then it drives with the same budget, which is set for one scene at a time. Some 25 minutes on one core,
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
        ]
        + [["ladder, quarter", "nearest, half"]],  # programs of nearly the same size
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        name, part = ARMS[arm]
        return experiment.run(name, part, arm in experiment.TRIED, seed, sizes, advance)

    scenes = len(experiment.prepare(sizes).train.value)
    steps = sizes.epochs * (scenes // BATCH) + sizes.drives
    return study.Study(about, study.arms_of(ARMS, smoke), steps, one)


NOTES = (
    "A left turn at highway-env's crossing, with up to 14 others. A planner that foresees everyone on "
    "their route is imitated: its decisions in 400 crossings, a quarter of them strayed from, of what "
    "is seen (places, speeds, headings, indicators) by one attention from the driver to the others. "
    "`full` attends to all who are there; the others to half or a quarter of them: `uniform` as many "
    "of every scene, `nearest` the nearest of them, `proportional` by each scene's share of "
    "importance, `ladder` at one price. A vehicle is worth what the planner's reward loses without "
    "it, learned for classes of when and how near it will come to a driver who drives on. `agreement` "
    "is with the planner in held-out scenes, a batch of them in one budget. On the road decisions "
    "come one at a time: the price is that of the training part, and the program has room for what it "
    "asked for in 99 of 100 scenes; beyond that the least is left out (`over capacity`). A driver of "
    "a quarter at one price decides as well as one who attends to all; even parts and the nearest "
    "miss those who matter. At a program of nearly the same size, a quarter at one price agrees more "
    "often than half by nearness. Where it does not help: a program for one scene must have room for "
    "the fullest, so one price saves less of its time than of a batch's; the returns of most arms "
    "differ by less than 30 crossings can tell; and with noise of 2 m and 1 m/s, or three of ten "
    "vehicles unseen, drivers crash more often, with the ladder as without it."
)

if __name__ == "__main__":
    sys.exit(main())
