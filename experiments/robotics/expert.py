"""What is imitated: a planner that knows everyone's route, and foresees who will be where.

Each sequence of three decisions, one a second, is driven in thought, with everybody on their own route
at their speed, or faster; the first decision of the best sequence is taken.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from experiments.robotics.crossing import ACTIONS

SPEEDS = np.array([0.0, 4.5, 9.0])  # m/s, that the driver can want
LAG = 0.6  # s, in which the speed follows the wanted one
STEP, SECONDS, SECOND = 0.2, 6, 5  # s of foresight; steps of one
TIMES = np.arange(1, SECONDS * SECOND + 1) * STEP
GAIN, LIMIT = 2.0, 10.0  # m/s^2 and m/s, of others that get faster
HALF = 1.25  # m, from a vehicle's middle to those of the two discs that cover it
TOUCH, GROWTH = 2.6, 0.1  # m between two vehicles' discs; and for each second of foresight
FAST = (7.0, 9.0)  # m/s, between which a second's reward rises from 0 to 1
ONWARD = 0.05  # a second's worth of being at full speed, where nothing else differs
CRASH, LATER = -8.0, 0.97  # a collision's worth, and what is left of it a step later
GRID = 0.5  # m, of the driver's way
# Every sequence of three actions; those that drive on first, which wins ties.
PLANS = np.array(list(itertools.product((2, 1, 0), repeat=3)))


def settings() -> dict[str, Any]:
    """All that the expert's decisions depend on."""
    return {
        "LAG": LAG,
        "STEP": STEP,
        "SECONDS": SECONDS,
        "GAIN": GAIN,
        "LIMIT": LIMIT,
        "HALF": HALF,
        "TOUCH": TOUCH,
        "GROWTH": GROWTH,
        "FAST": FAST,
        "ONWARD": ONWARD,
        "CRASH": CRASH,
        "LATER": LATER,
        "GRID": GRID,
        "speeds": SPEEDS.tolist(),
    }


def driven(speed: float) -> tuple[np.ndarray, np.ndarray]:
    """[plans, times] ways in m and speeds, of plans that end with driving on."""
    now, way = np.full(len(PLANS), speed), np.zeros(len(PLANS))
    wanted, ways, speeds = now, [], []
    for i in range(len(TIMES)):
        if i % SECOND == 0:
            second, index = i // SECOND, np.round(now / SPEEDS[1]).astype(int)
            action = PLANS[:, second] if second < PLANS.shape[1] else np.full(len(PLANS), 2)
            kept = wanted if second else SPEEDS[index]
            wanted = np.where(action == 1, kept, SPEEDS[np.clip(index + action - 1, 0, 2)])
        now = now + (wanted - now) * (1 - np.exp(-STEP / LAG))
        way = way + now * STEP
        ways.append(way)
        speeds.append(now)
    return np.stack(ways, 1), np.stack(speeds, 1)


def others_of(env: Any) -> list[Any]:
    """Everybody but the driver."""
    return [x for x in env.road.vehicles if x is not env.vehicle]


def hits(env: Any) -> np.ndarray:
    """[others, plans] in which step of `TIMES` a plan first hits each; their number where never."""
    own = env.vehicle
    ways, _ = driven(own.speed)
    places = _discs(env.road, own, np.arange(0, ways.max() + GRID, GRID))
    mine = places[np.round(ways / GRID).astype(int)]  # [plans, times, 2, 2]
    others = others_of(env)
    found = np.full((len(others), len(PLANS)), len(TIMES))
    for i, other in enumerate(others):
        if _follows(own, other):
            continue
        top = max(other.speed, min(other.target_speed, LIMIT))
        for speeds in (
            np.full(len(TIMES), other.speed),
            np.minimum(other.speed + GAIN * TIMES, top),
        ):
            theirs = _discs(env.road, other, np.cumsum(speeds) * STEP)  # [times, 2, 2]
            apart = np.linalg.norm(mine[:, :, :, None] - theirs[:, None], axis=-1).min((2, 3))
            touch = apart < TOUCH + GROWTH * TIMES
            first = np.where(touch.any(1), touch.argmax(1), len(TIMES))
            found[i] = np.minimum(found[i], first)
    return found


def values(speed: float, first: np.ndarray) -> np.ndarray:
    """[plans] what each is worth that first hits somebody in the step `first` [plans]."""
    _, speeds = driven(speed)
    reward = np.clip((speeds - FAST[0]) / (FAST[1] - FAST[0]), 0, 1) + ONWARD * speeds / SPEEDS[-1]
    total = np.cumsum(reward * STEP, 1)
    last = np.minimum(first, len(TIMES) - 1)
    crash = np.where(first < len(TIMES), CRASH * LATER**first, 0)
    return np.take_along_axis(total, last[:, None], 1)[:, 0] + crash


def decide(speed: float, found: np.ndarray) -> int:
    """The plan that is taken by who is hit [others, plans] in it."""
    first = found.min(0, initial=len(TIMES))
    return int(np.argmax(values(speed, first)))


def by_action(speed: float, found: np.ndarray) -> np.ndarray:
    """[ACTIONS] the worth of the best plan that begins with each."""
    each = values(speed, found.min(0, initial=len(TIMES)))
    return np.array([each[PLANS[:, 0] == action].max() for action in range(ACTIONS)])


def best(value: np.ndarray) -> np.ndarray:
    """[...] the best action by values [..., ACTIONS]; the fastest of equal ones."""
    return ACTIONS - 1 - np.argmax(value[..., ::-1], axis=-1)


def act(env: Any) -> int:
    """The expert's action."""
    return int(best(by_action(env.vehicle.speed, hits(env))))


def worth(speed: float, found: np.ndarray) -> np.ndarray:
    """[others] what it is worth to see each: the mean of what it adds first, and last, of all.

    First: beside nobody, what the plan gains that minds this one. Last: beside everybody else, what the
    plan loses that does not. The two ends of Shapley's value, in rewards.
    """
    truly = values(speed, found.min(0, initial=len(TIMES)))
    blind = truly[decide(speed, found[:0])]
    each = []
    for i in range(len(found)):
        first = truly[decide(speed, found[i : i + 1])] - blind
        last = truly.max() - truly[decide(speed, np.delete(found, i, axis=0))]
        each.append((max(first, 0.0) + last) / 2)
    return np.array(each, np.float32)


def _discs(road: Any, vehicle: Any, ways: np.ndarray) -> np.ndarray:
    """[ways, 2, 2] middles of a vehicle's two discs, so far along its route."""
    start = vehicle.lane.local_coordinates(vehicle.position)[0]
    route = vehicle.route or [vehicle.lane_index]
    found = []
    for way in ways:
        position, heading = road.network.position_heading_along_route(
            route, start + way, 0, vehicle.lane_index
        )
        along = HALF * np.array([np.cos(heading), np.sin(heading)])
        found.append([position + along, position - along])
    return np.array(found)


def _follows(own: Any, other: Any) -> bool:
    """On the driver's lane and behind: it keeps its distance by itself."""
    if other.lane_index != own.lane_index:
        return False
    places = (x.lane.local_coordinates(x.position)[0] for x in (other, own))
    return bool(next(places) < next(places))
