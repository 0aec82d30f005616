"""Parallel interface strings of an office suite, split by their English side, and their subwords."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import polib
from tokenizers import Tokenizer

from experiments.harness import packages, texts
from experiments.harness.tokens import byte_level_bpe

LANGUAGES = ("de", "fr")
PACKAGES = {language: f"libreoffice-l10n-{language}" for language in LANGUAGES}
CATALOGUES = "usr/lib/libreoffice/program/resource/{0}/LC_MESSAGES"
LEAST_WORDS, MOST_WORDS = 4, 10  # of the English sides that are tested; for training, 1 to 10
TEST, VALIDATION = 500, 300  # pairs
MOST_TOKENS = 32  # of either side, with the one that ends it
VOCABULARY = 2000
PAD, END, FIRST_LANGUAGE = 0, 1, 2  # begin-of-sentence says the language


@dataclasses.dataclass(frozen=True)
class Pair:
    """An English string and its translations, in the order of `LANGUAGES`."""

    english: str
    translations: tuple[str, ...]


class Split(NamedTuple):
    """No English string is in two of them."""

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]


def all_pairs() -> list[Pair]:
    """The strings that both catalogues translate, English ones once, in a fixed order.

    Raises:
      ValueError: packages that cannot be fetched.
    """
    entries: list[dict[str, str]] = []
    for language, package in PACKAGES.items():
        folder = packages.debian_tree(package) / CATALOGUES.format(language)
        found: dict[str, str] = {}
        for path in sorted(folder.glob("*.mo")):
            for entry in polib.mofile(str(path)):
                if entry.msgid and entry.msgstr:
                    # The first translation stands: catalogues repeat strings in other contexts.
                    found.setdefault(_plain(entry.msgid), _plain(entry.msgstr))
        entries.append(found)
    both = [s for s in entries[0] if s and all(found.get(s) for found in entries)]
    return [Pair(s, tuple(found[s] for found in entries)) for s in sorted(both)]


def _plain(text: str) -> str:
    """Without marks of keyboard shortcuts, on one line."""
    return re.sub(r"\s+", " ", text.replace("_", "").replace("~", "")).strip()


def split(
    pairs: list[Pair],
    test: int = TEST,
    validation: int = VALIDATION,
    least_words: int = LEAST_WORDS,
) -> Split:
    """Test, validation and training parts, drawn with a fixed seed.

    Strings of `least_words` to `MOST_WORDS` English words are tested; shorter ones, mostly names of
    commands, are for training only, and longer ones are left out.

    Raises:
      ValueError: nothing would be left for training.
    """
    words = {pair: len(pair.english.split()) for pair in pairs}
    pairs = [pair for pair in pairs if words[pair] <= MOST_WORDS]
    drawn = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    tested = [pair for pair in drawn if words[pair] >= least_words]
    if len(tested) <= test + validation:
        raise ValueError(
            f"pairs has {len(tested)} strings of {least_words} to {MOST_WORDS} words: test {test} and "
            f"validation {validation} leave none"
        )
    held = set(tested[: test + validation])
    train = [pair for pair in drawn if pair not in held]
    return Split(train, tested[test : test + validation], tested[:test])


def train_tokenizer(pairs: list[Pair], vocabulary: int = VOCABULARY) -> Tokenizer:
    """Byte-level BPE of all languages together, from these strings alone."""
    every = (text for pair in pairs for text in (pair.english, *pair.translations))
    special = ["<pad>", "<end>", *(f"<{language}>" for language in LANGUAGES)]
    return byte_level_bpe(every, vocabulary, special=special)


class Encoded(NamedTuple):
    """A pair as token ids, both ended by `END`."""

    source: np.ndarray
    target: np.ndarray


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids with `END`; what is too long loses its end. Names of special tokens are characters."""
    return np.append(texts.encode(tokenizer, text)[: MOST_TOKENS - 1], np.int32(END))


def encode_pairs(tokenizer: Tokenizer, pairs: list[Pair], language: str) -> list[Encoded]:
    """For one direction; pairs with a side too long are left out."""
    at = LANGUAGES.index(language)
    out = []
    for pair in pairs:
        both = pair.english, pair.translations[at]
        if all(len(texts.encode(tokenizer, text)) < MOST_TOKENS for text in both):
            out.append(Encoded(*(encode(tokenizer, text) for text in both)))
    return out


class Side(NamedTuple):
    """Sentences one after the other in N places, and where their tokens lie in P rows of T."""

    ids: Any  # [N] int32
    position: Any  # [N] int32 in the sentence
    place: Any  # [N] int32 in the rows, P T for no token
    row: Any  # [P, T] int32, the inverse; N for no token

    @property
    def lengths(self) -> Any:
        """Tokens of each row: [P]; leading axes of stacked sides stay."""
        return (self.row < self.ids.shape[-1]).sum(axis=-1)


class Batch(NamedTuple):
    """Pairs of one direction: `target.ids` begin with the language, `wanted` is what follows."""

    source: Side
    target: Side
    wanted: Any  # [N] int32, `PAD` for nothing


class Sizes(NamedTuple):
    """Static sizes of a batch."""

    rows: int = 64
    source: int = 400
    target: int = 480


def batches(
    pairs: list[Encoded], language: str, rng: np.random.Generator, sizes: Sizes | None = None
) -> Iterator[Batch]:
    """Batches without end, the pairs in a new order in every epoch; a batch takes what fits."""
    sizes = Sizes() if sizes is None else sizes
    chosen: list[Encoded] = []
    used = np.zeros(3, int)
    limits = np.array(sizes)
    while True:
        for i in rng.permutation(len(pairs)):
            need = np.array([1, len(pairs[i].source), len(pairs[i].target)])
            if (used + need > limits).any():
                yield pack(chosen, language, sizes)
                chosen, used = [], np.zeros(3, int)
            chosen.append(pairs[i])
            used += need


def pack(pairs: list[Encoded], language: str, sizes: Sizes) -> Batch:
    """One batch of pairs that fit."""
    begin = FIRST_LANGUAGE + LANGUAGES.index(language)
    shifted = [np.concatenate([[begin], pair.target[:-1]]) for pair in pairs]
    wanted = np.full(sizes.target, PAD, np.int32)
    joined = np.concatenate([pair.target for pair in pairs])
    wanted[: joined.size] = joined
    return Batch(
        side_of([pair.source for pair in pairs], sizes.rows, sizes.source),
        side_of(shifted, sizes.rows, sizes.target),
        wanted,
    )


def side_of(sentences: list[np.ndarray], rows: int, size: int) -> Side:
    """Sentences that fit, one after the other."""
    ids, position = np.full(size, PAD, np.int32), np.zeros(size, np.int32)
    place = np.full(size, rows * MOST_TOKENS, np.int32)
    row = np.full((rows, MOST_TOKENS), size, np.int32)
    at = 0
    for i, sentence in enumerate(sentences):
        length = len(sentence)
        here = slice(at, at + length)
        ids[here] = sentence
        position[here] = np.arange(length)
        place[here] = i * MOST_TOKENS + np.arange(length)
        row[i, :length] = np.arange(at, at + length)
        at += length
    return Side(ids, position, place, row)
