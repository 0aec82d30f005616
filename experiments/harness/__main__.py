"""Pages from results.

    python -m experiments.harness docs

writes `docs/results.md` and a plot for each file in `docs/results`.
"""

from __future__ import annotations

import argparse
import sys

from experiments.harness import cli, docs


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    parser = cli.parser("experiments.harness", __doc__)
    parser.add_argument("job", choices=("docs",))
    return cli.run(parser, _job, arguments)


def _job(options: argparse.Namespace) -> None:
    print("\n".join(str(path) for path in docs.write()))


if __name__ == "__main__":
    sys.exit(main())
