"""A command of forty short runs, as the studies are: python -m tests.support.faulty_runs OUT LOG [BYTES]

Each run that is done is a line of the log. With BYTES no file may grow beyond them, as on a full disk.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

from experiments.harness import cli, runs

ARMS, SEEDS = list("abcde"), list(range(8))
ABOUT = {"title": "It", "command": "python -m it", "settings": {"steps": 3}}
ABOUT |= {"baselines": {}, "compare": [], "notes": []}


def main(arguments: list[str]) -> int:
    parser = cli.parser("tests.support.faulty_runs", __doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("bytes", type=int, nargs="?")

    def job(options):
        def one(arm, seed, advance):
            time.sleep(0.01)
            with options.log.open("a") as log:
                log.write(f"{arm} {seed}\n")
            return {"figures": {"score": seed + len(arm)}, "drawn": list(range(50))}

        if options.bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (options.bytes, options.bytes))
        runs.run_all(options.out, ABOUT, ARMS, SEEDS, 1, one)

    return cli.run(parser, job, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
