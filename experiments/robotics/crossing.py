"""The crossing of highway-env: where everybody is, as a driver who turns left sees it."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# The last two say where each is bound for, as its indicators would.
ROWS, FEATURES = 15, ("presence", "x", "y", "vx", "vy", "cos_h", "sin_h", "cos_d", "sin_d")
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
        "observe_intentions": True,
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


class Moment:
    """A state of an episode, from which each action is driven once, whoever takes it.

    Attributes:
      env: as it is.
      seen: [ROWS, FEATURES] float32.
      reward: for coming here.
      over: whether the episode ended.
    """

    def __init__(self, env: Any, seen: np.ndarray, reward: float, over: bool):
        self.env, self.seen, self.reward, self.over = env, seen, reward, over
        self._after: dict[int, Moment] = {}

    def step(self, action: int) -> Moment:
        """The moment a second later."""
        if action not in self._after:
            roads = self.env.road.network  # never change
            env = copy.deepcopy(self.env, {id(roads): roads})
            seen, reward, ended, late, _ = env.step(action)
            self._after[action] = Moment(env, seen, float(reward), ended or late)
        return self._after[action]


def begin(seed: int) -> Moment:
    """An episode's first moment."""
    env = make().unwrapped
    seen, _ = env.reset(seed=seed)
    return Moment(env, seen, 0.0, False)


def drive(start: Moment, act: Callable[[Moment], int]) -> Drive:
    """One episode, decided once a second."""
    moment, total, steps = start, 0.0, 0
    while not moment.over:
        moment = moment.step(act(moment))
        total, steps = total + moment.reward, steps + 1
    return Drive(total, bool(moment.env.vehicle.crashed), steps)


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
