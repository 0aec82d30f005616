"""Transcripts as words, and how many of them are wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_ORDINALS = dict(
    zip(
        ["one", "two", "three", "five", "eight", "nine", "twelve"],
        ["first", "second", "third", "fifth", "eighth", "ninth", "twelfth"],
        strict=True,
    )
)
_SPELLED = {"mr": "mister", "&": "and", "ok": "okay"}


def normalized(text: str) -> list[str]:
    """Words in small letters without punctuation; numbers below a hundred are spelled."""
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower().replace("’", "'"))
    text = re.sub(r"'", "", text)
    found = re.findall(r"\d+(?:st|nd|rd|th)?|[a-z]+|&", text)
    return [spelled for word in found for spelled in _spelled(word)]


def _spelled(word: str) -> list[str]:
    digits = re.match(r"\d+", word)
    if digits is None or int(digits[0]) > 99:
        return [_SPELLED.get(word, word)]
    number = cardinal(int(digits[0]))
    return number if word == digits[0] else [*number[:-1], ordinal(number[-1])]


def cardinal(number: int) -> list[str]:
    """The words of a number below a hundred."""
    if number < len(ONES):
        return [ONES[number]]
    rest = number % 10
    return [TENS[number // 10 - 2], *([ONES[rest]] if rest else [])]


def ordinal(word: str) -> str:
    """The ordinal number of a cardinal one of one word."""
    if word in _ORDINALS:
        return _ORDINALS[word]
    return f"{word[:-1]}ieth" if word.endswith("y") else f"{word}th"


def edits(said: Sequence[str], found: Sequence[str]) -> int:
    """Levenshtein distance: substitutions, deletions and insertions that make one of the other."""
    row = np.arange(len(found) + 1)
    for i, word in enumerate(said):
        after = np.minimum(row[1:] + 1, row[:-1] + np.array([x != word for x in found], int))
        # Insertions run along the row: the least of any beginning plus its distance.
        after = np.append(i + 1, after) - np.arange(len(found) + 1)
        row = np.minimum.accumulate(after) + np.arange(len(found) + 1)
    return int(row[-1])
