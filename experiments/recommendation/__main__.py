"""The next film by attention over remembered ones: a budget of films, shared over people.

    python -m experiments.recommendation [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

Every arm trains a small recommender from nothing on the films that its budget remembers, and is tested
on everyone's last film with the same budget. Some 10 minutes on one core; runs that the file holds are
not run again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.harness import study
from experiments.recommendation import experiment, histories
from experiments.recommendation.experiment import BATCH, PIECES, Material, Sizes

WHOLE, SMOKE = Sizes(8, 943), Sizes(1, 128)
ARMS = study.at_parts("full", ("uniform", "proportional", "ladder"))


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("recommendation", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    sizes = SMOKE if smoke else WHOLE
    material = experiment.prepare(sizes)
    about = {
        "title": "Recommendation",
        "notes": (
            f"MovieLens-100k, {len(material.known.items)} people: the last film of each "
            "among all that the person has not seen. `full` remembers up to "
            f"{histories.MOST} films of each, the others half or a quarter of these over all "
            "people: `uniform` the latest, the same part of every history; `ladder` at one "
            "price. Importance is by age, discrimination and stars."
            " Where it does not help: at half of the films no arm differs from all of them, or from the "
            "others, by more than these people can show; at a quarter the latest films do as well."
        ),
        "settings": {
            "sizes": sizes._asdict(),
            "batch": BATCH,
            "rate": experiment.PEAK_RATE,
            "pieces": PIECES,
            "weights": list(histories.WEIGHTS),
            "model": [experiment.WIDTH, experiment.HEADS, experiment.HIDDEN, experiment.LAYERS],
        },
        "baselines": {"the most popular": popularity(material)},
        "drawn": ["the most popular"],
        "compare": [
            [f"ladder, {part}", other]
            for part in study.PARTS
            for other in ("full", f"uniform, {part}", f"proportional, {part}")
        ],
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        return experiment.run(*ARMS[arm], seed, sizes, advance)

    steps = sizes.epochs * PIECES * len(material.known.items) // BATCH
    return study.Study(about, study.arms_of(ARMS, smoke), steps, one)


def popularity(material: Material) -> dict[str, float]:
    """What everyone's most popular films reach that the person has not seen."""
    known = material.known
    counts = np.bincount(np.concatenate(known.items), minlength=known.num_items).astype(float)
    last = np.array([x[-1] for x in material.ratings.items])
    people = len(known.items)
    found = experiment.measure(material, np.tile(counts, (people, 1)), last, [0] * people, 0.0)
    names = ("NDCG@10", "recall@10", "coverage", "diversity", "women's gap in recall")
    return {name: found["figures"][name] for name in names}


if __name__ == "__main__":
    sys.exit(main())
