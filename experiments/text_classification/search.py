"""Settings of the classifier over features, searched on the validation parts with Optuna."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna

from experiments.text_classification import experiment
from experiments.text_classification.features import Settings
from jbalance import checks


def _training(trial: optuna.Trial) -> Settings:
    return Settings(
        rate=trial.suggest_float("rate", 1e-3, 3e-2, log=True),
        weight_decay=trial.suggest_float("weight_decay", 1e-4, 1.0, log=True),
        dropout=trial.suggest_float("dropout", 0.0, 0.7),
        temperature=1.0,
        epochs=trial.suggest_int("epochs", 2, 10),
    )


def _temperature(trial: optuna.Trial) -> Settings:
    temperature = trial.suggest_float("temperature", 0.03, 3.0, log=True)
    return experiment.SETTINGS["softmax"]._replace(temperature=temperature)


SEARCHES = {"uniform": _training, "softmax": _temperature}


def search(rule: str, sources: list[str], trials: int, seed: int = 0) -> dict[str, Any]:
    """The best of some trials: mean validation accuracy over the sources.

    "uniform" searches what training takes, "softmax" then its temperature alone, so that the rules
    differ in nothing but the attention.

    Raises:
      ValueError: trials below 1, unknown names.
    """
    checks.choice("rule", rule, SEARCHES)
    if trials < 1:
        raise ValueError(f"trials is {trials}: at least 1")

    def objective(trial: optuna.Trial) -> float:
        settings = SEARCHES[rule](trial)
        found = [
            experiment.run_features(source, rule, settings, 0, "validation")["accuracy"]
            for source in sources
        ]
        return float(np.mean(found))

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=trials)
    return {"best": study.best_params, "validation_accuracy": study.best_value}
