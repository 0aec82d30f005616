"""Pictures, captions and spoken captions of stamps under one budget of tokens.

    python -m experiments.multimodal [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

Every arm trains a small model on the tokens that its budget keeps and tests it with the same budget,
where a modality is missing and where one is noisy too; what is not kept is not computed. Some 12 minutes
on one core; runs that the file holds are not run again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from experiments.harness import study
from experiments.multimodal import baselines, data, experiment, report
from experiments.multimodal.experiment import BATCH, Sizes

WHOLE, SMOKE = Sizes(30, 8), Sizes(2, 1)
ARMS = study.at_parts("full", ("uniform", "proportional", "ladder")) | {
    "separate": ("separate", 1.0)
}


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("multimodal", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    sizes = SMOKE if smoke else WHOLE
    known, held = data.split(data.read())
    about = {
        "title": "Picture, sound and caption",
        "notes": _NOTES.format(known=len(known.labels), held=len(held.labels)),
        "settings": {
            "sizes": sizes._asdict(),
            "batch": BATCH,
            "rate": experiment.PEAK_RATE,
            "weight decay": experiment.WEIGHT_DECAY,
            "price of noise": experiment.PRICE,
        },
        "baselines": baselines.of_parts(known, held),
        "compare": [
            ["ladder, half", "full"],
            ["ladder, half", "uniform, half"],
            ["ladder, half", "proportional, half"],
            ["ladder, quarter", "full"],
            ["ladder, quarter", "uniform, quarter"],
            ["ladder, quarter", "proportional, quarter"],
            ["full", "separate"],
        ],
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        name, part = ARMS[arm]
        return experiment.run(name, part, seed, sizes, advance)

    steps = sizes.epochs * (len(known.labels) // BATCH)
    pictures = {report.PICTURE: (report.SHOWS, report.draw)}
    return study.Study(about, list(ARMS), steps, one, pictures)


_NOTES = "{known} {held}"


if __name__ == "__main__":
    sys.exit(main())
