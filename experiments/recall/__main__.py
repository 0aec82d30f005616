"""Associative recall with half or a quarter of the tiles: far keys matter, and a window cannot see them.

    python -m experiments.recall [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

A small language model learns over all tiles to recall values whose keys are asked for much later. Every
arm goes on from there over the tiles of its budget, and is tested with the same budget on sequences of
its own. Some 25 minutes on one core; runs that the file holds are not run again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from experiments.harness import study
from experiments.recall import experiment
from experiments.recall.experiment import BATCH, Sizes

WHOLE, SMOKE = Sizes(400, 150, 150, 256, 16), Sizes(4, 2, 2, 256, 16)
ARMS = study.at_parts("dense", ("window", "uniform", "ladder"))


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("recall", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    sizes = SMOKE if smoke else WHOLE
    about = {
        "title": "Recall",
        "notes": (
            f"Multi-query associative recall: {sizes.pairs} pairs of a key and a value at the start of "
            f"{sizes.length} tokens, then noise, then the keys again; the part of the values that is "
            f"recalled, in {experiment.TEST * BATCH} test sequences. Two layers that have learned "
            "it over all tiles go on over those of the arm, a half or a quarter of the causal ones: "
            "`window` the latest keys and the first block, `uniform` the same part of every query block "
            "and head, `ladder` at one price for a layer. Where it does not help: at a quarter of the "
            "tiles the even part of every query block is as good or better; why was not looked into."
        ),
        "settings": {
            "sizes": sizes._asdict(),
            "batch": BATCH,
            "rates": [experiment.BASE_RATE, experiment.ARM_RATE],
            "tiles": [experiment.BLOCK_Q, experiment.BLOCK_K, experiment.ROWS],
        },
        "compare": [
            [f"ladder, {part}", other]
            for part in study.PARTS
            for other in ("dense", f"window, {part}", f"uniform, {part}")
        ],
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        return experiment.run(*ARMS[arm], seed, sizes, advance)

    return study.Study(about, study.arms_of(ARMS, smoke), sizes.steps, one)


if __name__ == "__main__":
    sys.exit(main())
