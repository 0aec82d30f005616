"""Explanations of allocations against solving again: who gets more when, and what it buys.

    python -m experiments.explain.allocations [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

A context's heads share the bytes of two devices, of which one has twice the other's. Each head's claim
(the least budget that gives it more) is tried, and so is what its device's price says of a larger
budget. Some two minutes on one core; runs that the file holds are not run again.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.explain import experiment
from experiments.harness import study
from experiments.kv_budget import measure
from jbalance import allocate, explain

CONTEXT, SMOKE_CONTEXT = 1024, 256
SCORER = "combined"
SPLIT = (2, 1)  # of the bytes, over the devices
MORE = {"5 %": 0.05, "20 %": 0.2, "a half": 0.5}
PARTS = {"quarter": 0.25, "tenth": 0.1}


class Problem(NamedTuple):
    """Heads that share devices; costs and budgets in tokens."""

    error: (
        np.ndarray
    )  # [U, M] of the output, with so many tokens; without any it is 1 for all together
    costs: np.ndarray  # [M] int32
    device_of: np.ndarray  # [U] int32
    budgets: np.ndarray  # [G] int32


@functools.cache
def _measured(seed: int, tokens: int) -> np.ndarray:
    """[U, M] output error of the heads of a stretch of a text that the seed chooses."""
    model, _, _ = experiment.loaded()
    ids = experiment.tokens_of(experiment.TEXTS[seed % len(experiment.TEXTS)])
    start = int(np.random.default_rng([seed, 5]).integers(len(ids) - tokens))
    found = measure.prefill(model, ids[start : start + tokens], (SCORER,)).error[SCORER]
    return np.asarray(found, np.float64).reshape(-1, found.shape[-1])


def problem(error: np.ndarray, tokens: int, part: float) -> Problem:
    """Of a measured context: the first device has two heads of three, and as much of the tokens."""
    costs = np.asarray(measure.counts(tokens), np.int32)
    units = len(error)
    device_of = (np.arange(units) % sum(SPLIT) >= SPLIT[0]).astype(np.int32)
    budgets = np.array(SPLIT) * int(part * tokens * units) // sum(SPLIT)
    return Problem(error / error[:, 0].sum(), costs, device_of, budgets.astype(np.int32))


def ladder(given: Problem) -> dict[str, float]:
    """One price for each device's levels, explained."""
    values = (-given.error).astype(np.float32)
    fixed = given.costs, given.budgets, given.device_of
    why = explain.ladder(values, *fixed)
    level = np.asarray(why.allocation.level)

    @jax.jit
    def solved(budgets: jax.Array) -> jax.Array:
        return allocate.ladder(values, given.costs, budgets, given.device_of).level

    figures = {
        "claims that hold": _claims(given, why.next_budget, level, solved),
        "output error": float(given.error[np.arange(level.size), level].sum()),
        "nearest step": _nearest(given, why.next_budget),
        "gap": (why.bound - why.value) / -why.value,
    }
    for name, more in MORE.items():
        change = (more * given.budgets).astype(np.int32)
        found = explain.what_if(values, given.costs, given.budgets, change, given.device_of)
        figures[f"foretold of {name}"] = float(found.first_order / found.change)
    return figures


def whole(given: Problem) -> dict[str, float]:
    """Tokens in proportion to each head's error at the average number, explained."""
    average = given.budgets.sum() / len(given.error)
    column = min(int(np.searchsorted(given.costs, average)), given.costs.size - 1)
    w = given.error[:, column].astype(np.float32)
    least, most = int(given.costs[0]), int(given.costs[-1])
    why = explain.whole(w, given.budgets, least, most, given.device_of)

    @jax.jit
    def solved(budgets: jax.Array) -> jax.Array:
        return allocate.whole(w, budgets, least, most, given.device_of).amount

    level = np.searchsorted(given.costs, why.got, side="right") - 1
    return {
        "claims that hold": _claims(given, why.next_budget, why.got, solved),
        "output error": float(given.error[np.arange(level.size), level].sum()),
        "nearest step": _nearest(given, why.next_budget),
    }


def _claims(
    given: Problem, claimed: np.ndarray, got: np.ndarray, solved: Callable[..., Any]
) -> float:
    """Part of the heads that want more and get it at the claimed budget of their device, not below."""
    held = []
    for i in np.flatnonzero(claimed >= 0):
        budgets = given.budgets.copy()
        budgets[given.device_of[i]] = claimed[i]
        enough = np.asarray(solved(jnp.asarray(budgets)))[i] > got[i]
        budgets[given.device_of[i]] -= 1
        below = np.asarray(solved(jnp.asarray(budgets)))[i] > got[i]
        held.append(enough and not below)
    return float(np.mean(held))


def _nearest(given: Problem, claimed: np.ndarray) -> float:
    """Least part of its device's budget that gives any head more."""
    own = given.budgets[given.device_of]
    return float(((claimed - own) / own)[claimed >= 0].min())


RULES = {"ladder": ladder, "proportional": whole}
ARMS = {f"{rule}, {part}": (rule, part) for part in PARTS for rule in RULES}


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("explain.allocations", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    tokens = SMOKE_CONTEXT if smoke else CONTEXT
    about = {
        "title": "Explanations of allocations",
        "notes": (
            f"{len(experiment.TEXTS)} texts, of which SmolLM2-135M reads {tokens} tokens each: its 90 "
            "key/value heads share a quarter or a tenth of the tokens, on two devices of which the "
            "first has twice the second's. `claims that hold`: heads that get more at the budget that "
            "`explain` says, and not with one token less, by solving again. `foretold`: what the prices "
            "say that a larger budget saves of the output error, over what it saves when solved again. "
            "`nearest step`: the least part of a device's budget that gives any head more; `gap`: how "
            "far the dual bound is. Where it does not help: a price is the worth of the next tokens "
            "alone, and foretells too much for a budget that is half as large again."
        ),
        "settings": {"tokens": tokens, "scorer": SCORER, "split": SPLIT, "parts": PARTS},
        "compare": [[f"ladder, {part}", f"proportional, {part}"] for part in PARTS],
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        rule, part = ARMS[arm]
        figures = RULES[rule](problem(_measured(seed, tokens), tokens, PARTS[part]))
        advance()
        return {"figures": figures}

    return study.Study(about, list(ARMS)[: 2 if smoke else None], 1, one)


if __name__ == "__main__":
    sys.exit(main())
