"""One run: a policy serves a flood, counted in tokens for long and by the model for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.customer_service import data, engine, figures, schedule
from experiments.customer_service.data import CUSTOMERS, LIGHT, Trace
from experiments.customer_service.schedule import Executor, Policy, Served
from experiments.harness import runs

PLACES = 4


class Sizes(NamedTuple):
    """Steps of the counted trace, and of the one that the model serves."""

    horizon: int
    replayed: int


class Arm(NamedTuple):
    """How customers are served.

    Attributes:
      policy: who is next.
      shares_of: importance [C] -> shares of the service [C]; None for even ones.
      takes_back: whether places are lent.
      most: places that one customer may have at once; None for all.
      stuffed: whether the flood's texts are stuffed with what the scorers look for.
      by_model: whether the model serves the first steps too.
    """

    policy: Policy
    shares_of: Callable[[np.ndarray], np.ndarray] | None = None
    takes_back: bool = False
    most: int | None = None
    stuffed: bool = False
    by_model: bool = False


ARMS = {
    "first come": Arm(schedule.first_come, by_model=True),
    "round robin": Arm(schedule.round_robin),
    "counters": Arm(schedule.least_counter),
    "proportional": Arm(schedule.least_counter, data.proportional),
    "bounded": Arm(schedule.least_counter, data.bounded, by_model=True),
    "bounded, lent": Arm(schedule.least_counter, data.bounded, takes_back=True, by_model=True),
    "bounded, lent, halves": Arm(
        schedule.least_counter, data.bounded, takes_back=True, most=PLACES // 2, by_model=True
    ),
    "proportional, stuffed": Arm(schedule.least_counter, data.proportional, stuffed=True),
    "bounded, stuffed": Arm(schedule.least_counter, data.bounded, stuffed=True),
}


@functools.cache
def trace_of(seed: int, horizon: int, stuffed: bool) -> Trace:
    """The requests of a seed."""
    loaded = engine.loaded()
    return data.trace(seed, loaded.lines, loaded.tokenizer, horizon, stuffed=stuffed)


def run(name: str, seed: int, sizes: Sizes, advance: Callable[[], None]) -> Mapping[str, Any]:
    """An arm's figures over the whole trace, and whether the model serves it alike."""
    arm, trace = ARMS[name], trace_of(seed, sizes.horizon, ARMS[name].stuffed)
    weights = weights_of(arm, trace)
    calm_requests = trace.without_flood()
    flood = _served(arm, trace.requests, weights, sizes.horizon, schedule.Counting())
    calm = _served(arm, calm_requests, weights, sizes.horizon, schedule.Counting())
    waits = [
        figures.waits(requests, served, sizes.horizon, LIGHT)
        for requests, served in ((trace.requests, flood), (calm_requests, calm))
    ]
    own = [r.customer for r in calm_requests]
    of_customer = np.array([waits[0][np.equal(own, c)].mean() for c in range(LIGHT)])
    urgent = [c for c in range(LIGHT) if trace.customers[c].urgent]
    p99 = [float(np.percentile(x, 99)) for x in waits]
    advance()
    found = {
        "gap / bound": figures.service_gap(flood, weights)
        / figures.gap_bound(trace.requests, PLACES, weights),
        "p99 wait": p99[0],
        "p99 wait, no flood": p99[1],
        "p99 ratio": p99[0] / p99[1],
        "mean wait": float(of_customer.mean()),
        "mean wait, urgent": float(of_customer[urgent].mean()),
        "flood's part": float(flood.given[-1, data.FLOOD] / flood.given[-1].sum()),
        "Jain": figures.jain(trace.requests, flood, sizes.horizon),
        "idle steps": figures.idle_steps(flood),
        "tokens a step": figures.tokens_a_step(flood),
    }
    if arm.by_model:
        found |= _by_model(arm, trace, weights, sizes.replayed)
    advance()
    return {"figures": found, "cases": {"mean wait": runs.packed(of_customer)}}


def weights_of(arm: Arm, trace: Trace) -> np.ndarray:
    """[C] of the counters, 1 in the mean."""
    if arm.shares_of is None:
        return np.ones(CUSTOMERS)
    return CUSTOMERS * arm.shares_of(trace.importance)


def _served(
    arm: Arm,
    requests: list[schedule.Request],
    weights: np.ndarray,
    horizon: int,
    executor: Executor,
) -> Served:
    return schedule.serve(
        requests,
        arm.policy,
        executor,
        places=PLACES,
        horizon=horizon,
        weights=weights,
        takes_back=arm.takes_back,
        most=arm.most,
    )


def _by_model(arm: Arm, trace: Trace, weights: np.ndarray, horizon: int) -> dict[str, float]:
    """The first steps by the model: requests in the counted order, and answers beside a flood."""
    served, answers = [], []
    for requests in (trace.requests, trace.without_flood()):
        executor = engine.Engine(engine.loaded().decoder, PLACES, weights)
        served.append(_served(arm, requests, weights, horizon, executor))
        answers.append(executor.answers)
    counted = _served(arm, trace.requests, weights, horizon, schedule.Counting())
    alike = counted.order == served[0].order and np.array_equal(counted.given, served[0].given)
    both = [key for key in answers[0] if key in answers[1]]
    changed = sum(answers[0][key] != answers[1][key] for key in both)
    return {
        "as the model": float(alike),
        "answers beside a flood": len(both),
        "answers changed by it": changed,
    }
