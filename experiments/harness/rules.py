"""--keep: what a user knows of a text, a regular expression, compiled to a rule about its tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from jbalance.importance import Keep, Knowledge, in_spans, knowledge


def pattern_of(text: str) -> re.Pattern[str]:
    """The regular expression of --keep.

    Raises:
      ValueError: it is none.
    """
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"--keep is {text!r}, no regular expression: {error}") from None


def kept_by_rule(pattern: str, pieces: Sequence[str]) -> Knowledge:
    """The tokens of a text, given as their pieces, that a pattern matches always stay.

    Raises:
      ValueError: it matches none.
    """
    ends = np.cumsum([len(piece) for piece in pieces])
    offsets = np.stack([np.append(0, ends[:-1]), ends], axis=1)
    found = [match.span() for match in pattern_of(pattern).finditer("".join(pieces))]
    where = in_spans(offsets, found)
    if not where.any():
        raise ValueError(f"--keep is {pattern!r}: nothing that was read matches it")
    return knowledge([Keep(where)], len(pieces), beta=0)
