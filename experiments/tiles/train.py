"""Train a language model from scratch with attention that computes a part of its causal tiles.

    python -m experiments.tiles.train [--json OUT] [--steps N] [--seeds 0,1,2] [--arms NAMES]

A decoder of three layers and two million parameters, of Flax's own modules, on five books; every arm
has the same first parameters, the same pieces in the same order, and all tiles in its first steps.
Runs that the file holds are not run again. Some 6 minutes a run on one core for the defaults.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.harness import cli, runs
from experiments.harness.statistics import paired_interval
from experiments.tiles import training
from experiments.tiles.policies import BLOCK_K, BLOCK_Q
from jbalance import checks

# What a head will look for nobody knows before it has learnt some of it, and it learns nothing from keys
# that it does not see.
STEPS, TOKENS, DENSITY, DENSE_START = 2000, 512, 0.5, 0.1
COMPARED = "ladder"


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    parser = cli.parser("experiments.tiles.train", __doc__)
    cli.add_json(parser, "out/tiles_train.json")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each arm")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a piece of text")
    parser.add_argument("--density", type=float, default=DENSITY, help="part of the causal tiles")
    parser.add_argument(
        "--dense-start",
        type=float,
        default=DENSE_START,
        help="part of the steps, before the others, over all tiles; with 1 the arms only read",
    )
    parser.add_argument("--seeds", default="0,1,2", help="with commas")
    parser.add_argument("--arms", default=",".join(training.ARMS), help="names, with commas")
    return cli.run(parser, _job, arguments)


def _job(options: argparse.Namespace) -> None:
    report = train(
        options.json,
        options.arms.split(","),
        cli.numbers("--seeds", options.seeds, int),
        training.Settings(options.steps, options.tokens, options.density, options.dense_start),
    )
    _print(report)


def train(
    out: Path, arms: list[str], seeds: list[int], settings: training.Settings
) -> dict[str, Any]:
    """All runs.

    Raises:
      ValueError: unknown names, numbers outside their range, a file of other runs.
    """
    for name in arms:
        checks.choice("--arms", name, training.ARMS)
    steps, tokens, density, dense_start = settings
    checks.in_range("--dense-start", dense_start, 0, 1)
    if not 0 < density <= 1:
        raise ValueError(f"--density is {density}: a part of the causal tiles, in (0, 1]")
    if tokens < 4 * BLOCK_Q or tokens % BLOCK_Q:
        raise ValueError(f"--tokens is {tokens}: a multiple of {BLOCK_Q}, at least {4 * BLOCK_Q}")
    if steps < 2:
        raise ValueError(f"--steps is {steps}: at least 2")
    about = {
        "experiment": "tiles_train",
        "title": "A language model from scratch"
        + (", read over a part of the tiles" if dense_start == 1 else ""),
        "notes": [
            "Two million parameters on five books, negative log-likelihood of a token held out.",
            _when(density, dense_start),
            "`window`: the latest keys and the first ones, the same part of every query block's tiles;",
            "`sliding window`: the same width for every query block; `uniform`: most attention,",
            "each head and query block alike; `ladder`: one price for the tiles of a layer,",
            "`ladder over layers` for those of all layers.",
        ],
        "compare": [[COMPARED, arm] for arm in arms if arm != COMPARED],
        "command": f"python -m experiments.tiles.train --steps {steps} --dense-start {dense_start:g}"
        f" --seeds {','.join(map(str, seeds))}",
        "settings": settings._asdict(),
    }

    def one(arm: str, seed: int, advance: Any) -> dict[str, Any]:
        return training.train(arm, seed, settings, advance)

    return runs.run_all(out, about, arms, seeds, steps, one)


def _when(density: float, dense_start: float) -> str:
    part = f"{100 * density:g} % of the causal tiles, {BLOCK_Q} x {BLOCK_K}"
    if dense_start == 1:
        return f"Trained over all tiles, then read over {part}, but for `dense`."
    return f"After {100 * dense_start:g} % of the steps over {part}, but for `dense`."


def _print(report: dict[str, Any]) -> None:
    """Means over the seeds, and how far the ladder is from each, run by run."""
    table = Table("arm", "held out", "second half", f"{COMPARED} over this, %")
    of = functools.partial(runs.figures_of, report)
    for arm in dict.fromkeys(run["arm"] for run in report["runs"]):
        own = of(arm, "held_out")
        apart = ""
        if arm != COMPARED and len(of(COMPARED, "held_out")) == len(own) >= 2:
            mean, half = paired_interval(of(COMPARED, "held_out"), own)
            whole = sum(own) / len(own)
            apart = f"{100 * mean / whole:+.2f} ± {100 * half / whole:.2f}"
        halves = of(arm, "held_out_second_half")
        row = f"{sum(own) / len(own):.4f}", f"{sum(halves) / len(halves):.4f}"
        table.add_row(arm, *row, apart)
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
