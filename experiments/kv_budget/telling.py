"""What a run tells of its last plan, of each token and why."""

from __future__ import annotations

import numpy as np

from experiments.kv_budget import measure
from experiments.kv_budget.policies import codes_of
from jbalance import explain
from jbalance.cache._layout import token_bytes
from jbalance.decode import Plan
from jbalance.importance import Knowledge


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
