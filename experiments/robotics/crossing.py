"""The crossing of highway-env: where everybody is, as a driver who turns left sees it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

ROWS, FEATURES = 15, ("presence", "x", "y", "vx", "vy", "cos_h", "sin_h")
METRES, SPEED = 100.0, 20.0  # of a feature's 1
ACTIONS = 3  # slower, as it is, faster
CONFIG = {
    "observation": {
        "type": "Kinematics",
        "vehicles_count": ROWS,
        "features": list(FEATURES),
        "features_range": {
            "x": [-METRES, METRES],
            "y": [-METRES, METRES],
            "vx": [-SPEED, SPEED],
            "vy": [-SPEED, SPEED],
        },
        "absolute": False,
        "order": "shuffled",
        "see_behind": True,
    }
}


class Drive(NamedTuple):
    """What an episode came to.

    Attributes:
      total: of its rewards.
      crashed: whether it ended in a collision.
      steps: decisions.
    """

    total: float
    crashed: bool
    steps: int


def make() -> Any:
    """The environment `intersection-v0`.

    Its first successor has continuous actions; the second, which the warning is for, differs in which
    others each of them minds, so that figures that are known for the first do not hold.
    """
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    import gymnasium
    import highway_env  # noqa: F401  (registers the environment)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*intersection-v0 is out of date.*")
        return gymnasium.make("intersection-v0", config=CONFIG)


def drive(env: Any, seed: int, act: Callable[[np.ndarray], int]) -> Drive:
    """One episode: `act` decides by what is seen [ROWS, FEATURES], once a second."""
    seen, _ = env.reset(seed=seed)
    total, steps = 0.0, 0
    while True:
        seen, reward, ended, late, info = env.step(act(seen))
        total, steps = total + float(reward), steps + 1
        if ended or late:
            return Drive(total, bool(info["crashed"]), steps)


def noisy(seen: np.ndarray, rng: np.random.Generator, metres: float, speed: float) -> np.ndarray:
    """The same with normal errors of the others' positions and speeds, of these deviations."""
    errors = rng.normal(size=(ROWS, 4)) * np.array([metres / METRES] * 2 + [speed / SPEED] * 2)
    errors[0] = 0
    found = seen.copy()
    found[:, 1:5] += (errors * seen[:, :1]).astype(np.float32)
    return found


def missing(seen: np.ndarray, rng: np.random.Generator, part: float) -> np.ndarray:
    """The same without some of the others, each with the chance `part`."""
    lost = rng.random(ROWS) < part
    lost[0] = False
    return np.where(lost[:, None], 0, seen).astype(np.float32)
