"""What parts of a text are worth: taken out one by one, or Shapley values of few and many coalitions.

    python -m experiments.explain.parts [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

The exact values need every coalition of the parts; each arm needs fewer. Some three minutes a seed on
two cores; runs that the file holds are not run again.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.explain import experiment
from experiments.explain.__main__ import SMOKE, WHOLE
from experiments.explain.experiment import Sizes
from experiments.harness import study
from jbalance import explain

PARTS, SMOKE_PARTS = 8, 3
ARMS = {"leave one out": 0} | {f"Shapley, {n} orders": n for n in (2, 8, 32)}


class Table:
    """A game whose coalitions were all measured; it counts those that are asked for."""

    def __init__(self, worth: np.ndarray) -> None:
        self.worth, self.parts = worth, int(worth.size).bit_length() - 1
        self.asked: set[int] = set()

    def __call__(self, kept: jax.Array) -> jax.Array:
        """Of coalitions [N, U]."""
        number = np.asarray(kept) @ (1 << np.arange(self.parts))
        self.asked |= set(number.tolist())
        return jnp.asarray(self.worth[number])


@functools.cache
def measured(seed: int, sizes: Sizes, parts: int) -> np.ndarray:
    """[2^parts] minus the KL of the text that follows, with the parts that a number's bits name."""
    of_parts = (np.arange(2**parts)[:, None] >> np.arange(parts)) & 1 == 1
    return experiment.worth_of_parts(seed, sizes, of_parts)


def figures(game: Table, orders: int, seed: int) -> dict[str, float]:
    """An arm's values against the exact ones."""
    exact = np.asarray(explain.exact_shapley(Table(game.worth), game.parts).value)
    if orders:
        key = jax.random.key(seed)
        found = explain.shapley(game, game.parts, key, num_permutations=orders)
        value, error = np.asarray(found.value), float(np.mean(found.error))
    else:
        value, error = np.asarray(explain.leave_one_out(game, game.parts)), None
    together = game.worth[-1] - game.worth[0]
    told = {
        "coalitions": float(len(game.asked)),
        "rank correlation": float(explain.rank_correlation(jnp.asarray(value), exact)),
        "off by": float(np.abs(value - exact).sum() / np.abs(exact).sum()),
        "sum over all": float(value.sum() / together),
    }
    if error is not None:
        told["own error"] = float(error * value.size / np.abs(exact).sum())
    return told


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("explain.parts", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    sizes, parts = (SMOKE, SMOKE_PARTS) if smoke else (WHOLE, PARTS)
    about = {
        "title": "Parts of a text, by fewer coalitions",
        "notes": (
            f"SmolLM2-135M reads {sizes.context} tokens of a text in {parts} parts, of which some "
            f"are hidden from the {sizes.continuation} tokens that follow. All {2**parts} coalitions "
            "are measured, so that the Shapley values are known; each arm asks for some. `off by` sums "
            "the differences, over the sum of the values; `own error` is what the sampling says of "
            "itself; `sum over all` is their sum over what all parts are worth together. Parts stand in "
            "for each other: one by one they miss more than half of what they are worth together, and "
            "eight orders, with 51 coalitions of 256, are within a fifth of the values. Three texts are "
            "too few to tell the arms' rank correlations apart."
        ),
        "settings": {"sizes": sizes._asdict(), "parts": parts, "arms": ARMS},
        "compare": [["leave one out", arm] for arm in ARMS if arm != "leave one out"],
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        found = figures(Table(measured(seed, sizes, parts)), ARMS[arm], seed)
        advance()
        return {"figures": found}

    return study.Study(about, list(ARMS), 1, one)


if __name__ == "__main__":
    sys.exit(main())
