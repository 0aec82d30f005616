"""The sign of sentiment of editorials by half of their tokens, a lexicon as prior knowledge.

    python -m experiments.finance.sentiment [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

Texts about the economy with human sentiment that may be used are in no package: editorials stand in for
them. Some 4 minutes on one core; runs that the file holds are not run again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from experiments.harness import runs, study
from experiments.text_classification import experiment, features

SOURCE, BETA = "editorial", 0.5
ARMS = {
    "full": ("full", 0.0),
    "uniform": ("uniform", 0.0),
    "proportional": ("proportional", 0.0),
    "ladder": ("ladder", 0.0),
    "ladder, prior": ("ladder", BETA),
}


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("finance.sentiment", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    split = experiment.prepare(SOURCE).split
    share = float(split.test.positive.mean())
    about = {
        "title": "Sentiment of editorials",
        "notes": (
            f"{len(split.test.texts)} held-out sentences of editorials (no labelled texts of finance "
            "may be used), positive or not. The arms but `full` compute half of the tokens. `prior`: "
            "importance is pooled with how far from neutral people rate a word (VADER's lexicon). Where "
            "it does not help: some four thousand labelled sentences say more of words than the lexicon."
        ),
        "settings": {"epochs": experiment.EPOCHS, "beta": BETA},
        "baselines": {
            "TF-IDF and logistic regression": {"accuracy": features.logistic_regression(split)},
            "the more frequent class": {"accuracy": max(share, 1 - share)},
        },
        "drawn": ["TF-IDF and logistic regression"],
        "compare": [
            ["ladder", "full"],
            ["ladder", "uniform"],
            ["ladder", "proportional"],
            ["ladder, prior", "ladder"],
            ["ladder, prior", "full"],
        ],
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        budget, beta = ARMS[arm]
        found = experiment.run_transformer(SOURCE, budget, experiment.BASE, seed, beta=beta)
        advance()
        figures = {"accuracy": found["accuracy"], "tokens a step": found["tokens_a_step"]}
        return {"figures": figures, "cases": {"accuracy": runs.packed(found["hits"])}}

    return study.Study(about, ["ladder, prior"] if smoke else list(ARMS), 1, one)


if __name__ == "__main__":
    sys.exit(main())
