"""Two directions of translation with half of the attention's tiles, and with weighed tasks.

    python -m experiments.translation [--json OUT] [--steps N] [--seeds 0,1,2] [--arms NAMES]
    python -m experiments.translation density [--json OUT]
    python -m experiments.translation maps [--picture OUT]

The first trains a small encoder-decoder for English to German and French with all tiles, from nothing.
Then every arm goes on from there with its own attention, or its own weights of the two tasks, on the
same batches in the same order for a seed, and translates 500 held-out strings. What is there already is
not run again. Some 45 minutes on one core for the defaults. The second says what the first model loses
with fewer tiles before it has learned to do with them, the third draws what cross-attention looks at,
and the method's example (w, alpha, A~) on it.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.harness import cli, files, progress, runs, study
from experiments.translation import data, experiment, maps
from jbalance import checks

OUT = Path("out/translation.json")
STEPS, SEEDS, PARTS = 200, (0, 1, 2), (0.9, 0.75, 0.5)


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    parser = cli.parser("experiments.translation", __doc__)
    parser.add_argument(
        "job", nargs="?", choices=("train", "density", "maps"), default="train", help="as above"
    )
    cli.add_json(parser, OUT)
    parser.add_argument(
        "--base-steps", type=int, default=experiment.BASE_STEPS, help="of the first model"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of each arm after the base")
    parser.add_argument(
        "--seeds", default=",".join(map(str, SEEDS)), help="of the order of the data, with commas"
    )
    parser.add_argument("--arms", default="/".join(experiment.ARMS), help="names, with slashes")
    parser.add_argument(
        "--picture", metavar="OUT", default="out/translation_attention.png", help="of `maps`"
    )
    return cli.run(parser, _job, arguments)


def _job(options: argparse.Namespace) -> None:
    if options.job == "maps":
        found = maps.draw(Path(options.picture))
        print(f"w {found.w.round(3)}, alpha {found.alpha.round(4)}")
    elif options.job == "density":
        out = cli.of_job(options.json, OUT, options.job)
        files.check_writable(out)
        study.show(density(out, options.base_steps))
    else:
        out = options.json
        files.check_writable(out)
        arms, seeds = options.arms.split("/"), cli.numbers("--seeds", options.seeds, int)
        study.show(train(out, arms, seeds, options.base_steps, options.steps))


def train(
    out: Path, arms: list[str], seeds: list[int], base_steps: int, steps: int
) -> dict[str, Any]:
    """All runs of the arms.

    Raises:
      ValueError: unknown names, numbers outside their range, packages that cannot be fetched.
    """
    for name in arms:
        checks.choice("--arms", name, experiment.ARMS)
    for option, number in (("--base-steps", base_steps), ("--steps", steps)):
        if number < 1:
            raise ValueError(f"{option} is {number}: at least 1")
    material = experiment.prepare()
    about = {
        "title": "Translation",
        "notes": [
            "Interface strings of 4 to 10 words, English to German and French in one model; scores",
            "of 500 held-out strings. All arms go on from one model for the same steps; seeds differ",
            "in the order of the data alone. Half of the tiles but for `full`. `full, NAME` weigh the",
            "two tasks by a method of `multitask`, the others take the mean: by more than seeds differ",
            "no method is better in both languages, and random weights are worse. The tiles of a step",
            "take 88 MFLOP forward and backward, or 44; choosing them takes 57 more, for rows are",
            "padded to 32 tokens and one query in four looks at all of them: sentences this short",
            "save nothing.",
        ],
        "command": "python -m experiments.translation",
        "settings": {
            "base_steps": base_steps,
            "steps": steps,
            "vocabulary": material.config.vocabulary,
            "width": material.config.width,
            "batch": list(material.sizes),
            "layers": [material.config.encoder_layers, material.config.decoder_layers],
            "train_pairs": len(material.split.train),
            "test_pairs": len(material.split.test),
        },
        "baselines": experiment.baselines(material, data.all_pairs()),
        "drawn": ["translation memory"],
        "compare": [
            ["ladder", "full"],
            ["ladder", "uniform"],
            ["ladder", "proportional"],
            ["full, upgrad", "full"],
            ["full, importance", "full"],
        ],
        "pictures": {
            "translation_attention.png": "Cross-attention of one string, and A~ of both tasks"
        },
    }
    with progress.bar("base", base_steps) as advance:
        begin = experiment.start(material, base_steps, advance)
    one = functools.partial(_one, material, begin, steps)
    return runs.run_all(out, about, arms, seeds, steps, one)


def density(out: Path, base_steps: int) -> dict[str, Any]:
    """The base with a part of the tiles, by each of two arms.

    Raises:
      ValueError: packages that cannot be fetched, a file of other runs.
    """
    material = experiment.prepare()
    about = {
        "title": "Translation: fewer tiles at once",
        "notes": [
            "The model that all arms go on from, on validation strings, with a part of its tiles and",
            "no training for it. A list has three or four tiles of four keys here: few can be missed.",
        ],
        "command": "python -m experiments.translation density",
        "settings": {"base_steps": base_steps},
    }
    with progress.bar("base", base_steps) as advance:
        begin = experiment.start(material, base_steps, advance)
    arms = {f"{arm}, {part:.0%}": (arm, part) for part in PARTS for arm in ("ladder", "uniform")}
    arms = {"full": ("full", 1.0)} | arms

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        advance()
        return {"figures": experiment.untrained(material, begin, *arms[arm])}

    return runs.run_all(out, about, list(arms), [0], 1, one)


def _one(
    material: experiment.Material,
    begin: experiment.Start,
    steps: int,
    arm: str,
    seed: int,
    advance: Callable[[], None],
) -> Mapping[str, Any]:
    return experiment.run(material, begin, arm, seed, steps, advance)


if __name__ == "__main__":
    sys.exit(main())
