"""Fits what a model's tokens are worth on texts that packages carry, once; the result is kept.

    python -m experiments.kv_budget.fit_worth --out experiments/models/learned/smollm2.npz

Commands find what was learned of their model in that folder. Some 15 minutes on two idle cores. The
texts: a novel, two plays, newspapers, reviews, tweets, source code, and lists of codes, of which those
that README's table comes from are none. Contexts have 1,280 tokens, a few 256 or 4,096, at places that a
seed draws.
"""

from __future__ import annotations

import argparse
import inspect
import json.decoder
import random
import sys
import tarfile
import uuid
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from experiments.harness import cli, progress, texts
from experiments.models import options as models
from experiments.models.worth import decoder_of, write
from experiments.text_classification import data as sentiment
from jbalance.decode import fit_worth
from jbalance.decode.worth import NUM_FOLLOWING

BOOKS = ("alice29", "hamlet", "lear")
SIZES = {1280: 0.8, 256: 0.16, 4096: 0.04}  # of contexts, and the part of them
NUM_CODES = 1500


def sources() -> dict[str, str]:
    """Texts of several kinds, by name."""
    found = {name: texts.text_of(name) for name in BOOKS}
    for source in ("editorial", "product", "film", "tweets"):
        found[source] = "\n".join(sentiment.read(source).texts)
    found["code"] = "".join(inspect.getsource(m) for m in (argparse, json.decoder, tarfile))
    return found | {"codes": _codes(found["editorial"])}


def _codes(text: str) -> str:
    """Lines that give words numbers, in several forms, each for a stretch."""
    words = sorted({word for word in text.split() if word.isalpha() and 3 < len(word) < 9})
    rng = random.Random(0)

    def line(i: int) -> str:
        word, number = rng.choice(words), rng.randrange(10**6, 10**7)
        forms = (
            f"The code of the {word} is {number}.",
            f'"{word}": {number},',
            f"{word} = {number}",
            f"- {word}: {uuid.UUID(int=rng.getrandbits(128))}",
        )
        return forms[i // 60 % len(forms)]

    return "\n".join(line(i) for i in range(NUM_CODES))


def contexts(tokenizer: Tokenizer, number: int, seed: int = 0) -> list[np.ndarray]:
    """Stretches of all texts in turn, with the tokens that follow them.

    Raises:
      ValueError: if `number` is below 1.
    """
    if number < 1:
        raise ValueError(f"--contexts is {number}: at least 1")
    ids = [texts.encode(tokenizer, text) for text in sources().values()]
    sizes = np.repeat(list(SIZES), np.round(np.array(list(SIZES.values())) * number).astype(int))
    rng = np.random.default_rng(seed)
    found = []
    for i, size in enumerate(sizes):
        own = ids[i % len(ids)]
        start = int(rng.integers(len(own) - size - NUM_FOLLOWING + 1))
        found.append(own[start : start + size + NUM_FOLLOWING])
    return found


def job(options: argparse.Namespace) -> None:
    found = models.loaded(options)
    model = decoder_of(found.model, learned=False)
    given = contexts(found.spoken.tokenizer, options.contexts)
    with progress.bar("layers", model.num_layers) as advance:
        worth = fit_worth(model, given, on_layer=lambda layer: advance())
    write(options.out, found.model, worth)


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser("experiments.kv_budget.fit_worth", __doc__)
    parser.add_argument("--contexts", type=int, default=50, help="that are read")
    parser.add_argument("--out", type=Path, metavar="OUT", required=True, help="an .npz file")
    models.add_options(parser)
    return cli.run(parser, job, arguments)


if __name__ == "__main__":
    sys.exit(main())
