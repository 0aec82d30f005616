"""Speech recognition over a cross-attention cache of fewer bytes: Whisper tiny.en, words against bytes.

    python -m experiments.speech [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

Windows of 30 s that are full of speech, clean and with white noise, are transcribed over the frames that
each rule keeps in 50, 25, 10 and 5 % of the bytes, and over all of them; some ten minutes on two cores.
Runs that a file holds are not run again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from experiments.harness import cli, files, runs, study
from experiments.speech import experiment, memories, report
from jbalance import checks

OUT = Path("out/speech.json")
SMOKE = ("full", "ladder, 10%")


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    parser = cli.parser("experiments.speech", __doc__)
    cli.add_json(parser, OUT)
    seeds = ",".join(map(str, range(experiment.SEEDS)))
    parser.add_argument("--seeds", default=seeds, help="with commas, parts of the recordings")
    parser.add_argument("--arms", help="names, with slashes; all if left out")
    parser.add_argument("--smoke", action="store_true", help="two arms, to see whether it runs")
    return cli.run(parser, _job, arguments)


def _job(options: argparse.Namespace) -> None:
    every = SMOKE if options.smoke else experiment.ARMS
    arms = options.arms.split("/") if options.arms else list(every)
    for name in arms:
        checks.choice("--arms", name, experiment.ARMS)
    seeds = cli.numbers("--seeds", options.seeds, int)
    if not set(seeds) <= set(range(experiment.SEEDS)):
        raise ValueError(f"--seeds is {options.seeds!r}: seeds are 0..{experiment.SEEDS - 1}")
    out = cli.of_job(options.json, OUT, "smoke") if options.smoke else options.json
    files.check_writable(out)
    study.show(measure(out, arms, seeds))


def measure(out: Path, arms: list[str], seeds: list[int]) -> dict[str, Any]:
    """All runs, the intervals over recordings and the picture.

    Raises:
      ValueError: packages that cannot be fetched, a file of other runs.
    """
    about: dict[str, Any] = {
        "title": "Speech recognition",
        "notes": _NOTES,
        "command": "python -m experiments.speech",
        "settings": {
            "model": "Whisper tiny.en",
            "windows": {
                "librivox": 1,
                "named": experiment.NAMED,
                "sentences": experiment.SENTENCES,
            },
            "calibration": list(experiment.CALIBRATION),
            "conditions": experiment.CONDITIONS,
        },
        "compare": [
            [f"ladder, {percent}%", f"{rule}, {percent}%"]
            for percent in experiment.PERCENTS
            for rule in memories.RULES
            if rule != "ladder" and f"{rule}, {percent}%" in experiment.ARMS
        ],
    }
    found = runs.run_all(out, about, arms, seeds, len(experiment.CONDITIONS), experiment.run)
    lines = report.intervals(found)
    if lines:
        about["notes"] = [*_NOTES, "", _INTERVALS, "", *lines]
        about["pictures"] = {report.PICTURE: "Words unlike the full cache's, by bytes and noise"}
        files.write_bytes(out.with_name(report.PICTURE), report.draw(found))
        found = runs.run_all(out, about, arms, seeds, 1, experiment.run)
    return found


_NOTES = [
    "Whisper tiny.en transcribes windows of 30 s, which clips with short gaps between them fill:",
    "of each seed one of a novel (LibriVox, the same for all), one of single words and two of",
    "telephone prompts. WER is of the first two kinds, whose words are known; `changed` are words",
    "of all windows that differ from the transcript over all frames; noise is white. The bytes",
    "are those of cross-attention, 9.2 MB for a window at 16 bits; the decoder's own cache, 1 MB",
    "at most, is dense beside them. `ladder`: frames x heads x bits at one price, worth by",
    "queries of other recordings times the keys' leverage; `no queries`: by the leverage alone;",
    "`uniform bits`: as many for every frame as fit, 4, 3 and 1 at 50, 25 and 10 % (none fits 5",
    "%); `subsample`: every n-th frame at 16 bits; `proportional`: heads share 16-bit frames by",
    "their worth. The ladder's worth was chosen by KL on windows of the same prompts, whose clips",
    "overlap these; four prompts whose names are not what they say (invalid, sorry, transfer,",
    "vm-delete) were left out after the full transcripts had been seen.",
    "Whisper's retries at a higher temperature are off, so that a transcript that repeats itself",
    "counts with all its words, and one that ends at once with none: at 0 dB full memories repeat",
    "themselves too, and at 5 % one clean window of the ladder does. Step times are of",
    "four windows at once, over those of dense attention at float32.",
]
_INTERVALS = (
    "Words unlike the full cache's, of all words: differences, clean, 10 dB and 0 dB, with 95 % "
    "intervals by the paired bootstrap over the windows."
)


if __name__ == "__main__":
    sys.exit(main())
