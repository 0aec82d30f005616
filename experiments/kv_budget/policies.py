"""Who keeps which tokens at how many bits: one function a policy, all at the same bytes.

Those that only evict order each head's tokens by a scorer and give each (layer, key/value head) unit a
number of them, within every device's entries; `uniform:NAME` is `uniform` with another scorer of
`importance.TOKEN_SCORERS`. Those with several precisions give every token a level, within every
device's pages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.kv_budget import measure
from experiments.kv_budget.measure import Measured
from experiments.kv_budget.placing import Evenness, evenness, place_units
from jbalance import allocate, cache, checks, shares
from jbalance.cache import live, pages, remainder, worth
from jbalance.importance import TOKEN_SCORERS
from jbalance.importance.token_worth import NUM_RECENT as LADDER_RECENT
from jbalance.resources import kv_entry_bytes

LADDER_BITS = (8, 4, 3)
_PACKINGS = 4  # of one price's pages into the devices, before each gets its own price


class Counts(NamedTuple):
    """What a policy that only evicts decided."""

    entries: np.ndarray  # [U] tokens kept by each unit
    price: np.ndarray | None  # [G] output error that one more entry would save, if it has prices


Rule = Callable[[Measured, np.ndarray, np.ndarray], Counts]


class Levels(NamedTuple):
    """What a policy of several precisions decided."""

    level: np.ndarray  # [U, S] index into the policy's bits; their number where evicted
    price: np.ndarray | None  # [G] worth per byte, if it has prices


class Room(NamedTuple):
    """What the devices hold in pages."""

    num_pages: np.ndarray  # [G]
    page_bytes: int
    device_of: np.ndarray  # [U]
    head_dim: int

    def page_tokens(self, bits: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens that a page holds at each level."""
        return tuple(pages.tokens_per_page(self.page_bytes, self.head_dim, b) for b in bits)


PagedRule = Callable[[Measured, tuple[int, ...], Room], Levels]


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


def ladder_eviction_only(measured: Measured, entries: np.ndarray, device_of: np.ndarray) -> Counts:
    """Levels are numbers of tokens of 16 bits, their values the output error that they save."""
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


def ladder(measured: Measured, bits: tuple[int, ...], room: Room) -> Levels:
    """The ladder over all tokens: what one price allows each, from nothing to the highest precision."""
    codes = np.array(worth.encode_worth(measured.w)).reshape(room.device_of.size, -1)
    codes[:, : measure.NUM_SINKS] = codes[:, -LADDER_RECENT:] = worth.PROTECTED
    offsets = worth.steps(room.head_dim, bits)
    page_tokens = room.page_tokens(bits)
    level = np.full(codes.shape, len(bits), np.int8)
    prices = np.zeros(room.num_pages.size)
    for d, num_pages in enumerate(room.num_pages):
        own = room.device_of == d
        histogram = np.zeros((own.sum(), len(bits), worth.NUM_CODES), np.int32)
        np.add.at(histogram[:, 0], (np.arange(len(histogram))[:, None], codes[own]), 1)
        out = worth.price_of(jnp.asarray(histogram), offsets, page_tokens, num_pages)
        if out.shortfall > 0:
            raise ValueError(
                f"--device-memory[{d}] or the budget holds {num_pages} pages of {room.page_bytes} bytes "
                f"for contexts: sinks and recent tokens of its units lack {out.shortfall}; give more"
            )
        level[own] = worth.levels_of(codes[own], out.least[:, None])
        # A price in worth: what a token must bring per byte to be kept at all.
        least = float(worth.decode_worth(jnp.max(out.price)))
        prices[d] = least / pages.token_bytes(room.head_dim, bits[-1])
    return Levels(level, prices)


