"""Results in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def show(report: Mapping[str, Any]) -> None:
    """A row for every run and baseline of a report."""
    names = list(dict.fromkeys(name for run in report["runs"] for name in run["figures"]))
    table = Table("arm", "seed")
    for name in names:
        table.add_column(name, justify="right")
    for name, known in report.get("baselines", {}).items():
        table.add_row(name, "", *(f"{known[x]:.3f}" if x in known else "" for x in names))
    for run in report["runs"]:
        figures = (f"{run['figures'][x]:.4g}" if x in run["figures"] else "" for x in names)
        table.add_row(run["arm"], str(run["seed"]), *figures)
    Console(width=140).print(table)
