"""Needles in a haystack: eight RULER-like tasks (Hsieh et al. 2024, arXiv:2404.06654)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from experiments.suites import haystacks, words
from experiments.suites.cases import Case, Question, Writer, fitting

INTRO = (
    "Access codes are hidden in the text below. Remember all of them, for you will be asked for some "
    "of them at the end.\n\n"
)
DIGITS = 7
Values = Callable[[np.random.Generator, int], list[str]]


def _numbers(rng: np.random.Generator, number: int) -> list[str]:
    return words.numbers(rng, number, DIGITS)


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """What is hidden where.

    Attributes:
      haystack: "line" is one line again and again, "prose" sentences, "needles" other needles.
      keys, values: name -> so many of them.
      num_keys: that are hidden, each with `num_values`; in a haystack of needles, as many as fit.
      num_asked: keys that the question asks for.
    """

    haystack: Literal["line", "prose", "needles"]
    keys: Values = words.keys
    values: Values = _numbers
    num_keys: int = 1
    num_values: int = 1
    num_asked: int = 1

    def __call__(self, writer: Writer, rng: np.random.Generator) -> Case:
        if self.haystack == "needles":
            return self._of_needles(writer, rng)
        keys = self.keys(rng, self.num_keys)
        values = self.values(rng, self.num_keys * self.num_values)
        pairs = [(keys[i // self.num_values], value) for i, value in enumerate(values)]
        asked = keys[: self.num_asked]
        hide = haystacks.in_prose if self.haystack == "prose" else haystacks.in_lines
        hidden = [pairs[i] for i in rng.permutation(len(pairs))]
        context = hide(writer, rng, INTRO, [needle(*pair) for pair in hidden])
        wanted = [value for key, value in pairs if key in asked]
        return Case(context, (question(writer, asked, wanted),))

    def _of_needles(self, writer: Writer, rng: np.random.Generator) -> Case:
        """One of the needles that fit is asked for."""
        most = writer.size // 8  # no line is as short
        pairs = list(zip(self.keys(rng, most), self.values(rng, most), strict=True))
        lines = fitting(writer.lines(needle(*pair) for pair in pairs), writer.room(INTRO))
        key, value = pairs[int(rng.integers(len(lines)))]
        return Case(writer.context(INTRO, lines), (question(writer, [key], [value]),))


def needle(key: str, value: str) -> str:
    """The sentence that is hidden."""
    return f"The access code of {key} is {value}."


def question(writer: Writer, keys: list[str], values: list[str]) -> Question:
    """For all values of some keys, in one list."""
    named = " and ".join(filter(None, [", ".join(keys[:-1]), keys[-1]]))
    plural = len(values) > 1
    what = "are all the access codes" if plural else "is the access code"
    begin = f"The access code{'s' if plural else ''} of {named} {'are' if plural else 'is'}"
    text = f"\n\nQuestion: What {what} of {named}?\nAnswer: {begin}"
    answer = ", ".join(values)
    # With its space before digits: whether the model goes on with one is often decided by a hair.
    text, answer = (f"{text} ", answer) if answer[0].isdigit() else (text, f" {answer}")
    return writer.question(text, f"{answer}.", values)


TASKS = {
    "niah_single_1": Retrieval("line"),
    "niah_single_2": Retrieval("prose"),
    "niah_single_3": Retrieval("prose", values=words.uuids),
    "niah_multikey_1": Retrieval("prose", num_keys=4),
    "niah_multikey_2": Retrieval("needles"),
    "niah_multikey_3": Retrieval("needles", words.uuids, words.uuids),
    "niah_multivalue": Retrieval("prose", num_values=4),
    "niah_multiquery": Retrieval("prose", num_keys=4, num_asked=4),
}
