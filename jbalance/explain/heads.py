"""Why a layer's key/value head keeps what it keeps of a context, in numbers and in a sentence.

A plan has one price for the pages of all devices together, or one for the pages of each (`decode.fit`).
What a head gets at every price, and the pages at which that price is reached, are looked at all at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import ArrayLike

from jbalance import checks
from jbalance.cache import _price
from jbalance.cache._layout import token_bytes
from jbalance.decode.model import in_windows
from jbalance.decode.plan import Levels, Plan, Room, histogram_of, ladder
from jbalance.explain.ladder import NONE
from jbalance.resources import human_bytes
from jbalance.types import Binding, container

_PAGE_ENTRY_BYTES = 4  # of a page in its arena's table


@container
class HeadReasons:
    """Of each layer and key/value head [L, K]: NumPy arrays."""

    tokens: np.ndarray  # [L, K, M] int64, kept at each level
    asked_bytes: np.ndarray  # [L, K] int64, pages of all its tokens at the finest level
    got_bytes: np.ndarray  # [L, K] int64, pages of its own
    binding: np.ndarray  # [L, K] int32, a Binding
    price: np.ndarray  # [L, K] float64 worth per byte of the pages that it competes for
    marginal: np.ndarray  # [L, K] float64 worth per byte of its best step left out; 0 if none
    more_bytes: np.ndarray  # [L, K] int64, growth of those pages that gives it more; or NONE


def heads(plan: Plan, codes: ArrayLike) -> HeadReasons:
    """Explain a plan of `decode.ladder`, head by head.

    `Binding.DEVICE`: its device's pages are spent, at a price of the device's own. `PRICE`: those of all
    devices are, at one price. `FLOOR`: it keeps but the first and latest tokens, which always stay.
    `CAP`: it keeps all its tokens at the finest level.

    Args:
      plan: of `decode.fit` or of a `decode.Context`.
      codes: [L, K, S] or [L K, S] uint8, the worth that it was made of.

    Returns:
      `HeadReasons`. `more_bytes` is what the pages of the head's device (`DEVICE`), or of all devices
      together (`PRICE`), must grow by until the head holds more than it does.

    Raises:
      ValueError: a plan without a price, or codes that do not lead to it.
    """
    pools, problem = _problem(plan, codes)
    units, bits = len(problem.codes), plan.bits
    level = plan.level.reshape(units, -1)
    room = plan.room
    tokens = (level[..., None] == np.arange(len(bits))).sum(axis=1)
    number = problem.seen.sum(axis=1)
    out = {
        "tokens": tokens,
        "asked_bytes": -(-number // room.page_tokens[0]) * room.page_bytes,
        "got_bytes": room.pages_of(level) * room.page_bytes,
        "binding": _binding(problem, level, bits, by_device=len(pools) == room.num_pages.size),
        "price": np.asarray(plan.price, np.float64)[room.device_of],
        "marginal": np.zeros(units),
        "more_bytes": np.full(units, NONE),
    }
    for pages, own in pools:
        mine = problem._replace(codes=problem.codes[own], seen=problem.seen[own])
        out["marginal"][own] = _marginal(mine, level[own], room, int(pages))
        out["more_bytes"][own] = _more_bytes(mine, room, int(pages))
    out["more_bytes"][out["binding"] == Binding.CAP] = NONE
    shape = plan.level.shape[:2]
    return HeadReasons(**{name: x.reshape(*shape, *x.shape[1:]) for name, x in out.items()})


def sentence(
    plan: Plan, codes: ArrayLike, layer: int, head: int, *, more_bytes: int | None = None
) -> str:
    """Why a head keeps what it keeps, and what more bytes would buy: for a person.

    Args:
      plan: of `decode.fit` or of a `decode.Context`.
      codes: [L, K, S] or [L K, S] uint8, the worth that it was made of.
      layer: of the model, from 0.
      head: key/value head, from 0.
      more_bytes: what if the pages that it competes for grow by this, which is solved again; None for
        the least that gives this head more.

    Raises:
      ValueError: as `heads`; a layer or head that there is not.
    """
    why = heads(plan, codes)
    layers, kv_heads, size = plan.level.shape
    layer = checks.static_int("layer", layer, 0, layers - 1)
    head = checks.static_int("head", head, 0, kv_heads - 1)
    if more_bytes is not None:
        more_bytes = checks.static_int("more_bytes", more_bytes, 1)
    at = layer, head
    kept = ", ".join(
        f"{n:,} at {b} bits" for n, b in zip(why.tokens[at], plan.bits, strict=True) if n
    )
    begin = (
        f"Head {head} of layer {layer} keeps {why.tokens[at].sum():,} of {size:,} tokens ({kept}) in "
        f"{human_bytes(why.got_bytes[at])}"
    )
    binding = Binding(int(why.binding[at]))
    if binding == Binding.CAP:
        return f"{begin}: all that it asked for, so more memory would not change it."
    device = int(plan.device_of[at])
    full, there = f"device {device} is full", "there"
    if len(_owners(plan)) != plan.room.num_pages.size:
        number, there = plan.room.num_pages.size, "in all"
        full = f"all {number} devices' memory is spent at one price"
    if binding == Binding.FLOOR:
        full += " and these are the first and latest tokens, which always stay"
    least = int(why.more_bytes[at]) if more_bytes is None else more_bytes
    return (
        f"{begin}, because {full}: the best that it left out is worth {1024 * why.marginal[at]:.3g} a "
        f"KiB, and the price is {1024 * why.price[at]:.3g}. "
        + _what_if(plan, codes, at, least, there)
    )


class _Problem(NamedTuple):
    """What a plan was made of; U units of S tokens."""

    codes: np.ndarray  # [U, S] uint8
    seen: np.ndarray  # [U, S] bool
    certain: bool  # `Plan.certain`


def _problem(plan: Plan, codes: ArrayLike) -> tuple[list[tuple[int, np.ndarray]], _Problem]:
    """The pages that were priced, with the units [U] bool that compete for them; and the problem."""
    checks.instance("plan", plan, Plan)
    if plan.price is None or plan.priced_pages is None:
        raise ValueError("plan has no price: explanations are those of decode.ladder's plans")
    checks.rank("codes", codes, (2, 3), "[L, K, S] or [L K, S]")
    given = np.asarray(codes)
    layers, kv_heads, size = plan.level.shape
    if given.dtype != np.uint8 or given.shape not in (
        (layers, kv_heads, size),
        (layers * kv_heads, size),
    ):
        raise ValueError(
            f"codes has dtype {given.dtype} and shape {given.shape}: it must be uint8 [L, K, S] = "
            f"{plan.level.shape}, the worth that the plan was made of"
        )
    given = given.reshape(-1, size)
    seen = in_windows(plan.windows, kv_heads, size)
    seen = np.ones(given.shape, bool) if seen is None else seen
    problem = _Problem(given, seen, plan.certain)
    again = _again(plan, problem, plan.priced_pages).level
    if (again.reshape(plan.level.shape) != plan.level).any():
        raise ValueError("codes do not lead to plan.level: give those that the plan was made of")
    return list(zip(plan.priced_pages, _owners(plan), strict=True)), problem


def _owners(plan: Plan) -> list[np.ndarray]:
    """[U] bool of each number in `priced_pages`: the units that compete for those pages."""
    assert plan.priced_pages is not None
    if plan.priced_pages.size == 1:
        return [np.ones(plan.room.device_of.shape, bool)]
    return [plan.room.device_of == d for d in range(plan.priced_pages.size)]


def _again(plan: Plan, problem: _Problem, pages: np.ndarray) -> Levels:
    """What the ladder gives for so many pages, of all devices [1] or of each [G]."""
    room = plan.room._replace(num_pages=pages)
    if pages.size == 1:
        room = room._replace(device_of=np.zeros_like(plan.room.device_of))
    return ladder(problem.codes, problem.seen, certain=problem.certain)(room)


def _binding(problem: _Problem, level: np.ndarray, bits: tuple[int, ...], *, by_device: bool):
    """[U] int32, a Binding."""
    kept = level < len(bits)
    out = np.full(len(level), Binding.DEVICE if by_device else Binding.PRICE, np.int32)
    out[(~kept | (problem.codes == _price.PROTECTED)).all(axis=1)] = Binding.FLOOR
    out[((level == 0) | ~problem.seen).all(axis=1)] = Binding.CAP
    return out


def _plenty(problem: _Problem, room: Room, pages: int) -> int:
    """Of these units with so many pages: `_price.plenty`, if the plan knows of it."""
    if not problem.certain:
        return 0
    return int(_price.plenty(room.page_tokens, pages, int(problem.seen.sum())))


def _marginal(problem: _Problem, level: np.ndarray, room: Room, pages: int) -> np.ndarray:
    """[U] worth per byte of each unit's best step that was not taken; 0 if there is none."""
    steps = _price.steps(room.head_dim, room.bits)
    offsets = np.asarray(steps.at(_plenty(problem, room, pages)))
    lacks = problem.seen & (level > 0)
    key = np.where(lacks, problem.codes.astype(int) - offsets[np.maximum(level, 1) - 1], -(2**15))
    best = key.max(axis=1)
    worth = np.asarray(_price.decode_worth(jnp.asarray(best)), np.float64)
    return np.where(lacks.any(axis=1), worth / token_bytes(room.head_dim, room.bits[-1]), 0)


