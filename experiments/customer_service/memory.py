"""Customers share one memory by weight, one of them floods: whose facts are still answered.

    python -m experiments.customer_service.memory [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

Six requests of one language model (SmolLM2-135M) hold their keys and values in one arena, of a quarter
or a tenth of the bytes that they would take. Some 6 minutes on one core; runs that the file holds are
not run again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from experiments.customer_service import data, sharing
from experiments.harness import study


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("customer_service.memory", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    about = {
        "title": "Customer service: memory",
        "notes": NOTES,
        "settings": {
            "tokens": list(sharing.SIZES),
            "facts": [list(sharing.KINDS), list(sharing.PLACES_OF_FACTS)],
            "complexity": [*data.COMPLEXITY.tolist(), sharing.VOLUME],
            "floor and cap": [data.FLOOR, data.CAP],
            "flood": [sharing.MORE_TOKENS, sharing.NUM_MORE],
        },
        "compare": [
            ["bounded, quarter", "even, quarter"],
            ["bounded, tenth", "even, tenth"],
            ["bounded, tenth", "by length, tenth"],
            ["bounded, tenth", "proportional, tenth"],
            ["proportional, tenth, stuffed", "proportional, tenth"],
            ["bounded, tenth, stuffed", "bounded, tenth"],
        ],
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        return sharing.run(arm, seed, advance)

    arms = ["bounded, tenth"] if smoke else list(sharing.ARMS)
    return study.Study(about, arms, 1, one)


NOTES = "TODO"


if __name__ == "__main__":
    sys.exit(main())
