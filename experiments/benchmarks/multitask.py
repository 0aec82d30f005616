"""Benchmark of task aggregators: time and conflicts, beside one Gramian and, with --peers, torchjd.

    python -m experiments.benchmarks.multitask [--json OUT] [--peers] [--quick]

A case `upgrad_kK_nN` aggregates K gradients of N parameters, drawn so that they conflict: their Gramian
has condition number 1e5. `time_over_gramian` is the time as a multiple of that of the Gramian and one
weighted sum, which no aggregator can do without; `time_over_torchjd` is beside torchjd's aggregator of
the same name with its defaults; `least_cosine` is that of a gradient with the result, below 0 where a
task is harmed. Times are medians of interleaved calls on one core, ratios those of one run.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import _peers, _report
from experiments.benchmarks._peers import Peer
from experiments.benchmarks._report import Bar, Row
from jbalance import multitask

SIZES = ((2, 10**5), (2, 10**6), (8, 10**5), (8, 10**6), (32, 10**5), (32, 10**6))
QUICK_SIZES = ((2, 10**4), (8, 10**4))
CONDITION = 1e5
THEIRS = {"upgrad": "UPGrad", "mgda": "MGDA", "pcgrad": "PCGrad", "mean": "Mean"}
NO_HARM = ("upgrad", "mgda")


def main() -> None:
    _report.main("benchmarks.multitask", __doc__, measure_all, _peers.add_options)


def measure_all(quick: bool, peers: bool) -> Iterator[Row]:
    for tasks, size in QUICK_SIZES if quick else SIZES:
        yield from _sized(tasks, size, peers)


def conflicting(tasks: int, size: int) -> np.ndarray:
    """[K, N] float32 gradients, a positive sum of which all but cancels: condition number 1e5."""
    rng = np.random.default_rng(tasks)
    mixing = rng.normal(size=(tasks, tasks))
    mixing[:, 0] = rng.uniform(0.3, 1, size=tasks)
    left, _ = np.linalg.qr(mixing)
    right, _ = np.linalg.qr(rng.normal(size=(size, tasks)))
    scale = np.sqrt(np.append(1 / CONDITION, np.ones(tasks - 1)))
    return ((left * scale) @ right.T).astype(np.float32)


def _sized(tasks: int, size: int, peers: bool) -> list[Row]:
    """All aggregators for one size, in one interleaved run."""
    gradients = conflicting(tasks, size)
    x = jnp.asarray(gradients)
    made = {
        "upgrad": multitask.upgrad(),
        "mgda": multitask.fair(np.inf),
        "nash": multitask.fair(1.0),
        "pcgrad": multitask.pcgrad(jax.random.key(0)),
        "mean": multitask.mean(),
    }
    calls: dict[str, Callable[[], Any]] = {"gramian": functools.partial(_least, x)}
    for name, weighting in made.items():
        calls[name] = _call(multitask.aggregator(weighting, tasks), x)
    case = f"k{tasks}_n{size}"
    with contextlib.ExitStack() as stack:
        if peers:
            peer = stack.enter_context(Peer("aggregators.py", {case: gradients}))
            calls |= {
                f"their {name}": peer.call(f"{theirs} {case}") for name, theirs in THEIRS.items()
            }
        seconds = _report.interleaved(calls)
        theirs_cosine = {name: float(calls[f"their {name}"]()) for name in THEIRS if peers}
    rows = []
    for name in made:
        label, v = f"{name}_{case}", np.asarray(calls[name](), float)
        cosine = (gradients @ v / np.linalg.norm(gradients, axis=1) / np.linalg.norm(v)).min()
        bar = Bar(-1e-6, at_least=True) if name in NO_HARM else None
        rows.append(Row(label, "least_cosine", float(cosine), bar))
        rows.append(Row(label, "time_over_gramian", seconds[name] / seconds["gramian"]))
        if name in theirs_cosine:
            ratio = seconds[name] / seconds[f"their {name}"]
            rows.append(
                Row(label, "time_over_torchjd", ratio, Bar(1.0) if name == "upgrad" else None)
            )
            rows.append(Row(label, "least_cosine_of_torchjd", theirs_cosine[name]))
    return rows


def _call(made: Any, x: jax.Array) -> Callable[[], Any]:
    state = made.init(None)
    update = jax.jit(lambda x, state: made.update(x, state)[0])
    return functools.partial(update, x, state)


@jax.jit
def _least(x: jax.Array) -> jax.Array:
    """The Gramian and a sum weighted by something of it."""
    return multitask.combine(multitask.gramian(x)[0], x)


if __name__ == "__main__":
    main()
