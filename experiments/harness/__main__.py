"""Pages from results.

    python -m experiments.harness docs

writes `docs/results.md` and a plot for each file in `docs/results`.
"""

from __future__ import annotations

import argparse
import sys

from experiments.harness import docs


def main(arguments: list[str] | None = None) -> int:
    """Parse, write, say what; a bad input is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.harness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", choices=("docs",))
    parser.parse_args(arguments)
    try:
        written = docs.write()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(str(path) for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
