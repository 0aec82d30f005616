"""Multi-query associative recall (Arora et al., "Zoology", arXiv:2312.04927): pairs early, queries late.

A sequence begins with pairs of a key and its value, goes on with noise, and ends with the keys again in
another order, each followed by its value: at these keys the value is asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

KEYS, VALUES, NOISE = 32, 32, 32
VOCABULARY = KEYS + VALUES + NOISE


class Batch(NamedTuple):
    """Sequences, and what is asked in them."""

    tokens: np.ndarray  # [B, T] int32
    target: np.ndarray  # [B, T] int32, the value that is asked for; -1 where nothing is


def draw(rng: np.random.Generator, number: int, length: int, pairs: int) -> Batch:
    """Random sequences.

    Args:
      rng: of everything.
      number: B.
      length: T.
      pairs: of keys and values, all of which are asked for.

    Raises:
      ValueError: no room for the pairs, the queries and noise between them.
    """
    if 4 * pairs >= length or pairs > KEYS:
        raise ValueError(
            f"pairs is {pairs}: {length} tokens have room for fewer than {length // 4}, and there are "
            f"{KEYS} keys"
        )
    order = np.argsort(rng.random((number, KEYS)), axis=1)[:, :pairs]
    value = KEYS + rng.integers(0, VALUES, (number, pairs))
    tokens = KEYS + VALUES + rng.integers(0, NOISE, (number, length))
    target = np.full((number, length), -1)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = order, value
    again = np.argsort(rng.random((number, pairs)), axis=1)
    at = length - 2 * pairs
    tokens[:, at::2] = np.take_along_axis(order, again, axis=1)
    tokens[:, at + 1 :: 2] = target[:, at::2] = np.take_along_axis(value, again, axis=1)
    return Batch(tokens.astype(np.int32), target.astype(np.int32))
