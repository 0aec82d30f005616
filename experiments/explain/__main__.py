"""How well each scorer orders tokens, heads and layers by what a real model loses without them.

    python -m experiments.explain [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

Each seed is a stretch of a text that SmolLM2-135M reads; its parts are hidden from what follows, one
after the other. Some two minutes a seed on two cores; runs that the file holds are not run again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from experiments.explain import experiment
from experiments.explain.experiment import Sizes
from experiments.harness import study

WHOLE, SMOKE = Sizes(500, 32, 15), Sizes(164, 4, 2)


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("explain", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    sizes = SMOKE if smoke else WHOLE
    about = {
        "title": "Scorers against ablation",
        "notes": (
            f"SmolLM2-135M reads {sizes.context} tokens of a text; then some of them, never the first 4 "
            f"and the latest 32, are hidden from the {sizes.continuation} that follow: groups of "
            f"{experiment.GROUP} tokens in all heads, all of them in one key/value head or in one layer "
            f"(of {sizes.layers} layers), or coalitions of {experiment.PARTS} parts of the text. The "
            "effect is the KL of what the model predicts without them from what it predicts with "
            "everything; of coalitions its exact Shapley values. The figures are Spearman's "
            "correlations of these with the sum of a scorer's w over what is hidden; six contexts of "
            "three texts. "
            "Which tokens the very next words need, the last queries know best (`window`, and with it "
            "`combined`), and `worth` no worse by more than the interval. But heads and layers, among "
            "which bytes are divided, are ordered best by scorers that ask for the worth to any later "
            "question in one currency: `worth`, by which `ladder` keeps tokens, `repetition` and "
            "`sketch`; attention mass sums to nearly the same in every head. "
            "Where it does not help: six parts of a text are few to order, and their correlations vary "
            "by some tenths between contexts."
        ),
        "settings": {
            "sizes": sizes._asdict(),
            "group": experiment.GROUP,
            "parts": experiment.PARTS,
        },
        "compare": [
            ["worth", other]
            for other in ("repetition", "sketch", "attention_mass", "window", "random")
        ],
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        found = experiment.run(arm, seed, sizes)
        advance()
        return found

    arms = [*experiment.SCORERS, experiment.RANDOM]
    return study.Study(about, arms, 1, one)


if __name__ == "__main__":
    sys.exit(main())