def _more_bytes(problem: _Problem, room: Room, pages: int) -> np.ndarray:
    """[U] bytes by which the pages of these units must grow for each of them to hold more; NONE.

    As the pages grow they become plenty, in steps (`_price.plenty`): of each the pages are looked at
    with which it lasts, and the rest only for units that are not done.
    """
    steps = _price.steps(room.head_dim, room.bits)
    histogram = jnp.asarray(histogram_of(problem.codes, problem.seen, len(room.bits)))
    number = int(problem.seen.sum()) if problem.certain else None
    size = np.array([token_bytes(room.head_dim, b, timed=room.timed) for b in room.bits])

    def held(pages):
        of = _held_at(histogram, jnp.asarray(pages), number, steps, room.page_tokens)
        return np.asarray(of, np.int64) @ size

    before = held(np.array([pages]))[0]
    done = before == problem.seen.sum(axis=1) * size[0]  # no pages more would help
    least = np.full(len(before), 2**62)
    at = _plenty(problem, room, pages)
    most = max(np.subtract(steps.offsets, steps.least)) if problem.certain else 0
    begin = pages + 1
    while not done.all() and begin < checks.INT32_MAX:
        end = _end_of(problem, room, at, begin) if at < most else checks.INT32_MAX
        found = _candidates(histogram, before, pages, steps, room, size, at)
        found = np.maximum(np.concatenate([np.full((len(found), 1), begin), found], axis=1), begin)
        gained = _first_gain(np.where(found < end, found, 2**62), lambda x: held(x) > before)
        least = np.where(done, least, gained)
        done |= gained < 2**62
        begin = end
        at = _plenty(problem, room, begin)
    page = room.page_bytes + _PAGE_ENTRY_BYTES
    return np.where(least < 2**62, (least - pages) * page, NONE)


