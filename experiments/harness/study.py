"""The command of a study: arms times seeds into one file of results, and the table of them."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from experiments.harness import cli, docs, files, runs
from jbalance import checks

SEEDS = (0, 1, 2)
PARTS = {"half": 0.5, "quarter": 0.25}


class Study(NamedTuple):
    """What a command runs.

    Attributes:
      about: title, settings, baselines, pairs of arms to compare, as the file of results has them, and
        notes: a paragraph.
      arms: names, in the order of the runs.
      steps: of one run, for the progress bar.
      one: (arm, seed, advance) -> a run's figures and cases.
      pictures: beside the file of results, by name: what each shows, and the PNG of a report.
    """

    about: Mapping[str, Any]
    arms: Sequence[str]
    steps: int
    one: runs.RunOne
    pictures: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], bytes]]] = {}


def at_parts(whole: str, arms: Sequence[str]) -> dict[str, tuple[str, float]]:
    """An arm over all there is, and others over each of `PARTS`: by name, arm and part."""
    return {whole: (whole, 1.0)} | {
        f"{arm}, {name}": (arm, part) for name, part in PARTS.items() for arm in arms
    }


def arms_of(arms: Mapping[str, tuple[str, float]], smoke: bool) -> list[str]:
    """Names of `at_parts`; in a smoke run without the smallest part, another size of the same."""
    last = min(PARTS.values())
    return [name for name, (_, part) in arms.items() if not smoke or part != last]


def main(
    name: str,
    description: str | None,
    study_of: Callable[[bool], Study],
    arguments: Sequence[str] | None = None,
) -> int:
    """The exit code of `python -m experiments.NAME`; a bad input is one line on stderr.

    Args:
      name: of the module below `experiments`, and of the file of results.
      description: the module's docstring.
      study_of: smoke -> the study; with `smoke` at a size that tells whether it runs.
      arguments: those of the process if left out.
    """
    parser = cli.parser(f"experiments.{name}", description)
    default = Path(f"out/{name}.json")
    cli.add_json(parser, default)
    parser.add_argument(
        "--seeds", default=",".join(map(str, SEEDS)), help="of data and parameters, with commas"
    )
    parser.add_argument("--arms", help="names, with slashes; all if left out")
    parser.add_argument("--smoke", action="store_true", help="a small size, to see whether it runs")

    def job(options: argparse.Namespace) -> None:
        out = cli.of_job(options.json, default, "smoke") if options.smoke else options.json
        seeds = cli.numbers("--seeds", options.seeds, int)
        files.check_writable(out)
        study = study_of(options.smoke)
        arms = options.arms.split("/") if options.arms else list(study.arms)
        for arm in arms:
            checks.choice("--arms", arm, dict.fromkeys(study.arms))
        command = f"python -m experiments.{name}" + (" --smoke" if options.smoke else "")
        if tuple(seeds) != SEEDS:
            command += f" --seeds {options.seeds}"
        notes = textwrap.wrap(study.about["notes"], 100)
        about = {**study.about, "notes": notes, "command": command}
        if study.pictures:
            about["pictures"] = {name: shows for name, (shows, _) in study.pictures.items()}
        report = runs.run_all(out, about, arms, seeds, study.steps, study.one)
        for picture, (_, draw) in study.pictures.items():
            files.write_bytes(out.with_name(picture), draw(report))
        show(report)

    return cli.run(parser, job, arguments)


def show(report: Mapping[str, Any]) -> None:
    """Means of the arms, baselines and differences, in the terminal."""
    console = Console(width=160)
    for lines in (docs.means(report), docs.differences(report)):
        rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
        if not rows:
            continue
        table = Table(*rows[0])
        for row in rows[2:]:
            table.add_row(*row)
        console.print(table)
