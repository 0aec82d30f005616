"""Many questions of one long text, answered by a language model from a part of its cache's bytes.

    python -m experiments.long_text [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

The text is read and its cache reduced before any question is known. Some 25 minutes on one core; runs
that the file holds are not run again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from experiments.harness import study
from experiments.long_text import questions
from experiments.long_text.questions import NOTHING, Sizes

WHOLE, SMOKE = Sizes(2), Sizes(1)
PARTS = {"quarter": 0.25, "tenth": 0.1}
ARMS = {"full": ("full", 1.0), NOTHING: (NOTHING, 0.0)} | {
    f"{arm}, {name}": (arm, part)
    for name, part in PARTS.items()
    for arm in questions.ARMS
    if arm != "full"
}


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("long_text", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    sizes = SMOKE if smoke else WHOLE
    about = {
        "title": "Questions of a long text",
        "notes": (
            "Entries of the Jargon File, 1,024 tokens of them in a random order, are read by "
            f"SmolLM2-135M; then it is asked what {questions.QUESTIONS} of the terms mean. The cache is "
            "reduced before any question is known, within the same bytes for all arms: `uniform` the "
            "same number of tokens for every head, `uniform-bits` every token at the most bits that "
            "all can have, which leaves some bytes unused, `proportional` as the source prints it, "
            "`ladder` at one price. Nats a token of what the text says of the term, its first 24 "
            "tokens, and ROUGE-L of the greedy answers with it. At a quarter of the bytes `ladder` "
            "answers as the whole cache does; at a tenth it has lost four thousandths of what reading "
            "the text brings, where those that evict answer almost as if they had not read it. Where "
            "it does not help: the model's own answers are short of the text even with everything, "
            "ROUGE-L 0.4, and 48 questions say little of differences of some hundredths."
        ),
        "settings": {"sizes": sizes._asdict(), "tokens": questions.CONTEXT},
        "compare": [
            pair
            for name in PARTS
            for pair in ([f"ladder, {name}", "full"], [f"ladder, {name}", f"uniform, {name}"],
                         [f"ladder, {name}", f"uniform-bits, {name}"],
                         [f"ladder, {name}", f"proportional, {name}"])
        ],
    }  # fmt: skip

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        name, part = ARMS[arm]
        return questions.run(name, part, seed, sizes, advance)

    arms = ["full", "ladder, tenth"] if smoke else list(ARMS)
    return study.Study(about, arms, sizes.contexts, one)


if __name__ == "__main__":
    sys.exit(main())
