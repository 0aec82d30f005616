"""The most common words of a list and of a coded text (RULER-like `cwe` and `fwe`)."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import zeta

from experiments.suites import words
from experiments.suites.cases import Case, Writer


class Counts(NamedTuple):
    """How often words stand in a list."""

    common: int
    others: int


COMMON_WORDS = 10
SHORT = 4096  # L below which words stand less often
LONG_COUNTS, SHORT_COUNTS, EXAMPLE_COUNTS = Counts(30, 3), Counts(6, 1), Counts(3, 1)
EXAMPLE_OTHERS = 10  # words of the worked example besides the common ones
LIST_INTRO = "Some words stand more often than others in the numbered list below.\n\n"
LIST_QUESTION = (
    "\n\nQuestion: Which ten words are the most common in the list?\n"
    "Answer: The ten most common words are"
)

EXPONENT, CODE_LETTERS, ASKED_RANKS = 2.0, 6, (2, 3, 4)
NOISE_WORD = "..."
CODE_INTRO = (
    "Some coded words stand more often than others in the text below. Dots mean nothing.\n\n"
)
CODE_QUESTION = (
    "\n\nQuestion: Which three coded words are the most common in the text?\n"
    "Answer: The three most common coded words are"
)


def common_words(writer: Writer, rng: np.random.Generator) -> Case:
    """The ten most common words of a shuffled numbered list, behind a worked example."""
    counts = SHORT_COUNTS if writer.length < SHORT else LONG_COUNTS
    every = words.vocabulary()
    order = [every[i] for i in rng.permutation(len(every))]
    chosen, left = _none_in_others(order, 2 * COMMON_WORDS)
    shown, asked = chosen[:COMMON_WORDS], chosen[COMMON_WORDS:]
    example, others = left[:EXAMPLE_OTHERS], left[EXAMPLE_OTHERS:]
    begin = f"{LIST_INTRO}{_numbered(_shuffled(rng, shown, example, EXAMPLE_COUNTS))}"
    begin += f"{LIST_QUESTION} {', '.join(shown)}.\n\n{LIST_INTRO}"

    seed = int(rng.integers(2**32))

    def text_of(number: int) -> np.ndarray:
        generator = np.random.default_rng([seed, number])
        return writer.ids(_numbered(_shuffled(generator, asked, others[:number], counts)))

    number = _largest(len(others), lambda n: len(text_of(n)) <= writer.room(begin))
    context = writer.context(begin, [text_of(number)])
    return Case(context, (writer.question(LIST_QUESTION, f" {', '.join(asked)}.", asked),))


def frequent_words(writer: Writer, rng: np.random.Generator) -> Case:
    """The three most frequent words of a coded text whose counts are those of a zeta distribution."""
    number = max((writer.length - 50) // 50, ASKED_RANKS[-1])
    coded = [NOISE_WORD, *words.letters(rng, number - 1, CODE_LETTERS, string.ascii_lowercase)]
    pieces = [writer.ids(f" {word}") for word in coded]
    sizes, room = np.array([len(piece) for piece in pieces]), writer.room(CODE_INTRO)
    total = _largest(room * 2, lambda n: int(occurrences(n, number) @ sizes) <= room)
    ranks = np.repeat(np.arange(number), occurrences(total, number))
    context = writer.context(CODE_INTRO, [pieces[rank] for rank in rng.permutation(ranks)])
    asked = [coded[rank - 1] for rank in ASKED_RANKS]
    return Case(context, (writer.question(CODE_QUESTION, f" {', '.join(asked)}.", asked),))


def occurrences(total: int, number: int) -> np.ndarray:
    """[V] floor(N r^-a / zeta(a)) of the ranks r = 1..V in N words."""
    ranks = np.arange(1, number + 1, dtype=float)
    return np.floor(total * ranks**-EXPONENT / zeta(EXPONENT)).astype(int)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits, by bisection; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _none_in_others(order: Sequence[str], number: int) -> tuple[list[str], list[str]]:
    """The first words that are no part of another, for a score by what an answer holds; and the rest."""
    text = "\n".join(order)
    chosen = []
    for word in order:
        if text.count(word) == 1:
            chosen.append(word)
            if len(chosen) == number:
                break
    taken = set(chosen)
    return chosen, [word for word in order if word not in taken]


def _shuffled(
    rng: np.random.Generator, common: Sequence[str], others: Sequence[str], counts: Counts
) -> list[str]:
    every = [*common] * counts.common + [*others] * counts.others
    return [every[i] for i in rng.permutation(len(every))]


def _numbered(items: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(items, 1))


TASKS = {"cwe": common_words, "fwe": frequent_words}
