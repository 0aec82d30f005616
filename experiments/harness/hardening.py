"""The page of what was tried to break jbalance, from `docs/results/hardening.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.harness import files

DATA, PAGE = Path("docs/results/hardening.json"), Path("docs/hardening.md")
HEAD = """# Hardening

Written by `python -m experiments.harness hardening` from `docs/results/hardening.json`; do not edit.
What was tried to break jbalance, what broke, the test that would notice again, and what is left.
"""
_TESTED = ("defects", "faults")
# Of faults, by the letter that each begins with.
_KINDS = {
    "A": "Numbers of the host",
    "B": "Adapters and what they assume of their context",
    "C": "Files",
    "D": "Degenerate numbers in training",
    "E": "Devices and attention",
    "F": "Arguments that are none",
    "G": "Random and hostile input",
}
# Heading, key of the file, fields and the titles of their columns.
_TABLES = (
    ("What was tried", "campaigns", {"what": "", "tried": "tried", "found": "found"}),
    (
        "What was found, and is mended",
        "defects",
        {"what": "defect", "now": "now", "test": "test"},
    ),
    (
        "Faults that other projects' users reported",
        "faults",
        {"fault": "fault", "now": "now", "test": "test"},
    ),
    ("What remains", "remains", {"what": "", "why": "why"}),
)


def write(data: Path = DATA, page: Path = PAGE) -> Path:
    """The page; returns its path.

    Raises:
      ValueError: a file of other fields, or a test that there is not.
    """
    report = files.read_json(data)
    parts = [HEAD]
    for title, key, columns in _TABLES:
        rows = report.get(key) if isinstance(report, dict) else None
        if not isinstance(rows, list) or any(set(columns) - set(row) for row in rows):
            raise ValueError(f"{data}: {key} must be a list of objects with {', '.join(columns)}")
        parts += [f"## {title}", ""]
        for heading, some in _grouped(data, rows) if key == "faults" else [(None, rows)]:
            parts += [f"### {heading}", ""] if heading else []
            parts += [_table(some, columns), ""]
        commands = [f"    {row['command']}" for row in rows if row.get("command")]
        parts += [*dict.fromkeys(commands), ""] if commands else []
    for row in (row for key in _TESTED for row in report[key]):
        path, _, name = row["test"].partition("::")
        if not Path(path).is_file() or f"def {name}" not in Path(path).read_text(encoding="utf-8"):
            raise ValueError(f"{data}: there is no test {row['test']}")
    files.write_text(page, "\n".join(parts).rstrip() + "\n")
    return page


def _grouped(
    data: Path, rows: Sequence[Mapping[str, Any]]
) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Faults by their letters."""
    for row in rows:
        if row["fault"][:1] not in _KINDS:
            raise ValueError(f"{data}: {row['fault']!r} begins with none of {', '.join(_KINDS)}")
    groups = {x: [row for row in rows if row["fault"][0] == x] for x in _KINDS}
    return [(f"{x}. {_KINDS[x]}", some) for x, some in groups.items() if some]


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(_cell(x) for x in cells) + " |"

    lines = [line(list(columns.values())), "|" + " --- |" * len(columns)]
    return "\n".join([*lines, *(line([row[name] for name in columns]) for row in rows)])


def _cell(x: Any) -> str:
    text = f"{x:,}" if isinstance(x, int) else str(x).replace("|", r"\|")
    return f"`{text}`" if "::" in text else text
