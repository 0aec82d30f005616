"""What a run tells of its last plan, of each token and why; and what the user tells it, as a rule."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from experiments.kv_budget import measure
from experiments.kv_budget.policies import codes_of
from jbalance import explain
from jbalance.cache._layout import token_bytes
from jbalance.decode import Plan
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
        raise ValueError(f"--keep is {pattern!r}: nothing in the context matches it")
    return knowledge([Keep(where)], len(pieces), beta=0)


def reasons(w: np.ndarray, plan: Plan, known: Knowledge | None) -> list[str]:
    """Why heads keep what they keep: that which is next to get more, those with least and most."""
    codes = codes_of(w.reshape(-1, w.shape[-1]), known)
    more = explain.heads(plan, codes).more_bytes
    kept = plan.kept.sum(axis=-1)
    chosen = [np.argmin(np.where(more < 0, 2**62, more)), np.argmin(kept), np.argmax(kept)]
    heads = dict.fromkeys(tuple(map(int, np.unravel_index(at, kept.shape))) for at in chosen)
    return [explain.sentence(plan, codes, *at) for at in heads]


def of_tokens(w: np.ndarray, plan: Plan) -> dict[str, list[float]]:
    """Of each token: importance, averaged over the heads, how many kept it, and at how many bits.

    Besides its worth for each byte at the lowest level, in the currency of the plan's price.
    """
    inner = slice(measure.NUM_SINKS, w.shape[-1] - measure.NUM_RECENT)
    shown = w / w[..., inner].sum(axis=-1, keepdims=True)
    top = shown[..., inner].mean(axis=(0, 1)).max()
    mean = np.minimum(shown.mean(axis=(0, 1)), top)  # protected tokens stand above every score
    bits = np.array([*plan.bits, 0])[plan.level]
    size = token_bytes(plan.room.head_dim, plan.bits[-1])
    return {
        "mean": mean.tolist(),
        "kept": plan.kept.mean(axis=(0, 1)).tolist(),
        "bits": bits.mean(axis=(0, 1)).tolist(),
        "worth_per_byte": (w.mean(axis=(0, 1)) / size).tolist(),
    }
