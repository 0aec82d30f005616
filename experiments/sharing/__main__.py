"""Four tasks share one model's training: memory for texts, the batch and attention, by importance.

    python -m experiments.sharing [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

In every round `tasks.divide` says how many rows of memory and how many examples of the batch each task
gets; one task ends and another begins in mid-run. Some three minutes on one core; runs that the file
holds are not run again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from experiments.harness import study
from experiments.sharing import experiment
from experiments.sharing.data import ROW_BYTES, TASKS
from experiments.sharing.experiment import AGED, ARMS, BATCH, JOINS, LEAVES, SAMPLE, STEPS, Sizes

WHOLE, SMOKE = Sizes(24, None, 0.1), Sizes(4, 300, 0.5)


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("sharing", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    sizes = SMOKE if smoke else WHOLE
    about = {
        "title": "Several tasks on one set of resources",
        "notes": (
            "The sentiment of texts from four sources by one model with a head for each "
            f"({', '.join(TASKS)}); {TASKS[LEAVES]} ends in the middle of {sizes.rounds} rounds "
            f"of {STEPS} steps, when {TASKS[JOINS]} begins. Memory holds {sizes.part:.0%} of the "
            f"training texts ({ROW_BYTES} bytes each), of which one in {AGED} gives way in each "
            f"round; what remains, and the {BATCH} examples of each step, `tasks.divide` shares "
            "out by importance. `volume` is a task's number of texts, `loss` that of its "
            "validation texts, `both` the mean of these indicators, `shift` how far its tokens are "
            "from all tasks' (Jensen-Shannon), `floor` a least share of a quarter. `rescaled` adds "
            "the rule `renormalize` to attention's logits, by the "
            "tokens that TF-IDF features say tell a task's labels; `tuned` adjusts floor and "
            "rate between rounds. `rows shared out`: what remains in a round. `all texts` are "
            "in memory at 8.4 times the bytes. Where it does not help: nothing is above an even "
            "split. Volume gives film, which has most texts, what tweets lose, and a floor does "
            "not give it back; losses are too near to each other to move much; shift gives the tasks "
            "that are unlike the rest what film loses, and they gain less; the bias of "
            f"rescaled attention, which knows {SAMPLE} texts a task, costs a hundredth of the "
            "texts; and tuning, which undoes rounds that do not validate better, gains nothing."
        ),
        "settings": {
            "sizes": sizes._asdict(),
            "arms": {name: arm._asdict() for name, arm in ARMS.items()},
            "batch": BATCH,
            "steps": STEPS,
            "aged": AGED,
        },
        "compare": [[arm, "even"] for arm in ARMS if arm != "even"],
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        return experiment.run(arm, seed, sizes, advance)

    return study.Study(about, list(ARMS), 2, one)


if __name__ == "__main__":
    sys.exit(main())
