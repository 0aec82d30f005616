"""Pages from results, and who uses what of the library.

    python -m experiments.harness docs
    python -m experiments.harness uses

The first writes `docs/results.md` and a plot for each file in `docs/results`. The second lists every
public name of jbalance with the studies, commands and benchmarks that call it.
"""

from __future__ import annotations

import argparse
import sys

from experiments.harness import cli, docs, uses


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    parser = cli.parser("experiments.harness", __doc__)
    parser.add_argument("job", choices=("docs", "uses"))
    return cli.run(parser, _job, arguments)


def _job(options: argparse.Namespace) -> None:
    if options.job == "docs":
        print("\n".join(str(path) for path in docs.write()))
        return
    found = uses.of_experiments()
    for name, users in found.items():
        print(f"{name}: {', '.join(x.removeprefix('experiments.') for x in users) or 'nobody'}")
    used = sum(bool(users) for users in found.values())
    print(f"{used} of {len(found)} names are used by experiments")


if __name__ == "__main__":
    sys.exit(main())
