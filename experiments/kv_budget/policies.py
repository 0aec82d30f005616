"""Who keeps which tokens at how many bits: one rule a policy, all at the same bytes.

Those that only evict keep the tokens at 16 bits that a scorer puts first, and give each (layer,
key/value head) unit a number of pages; `uniform:NAME` is `uniform` with another scorer of
`importance.TOKEN_SCORERS`. Those of several precisions give every token a level.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from experiments.kv_budget import measure
from experiments.kv_budget.measure import Measured
from jbalance import allocate, checks, shares
from jbalance.cache import _cache
from jbalance.cache._layout import token_bytes
from jbalance.cache._sight import MOST_WINDOW
from jbalance.decode import plan as planning
from jbalance.decode.context import Context, first_prompt_codes, write
from jbalance.decode.plan import Levels, Plan, Reserve, Room
from jbalance.decode.prefill import LayerTokens
from jbalance.importance import TOKEN_SCORERS, Knowledge

LADDER_BITS = (8, 4, 3)
WIDE_PAGE_TOKENS = 8  # of pages at 16 bits: units get whole ones, so they are small


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a rule sees of a context, by its policy's scorer; U units of S tokens."""

    w: np.ndarray  # [U, S] importance
    error: np.ndarray | None  # [U, M] what keeping `measure.counts` tokens costs in output error
    known: Knowledge | None = None  # rules, which ladders of single tokens honor
    certain: bool = False  # whether w is learned or measured, which ladders of single tokens ask


Rule = Callable[[Scores, Room], Levels]


def everything(scores: Scores, room: Room) -> Levels:
    """All tokens of all heads, over any budget: the reference."""
    del room
    return Levels(np.zeros(scores.w.shape, np.int8), None)


def equal(scores: Scores, room: Room) -> Levels:
    """The same number of pages for every head of a device."""
    alpha = shares.uniform(len(scores.w))
    return _best(scores, room, _whole(alpha, 0, scores, room))


def proportional(scores: Scores, room: Room) -> Levels:
    """METHOD step 3: in proportion to w, a head's output error at the average number of tokens."""
    counts = np.asarray(measure.counts(scores.w.shape[1]))
    average = room.num_pages.sum() * room.page_tokens[0] / len(scores.w)
    column = min(int(np.searchsorted(counts, average)), counts.size - 1)
    assert scores.error is not None
    floor = int(counts[_least_level(counts, average)]) // room.page_tokens[0]
    alpha = shares.proportional(scores.error[:, column])
    return _best(scores, room, _whole(alpha, floor, scores, room))


