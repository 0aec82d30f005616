"""Sentiment of short texts: attention over scored features, and a transformer under a token budget.

    python -m experiments.text_classification [--json OUT] [--seeds 0,1,2] [--arms NAMES]
    python -m experiments.text_classification regularise [--json OUT] [--seeds 0,1,2] [--arms NAMES]
    python -m experiments.text_classification search [--trials N] [--json OUT]

The first trains every arm on three sources and tests it, beside scikit-learn's TF-IDF and logistic
regression; some 10 minutes on one core. The second measures dropout, weight decay, augmentation
(BPE-dropout) and adversarial training of the transformer on the smallest source, the third searches the
settings of the classifiers over features with Optuna, on validation texts. Runs that a file holds are
not run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness import cli, files, runs, study
from experiments.text_classification import experiment, features, search
from experiments.text_classification.experiment import REGULARISED
from experiments.text_classification.tokens import BUDGETS
from jbalance import checks

OUT = Path("out/text_classification.json")
SEEDS, TRIALS = (0, 1, 2), 12
STUDIED = ("film", "product", "tweets")
SMALLEST = "product"
SEARCHED = ("product", "tweets")  # no setting has seen the third source
RULES = ("uniform", "proportional", "softmax")
ARMS = tuple(
    [f"transformer, {budget}" for budget in BUDGETS] + [f"features, {rule}" for rule in RULES]
)

JOBS: dict[str, dict[str, None]] = {
    "train": dict.fromkeys(ARMS),
    "regularise": dict.fromkeys(REGULARISED),
    "search": dict.fromkeys(search.SEARCHES),
}


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    parser = cli.parser("experiments.text_classification", __doc__)
    parser.add_argument("job", nargs="?", choices=JOBS, default="train", help="as above")
    cli.add_json(parser, OUT)
    parser.add_argument(
        "--seeds", default=",".join(map(str, SEEDS)), help="of data and parameters, with commas"
    )
    parser.add_argument("--arms", help="names, with slashes; all if left out")
    parser.add_argument("--trials", type=int, default=TRIALS, help="of the search, for each arm")
    return cli.run(parser, _job, arguments)


def _job(options: argparse.Namespace) -> None:
    arms = options.arms.split("/") if options.arms else list(JOBS[options.job])
    out = cli.of_job(options.json, OUT, options.job)
    for name in arms:
        checks.choice("--arms", name, JOBS[options.job])
    seeds = cli.numbers("--seeds", options.seeds, int)
    files.check_writable(out)
    if options.job == "search":
        report = find(out, arms, options.trials)
    elif options.job == "regularise":
        report = regularise(out, arms, seeds)
    else:
        report = train(out, arms, seeds)
    study.show(report)


def train(out: Path, arms: list[str], seeds: list[int]) -> dict[str, Any]:
    """Every arm on every source.

    Raises:
      ValueError: packages that cannot be fetched, a file of other runs.
    """
    sources = list(STUDIED)
    splits = {source: experiment.prepare(source).split for source in sources}
    about = {
        "title": "Text classification",
        "notes": [
            "Sign of human sentiment, accuracy on a fifth of the texts of each source. Transformers",
            "compute half of the tokens (`full`: all); attention over features weighs TF-IDF features",
            "by their scores.",
        ],
        "command": "python -m experiments.text_classification",
        "settings": {
            "epochs": experiment.EPOCHS,
            "rate": experiment.PEAK_RATE,
            "regularisation": experiment.BASE._asdict(),
            "features": {rule: s._asdict() for rule, s in experiment.SETTINGS.items()},
            "weights_of_scores": features.WEIGHTS,
        },
        "baselines": {
            "TF-IDF and logistic regression": {
                f"accuracy {source}": features.logistic_regression(splits[source])
                for source in sources
            },
            "the more frequent class": {
                f"accuracy {source}": float(max(np.mean(y), 1 - np.mean(y)))
                for source, y in ((s, splits[s].test.positive) for s in sources)
            },
        },
        "drawn": ["TF-IDF and logistic regression"],
        "compare": [
            ["transformer, ladder", "transformer, full"],
            ["transformer, ladder", "transformer, uniform"],
            ["transformer, ladder", "transformer, proportional"],
            ["features, softmax", "features, uniform"],
            ["features, proportional", "features, uniform"],
        ],
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        kind, name = arm.split(", ")
        found: dict[str, dict[str, Any]] = {}
        for source in sources:
            if kind == "features":
                settings = experiment.SETTINGS[name]
                found[source] = experiment.run_features(source, name, settings, seed)
            else:
                found[source] = experiment.run_transformer(source, name, experiment.BASE, seed)
            advance()
        return {
            "figures": {f"accuracy {s}": row.pop("accuracy") for s, row in found.items()},
            "cases": {f"accuracy {s}": runs.packed(row.pop("hits")) for s, row in found.items()},
            "details": found,
        }

    return runs.run_all(out, about, arms, seeds, len(sources), one)


def regularise(out: Path, arms: list[str], seeds: list[int]) -> dict[str, Any]:
    """Each way of regularising alone, all of them, and none.

    Raises:
      ValueError: packages that cannot be fetched, a file of other runs.
    """
    about = {
        "title": "Regularisation of the text classifier",
        "notes": [f"The transformer over all tokens of the source {SMALLEST!r}."],
        "command": "python -m experiments.text_classification regularise",
        "settings": {
            "epochs": experiment.EPOCHS,
            "rate": experiment.PEAK_RATE,
            "arms": {name: value._asdict() for name, value in REGULARISED.items()},
        },
        "compare": [[name, "none"] for name in REGULARISED if name != "none"],
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        found = experiment.run_transformer(SMALLEST, "full", REGULARISED[arm], seed)
        advance()
        return {"figures": {"accuracy": found["accuracy"], "training loss": found["train_loss"]}}

    return runs.run_all(out, about, arms, seeds, 1, one)


def find(out: Path, rules: list[str], trials: int) -> dict[str, Any]:
    """The best settings of each rule.

    Raises:
      ValueError: packages that cannot be fetched, a file of other runs, trials below 1.
    """
    about = {
        "title": "Search of the settings over features",
        "notes": [
            f"Optuna's TPE, {trials} trials each, on the validation texts of {' and '.join(SEARCHED)}:",
            "what training takes, with uniform attention, and then the softmax's temperature.",
        ],
        "command": "python -m experiments.text_classification search",
        "settings": {"trials": trials},
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        found = search.search(arm, list(SEARCHED), trials, seed)
        advance()
        return {"figures": {"validation accuracy": found["validation_accuracy"]} | found["best"]}

    return runs.run_all(out, about, rules, [0], 1, one)


if __name__ == "__main__":
    sys.exit(main())
