"""Variable tracking: names that get their values from one another (RULER-like `vt`)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from experiments.suites import haystacks, words
from experiments.suites.cases import Case, Writer

INTRO = (
    "The lines below give names a value, or the value of another name. Follow the values through the "
    "text.\n\n"
)
HOPS, NAME_LETTERS, DIGITS = 4, 5, 5
EXAMPLE_TOKENS = 500  # of the worked example


class Chain(NamedTuple):
    """Names that have one value, in the order in which they get it."""

    names: list[str]
    value: str

    @property
    def lines(self) -> list[str]:
        sources = [self.value, *self.names]
        return [f"LET {x} = {y}." for x, y in zip(self.names, sources, strict=False)]


def chains(rng: np.random.Generator, number: int, hops: int) -> list[Chain]:
    """Chains that share no name and no value."""
    size = hops + 1
    names = words.letters(rng, number * size, NAME_LETTERS)
    values = words.numbers(rng, number, DIGITS)
    return [Chain(names[i * size : (i + 1) * size], value) for i, value in enumerate(values)]


def question(chain: Chain) -> str:
    """For all names with the chain's value, up to the beginning of the answer."""
    return (
        f"\n\nQuestion: Which names have the value {chain.value}?\nAnswer: The {len(chain.names)} names "
        f"with the value {chain.value} are"
    )


def answer(chain: Chain) -> str:
    """Of `question`."""
    return f" {', '.join(chain.names)}."


def variable_tracking(writer: Writer, rng: np.random.Generator) -> Case:
    """One chain of four hops among lines of noise, behind a worked example of some 500 tokens."""
    shown, asked = chains(rng, 2, HOPS)
    asks = writer.ids(question(shown) + answer(shown) + "\n\n")
    room = EXAMPLE_TOKENS - len(writer.ids(INTRO)) - len(asks)
    example = [*haystacks.among_noise(writer, rng, room, shown.lines), asks, writer.ids(INTRO)]
    room = writer.room(INTRO) - sum(map(len, example))
    program = haystacks.among_noise(writer, rng, room, asked.lines)
    context = writer.context(INTRO, example + program)
    return Case(context, (writer.question(question(asked), answer(asked), asked.names),))


TASKS = {"vt": variable_tracking}
