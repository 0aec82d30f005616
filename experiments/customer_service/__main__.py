"""A customer floods a service: who is served next, and what the others notice.

    python -m experiments.customer_service [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

Seven customers ask now and then and one at every step, in four places of one language model
(SmolLM2-135M). Each arm is a policy that chooses who joins next. Some 5 minutes on one core; runs that
the file holds are not run again. How the requests share memory: `experiments.customer_service.memory`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from experiments.customer_service import data, experiment, schedule
from experiments.customer_service.experiment import Sizes
from experiments.harness import study

WHOLE, SMOKE = Sizes(2000, 50), Sizes(200, 8)


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("customer_service", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    sizes = SMOKE if smoke else WHOLE
    about = {
        "title": "Customer service: time",
        "notes": (
            f"{data.LIGHT} light customers ask every {data.GAP} steps or so and one floods with a "
            f"request at every step; {experiment.PLACES} places. Texts are real opinions on "
            "products, with a number of the customer's and a question for it. A step is one of "
            "the engine's; a prompt takes one for every "
            f"{schedule.CHUNK_TOKENS} tokens. Waits are steps from arrival to the first token. "
            "`counters` are virtual token counters; `proportional` weighs them by importance "
            "(urgency, sentiment, history) as the source prints it; `bounded` keeps the shares "
            f"within {data.FLOOR:g} and {data.CAP:g} times an even one; `lent` lets a customer "
            "without a place take one back from who has two or more; `halves`: nobody has more "
            "than half of the places, though the others are free; `stuffed`: the flood writes "
            "urgent words only. `gap / bound`: service gap of two who wait, over the "
            "bound of plain or weighted counters. `as the model`: whether the model serves the "
            f"first {sizes.replayed} steps in the counted order; with room for all, no answer "
            "beside a flood may change. "
            "Where it does not help: importance changes next to nothing while light customers "
            "ask for less than their shares, and as printed it hands a stuffed flood the "
            "service. A flood keeps all places taken, and nobody steps during a prompt: light "
            "customers wait longer than without it, more than 1.2 times as long at p99 in every "
            "arm that leaves no place free. Lending pays with tokens that are lost, and "
            "`halves`, which no longer serves all who wait, with free places besides. "
            "The round robin is nearly as fair, since all prompts are of like length."
        ),
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
            ["bounded, lent, halves", "bounded, lent"],
            ["proportional, stuffed", "proportional"],
            ["bounded, stuffed", "bounded"],
        ],
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        return experiment.run(arm, seed, sizes, advance)

    arms = ["first come", "bounded"] if smoke else list(experiment.ARMS)
    return study.Study(about, arms, 2, one)


if __name__ == "__main__":
    sys.exit(main())
