"""Haystacks: prose of the public domain or one line again and again, with needles among it."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import numpy as np

from experiments.harness import texts
from experiments.long_text.data import sentences
from experiments.suites.cases import NOISE, Writer
from experiments.suites.words import TEXTS

DEPTHS = np.linspace(0, 100, 40)  # per cent of a haystack's sentences
SHORTEST_PARAGRAPH = 80  # characters; shorter ones are headings and lists


@functools.cache
def prose() -> tuple[str, ...]:
    """The sentences of the texts' paragraphs, in their order."""
    found: list[str] = []
    for name in TEXTS:
        for paragraph in re.split(r"\n\s*\n", texts.text_of(name)):
            text = " ".join(paragraph.split())
            small = sum(map(str.islower, text))
            if len(text) >= SHORTEST_PARAGRAPH and small >= 0.7 * len(text):
                found += sentences(text)
    return tuple(found)


def in_prose(
    writer: Writer, rng: np.random.Generator, intro: str, needles: Sequence[str]
) -> np.ndarray:
    """[S]: needles at distinct depths of prose, in a random order.

    A needle at the depth d stands after sentence floor(N d / 100) of N, the last of which is cut where
    the length is reached.
    """
    planted = [writer.ids(f" {needle}") for needle in needles]
    room = writer.room(intro) - sum(map(len, planted))
    every = prose()
    first, taken = int(rng.integers(len(every))), 0
    pieces: list[np.ndarray] = []
    while taken < room:
        text = every[(first + len(pieces)) % len(every)]
        pieces.append(writer.ids(f" {text}")[: room - taken])
        taken += len(pieces[-1])
    depths = rng.choice(DEPTHS, len(needles), replace=False)
    after = [int(len(pieces) * d / 100) for d in depths]
    found = []
    for i in range(len(pieces) + 1):
        found += [needle for needle, at in zip(planted, after, strict=True) if at == i]
        found += pieces[i : i + 1]
    return writer.context(intro, found)


def in_lines(
    writer: Writer, rng: np.random.Generator, intro: str, needles: Sequence[str]
) -> np.ndarray:
    """[S]: lines of noise, as many as fit, with needles in their order at distinct random ones."""
    return writer.context(intro, among_noise(writer, rng, writer.room(intro), needles))


def among_noise(
    writer: Writer, rng: np.random.Generator, room: int, needles: Sequence[str]
) -> list[np.ndarray]:
    """Lines of noise and needles for so many tokens."""
    planted = list(writer.lines(needles))
    (noise,) = writer.lines([NOISE])
    room -= sum(map(len, planted))
    number = max(room // len(noise), 0) + len(planted)
    at = np.sort(rng.choice(number, len(planted), replace=False))
    pieces = [noise] * number
    for i, needle in zip(at, planted, strict=True):
        pieces[i] = needle
    return pieces