def _end_of(problem: _Problem, room: Room, plenty: int, begin: int) -> int:
    """The least number of pages, above `begin`, with more of plenty than this."""
    low, high = begin, begin + 1
    while _plenty(problem, room, high) <= plenty:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _plenty(problem, room, middle) > plenty else (middle, high)
    return high


def _candidates(histogram, before, pages, steps, room: Room, size, plenty: int) -> np.ndarray:
    """[U, n] pages at which units may begin to hold more than `before`; 2^62 for none.

    At one plenty, as the pages grow the price falls, to the lowest that fits, and just before it does
    the last units pay it already (`_price.price_of`): so a unit pays price j from total(j) on, or, as
    one of the last, from total(j) less what the units before it save by still paying the next higher.
    """
    need, tokens = (
        np.asarray(x, np.int64)
        for x in _at_every_price(histogram, jnp.int32(plenty), steps, room.page_tokens)
    )
    gains = tokens @ size > before[:, None]  # [U, n]
    total = need.sum(axis=0)
    below = np.minimum.accumulate(
        np.concatenate([[2**62], total[:-1]])
    )  # least of all lower prices
    reached = total < below
    candidates = [np.where(gains & reached & (total > pages), total, 2**62)]
    # The last units pay price j - 1 while the first pay j.
    saved = np.cumsum(need[:, :-1] - need[:, 1:], axis=0)
    left = np.minimum.accumulate(total[:-1] - saved, axis=0)[
        :-1
    ]  # once the units before it suffice
    early = np.maximum(left, total[1:])
    valid = gains[1:, :-1] & reached[1:] & (early < below[1:]) & (early > pages)
    first_unit = np.full((1, early.shape[1]), 2**62)
    candidates.append(np.concatenate([first_unit, np.where(valid, early, 2**62)]))
    return np.concatenate(candidates, axis=1)


