"""Pictures, captions and spoken captions of stamps under one budget of tokens.

    python -m experiments.multimodal [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

Every arm trains a small model on the tokens that its budget keeps and tests it with the same budget,
where a modality is missing and where one is noisy too; what is not kept is not computed. Some 12 minutes
on one core; runs that the file holds are not run again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.harness import study
from experiments.multimodal import baselines, data, experiment, report
from experiments.multimodal.experiment import BATCH, Sizes

WHOLE, SMOKE = Sizes(30, 8), Sizes(2, 1)
ARMS = study.at_parts("full", ("uniform", "proportional", "ladder")) | {
    "separate": ("separate", 1.0)
}


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("multimodal", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    sizes = SMOKE if smoke else WHOLE
    known, held = data.split(data.read())
    some = known.part(np.arange(0, len(known.labels), 3)) if smoke else known
    about = {
        "title": "Picture, sound and caption",
        "notes": _NOTES.format(known=len(known.labels), held=len(held.labels)),
        "settings": {
            "sizes": sizes._asdict(),
            "batch": BATCH,
            "rate": experiment.PEAK_RATE,
            "weight decay": experiment.WEIGHT_DECAY,
            "price of noise": experiment.PRICE,
        },
        "baselines": baselines.of_parts(some, held),
        "compare": [
            ["ladder, half", "full"],
            ["ladder, half", "uniform, half"],
            ["ladder, half", "proportional, half"],
            ["ladder, quarter", "full"],
            ["ladder, quarter", "uniform, quarter"],
            ["ladder, quarter", "proportional, quarter"],
            ["full", "separate"],
        ],
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        name, part = ARMS[arm]
        return experiment.run(name, part, seed, sizes, advance)

    steps = sizes.epochs * (len(known.labels) // BATCH)
    pictures = {report.PICTURE: (report.SHOWS, report.draw)}
    return study.Study(about, study.arms_of(ARMS, smoke), steps, one, pictures)


_NOTES = (
    "Stamps of a drawing program (Tux Paint): {known} for training and {held} held out, no two "
    "with the same caption. A stamp is 36 tokens of its picture, one of each tenth of a second of "
    "its caption spoken in French, and one of each word of the English caption. Two tasks: its "
    "category among 16 from all three (accuracy), and its caption among the held-out ones from "
    "picture and sound (R@1 and R@10, by chance 0.007 and 0.075). `half` and `quarter` of the "
    "tokens of all stamps are computed: `uniform` the same part of every modality, `proportional` "
    "in the parts of what a stamp's modalities are worth, alpha = w / sum w, `ladder` at one "
    "price, so that who gets how much is an outcome. Worth is the mass that a scorer of one layer "
    "gives a token, which was told in training where noise was added; its operations are counted. "
    "`missing`: a third of the stamps lack a modality; `noisy`: a third have a noisy picture, a "
    "third a noisy sound, and `keep` is what those get over what they get without noise. At a "
    "quarter the ladder keeps 15 % of the patches, 49 % of the sounds and 42 % of the words, "
    "hardly any noise, and accuracy is that of all tokens; the price of a word would be 6 times "
    "that of a patch if each modality had a quarter of its own. Both tasks of all arms but "
    "`separate` read all keys once, each key's attention divided by the tasks' shares (rescaled "
    "attention, rule split); `separate` reads every modality by itself. Where it does not help: "
    "at half no budget is above another by more than chance; words tell the category whatever the "
    "noise, so that taking the budget from noise gains nothing that these runs can show, and R@10 "
    "may lose by it; proportional parts are as good as one price; one read is a fifth cheaper "
    "than separate ones and finds fewer captions; ridge regression over whole pictures and sounds "
    "finds the first caption more often than any arm, and logistic regression over the captions' "
    "words is two points above all arms in accuracy. A scorer that is not told where noise was "
    "looks at noisy sounds most of all, since they say the same in all stamps: attention alone is "
    "no measure of worth there. That the scorer is told was decided after a first run had shown "
    "what noisy held-out sounds got; how much it counts was set on stamps for training."
)


if __name__ == "__main__":
    sys.exit(main())
