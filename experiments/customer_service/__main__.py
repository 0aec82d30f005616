"""A customer floods a service: who is served next, and what the others notice.

    python -m experiments.customer_service [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

Seven customers ask now and then and one at every step, in four places of one language model
(SmolLM2-135M). Each arm is a policy that chooses who joins next. Some 3 minutes on one core; runs that
the file holds are not run again. How the requests share memory: `experiments.customer_service.memory`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from experiments.customer_service import data, experiment, schedule
from experiments.customer_service.experiment import Sizes
from experiments.harness import study

WHOLE, SMOKE = Sizes(2000, 30), Sizes(200, 8)


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("customer_service", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    sizes = SMOKE if smoke else WHOLE
    about = {
        "title": "Customer service: time",
        "notes": NOTES,
        "settings": {
            "sizes": sizes._asdict(),
            "places": experiment.PLACES,
            "customers": [data.LIGHT, 1],
            "gap": data.GAP,
            "prompt tokens": [data.LEAST_TOKENS, data.MOST_TOKENS],
            "new tokens": data.NEW_TOKENS,
            "chunk": schedule.CHUNK_TOKENS,
            "costs": [schedule.PROMPT_COST, schedule.OUTPUT_COST],
            "complexity": data.COMPLEXITY.tolist(),
            "floor and cap": [data.FLOOR, data.CAP],
        },
        "compare": [
            ["counters", "first come"],
            ["counters", "round robin"],
            ["bounded", "counters"],
            ["bounded", "proportional"],
            ["bounded, lent", "bounded"],
            ["proportional, stuffed", "proportional"],
            ["bounded, stuffed", "bounded"],
        ],
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        return experiment.run(arm, seed, sizes, advance)

    arms = ["first come", "bounded"] if smoke else list(experiment.ARMS)
    return study.Study(about, arms, 2, one)


NOTES = "TODO"


if __name__ == "__main__":
    sys.exit(main())
