"""Pages from results, and who uses what of the library.

    python -m experiments.harness docs
    python -m experiments.harness uses
    python -m experiments.harness site
    python -m experiments.harness hardening
    python -m experiments.harness figures

The first writes `docs/results.md` and a plot for each file in `docs/results`. The second lists every
public name of jbalance with the studies, commands and benchmarks that call it. The third says what
the site that `make docs` built lacks. The fourth writes `docs/hardening.md`. The last lists the figures
of README and the documentation with the place in a committed file that each comes from.
"""

from __future__ import annotations

import argparse
import sys

from experiments.harness import cli, docs, figures, hardening, site, uses


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    parser = cli.parser("experiments.harness", __doc__)
    parser.add_argument(
        "job", choices=("docs", "uses", "site", "hardening", "figures"), help="as above"
    )
    return cli.run(parser, _job, arguments)


def _job(options: argparse.Namespace) -> None:
    if options.job == "docs":
        print("\n".join(str(path) for path in docs.write()))
        return
    if options.job == "hardening":
        print(hardening.write())
        return
    if options.job == "figures":
        figures.check(figures.of_pages())
        return
    if options.job == "site":
        site.check()
        return
    found, through = uses.of_experiments(), uses.through()
    for name, users in found.items():
        direct = ", ".join(x.removeprefix("experiments.") for x in users)
        print(f"{name}: {direct or (f'through {through[name]}' if name in through else 'nobody')}")
    used = sum(bool(users) for users in found.values())
    print(
        f"{used} of {len(found)} names are used by experiments, {len(through)} others through these"
    )


if __name__ == "__main__":
    sys.exit(main())
