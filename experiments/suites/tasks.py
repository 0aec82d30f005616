"""The tasks by name, and their cases by number."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from experiments.suites import arithmetic, counting, many_questions, retrieval, tracking
from experiments.suites.cases import Case, Writer
from jbalance import checks

Task = Callable[[Writer, np.random.Generator], Case]
GROUPS: dict[str, dict[str, Task]] = {
    "RULER-like": {**retrieval.TASKS, **tracking.TASKS, **counting.TASKS},
    "many questions": {**many_questions.TASKS},
    "arithmetic and in-context learning": {**arithmetic.TASKS},
}
TASKS: dict[str, Task] = {name: task for own in GROUPS.values() for name, task in own.items()}


def case_of(name: str, writer: Writer, index: int) -> Case:
    """Case `index` of a task: always the same one.

    Raises:
      ValueError: an unknown task, or a length that is too small for it.
    """
    task = checks.choice("--task", name, TASKS)
    case = task(writer, np.random.default_rng([zlib.crc32(name.encode()), index]))
    assert len(case.context) == writer.size
    return case
