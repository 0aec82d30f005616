"""Kernels, and whole programs for pods, compiled by the accelerators' own compilers.

    make compiled
    experiments/compiled/.venv/bin/python -m experiments.compiled [--json OUT] [--page OUT] [--only PART]

Compiles every kernel for every chip and every program for every pod, some two hours on two cores, and
writes a file of results and a page. No accelerator is needed, and nothing is timed. What the file holds
is not compiled again; --only takes those whose name has that part.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experiments.compiled import cases, gpu, page, pod, pods, tpu
from experiments.harness import cli, files, progress

RESULTS, PAGE = Path("docs/results/compiled.json"), Path("docs/results/compiled.md")
PACKAGES = ("jax", "libtpu", "triton")
SECONDS = 3600  # that a compiler may take


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    parser = cli.parser("experiments.compiled", __doc__)
    cli.add_json(parser, RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE, metavar="OUT", help="page of them")
    parser.add_argument("--only", default="", metavar="PART", help="of the names of cases")
    return cli.run(parser, _job, arguments)


def _job(options: argparse.Namespace) -> None:
    chosen = [
        ("cases", "one", case.name, chip)
        for case in cases.all_cases().values()
        for chip in (tpu.CHIPS if case.platform == "tpu" else gpu.CHIPS)
    ]
    chosen += [("pods", "pod", name, where) for name in pods.programs() for where in pod.PODS]
    chosen = [x for x in chosen if options.only in x[2]]
    if not chosen:
        raise ValueError(f"--only is {options.only!r}: no case has that in its name")
    versions = {name: version(name) for name in PACKAGES}
    report: dict[str, Any] = {"versions": versions, "cases": {}, "pods": {}}
    with files.locked(options.json), progress.bar("Compiling", len(chosen)) as advance:
        if options.json.exists():
            old = files.read_signed(options.json, **dict.fromkeys(report, dict))
            if old["versions"] == versions:
                report |= old
        for kind, module, name, where in chosen:
            held = report[kind].setdefault(name, {})
            if where not in held:
                held[where] = compile_one(module, name, where)
                files.write_signed(options.json, report, "versions", "cases", "pods")
            advance()
    files.write_text(options.page, page.text_of(report))
    print(options.page)


def compile_one(module: str, name: str, where: str) -> dict[str, Any]:
    """What `one` or `pod` prints, or why its process ended."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", f"experiments.compiled.{module}", name, where, folder]
        environment = {**os.environ, **tpu.environment(Path(folder))}
        try:
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"reason": f"not compiled within {SECONDS} s"}
    if done.returncode:
        return {"reason": f"the compiler ended its process: {done.stderr.strip()[-200:]}"}
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
