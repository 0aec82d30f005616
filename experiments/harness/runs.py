"""Arms times seeds, one file of results: what is there is not run again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.harness import files, progress

RunOne = Callable[[str, int, Callable[[], None]], Mapping[str, Any]]


def run_all(
    out: Path,
    about: Mapping[str, Any],
    arms: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    one: RunOne,
) -> dict[str, Any]:
    """Every arm with every seed; the file is written after each run.

    Seeds are the outer loop, so that whatever is there can be compared pair by pair.

    Args:
      out: the file of results.
      about: what the runs share (settings, baselines, the command that made them), as JSON has it.
      arms: names.
      seeds: of data order and first parameters, the same ones for each arm.
      steps: of one run, for the progress bar.
      one: `one(arm, seed, advance)` -> a run's figures; it calls `advance()` after each step.

    Returns:
      What the file holds: `about` with "runs", one mapping with "arm" and "seed" for each.

    Raises:
      ValueError: the file holds runs with other settings, or is no file of results.
    """
    report = _begun(out, about)
    files.write_json(out, report)  # what is said about the runs may be new
    done = {(run["arm"], run["seed"]) for run in report["runs"]}
    for seed in seeds:
        for arm in arms:
            if (arm, seed) not in done:
                with progress.bar(f"{arm}, seed {seed}", steps) as advance:
                    figures = one(arm, seed, advance)
                report["runs"].append({"arm": arm, "seed": seed, **figures})
                files.write_json(out, report)
    return report


def seeds_of(text: str) -> list[int]:
    """Those of the option --seeds.

    Raises:
      ValueError: anything but whole numbers with commas.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds is {text!r}: whole numbers with commas") from None


def _begun(out: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """The file's report, or a new one."""
    fresh = json.loads(json.dumps({**about, "runs": []}))
    if not out.exists():
        return fresh
    report = read(out)
    if report.get("settings") != fresh.get("settings"):
        raise ValueError(
            f"{out} holds runs with the settings {report.get('settings')}, not "
            f"{fresh.get('settings')}: give another --json, or remove it"
        )
    return {**fresh, "runs": report["runs"]}


def read(path: Path) -> dict[str, Any]:
    """A file of results.

    Raises:
      ValueError: it cannot be read as one.
    """
    report = _parsed(path)
    if not _holds_runs(report):
        raise ValueError(f'{path} is no file of results: it must be an object with "runs"')
    return report


def read_all(folder: Path) -> dict[Path, dict[str, Any]]:
    """The files of results in a folder, by path; other experiments keep rows of their own there.

    Raises:
      ValueError: a file that is not JSON.
    """
    found = {path: _parsed(path) for path in sorted(folder.glob("*.json"))}
    return {path: report for path, report in found.items() if _holds_runs(report)}


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None


def _holds_runs(report: Any) -> bool:
    return isinstance(report, dict) and isinstance(report.get("runs"), list)


def figures_of(report: Mapping[str, Any], arm: str, name: str) -> list[float]:
    """One figure of an arm's runs, in the order of the seeds; of those that have it."""
    own = sorted((r for r in report["runs"] if r["arm"] == arm), key=lambda r: r["seed"])
    return [run["figures"][name] for run in own if name in run["figures"]]
