"""What a vehicle is worth by where it will be: METHOD step 1 over classes of closest approach."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from experiments.robotics import crossing
from experiments.robotics.data import Scenes
from jbalance import importance

# The driver's way, in m: northward, an arc to the left, westward.
EDGE, RADIUS, LANE = 11.0, 13.0, -2.0
ARC = RADIUS * np.pi / 2
FULL, LAG = 9.0, 0.6  # m/s of driving on, and s until it is reached
TIMES = np.arange(1, 25) * 0.25  # s
SPEEDS, REACHES = (
    (0.0, 4.5, FULL),
    (3.0, 10.0),
)  # m/s that a driver may want; m, in which nearness falls
FORESEEN = len(SPEEDS) * (1 + len(REACHES))
WHEN, HOW_NEAR = np.array([0.0, 1, 2, 3, 4, 6]), np.array([0.0, 2, 4, 6, 10, 20, 60])  # s, m
TRUST = 10.0  # vehicles of a class that count as much as there being no worth


def approach(seen: np.ndarray, wanted: float = FULL) -> tuple[np.ndarray, np.ndarray]:
    """When (s) and how near (m) each row comes to a driver of this speed, itself straight on.

    Args:
      seen: [B, ROWS, FEATURES].
      wanted: m/s, that the driver's speed becomes.

    Returns:
      [B, ROWS] twice.
    """
    own, others = seen[:, :1].astype(float), seen.astype(float)
    x, y = crossing.METRES * own[..., 1], crossing.METRES * own[..., 2]
    speed = crossing.SPEED * np.hypot(own[..., 3], own[..., 4])
    changed = TIMES - LAG * (1 - np.exp(-TIMES / LAG))
    way = speed * TIMES + (wanted - speed) * changed  # [B, times]
    start = _along(x, y)
    lane = _place(start + way) - _place(start)
    # Others' places and speeds are relative to the driver's.
    place = crossing.METRES * others[..., None, 1:3]
    velocity = crossing.SPEED * (others[..., None, 3:5] + own[..., None, 3:5])
    apart = np.linalg.norm(place + velocity * TIMES[:, None] - lane[:, None], axis=-1)
    return TIMES[apart.argmin(-1)], apart.min(-1)


def foreseen(seen: np.ndarray) -> np.ndarray:
    """[B, ROWS, FORESEEN] in 0..1: when and how near each row comes to a driver of each speed."""
    found = []
    for wanted in SPEEDS:
        when, near = approach(seen, wanted)
        found += [when / TIMES[-1], *(np.exp(-near / reach) for reach in REACHES)]
    return np.stack(found, -1).astype(np.float32)


class Worth(NamedTuple):
    """What classes of approach are worth, learned from the training part.

    Attributes:
      by_class: [classes] mean worth of seeing a vehicle of each, in rewards.
    """

    by_class: np.ndarray

    @classmethod
    def of(cls, known: Scenes) -> Worth:
        there = _others(known.seen)
        a, worth = classes(known.seen)[there], known.worth[there]
        return cls((a.T @ worth / (a.sum(0) + TRUST)).astype(np.float32))

    def of_rows(self, seen: np.ndarray) -> np.ndarray:
        """[B, ROWS] w_i = sum_k a_ik complexity_k; 0 where there is nobody, and the driver's."""
        a = classes(seen)
        w = importance.weighted(a.reshape(-1, a.shape[-1]), self.by_class)
        return np.where(_others(seen), np.asarray(w).reshape(a.shape[:-1]), 0)


def classes(seen: np.ndarray) -> np.ndarray:
    """[B, ROWS, classes] how far each row is of each class: linear between neighbours, 1 in all."""
    when, near = approach(seen)
    a = _hats(when, WHEN)[..., :, None] * _hats(near, HOW_NEAR)[..., None, :]
    return a.reshape(*when.shape, -1).astype(np.float32)


def _others(seen: np.ndarray) -> np.ndarray:
    """[B, ROWS] where there is somebody else."""
    there = seen[..., 0] > 0
    there[:, 0] = False
    return there


def _hats(x: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """[..., nodes] linear interpolation's weights; the ends' beyond them."""
    x = np.clip(x, nodes[0], nodes[-1])
    left = np.clip(np.searchsorted(nodes, x, side="right") - 1, 0, len(nodes) - 2)
    part = (x - nodes[left]) / (nodes[left + 1] - nodes[left])
    unit = np.eye(len(nodes))
    return unit[left] * (1 - part[..., None]) + unit[left + 1] * part[..., None]


def _along(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far a place is on the driver's way; 0 where the arc begins."""
    arc = RADIUS * np.arctan2(EDGE - y, x + EDGE)
    return np.where(y > EDGE, EDGE - y, np.where(x < -EDGE, ARC - EDGE - x, arc))


def _place(way: np.ndarray) -> np.ndarray:
    """[..., 2] where that is."""
    angle = np.clip(way, 0, ARC) / RADIUS
    x = RADIUS * np.cos(angle) - EDGE - np.maximum(way - ARC, 0)
    y = EDGE - RADIUS * np.sin(angle) - np.minimum(way, 0)
    return np.stack([x, y], -1)
