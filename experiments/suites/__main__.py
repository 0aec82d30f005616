"""Suites that the field knows, over caches at fractions of the full one's bytes.

python -m experiments.suites --json out/suites.json     (every task at 1,024 tokens; an hour on 2 cores)
python -m experiments.suites --task niah_single_2 vt --length 2048,4096 --samples 8 \\
    --policy ladder,ladder-thorough --budget 0.25,0.1,0.05 --json out/suites.json

Writes the file of results after every context, and goes on where it ended; a page of tables is written
beside it in the end. Tasks: RULER-like, several questions of one context, arithmetic and learning in the
context, and `prose`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from experiments.harness import cli, files, origin
from experiments.models import options as models

MODULE = "experiments.suites"


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", MODULE, *arguments])
    return cli.run(_parser(), lambda options: _job(options, command), arguments)


def _job(options: argparse.Namespace, command: str) -> None:
    from experiments.harness import progress
    from experiments.suites import page, prose, run, tasks

    settings = run.Settings(
        tasks=tuple(options.task or (*tasks.TASKS, prose.NAME)),
        lengths=tuple(cli.numbers("--length", options.length, int)),
        samples=options.samples,
        policies=tuple(filter(None, options.policy.split(","))),
        budgets=tuple(cli.numbers("--budget", options.budget)),
    )
    run.check(settings)
    path = options.json
    with files.locked(path):
        report = _begun(path, command)
        found = models.loaded(options)
        models.check_positions(found, max(settings.lengths), "--length")
        results = report["results"]
        with progress.bar("contexts", run.number_left(results, options.model, settings)) as bar:

            def step() -> None:
                files.write_signed(path, report | origin.of_results(), "results")
                bar()

            run.run(found.model, found.spoken.tokenizer, options.model, settings, results, step)
        tables = path.with_suffix(".md")
        files.write_text(tables, page.text_of(results, report["commands"]))
        print(tables)


def _begun(path: Path, command: str) -> dict[str, Any]:
    """The file's report, or a new one, with this command among its own.

    Raises:
      ValueError: the file is another's, or was altered.
    """
    report: dict[str, Any] = {"commands": [], "results": []}
    if path.exists():
        report = files.read_signed(path, results=list)
        if not isinstance(report.get("commands"), list):
            raise ValueError(f"{path} lacks 'commands': it was not written by this command")
    if command not in report["commands"]:
        report["commands"].append(command)
    return report


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(MODULE, __doc__)
    parser.add_argument("--task", nargs="+", metavar="NAME", help="all if left out")
    parser.add_argument("--length", default="1024", help="tokens, with commas")
    parser.add_argument("--samples", type=int, default=8, help="contexts of each")
    parser.add_argument(
        "--policy",
        default="ladder,ladder-thorough",
        help="names, with commas; empty to screen with the full cache alone",
    )
    parser.add_argument("--budget", default="0.25,0.1,0.05", help="fractions, with commas")
    cli.add_json(parser, required=True)
    models.add_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
