"""Customers share one memory by weight, one of them floods: whose facts are still answered.

    python -m experiments.customer_service.memory [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

Six requests of one language model (SmolLM2-135M) hold their keys and values in one arena, of a quarter
or a tenth of the bytes that they would take. Some 11 minutes on one core; runs that the file holds are
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
        "notes": (
            f"{sharing.CUSTOMERS} customers' texts of {min(sharing.SIZES)} to "
            f"{max(sharing.SIZES)} tokens, real opinions on products with two numbers of the "
            "customer's own, in one arena of a quarter or a tenth of their bytes. The first "
            "customer floods: it says more later on, and is not asked. The others are asked "
            "for their numbers: KL of the next token to the whole cache's over question and "
            "answer, nats a token of the answer, and whether every digit is the likeliest. "
            "Weights of the requests: `even`, `by length`, `proportional` to importance "
            "(urgency, sentiment, history, data volume) as the source prints it, `bounded` "
            f"within {data.FLOOR:g} and {data.CAP:g} times an even share. `stuffed`: the flood "
            "writes urgent words only. `changed by the flood`: customers whose log-"
            "probabilities or next tokens differ in any bit from those beside a silent "
            "customer of the flood's weight. "
            "Where it does not help: no weights beat even shares in the mean at a tenth, and "
            "what `bounded` takes from the others is less KL of the urgent ones, which three "
            "seeds do not settle. Longer texts need no larger part here: what is asked lies "
            "in a few of their tokens. As printed, a stuffed flood takes three quarters of the "
            "memory and nobody is answered; `bounded` stops it at the cap, twice an even part."
        ),
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


if __name__ == "__main__":
    sys.exit(main())
