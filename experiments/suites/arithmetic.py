"""Arithmetic and learning in the context, which low bits break first; five questions of each context."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from experiments.suites import words
from experiments.suites.cases import Case, Writer, fitting
from experiments.suites.many_questions import CLASSES, QUESTIONS, by_examples

LABEL_LETTERS = 3
MOST_REPEATED = 5  # of a thing that is counted
ASSIGNMENTS = 4  # in a chain that is asked for
LARGEST_X, LARGEST_FACTOR, LARGEST_SHIFT = 60, 9, 20

Example = tuple[str, str]  # a question and its answer


def shots(
    intro: str, example: Callable[[np.random.Generator], Example]
) -> Callable[[Writer, np.random.Generator], Case]:
    """A task of examples, as many as fit, none of which is asked for."""

    def task(writer: Writer, rng: np.random.Generator) -> Case:
        asked: dict[str, str] = {}
        while len(asked) < QUESTIONS:
            text, answer = example(rng)
            asked[text] = answer
        room = writer.room(intro)
        lines = writer.lines(f"{x} {y}" for x, y in _others(rng, example, asked, room))
        return Case(
            writer.context(intro, fitting(lines, room)),
            tuple(writer.question(f"{text} ", answer) for text, answer in asked.items()),
        )

    return task


def _others(rng, example, asked: dict[str, str], number: int) -> Iterator[Example]:
    """So many examples but those that are asked for."""
    while number:
        text, answer = example(rng)
        if text not in asked:
            number -= 1
            yield text, answer


def two_digits(rng: np.random.Generator) -> Example:
    return _sum(*rng.integers(10, 100, 2))


def three_digits(rng: np.random.Generator) -> Example:
    return _sum(*rng.integers(100, 1000, 2))


def _sum(x: int, y: int) -> Example:
    return f"{x} + {y} =", str(x + y)


def repeated(rng: np.random.Generator) -> Example:
    """How often a word stands in a row."""
    word, times = (
        words.NOUNS[int(rng.integers(len(words.NOUNS)))],
        int(rng.integers(1, MOST_REPEATED + 1)),
    )
    return f"{' '.join([word] * times)}:", str(times)


def assigned(rng: np.random.Generator) -> Example:
    """A name at the end of a chain of assignments, some of which add."""
    names = words.letters(rng, ASSIGNMENTS, 1)
    value = int(rng.integers(1, 10))
    parts = [f"{names[0]} = {value}"]
    for before, name in itertools.pairwise(names):
        more = int(rng.integers(0, 3))
        value += more
        parts.append(f"{name} = {before} + {more}" if more else f"{name} = {before}")
    return f"{', '.join(parts)}. {names[-1]} is", str(value)


def linear_rule(writer: Writer, rng: np.random.Generator) -> Case:
    """f(x) = a x + b with a and b of the context: values at five x, by those at others."""
    factor, shift = int(rng.integers(2, LARGEST_FACTOR + 1)), int(rng.integers(LARGEST_SHIFT + 1))

    def example(rng: np.random.Generator) -> Example:
        x = int(rng.integers(LARGEST_X + 1))
        return f"f({x}) =", str(factor * x + shift)

    return shots("Values of one function:\n\n", example)(writer, rng)


def random_labels(writer: Writer, rng: np.random.Generator) -> Case:
    """Classes with labels that mean nothing, by examples."""
    labels = words.letters(rng, len(CLASSES), LABEL_LETTERS)
    return by_examples(writer, rng, dict(zip(CLASSES, labels, strict=True)))


TASKS = {
    "sums_of_two_digits": shots("Sums:\n\n", two_digits),
    "sums_of_three_digits": shots("Sums:\n\n", three_digits),
    "assignments": shots("What a name is:\n\n", assigned),
    "counting": shots("How often a word stands there:\n\n", repeated),
    "linear_rule": linear_rule,
    "random_labels": random_labels,
}
