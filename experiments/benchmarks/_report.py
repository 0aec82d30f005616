"""What every benchmark shares: interleaved timing, rows with bars, a table and a JSON file."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from experiments.harness import cli, files, progress

REPETITIONS = 7
MOST_CALLS, TURN_SECONDS = 10, 0.02


@dataclasses.dataclass(frozen=True)
class Bar:
    """What a value is held against."""

    limit: float
    at_least: bool = False  # the value must reach the limit; else it must not exceed it

    def holds(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured value, and whether it holds its bar."""

    case: str
    metric: str
    value: float
    bar: Bar | None = None

    def as_json(self) -> dict[str, Any]:
        holds = None if self.bar is None else self.bar.holds(self.value)
        bar = None if self.bar is None else str(self.bar)
        return {
            "case": self.case,
            "metric": self.metric,
            "value": self.value,
            "bar": bar,
            "holds": holds,
        }


def interleaved(
    calls: Mapping[str, Callable[[], Any]], repetitions: int = REPETITIONS
) -> dict[str, float]:
    """Median seconds of each call, the calls taking turns so that all meet the same load.

    In its turn a call runs at least twice, and up to ten times within 20 ms, and the last is timed: what
    is measured is a step that repeats, not what the call before it left in the caches, of which a short
    call has some five to clear. Results are waited for; the first turn compiles.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            times[name].append(_turn(call))
    return {name: statistics.median(taken) for name, taken in times.items()}


def _turn(call: Callable[[], Any]) -> float:
    """Seconds of the last of some calls."""
    taken: list[float] = []
    while len(taken) < 2 or (len(taken) < MOST_CALLS and sum(taken) < TURN_SECONDS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - start)
    return taken[-1]


def main(
    name: str,
    description: str | None,
    measure: Callable[..., Iterable[Row]],
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """Run `measure(quick, **options)`, print its rows, and write them where --json says.

    On one core unless --all-cores: XLA does not spread a loop over cores, and on more than one the many
    small steps inside of it wait for each other, while dense attention gains.

    Args:
      name: of the module below `experiments`.
      description: the module's docstring.
      measure: all rows, with `quick` for a smoke run; the file has those that are there already.
      add_options: adds the options that it takes besides.
    """
    parser = cli.parser(f"experiments.{name}", description)
    cli.add_json(parser)
    parser.add_argument("--quick", action="store_true", help="small sizes: a smoke run")
    parser.add_argument("--all-cores", action="store_true", help="use all cores, not one")
    add_options(parser)
    sys.exit(cli.run(parser, functools.partial(_job, measure)))


def _job(measure: Callable[..., Iterable[Row]], options: argparse.Namespace) -> None:
    switches = vars(options)
    out = switches.pop("json")
    if not switches.pop("all_cores"):  # before JAX makes its threads
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    keep = files.json_writer(out)
    rows: list[Row] = []
    with progress.display() as bars:
        task = bars.add_task("Measuring", total=None)
        for row in measure(**switches):
            rows.append(row)
            every = [row.as_json() for row in rows]
            keep({"rows": every, "device": jax.devices()[0].device_kind})
            bars.update(task, description=f"{row.case}: {row.metric} {row.value:.4g}")
            bars.advance(task)
    _print(rows)


def _print(rows: list[Row]) -> None:
    table = Table("case", "metric")
    for name in ("value", "bar", "holds"):
        table.add_column(name, justify="right")
    for row in rows:
        holds = ""
        if row.bar is not None:
            holds = "[green]yes[/]" if row.bar.holds(row.value) else "[red]no[/]"
        table.add_row(row.case, row.metric, f"{row.value:.4g}", str(row.bar or ""), holds)
    Console().print(table)