def uniform_bits(measured: Measured, bits: tuple[int, ...], room: Room) -> Levels:
    """As KIVI and its like: all tokens at the most bits that all can have; else the latest and sinks."""
    units, tokens = room.device_of.size, measured.w.shape[2]
    level = np.full((units, tokens), len(bits), np.int8)
    order = np.argsort(-np.asarray(measured.w[0, 0]), kind="stable")  # by position, as in all heads
    for d, num_pages in enumerate(room.num_pages):
        own = room.device_of == d
        each = int(num_pages) // max(int(own.sum()), 1)
        fits = [each * number for number in room.page_tokens(bits)]
        chosen = next((m for m, number in enumerate(fits) if number >= tokens), len(bits) - 1)
        level[np.ix_(own, order[: fits[chosen]])] = chosen
    return Levels(level, None)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A way to spend the bytes on whole tokens."""

    name: str
    scorer: str
    rule: Rule


@dataclasses.dataclass(frozen=True)
class PagedPolicy:
    """A way to spend the bytes at several precisions."""

    name: str
    scorer: str
    rule: PagedRule
    bits: tuple[int, ...]
    remainder: bool  # whether something stays of the tokens that it evicts


def everything(measured: Measured, entries: np.ndarray, device_of: np.ndarray) -> Counts:
    """All tokens of all heads, over any budget: the reference."""
    del entries
    return Counts(np.full(device_of.size, measured.w.shape[2], np.int32), None)


AnyPolicy = Policy | PagedPolicy

_ALL: tuple[AnyPolicy, ...] = (
    Policy("full", "combined", everything),
    Policy("sinks-recent", "sinks_recent", equal),
    Policy("uniform", "combined", equal),
    Policy("proportional", "combined", proportional),
    Policy("proportional-rms", "combined", proportional_rms),
    Policy("ladder-eviction-only", "combined", ladder_eviction_only),
    PagedPolicy("uniform-bits", "sinks_recent", uniform_bits, (16, 8, 4, 3, 2, 1), False),
    PagedPolicy("ladder", "sketch", ladder, LADDER_BITS, True),
    PagedPolicy("ladder-thorough", "repetition", ladder, LADDER_BITS, True),
    *(Policy(f"uniform:{scorer}", scorer, equal) for scorer in TOKEN_SCORERS),
)
POLICIES = {policy.name: policy for policy in _ALL}


def policy_of(name: str) -> AnyPolicy:
    """The policy called `name`.

    Raises:
      ValueError: that lists the names.
    """
    return checks.choice("policy", name, POLICIES)


class Plan(NamedTuple):
    """Which tokens stay, at how many bits, and where."""

    level: np.ndarray  # [L, K, S] index into bits; their number where evicted
    bits: tuple[int, ...]
    device_of: np.ndarray  # [U] int32
    price: np.ndarray | None  # [G] value that one more byte would save, if it has prices
    room: Room | None = None  # of a plan in pages
    remainder: bool = False  # whether something stays of evicted tokens
    evenness: Evenness | None = None  # of a plan within the budgets of several devices

    @property
    def kept(self) -> np.ndarray:
        """[L, K, S] bool."""
        return self.level < len(self.bits)

    @property
    def entries(self) -> np.ndarray:
        """[U] tokens kept by each unit."""
        return self.kept.sum(axis=-1).reshape(-1)


def make_plan(
    policy: AnyPolicy, measured: Measured, budgets_bytes: list[int], tail_tokens: int = 0
) -> Plan:
    """Place the units on the devices, each layer's time and each device's memory even.

    Bytes are given as if the memory were one, at one price. Where the units with their pages, or a few
    pages less, fit into the devices so, that is the plan; else each device's bytes are spent on its own
    units.

    Args:
      policy: who gets how much.
      measured: the context.
      budgets_bytes: of each device, for tables, kept entries and the tails of its units.
      tail_tokens: tokens to reserve for each unit behind the context.

    Raises:
      ValueError: a budget too small for the tables, tails and least entries of its units.
    """
    budgets = np.asarray(budgets_bytes, np.int64)
    units = measured.w.shape[0] * measured.w.shape[1]
    if policy.rule is everything:  # over any budget: spread evenly, whatever there is
        device_of = (np.arange(units) * budgets.size // units).astype(np.int32)
        return Plan(np.zeros(measured.w.shape, np.int8), (16,), device_of, None)
    if isinstance(policy, PagedPolicy):
        return _plan_pages(policy, measured, budgets, tail_tokens)
    return _plan_entries(policy, measured, budgets, tail_tokens)


def _plan_entries(policy: Policy, measured: Measured, budgets: np.ndarray, tail: int) -> Plan:
    """Of a policy that only evicts: whole entries, as many as fit."""
    layers, heads, tokens = measured.w.shape
    units, head_dim = layers * heads, measured.k.shape[-1]
    # Placed as if the memory were one, so that the devices' prices come out alike.
    at_most = _entries(int(budgets.sum()), units, tail, head_dim, "the budget")
    on_one = np.zeros(units, np.int32)
    demand = policy.rule(measured, np.array([min(at_most, units * tokens)]), on_one).entries
    entry, wanted = kv_entry_bytes(head_dim), (demand + tail).reshape(layers, heads)
    device_of = place_units(wanted, wanted * entry + 4, budgets - 4)
    number = np.bincount(device_of, minlength=budgets.size)
    fits = [
        _entries(int(size), int(n), tail, head_dim, f"--device-memory[{d}]")
        for d, (size, n) in enumerate(zip(budgets, number, strict=True))
    ]
    entries = np.minimum(fits, number * tokens).astype(np.int32)
    chosen = policy.rule(measured, entries, device_of)
    order = np.argsort(-np.asarray(measured.w), axis=-1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(tokens)[None, None], axis=-1)
    evicted = rank >= chosen.entries.reshape(layers, heads, 1)
    price = None if chosen.price is None else chosen.price / entry
    held = (chosen.entries + tail).reshape(layers, heads)
    even = evenness(held, held * entry + 4, device_of, budgets)
    return Plan(evicted.astype(np.int8), (16,), device_of, price, evenness=even)


def _plan_pages(policy: PagedPolicy, measured: Measured, budgets: np.ndarray, tail: int) -> Plan:
    """Of a policy of several precisions: whole pages, as many as fit beside what units have besides."""
    shape, head_dim = measured.w.shape, measured.k.shape[-1]
    units = shape[0] * shape[1]
    beside = tail * kv_entry_bytes(head_dim) + key_mean_bytes(head_dim)
    if policy.remainder:
        beside += remainder.unit_bytes(head_dim)
    page_bytes = live.page_bytes_for(
        max(int(budgets.sum()) - units * beside, 1), units, head_dim, policy.bits
    )

    def room_of(budgets: np.ndarray, device_of: np.ndarray) -> Room:
        number = np.bincount(device_of, minlength=budgets.size)
        fits = [
            _pages_within(int(size), int(n), tail, beside, head_dim, policy.bits, page_bytes, d)
            for d, (size, n) in enumerate(zip(budgets, number, strict=True))
        ]
        return Room(np.array(fits), page_bytes, device_of, head_dim)

    def sizes_of(level: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pages [U], and tokens and bytes [L, K], of units with tokens at levels [U, S]."""
        need = _pages_of(level, room, policy.bits)
        size = need * (page_bytes + 4) + beside + 8 * len(policy.bits)  # its part of the tables too
        tokens = (level < len(policy.bits)).sum(axis=1) + tail
        return need, tokens.reshape(shape[:2]), size.reshape(shape[:2])

    room = pool = room_of(budgets.sum(keepdims=True), np.zeros(units, np.int32))
    chosen = policy.rule(measured, policy.bits, pool)
    for _ in range(_PACKINGS if budgets.size > 1 else 0):
        need, tokens, size = sizes_of(chosen.level)
        room = room_of(budgets, place_units(tokens, size, budgets - 4))
        if (np.bincount(room.device_of, need, budgets.size) <= room.num_pages).all():
            if chosen.price is not None:
                chosen = Levels(chosen.level, chosen.price.repeat(budgets.size))
            break
        # Pages do not divide: the devices together hold some fewer than one of their bytes.
        fewer = np.minimum(room.num_pages.sum(), pool.num_pages - 1)
        pool = pool._replace(num_pages=fewer)
        chosen = policy.rule(measured, policy.bits, pool)
    else:
        chosen = policy.rule(measured, policy.bits, room)
    _, tokens, size = sizes_of(chosen.level)
    even = evenness(tokens, size, room.device_of, budgets)
    level = chosen.level.reshape(shape)
    return Plan(level, policy.bits, room.device_of, chosen.price, room, policy.remainder, even)


def _pages_of(level: np.ndarray, room: Room, bits: tuple[int, ...]) -> np.ndarray:
    """Pages [U] that units take with their tokens at levels [U, S]."""
    counts = (level[..., None] == np.arange(len(bits))).sum(axis=1)
    return np.sum(-(-counts // np.array(room.page_tokens(bits))), axis=1)


def key_mean_bytes(head_dim: int) -> int:
    """Of one unit's mean key, in bfloat16."""
    return 2 * head_dim


def _pages_within(budget, units, tail, beside, head_dim, bits, page_bytes, device) -> int:
    """Pages that a device can hold beside the tails, mean keys and remainders of its units."""
    try:
        return pages.pages_within(budget - units * beside, units, head_dim, bits, page_bytes)
    except ValueError as error:
        raise ValueError(
            f"--device-memory[{device}] or the budget is {budget} bytes, of which {tail} new tokens, "
            f"mean keys and what stays of evicted tokens of its {units} units take {units * beside}: "
            f"{error}"
        ) from None


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
