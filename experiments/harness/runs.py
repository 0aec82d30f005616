"""Arms times seeds, one file of results: what is there is not run again."""

from __future__ import annotations

import base64
import binascii
import json
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from experiments.harness import files, progress

_KINDS: Mapping[str, type] = {
    **dict.fromkeys(("command", "title", "experiment", "digest"), str),
    **dict.fromkeys(("notes", "compare", "drawn"), list),
    **dict.fromkeys(("settings", "baselines", "pictures"), dict),
}
_SIGNED = ("settings", "runs")
_LARGEST = sys.float_info.max
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
      ValueError: the file holds runs with other settings, is no file of results, was altered, or
        another process adds runs to it.
    """
    with files.locked(out):
        report = _begun(out, about)
        files.write_signed(out, report, *_SIGNED)  # what is said about the runs may be new
        done = {(run["arm"], run["seed"]) for run in report["runs"]}
        for seed in seeds:
            for arm in arms:
                if (arm, seed) not in done:
                    with progress.bar(f"{arm}, seed {seed}", steps) as advance:
                        figures = one(arm, seed, advance)
                    report["runs"].append({"arm": arm, "seed": seed, **figures})
                    files.write_signed(out, report, *_SIGNED)
    return report


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
      ValueError: it cannot be read as one, or was altered.
    """
    report = files.read_json(path)
    if not _holds_runs(report):
        raise ValueError(f'{path} is no file of results: it must be an object with "runs"')
    return _checked(path, report)


def read_all(folder: Path) -> dict[Path, dict[str, Any]]:
    """The files of results in a folder, by path; other experiments keep rows of their own there.

    Raises:
      ValueError: a file that is not JSON, or whose runs were altered.
    """
    found = {path: files.read_json(path) for path in sorted(folder.glob("*.json"))}
    return {path: _checked(path, report) for path, report in found.items() if _holds_runs(report)}


def _holds_runs(report: Any) -> bool:
    return isinstance(report, dict) and isinstance(report.get("runs"), list)


def _checked(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The report, if every field is of its kind and the runs are those that were written."""
    for name, kind in _KINDS.items():
        if name in report and not isinstance(report[name], kind):
            raise ValueError(f"{path}: {name} is {report[name]!r}, no {kind.__name__}")
    for name, words in (
        ("notes", report.get("notes", [])),
        ("drawn", report.get("drawn", [])),
        ("pictures", report.get("pictures", {}).values()),
    ):
        if not all(isinstance(word, str) for word in words):
            raise ValueError(f"{path}: {name} holds {list(words)!r}: it must be text")
    for name in ("command", "digest"):
        if name not in report:
            raise ValueError(f"{path} lacks {name!r}: it was not written by these experiments")
    if not report.get("title") and not report.get("experiment"):
        raise ValueError(f"{path} lacks 'title': it was not written by these experiments")
    for i, run in enumerate(report["runs"]):
        _check_run(f"{path}: runs[{i}]", run)
    for name, known in report.get("baselines", {}).items():
        _check_figures(f"{path}: baselines[{name!r}]", known)
    for pair in report.get("compare", []):
        if not (isinstance(pair, list) and [type(x) for x in pair] == [str, str]):
            raise ValueError(f"{path}: compare holds {pair!r}: it must be pairs of arms")
    if not files.is_signed(report, *_SIGNED):
        raise ValueError(
            f"{path} is not what was written: its digest is not that of its settings and runs; "
            f"remove it to run them again"
        )
    return report


def _check_run(where: str, run: Any) -> None:
    if not isinstance(run, dict):
        raise ValueError(f"{where} is {run!r}: it must be an object with arm, seed and figures")
    if not isinstance(run.get("arm"), str) or type(run.get("seed")) is not int:
        raise ValueError(
            f"{where} has the arm {run.get('arm')!r} and the seed {run.get('seed')!r}: they must be "
            f"a name and a whole number"
        )
    _check_figures(f"{where}.figures", run.get("figures"))
    for name, packed in run.get("cases", {}).items():
        unpacked(f"{where}.cases[{name!r}]", packed)


def _check_figures(where: str, figures: Any) -> None:
    if not isinstance(figures, dict):
        raise ValueError(f"{where} is {figures!r}: it must be numbers by name")
    for name, value in figures.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or (isinstance(value, int) and abs(value) > _LARGEST):
            shown = repr(value)[:80]
            raise ValueError(
                f"{where}[{name!r}] is {shown}: it must be a number that a float can be"
            )


def figures_of(report: Mapping[str, Any], arm: str, name: str) -> list[float]:
    """One figure of an arm's runs, in the order of the seeds; of those that have it."""
    own = sorted((r for r in report["runs"] if r["arm"] == arm), key=lambda r: r["seed"])
    return [run["figures"][name] for run in own if name in run["figures"]]


def packed(cases: ArrayLike) -> str:
    """A figure of every held-out case, float32 in few letters: what a run has under "cases".

    The mean over the cases is the run's figure of the same name.
    """
    content = np.asarray(cases, "<f4")
    return base64.b64encode(zlib.compress(content.tobytes(), 9)).decode()


def unpacked(where: str, text: Any) -> np.ndarray:
    """[N], what `packed` was given.

    Raises:
      ValueError: that names `where`, for anything else.
    """
    try:
        return np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), "<f4")
    except (TypeError, ValueError, binascii.Error, zlib.error) as error:
        raise ValueError(f"{where} are no packed cases: {error}") from None


def cases_of(report: Mapping[str, Any], arm: str, name: str) -> np.ndarray | None:
    """[S, N] a figure of an arm's runs by case, in the order of the seeds; None where it has none."""
    own = sorted((r for r in report["runs"] if r["arm"] == arm), key=lambda r: r["seed"])
    found = [run.get("cases", {}).get(name) for run in own]
    if None in found or len(found) < 2:
        return None
    rows = [unpacked(f"cases of {name}", x) for x in found]
    return np.stack(rows) if len({row.size for row in rows}) == 1 else None
