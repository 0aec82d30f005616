"""What a run shows: tables in the terminal, `report.json` and `report.html`."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.harness import files
from experiments.kv_budget.report import page
from experiments.kv_budget.report.rows import (
    DEVICE_COLUMNS,
    POLICY_COLUMNS,
    device_rows,
    policy_rows,
)
from experiments.kv_budget.report.wording import Report, clean, evenness, label, verdict

_LOG_WIDTH = 100  # of the tables where the output is not a terminal
_WIDE = 98  # what the policies' ten columns need; in a narrower terminal they are two tables
_LEFT_COLUMNS = {"policy", "device"}


def write(report: Report, out: Path) -> None:
    """Writes `report.json` and the self-contained `report.html` into the folder `out`.

    Figures that are not finite are null in the JSON, which has no literal for them.
    """
    text = json.dumps(_plain(report), indent=1, sort_keys=True, allow_nan=False)
    # Rows of figures on one line each. Text cannot match: in it a line break is an escape.
    text = re.sub(r"\[\n[-+\d.eE,\snul]+\]", lambda rows: "".join(rows[0].split()), text)
    both = {"report.json": text + "\n", "report.html": page.render(report)}
    files.write_together({out / name: content.encode() for name, content in both.items()})


def print_table(report: Report, console: Console | None = None) -> None:
    """Prints a table of the policies and one of their devices, no wider than the terminal."""
    if console is None:
        console = Console(width=None if sys.stdout.isatty() else _LOG_WIDTH)
    title = (
        f"{label(report['model']['name'])}: {report['context_tokens']:,} tokens of context, "
        f"{report['continuation_tokens']:,} of continuation"
    )
    dim = {i for i, row in enumerate(report["policies"]) if not row["within_budget"]}
    parts = [range(10)] if console.width >= _WIDE else [range(6), (0, 6, 7, 8, 9)]
    for part in parts:
        rows = [[row[i] for i in part] for row in policy_rows(report)]
        _print(console, title, [POLICY_COLUMNS[i] for i in part], rows, dim)
    _print(console, "The devices", DEVICE_COLUMNS, device_rows(report), set())
    words = f"(over): more than the budget. {verdict(report)} {evenness(report)}"
    console.print(_text(words.strip(), console))


def _print(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    dim: set[int],
) -> None:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title_justify="left",
        title_style="bold",
    )
    table.title = _text(title, console)
    for name in columns:
        table.add_column(
            name, justify="left" if name in _LEFT_COLUMNS else "right", overflow="fold"
        )
    for i, row in enumerate(rows):
        cells = (_text(cell, console) for cell in row)
        table.add_row(*cells, style="dim" if i in dim else None)
    console.print(table)


def _text(text: str, console: Console) -> Text:
    """Text as it stands, no markup in it, in characters that the console can write."""
    return Text(clean(text).encode(console.encoding, "replace").decode(console.encoding))


def _plain(value: Any) -> Any:
    """Numbers and containers that JSON knows: arrays as lists, figures that are not finite as null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
