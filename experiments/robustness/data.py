"""Texts of four sources, and what may happen to them before a budget sees them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from experiments.text_classification import data, tokens
from experiments.text_classification.data import SOURCES
from experiments.text_classification.tokens import MOST_TOKENS, Worth

NOISE, MISSING = 0.1, 1 / 3  # of the letters that are others, of the words that are not there
STUFFERS, STUFFING = 0.1, 24  # of the texts, and tokens that each puts before its own
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Texts(NamedTuple):
    """Some of each source.

    Attributes:
      texts: of all sources, one after the other.
      labels: [B, 2] int32, whether positive, and which source.
    """

    texts: list[str]
    labels: np.ndarray


class Material(NamedTuple):
    """What all runs read."""

    train: list[np.ndarray]
    train_labels: np.ndarray
    test: dict[str, list[np.ndarray]]  # tokens by condition
    test_labels: np.ndarray
    stuffs: np.ndarray  # [B] bool, who does in the condition "stuffed"
    tokenizer: Tokenizer
    worth: Worth


def read(most: int, most_test: int) -> tuple[Texts, Texts]:
    """For training and for the test, at most so many of each source.

    Raises:
      ValueError: a package that cannot be fetched.
    """
    splits = [data.split(data.read(source)) for source in SOURCES]
    both = []
    for part, size in (("train", most), ("test", most_test)):
        own = [getattr(split, part).at(np.arange(size)) if len(getattr(split, part).texts) > size
               else getattr(split, part) for split in splits]  # fmt: skip
        group = np.repeat(np.arange(len(own)), [len(x.texts) for x in own])
        positive = np.concatenate([x.positive for x in own])
        labels = np.stack([positive, group], axis=1).astype(np.int32)
        both.append(Texts([text for x in own for text in x.texts], labels))
    return both[0], both[1]


@functools.cache
def prepare(most: int, most_test: int) -> Material:
    """Tokens, what they are worth by the training part, and the conditions of the test."""
    train, test = read(most, most_test)
    tokenizer = tokens.train_tokenizer(train.texts)
    ids = tokens.encode(tokenizer, train.texts)
    worth = Worth.of(ids, train.labels[:, 0], tokenizer.get_vocab_size())
    rng = np.random.default_rng(0)
    clean = tokens.encode(tokenizer, test.texts)
    stuffs = rng.random(len(clean)) < STUFFERS
    conditions = {
        "clean": clean,
        "noise": tokens.encode(tokenizer, changed(test.texts, with_typos, rng)),
        "missing": tokens.encode(tokenizer, changed(test.texts, with_gaps, rng)),
        "stuffed": stuffed(clean, stuffs, worth),
    }
    return Material(ids, train.labels, conditions, test.labels, stuffs, tokenizer, worth)


def changed(
    texts: Sequence[str],
    change: Callable[[str, np.random.Generator], str],
    rng: np.random.Generator,
) -> list[str]:
    """Each text, changed."""
    return [change(text, rng) for text in texts]


def with_typos(text: str, rng: np.random.Generator) -> str:
    """`NOISE` of the letters are others."""
    wrong = rng.random(len(text)) < NOISE
    others = rng.integers(len(LETTERS), size=len(text))
    return "".join(
        LETTERS[o] if w and x.isalpha() else x for x, w, o in zip(text, wrong, others, strict=True)
    )


def with_gaps(text: str, rng: np.random.Generator) -> str:
    """`MISSING` of the words are not there."""
    words = text.split()
    return " ".join(x for x, p in zip(words, rng.random(len(words)), strict=True) if p >= MISSING)


def stuffed(ids: Sequence[np.ndarray], stuffs: np.ndarray, worth: Worth) -> list[np.ndarray]:
    """Some texts with the tokens of most worth before their own, as many as fit."""
    liked = np.argsort(-worth.w * worth.idf, kind="stable")[:STUFFING].astype(np.int32)
    return [
        np.concatenate([liked, own])[:MOST_TOKENS] if bad else own
        for own, bad in zip(ids, stuffs, strict=True)
    ]
