"""Loads that drift: experts stay where they are, move where that pays, or are placed anew each time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks._report import Bar, Row
from jbalance import place

DEVICES, ROUNDS, DRIFT = 16, 8, 0.15  # standard deviation of a round's change of the logarithms
COST = 0.002  # of moving one of the experts, in relative load: a round is many steps


def rows(loads: np.ndarray, seed: int = 0) -> Iterator[Row]:
    """Time of the steps over its bound, and experts moved a round, of each way.

    Args:
      loads: [layers, experts] at the beginning.
      seed: of the drift.
    """
    walk = np.cumsum(np.random.default_rng(seed).normal(size=(ROUNDS + 1, *loads.shape)), axis=0)
    path = [jnp.asarray(loads * np.exp(DRIFT * x), jnp.float32) for x in walk]
    size = jnp.ones(loads.shape[1], jnp.int32)
    settings: dict[str, Any] = {"num_devices": DEVICES, "max_count": -(-loads.shape[1] // DEVICES)}
    pack = jax.jit(jax.vmap(functools.partial(place.pack, **settings)))

    def rebalanced(**more: Any) -> Callable[[jax.Array, jax.Array], Any]:
        def one(device_of: jax.Array, now: jax.Array) -> Any:
            return place.rebalance(device_of, now, size, **settings, **more).placement

        return jax.jit(jax.vmap(one))

    ways = {
        "stay": rebalanced(swaps=0),
        "rebalance": rebalanced(cost=COST),
        "anew": lambda device_of, now: pack(now),
    }
    for name, way in ways.items():
        device_of, times, bounds, moved = pack(path[0]).device_of, 0.0, 0.0, 0
        for now in path[1:]:
            placed = way(device_of, now)
            step = place.step_time(placed)
            times, bounds = times + float(step.total), bounds + float(step.bound)
            moved += int(jnp.sum(placed.device_of != device_of))
            device_of = placed.device_of
        label = f"drift_g{DEVICES}_{name}"
        bar = Bar(1.06) if name == "rebalance" else None
        yield Row(label, "time_over_bound", times / bounds, bar)
        yield Row(label, "moved_a_round", moved / ROUNDS / loads.size)
