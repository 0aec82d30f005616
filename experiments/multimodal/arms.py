"""Which tokens of which modality one budget keeps, and at what price."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.harness import budgets
from experiments.multimodal.tokens import MODALITIES, Example, modality_of
from experiments.text_classification.tokens import uniform
from jbalance import allocate


class Scored(NamedTuple):
    """Tokens of examples, and what each is worth."""

    examples: Sequence[Example]
    worth: Sequence[np.ndarray]


def full(scored: Scored, total: int) -> list[np.ndarray]:
    """Every token."""
    return budgets.full(scored.worth, total)


def by_modality(rule: budgets.Budget) -> Callable[[Scored, int], list[np.ndarray]]:
    """A budget over texts as one over the modalities of all examples."""

    def arm(scored: Scored, total: int) -> list[np.ndarray]:
        kinds = [modality_of(x["place"]) for x in scored.examples]
        where = [
            (i, np.flatnonzero(own == m))
            for i, own in enumerate(kinds)
            for m in range(len(MODALITIES))
            if (own == m).any()
        ]
        masks = [np.zeros(len(own), bool) for own in kinds]
        for (i, at), kept in zip(
            where, rule([scored.worth[i][at] for i, at in where], total), strict=True
        ):
            masks[i][at] = kept
        return masks

    return arm


def ladder(scored: Scored, total: int) -> list[np.ndarray]:
    """One price for the tokens of all modalities and examples."""
    return budgets.ladder(scored.worth, total)


ARMS: dict[str, Callable[[Scored, int], list[np.ndarray]]] = {
    "full": full,
    "uniform": by_modality(uniform),
    "proportional": by_modality(budgets.proportional),
    "ladder": ladder,
}


def budgeted(scored: Scored, arm: str, part: float) -> list[Example]:
    """The tokens that `part` of all of them pays for."""
    total = int(part * sum(map(len, scored.worth)))
    masks = ARMS[arm](scored, total)
    return [
        {name: x[m] for name, x in example.items()}
        for example, m in zip(scored.examples, masks, strict=True)
    ]


def counts(examples: Sequence[Example]) -> np.ndarray:
    """[B, modalities] tokens."""
    size = len(MODALITIES)
    return np.stack([np.bincount(modality_of(x["place"]), minlength=size) for x in examples])


def prices(scored: Scored, part: float) -> tuple[float, np.ndarray]:
    """What the next token is worth: under one budget, and [modalities] if each had `part` of its own.

    Of the tokens' worth as it is: the arm `ladder` also counts how many better ones a stamp has.
    """
    w = np.concatenate(scored.worth).astype(np.float32)
    owner = np.concatenate([modality_of(x["place"]) for x in scored.examples])
    steps, costs = jnp.stack([jnp.zeros(w.size), w], axis=1), jnp.array([0, 1])
    one = allocate.ladder(steps, costs, int(part * w.size))
    each = (part * np.bincount(owner, minlength=len(MODALITIES))).astype(np.int32)
    apart = allocate.ladder(steps, costs, jnp.asarray(each), jnp.asarray(owner))
    return float(one.price[0]), np.asarray(apart.price)
