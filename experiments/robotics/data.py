"""What the expert does in crossings, on its own way and off it; recorded once, kept in `out/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.harness import files
from experiments.robotics import crossing, expert

STRAY = 0.25  # part of the decisions that are drawn instead, so that mistakes are seen too
CACHE = Path("out/robotics")


class Scenes(NamedTuple):
    """Of decisions.

    Attributes:
      seen: [B, ROWS, FEATURES] float32; the driver's row first.
      value: [B, ACTIONS] float32, in rewards: the expert's best plan that begins with each action.
      worth: [B, ROWS] float32, of seeing each, in rewards; 0 where there is nobody, and the driver's.
    """

    seen: np.ndarray
    value: np.ndarray
    worth: np.ndarray


def record(first: int, episodes: int) -> Scenes:
    """The scenes of episodes whose seeds begin with `first`."""
    seen, value, worth = [], [], []
    for seed in range(first, first + episodes):
        stray = np.random.default_rng(seed)

        def act(now: crossing.Moment, stray: np.random.Generator = stray) -> int:
            found, speed = expert.hits(now.env), now.env.vehicle.speed
            judged = expert.by_action(speed, found)
            seen.append(now.seen)
            value.append(judged)
            worth.append(_by_row(now.seen, now.env, expert.worth(speed, found)))
            drawn = int(stray.integers(crossing.ACTIONS))
            return drawn if stray.random() < STRAY else int(expert.best(judged))

        crossing.drive(crossing.begin(seed), act)
    return Scenes(np.array(seen, np.float32), np.array(value, np.float32), np.array(worth))


def read(first: int, episodes: int) -> Scenes:
    """`record`, or what it gave before with the same settings.

    Raises:
      ValueError: a file of other arrays in its place.
    """
    made_by = [first, episodes, STRAY, crossing.CONFIG, expert.settings()]
    path = CACHE / f"scenes_{files.digest_of(made_by)[:16]}.npz"
    if not path.exists():
        files.write_npz(path, record(first, episodes)._asdict())
    arrays = files.read_npz(path)
    if set(arrays) != set(Scenes._fields):
        raise ValueError(f"{path} holds {sorted(arrays)}, not {sorted(Scenes._fields)}: remove it")
    return Scenes(**arrays)


def _by_row(view: np.ndarray, env: Any, worth: np.ndarray) -> np.ndarray:
    """[ROWS] the others' worth in the order of the rows, which have their places."""
    rows = np.zeros(len(view), np.float32)
    own = env.vehicle.position
    for other, w in zip(expert.others_of(env), worth, strict=True):
        place = np.clip((other.position - own) / crossing.METRES, -1, 1)
        apart = np.abs(view[1:, 1:3] - place).max(axis=1) + (view[1:, 0] == 0)
        if apart.min() < 1e-4:  # else beyond the rows that are seen
            rows[1 + apart.argmin()] = w
    return rows
