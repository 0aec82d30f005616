"""Allocation against one sort of the units: time, exactness, compilations.

    python -m experiments.benchmarks.allocation [--json OUT] [--quick]

Half a minute on two cores; --quick takes ten seconds. Expected, as ratio to `jnp.sort` of N float32 in
the same run at N = 1e5 and 1e6: real amounts at most 0.1, whole amounts at most 0.25, a ladder of 4
levels under 8 device budgets at most 0.5.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import _report
from experiments.benchmarks._report import Bar, Row
from jbalance import Status, allocate

SIZES = (1_000, 100_000, 1_000_000)
QUICK_SIZES = (1_000, 100_000)
BARRED_FROM = 100_000  # below, the fixed cost of a call is what is measured
UPDATES = 100
PER_UNIT = 64  # budget per unit
NUM_DEVICES = 8
LADDER_COSTS = (0, 2, 4, 8)


class Case(NamedTuple):
    """One allocation of N units: a jitted function of its data, and whether a result is exact."""

    run: Callable[..., Any]
    data: tuple[Any, ...]  # w or values first, the budget second
    exact: Callable[[Any], bool]
    bar: float | None


def main() -> None:
    _report.main("benchmarks.allocation", __doc__, measure)


def measure(quick: bool) -> Iterator[Row]:
    for size in QUICK_SIZES if quick else SIZES:
        yield from _ratios(size)


def _ratios(size: int) -> list[Row]:
    rng = np.random.default_rng(0)
    w = rng.lognormal(0, 1, size).astype(np.float32)
    unsorted = jnp.asarray(w)
    sort = jax.jit(jnp.sort)
    cases = {name: make(rng, w) for name, make in CASES.items()}
    calls: dict[str, Callable[[], Any]] = {
        "jnp.sort": lambda: sort(unsorted),
        "np.sort": lambda: np.sort(w),
    }
    calls |= {name: functools.partial(case.run, *case.data) for name, case in cases.items()}
    seconds = _report.interleaved(calls)
    rows = []
    for name, case in cases.items():
        label = f"{name}_n{size}"
        bar = Bar(case.bar) if case.bar and size >= BARRED_FROM else None
        rows += [
            Row(label, "ms", seconds[name] * 1e3),
            Row(label, "ratio_to_jnp_sort", seconds[name] / seconds["jnp.sort"], bar),
            Row(label, "ratio_to_np_sort", seconds[name] / seconds["np.sort"]),
            Row(label, "budget_exact", float(_exact(case)), Bar(1, at_least=True)),
        ]
        if size == SIZES[0]:
            rows.append(Row(label, "traces", _traces(rng, case), Bar(1)))
    return rows


def _exact(case: Case) -> bool:
    out = case.run(*case.data)
    return int(out.status) == Status.OK and case.exact(out)


def _traces(rng: np.random.Generator, case: Case) -> int:
    """Traces of 100 updates, each with new importance and a new budget."""
    traces = 0

    def counted(*data: Any) -> Any:
        nonlocal traces
        traces += 1
        return case.run(*data)

    update = jax.jit(counted)
    importance, budget, *rest = case.data
    for i in range(UPDATES):
        fresh = importance * rng.uniform(0.5, 2.0, np.shape(importance)).astype(np.float32)
        update(fresh, budget + np.asarray(i, budget.dtype), *rest)
    return traces


def _real(rng: np.random.Generator, w: np.ndarray) -> Case:
    budget = np.float32(PER_UNIT * w.size)

    def exact(out: Any) -> bool:
        """To the rounding of float32 amounts."""
        total = np.asarray(out.amount, np.float64).sum()
        return bool(abs(total / budget - 1) < 1e-6)

    floor, cap = np.float32(4), np.float32(512)
    run = jax.jit(allocate.water_fill)
    return Case(run, jax.device_put((w, budget, floor, cap)), exact, 0.1)


def _integer(rng: np.random.Generator, w: np.ndarray) -> Case:
    budget = np.int32(PER_UNIT * w.size)

    def exact(out: Any) -> bool:
        return int(np.asarray(out.amount, np.int64).sum()) == budget

    run = jax.jit(allocate.whole)
    return Case(run, jax.device_put((w, budget, np.int32(4), np.int32(512))), exact, 0.25)


def _ladder(rng: np.random.Generator, w: np.ndarray, costs: np.ndarray, bar: float | None) -> Case:
    """Concave values; half of what the top levels of a device's units would cost."""
    values = w[:, None] * np.array([0, 0.6, 0.85, 1], np.float32)
    device_of = rng.integers(0, NUM_DEVICES, w.size).astype(np.int32)
    cost = np.broadcast_to(costs, values.shape)
    budgets = (np.bincount(device_of, cost[:, -1], NUM_DEVICES) / 2).astype(np.int32)

    def run(values, budgets, costs, device_of):
        return allocate.ladder(values, costs, budgets, device_of)

    def exact(out: Any) -> bool:
        """Within every budget, and less left than one unit's whole ladder."""
        chosen = np.take_along_axis(cost, np.asarray(out.level)[:, None], 1)[:, 0]
        spent = np.bincount(device_of, chosen, NUM_DEVICES)
        left = budgets - spent
        return bool((left >= 0).all() and (left < costs.max()).all())

    return Case(jax.jit(run), jax.device_put((values, budgets, costs, device_of)), exact, bar)


def _ladder_shared(rng: np.random.Generator, w: np.ndarray) -> Case:
    return _ladder(rng, w, np.array(LADDER_COSTS, np.int32), 0.5)


def _ladder_per_unit(rng: np.random.Generator, w: np.ndarray) -> Case:
    steps = rng.integers(1, 5, (w.size, len(LADDER_COSTS) - 1))
    costs = np.concatenate([np.zeros((w.size, 1), int), np.cumsum(steps, axis=1)], axis=1)
    return _ladder(rng, w, costs.astype(np.int32), None)


CASES: dict[str, Callable[[np.random.Generator, np.ndarray], Case]] = {
    "real": _real,
    "integer": _integer,
    "ladder4_g8": _ladder_shared,
    "ladder4_g8_unit_costs": _ladder_per_unit,
}

if __name__ == "__main__":
    main()
