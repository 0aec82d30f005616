"""Progress of long steps: bars on a terminal, plain lines in a log; both on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def display() -> Iterator[Progress]:
    """Bars for tasks of any kind.

    `for x in bars.track(items, description="Scoring")`, or `task = bars.add_task("Scoring", total=8)`
    and `bars.advance(task)` after each; total=None where it is not known.
    """
    console = Console(stderr=True)
    columns = (SpinnerColumn(), *Progress.get_default_columns()[:2], MofNCompleteColumn())
    times = TimeElapsedColumn(), TimeRemainingColumn()
    moving = sys.stderr.isatty() and not console.is_dumb_terminal
    bars = Progress(*columns, *times, console=console) if moving else _Lines(console)
    with bars:
        yield bars


@contextmanager
def bar(name: str, steps: int) -> Iterator[Callable[[], None]]:
    """One bar of so many steps; what it gives is called after each."""
    with display() as bars:
        task = bars.add_task(name, total=steps)
        yield lambda: bars.advance(task)


class _Lines(Progress):
    """Progress for logs: a line when a task starts, at every quarter of it, and when it is done."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, auto_refresh=False, disable=True)

    def add_task(
        self,
        description: str,
        start: bool = True,
        total: float | None = 100.0,
        completed: int = 0,
        visible: bool = True,
        **fields: Any,
    ) -> TaskID:
        print(description, file=sys.stderr, flush=True)
        return super().add_task(description, start, total, completed, visible, **fields)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        before = self._quarter(task_id)
        super().advance(task_id, advance)
        task = self.tasks[self.task_ids.index(task_id)]
        if self._quarter(task_id) > before:
            line = f"{task.description}: {task.completed:.0f} of {task.total:.0f}"
            print(f"{line}, {task.elapsed or 0:.1f} s", file=sys.stderr, flush=True)

    def _quarter(self, task_id: TaskID) -> int:
        task = self.tasks[self.task_ids.index(task_id)]
        return int(4 * task.completed / task.total) if task.total else 0
