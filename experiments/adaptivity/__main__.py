"""A balance while the data change: from reviews of products to tweets, in mid-stream.

    python -m experiments.adaptivity [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

What tokens are worth is measured on the latest texts of a stream, averaged, and decides which half of
held-out texts of the new domain is kept. Some 5 minutes on one core; runs that the file holds are not
run again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from experiments.adaptivity import experiment
from experiments.adaptivity.experiment import AFTER, ARMS, BATCH, BEFORE, GOOD, WINDOW, Sizes
from experiments.harness import study

WHOLE, SMOKE = Sizes(15, 40, 800), Sizes(3, 4, 80)


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("adaptivity", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    sizes = SMOKE if smoke else WHOLE
    about = {
        "title": "Adaptivity",
        "notes": (
            f"A stream of texts in steps of {BATCH} changes from {BEFORE} reviews to {AFTER}. "
            f"The importance of tokens is measured on its latest {WINDOW} texts and averaged; by "
            f"it half of the tokens of {sizes.held} held-out {AFTER} are kept. `kept` is their "
            f"worth by all {AFTER}, as a part of what importance fitted to these keeps; good is "
            f"{GOOD}. `static` stays as it was, `carried` goes on, `fresh` forgets at the "
            "change, and `prior` pools with the old importance. `reviewed`: of each step after "
            f"the change the lexicon, in which people rated words, judges {experiment.REVIEWED} "
            "tokens, and what it said counts less with each step. Steps until good are "
            f"{sizes.after + 1} where it never is; tokens that change a step are counted in the "
            "second half, as flapping, of which the average takes two thirds. Where it does not "
            "help: what was carried over saves one step of six, as a prior whose weight does "
            "not fall it holds the new importance back, and verdicts on words come no sooner "
            "than what the texts say."
        ),
        "settings": {
            "sizes": sizes._asdict(),
            "window": WINDOW,
            "arms": {name: arm._asdict() for name, arm in ARMS.items()},
            "beta": experiment.BETA,
            "unseen": "mean",
            "reviewed, forget, eta": [experiment.REVIEWED, experiment.FORGET, experiment.ETA],
        },
        "compare": [["carried", other] for other in ARMS if other != "carried"],
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        return experiment.run(arm, seed, sizes, advance)

    return study.Study(about, list(ARMS), sizes.before + sizes.after, one)


if __name__ == "__main__":
    sys.exit(main())