def ladder_eviction_only(scores: Scores, room: Room) -> Levels:
    """Levels are numbers of tokens of 16 bits, their values the output error that they save."""
    size = room.page_tokens[0]
    counts = np.asarray(measure.counts(scores.w.shape[1]), np.int32)
    lowest = _least_level(counts, room.num_pages.sum() * size / len(scores.w))
    pages = -(-counts // size)
    kept = np.append(np.diff(pages) > 0, True) & (np.arange(counts.size) >= lowest)
    counts, pages = counts[kept], pages[kept]  # the most tokens of each number of pages
    assert scores.error is not None
    error = scores.error[:, kept].astype(np.float64)
    scale = error.max() if error.max() > 0 else 1.0
    values = (-error / scale).astype(np.float32)
    out = allocate.ladder(values, pages, room.num_pages.astype(np.int32), room.device_of)
    price = np.asarray(out.price) * scale / room.page_bytes
    chosen = np.asarray(out.level)
    return _best(scores, room, pages[chosen], counts[chosen])._replace(price=price)


def _whole(alpha, floor: int, scores: Scores, room: Room) -> np.ndarray:
    """[U] whole pages in these shares, at least the floor."""
    most = -(-scores.w.shape[1] // room.page_tokens[0])
    pages = np.minimum(
        room.num_pages, np.bincount(room.device_of, minlength=room.num_pages.size) * most
    )
    return np.asarray(
        allocate.whole(alpha, pages.astype(np.int32), floor, most, room.device_of).amount
    )


def _best(scores: Scores, room: Room, pages: np.ndarray, most: np.ndarray | None = None) -> Levels:
    """Each unit's first tokens by its scorer, as many as its pages hold, or fewer."""
    number = np.minimum(pages * room.page_tokens[0], scores.w.shape[1])
    number = number if most is None else np.minimum(number, most)
    order = np.argsort(-scores.w, axis=-1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(scores.w.shape[1])[None], axis=-1)
    return Levels((rank >= number[:, None]).astype(np.int8), None)


def _least_level(counts: np.ndarray, average: float) -> int:
    """Index of the least count: sinks and recent tokens, or half of the average where that is less.

    The last queries cannot see what a head that they do not use will be asked later.
    """
    floor = min(measure.NUM_SINKS + measure.NUM_RECENT, average / 2)
    return max(int(np.searchsorted(counts, floor, side="right")) - 1, 0)


def ladder(scores: Scores, room: Room) -> Levels:
    """One price over all tokens: what it allows each, from nothing to the highest precision."""
    return planning.ladder(codes_of(scores.w, scores.known), certain=scores.certain)(room)


def uniform_bits(scores: Scores, room: Room) -> Levels:
    """As KIVI and its like: all tokens at the most bits that all can have; else the latest and sinks."""
    units, tokens = scores.w.shape
    level = np.full((units, tokens), len(room.bits), np.int8)
    order = np.argsort(-scores.w[0], kind="stable")  # by position, as in all heads
    for d, num_pages in enumerate(room.num_pages):
        own = room.device_of == d
        each = int(num_pages) // max(int(own.sum()), 1)
        fits = [each * number for number in room.page_tokens]
        chosen = next((m for m, number in enumerate(fits) if number >= tokens), len(room.bits) - 1)
        level[np.ix_(own, order[: fits[chosen]])] = chosen
    return Levels(level, None)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A way to spend the bytes."""

    name: str
    scorer: str
    rule: Rule
    bits: tuple[int, ...] = (16,)
    centroids: bool = False  # whether evicted tokens join centroids


_ALL = (
    Policy("full", "combined", everything),
    Policy("sinks-recent", "sinks_recent", equal),
    Policy("uniform", "combined", equal),
    Policy("proportional", "combined", proportional),
    Policy("ladder-eviction-only", "combined", ladder_eviction_only),
    Policy("uniform-bits", "sinks_recent", uniform_bits, (16, 8, 4, 3, 2, 1)),
    Policy("ladder", measure.WORTH, ladder, LADDER_BITS, True),
    Policy("ladder-sketch", measure.SKETCH, ladder, LADDER_BITS, True),
    Policy("ladder-thorough", measure.REPETITION, ladder, LADDER_BITS, True),
    *(Policy(f"uniform:{scorer}", scorer, equal) for scorer in TOKEN_SCORERS),
)
POLICIES = {policy.name: policy for policy in _ALL}


def policy_of(name: str) -> Policy:
    """The policy called `name`.

    Raises:
      ValueError: that lists the names.
    """
    return checks.choice("policy", name, POLICIES)


def scorers_of(policies: list[Policy]) -> tuple[str, ...]:
    """The scorers that they ask for, each once."""
    return tuple(dict.fromkeys(policy.scorer for policy in policies))


def make_plan(
    policy: Policy,
    measured: Measured,
    budgets_bytes: list[int],
    reserve: Reserve | None = None,
    windows: tuple[int | None, ...] | None = None,
) -> Plan:
    """The plan of a policy within the budgets; of `everything` over them, spread evenly.

    Where layers have windows, the budgets are for the other layers, and the tokens of the windows are
    held besides, at the policy's finest precision: policies differ in what they do beyond windows.

    Raises:
      ValueError: a budget too small for what its units need at least.
    """
    if windows is not None:
        return _beside_windows(policy, measured, budgets_bytes, windows)
    return _plan(policy, measured, budgets_bytes, reserve, windows)


def _beside_windows(policy, measured, budgets_bytes, windows) -> Plan:
    """A plan of one device's layers without a window, and the windows of the others."""
    (budget,) = budgets_bytes
    whole = np.flatnonzero([w is None for w in windows])
    if not whole.size:
        raise ValueError("all layers have windows: there is nothing to choose beyond them")
    part = jax.tree.map(lambda x: x[whole], measured)
    layers, heads, size = next(iter(measured.w.values())).shape
    # As in windows that hold all tokens: their pages then have room for positions, as the others' have.
    plan = _plan(policy, part, [budget], None, (min(size + 1, MOST_WINDOW),) * whole.size)
    level = np.full((layers, heads, size), len(plan.bits), np.int8)
    level[whole] = plan.level
    for i, window in enumerate(windows):
        if window is not None:
            level[i, :, max(size + 1 - window, 0) :] = 0
    room = plan.room
    beside = (
        room.pages_of(level.reshape(-1, size)).sum()
        - room.pages_of(plan.level.reshape(-1, size)).sum()
    )
    room = room._replace(
        num_pages=room.num_pages + beside, device_of=np.zeros(layers * heads, np.int32)
    )
    return Plan(level, room, plan.price, None, windows)


def window_bytes(plan: Plan) -> int:
    """Of a plan's windows: their pages, and what their units have besides."""
    if plan.windows is None:
        return 0
    local = [i for i, w in enumerate(plan.windows) if w is not None]
    level = plan.level[local].reshape(-1, plan.level.shape[2])
    pages = plan.room.pages_of(level).sum() * (plan.room.page_bytes + 4)
    unit = _cache.unit_bytes(plan.room.head_dim, 0) + 8 * len(plan.bits) + 8
    return int(pages + unit * len(level))


def _plan(policy, measured, budgets_bytes, reserve, windows) -> Plan:
    """`make_plan` of layers without windows; the arena holds positions if others have some."""
    timed = windows is not None
    w = measured.w[policy.scorer]
    layers, heads, tokens = w.shape
    error = measured.error.get(policy.scorer)
    units = layers * heads
    scores = Scores(
        np.asarray(w).reshape(units, tokens),
        None if error is None else np.asarray(error).reshape(units, -1),
        measured.known,
        measured.certain(policy.scorer),
    )
    head_dim = measured.k.shape[-1]
    wide = token_bytes(head_dim, 16, timed=timed) * WIDE_PAGE_TOKENS
    page_bytes = wide if policy.bits == (16,) else None
    if policy.rule is everything:
        groups = len(budgets_bytes)
        device_of = (np.arange(units) * groups // units).astype(np.int32)
        need = -(-tokens // WIDE_PAGE_TOKENS) * np.bincount(device_of, minlength=groups)
        room = Room(need, int(page_bytes or 0), device_of, head_dim, policy.bits, timed)
        return Plan(np.zeros(w.shape, np.int8), room, None, None)
    return planning.fit(
        lambda room: policy.rule(scores, room),
        (layers, heads, tokens),
        head_dim,
        budgets_bytes,
        bits=policy.bits,
        reserve=reserve,
        page_bytes=page_bytes,
        windows=windows,
    )


def pack(policy: Policy, measured: Measured, plan: Plan, devices: list[jax.Device]) -> Context:
    """The context as it was planned, on its devices."""
    w = measured.w[policy.scorer]
    layers = map(LayerTokens, measured.k, measured.v, w, measured.energy)
    codes = codes_of(np.asarray(w).reshape(-1, w.shape[2]), measured.known).reshape(w.shape)
    return write(plan, codes, layers, devices, centroids=policy.centroids)


def codes_of(w: np.ndarray, known: Knowledge | None = None) -> np.ndarray:
    """[U, S] codes of worth, by rules."""
    return np.array(first_prompt_codes(w, w.shape[1], known))
