"""Who keeps how many tokens: one function a policy, all at the same bytes.

A policy orders each head's tokens by a scorer and gives each (layer, key/value head) unit a number of
them, within every device's entries. `uniform:NAME` is `uniform` with another scorer of
`importance.TOKEN_SCORERS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.kv_budget import measure
from experiments.kv_budget.measure import Measured
from jbalance import allocate, cache, checks, place, shares
from jbalance.importance import TOKEN_SCORERS
from jbalance.resources import kv_entry_bytes


class Counts(NamedTuple):
    """What a policy decided."""

    entries: np.ndarray  # [U] tokens kept by each unit
    price: np.ndarray | None  # [G] output error that one more entry would save, if it has prices


Rule = Callable[[Measured, np.ndarray, np.ndarray], Counts]


def equal(measured: Measured, entries: np.ndarray, device_of: np.ndarray) -> Counts:
    """The same number for every head of a device."""
    units, tokens = measured.w.shape[0] * measured.w.shape[1], measured.w.shape[2]
    alpha = shares.uniform(units)
    return Counts(np.asarray(allocate.whole(alpha, entries, 0, tokens, device_of).amount), None)


def proportional(measured: Measured, entries: np.ndarray, device_of: np.ndarray) -> Counts:
    """METHOD step 3: in proportion to w, a head's output error at the average number of tokens."""
    return _in_proportion(measured, entries, device_of, 1.0)


def proportional_rms(measured: Measured, entries: np.ndarray, device_of: np.ndarray) -> Counts:
    """The same with the root of that error, its amplitude, for w."""
    return _in_proportion(measured, entries, device_of, 0.5)


def _in_proportion(measured, entries, device_of, power) -> Counts:
    tokens = measured.w.shape[2]
    counts = np.asarray(measure.counts(tokens))
    average = entries.sum() / device_of.size
    at = min(int(np.searchsorted(counts, average)), counts.size - 1)
    w = np.asarray(measured.error).reshape(device_of.size, -1)[:, at] ** power
    floor = counts[_least_level(counts, average)]
    out = allocate.whole(shares.proportional(w), entries, int(floor), tokens, device_of)
    return Counts(np.asarray(out.amount), None)


def ladder(measured: Measured, entries: np.ndarray, device_of: np.ndarray) -> Counts:
    """The ladder: levels are numbers of tokens, their values the output error that they save."""
    counts = np.asarray(measure.counts(measured.w.shape[2]), np.int32)
    lowest = _least_level(counts, entries.sum() / device_of.size)
    error = np.asarray(measured.error, np.float64).reshape(device_of.size, -1)[:, lowest:]
    scale = error.max()
    values = (-error / (scale if scale > 0 else 1.0)).astype(np.float32)
    out = allocate.ladder(values, counts[lowest:], entries, device_of)
    return Counts(counts[lowest:][np.asarray(out.level)], np.asarray(out.price) * scale)


def _least_level(counts: np.ndarray, average: float) -> int:
    """Index of the least count: sinks and recent tokens, or half of the average where that is less.

    The last queries cannot see what a head that they do not use will be asked later.
    """
    floor = min(measure.NUM_SINKS + measure.NUM_RECENT, average / 2)
    return max(int(np.searchsorted(counts, floor, side="right")) - 1, 0)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A way to spend the entries."""

    name: str
    scorer: str
    rule: Rule


def everything(measured: Measured, entries: np.ndarray, device_of: np.ndarray) -> Counts:
    """All tokens of all heads, over any budget: the reference."""
    del entries
    return Counts(np.full(device_of.size, measured.w.shape[2], np.int32), None)


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("full", "combined", everything),
        Policy("sinks-recent", "sinks_recent", equal),
        Policy("uniform", "combined", equal),
        Policy("proportional", "combined", proportional),
        Policy("proportional-rms", "combined", proportional_rms),
        Policy("ladder", "combined", ladder),
        *(Policy(f"uniform:{scorer}", scorer, equal) for scorer in TOKEN_SCORERS),
    )
}


def policy_of(name: str) -> Policy:
    """The policy called `name`.

    Raises:
      ValueError: that lists the names.
    """
    return checks.choice("policy", name, POLICIES)


class Plan(NamedTuple):
    """Which tokens stay, and where."""

    kept: np.ndarray  # [L, K, S] bool
    device_of: np.ndarray  # [U] int32
    entries: np.ndarray  # [U]
    price: np.ndarray | None  # [G]


def make_plan(
    policy: Policy, measured: Measured, budgets_bytes: list[int], tail_tokens: int = 0
) -> Plan:
    """Place the units on the devices, and spend each device's bytes on its own.

    Args:
      policy: who gets how much.
      measured: the context.
      budgets_bytes: of each device, for tables, kept entries and the tails of its units.
      tail_tokens: tokens to reserve for each unit behind the context.

    Raises:
      ValueError: a budget too small for the tables, tails and least entries of its units.
    """
    layers, heads, tokens = measured.w.shape
    units, head_dim = layers * heads, measured.k.shape[-1]
    budgets = np.asarray(budgets_bytes, np.int64)
    if policy.rule is everything:  # over any budget: spread evenly, whatever there is
        device_of = (np.arange(units) * budgets.size // units).astype(np.int32)
        entries = np.zeros(budgets.size, np.int32)
    else:
        # Placed as if the memory were one, so that the devices' prices come out alike.
        at_most = _entries(int(budgets.sum()), units, tail_tokens, head_dim, "the budget")
        on_one = np.zeros(units, np.int32)
        demand = policy.rule(measured, np.array([min(at_most, units * tokens)]), on_one).entries
        loads = jnp.asarray(demand + tail_tokens, jnp.float32)
        device_of = np.asarray(place.pack(loads, budgets.size, budgets).device_of)
        number = np.bincount(device_of, minlength=budgets.size)
        fits = [
            _entries(int(size), int(n), tail_tokens, head_dim, f"--device-memory[{d}]")
            for d, (size, n) in enumerate(zip(budgets, number, strict=True))
        ]
        entries = np.minimum(fits, number * tokens).astype(np.int32)
    chosen = policy.rule(measured, entries, device_of)
    order = np.argsort(-np.asarray(measured.w), axis=-1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(tokens)[None, None], axis=-1)
    kept = rank < chosen.entries.reshape(layers, heads, 1)
    return Plan(kept, device_of, chosen.entries, chosen.price)


def _entries(budget: int, units: int, tail_tokens: int, head_dim: int, name: str) -> int:
    """Entries that a device can keep beside its table and the tails of its units."""
    entry, fewest = kv_entry_bytes(head_dim), measure.FEW_TOKENS[0]
    tails = units * tail_tokens * entry
    least = tails + cache.table_bytes(units) + units * fewest * entry
    if budget < least:
        raise ValueError(
            f"{name} is {budget} bytes: the tables, {tail_tokens} new tokens and {fewest} kept ones of "
            f"its {units} units take {least}; give more memory, or fewer --new-tokens"
        )
    return cache.entries_within(budget - tails, units, head_dim)