def _first_gain(candidates: np.ndarray, gains: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """[U] the least pages of candidates [U, n] at which a unit gains; 2^62 if at none.

    `gains` of [m] pages says it of all units, [m, U]. Where a unit pays the next lower price already it
    may hold no more than before: more tokens, but fewer bits for others.
    """
    units = np.arange(len(candidates))
    while True:
        at = candidates.argmin(axis=1)
        least = candidates[units, at]
        wrong = (least < 2**62) & ~gains(np.minimum(least, checks.INT32_MAX))[units, units]
        if not wrong.any():
            return least
        candidates[units[wrong], at[wrong]] = 2**62


@functools.partial(jax.jit, static_argnames=("steps", "page_tokens"))
def _held_at(histogram, pages, number, steps, page_tokens) -> jax.Array:
    """[m, U, M] tokens that are held with so many pages [m], of a number that they may be plenty for."""

    def tokens(pages):
        plenty = 0 if number is None else _price.plenty(page_tokens, pages, number)
        return _price.price_of(histogram, steps, page_tokens, pages, plenty).tokens

    return lax.map(tokens, pages.astype(jnp.int32))


@functools.partial(jax.jit, static_argnames=("steps", "page_tokens"))
def _at_every_price(histogram, plenty, steps, page_tokens) -> tuple[jax.Array, jax.Array]:
    """[U, n] pages that are paid for, and [U, n, M] tokens that are held."""
    units = histogram.shape[0]

    def tokens(price):
        return _price.filled(histogram, jnp.full(units, price), steps, page_tokens, plenty)[1]

    held = lax.map(tokens, jnp.asarray(_price.every_price(steps), jnp.int32))
    return _price.pages_at(histogram, steps, page_tokens, plenty), jnp.moveaxis(held, 0, 1)


def _what_if(plan: Plan, codes: ArrayLike, at: tuple[int, int], more_bytes: int, there: str) -> str:
    """What the pages that a head competes for would buy if they grew: by solving again."""
    if more_bytes == NONE:
        return "No memory more would change it."
    pools, problem = _problem(plan, codes)
    pages = more_bytes // (plan.room.page_bytes + _PAGE_ENTRY_BYTES)
    own = np.flatnonzero(
        [units[np.ravel_multi_index(at, plan.level.shape[:2])] for _, units in pools]
    )[0]
    assert plan.priced_pages is not None
    grown = plan.priced_pages.copy()
    grown[own] += pages
    after = _again(plan, problem, grown).level.reshape(plan.level.shape)
    more = (after < len(plan.bits)).sum(axis=2) - plan.kept.sum(axis=2)
    finer = ((after < plan.level) & plan.kept).sum(axis=2)
    part = np.append(_price.values(plan.room.head_dim, plan.bits), 0.0)
    worth = np.asarray(_price.decode_worth(jnp.asarray(problem.codes)), np.float64)
    worth = np.where(problem.codes == _price.PROTECTED, 0, worth).reshape(plan.level.shape)
    gained = (worth * (part[after] - part[plan.level])).sum()
    return (
        f"{human_bytes(more_bytes)} more {there} would buy {pages:,} page{'s' * (pages != 1)}: "
        f"{more.sum():,} more tokens ({more[at]:,} of this head) and more bits for {finer.sum():,} "
        f"({finer[at]:,} of this head), worth {gained:.3g} together."
    )
