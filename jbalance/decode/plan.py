"""Which tokens of a context are kept, at how many bits, and on which device: one price for all bytes.

Tokens get levels as if the devices' memory were one, by one price; the units' exact pages are then
placed so that each layer's time and each device's memory are even (`place.over_layers`). Pages do not
divide, so the devices may together hold a few fewer than one of their bytes: the price rises until they
fit. Where they do not fit so, each device's bytes are spent on its own units, at a price of its own.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import checks
from jbalance.cache import _cache, _pages, _price
from jbalance.cache._layout import TILE_BYTES, PageLayout, table_bytes, token_bytes
from jbalance.cache._sight import clock_bytes
from jbalance.decode._placement import Evenness, evenness, place_units
from jbalance.decode.model import budgets_of
from jbalance.importance.token_worth import NUM_RECENT

_PACKINGS = 4  # of one price's pages into the devices, before each gets its own price


@dataclasses.dataclass(frozen=True)
class Reserve:
    """Bytes beside a context for the caches of the requests that read it.

    Attributes:
      num_requests: at once.
      new_tokens: of each, its question and its answer, that are kept at 8 bits or more; for more of them
        the precision falls.
    """

    num_requests: int = 1
    new_tokens: int = 64

    recent_tokens = 16

    def __post_init__(self) -> None:
        checks.static_fields(self, "num_requests")
        checks.static_fields(self, "new_tokens", least=0)

    def page_bytes(self, head_dim: int, *, timed: bool = False) -> int:
        """Of the requests' pages: eight tokens at 8 bits, or more where kernels read whole tiles.

        `timed` is for a model with windows.
        """
        least = 8 * token_bytes(head_dim, _cache.BITS[0], timed=timed)
        step = 64 if jax.default_backend() == "cpu" else TILE_BYTES
        return -(-least // step) * step

    def unit_bytes(self, head_dim: int, *, timed: bool = False) -> int:
        """Of each of the model's layers and key/value heads."""
        size = self.page_bytes(head_dim, timed=timed)
        of_page = PageLayout.within(size, head_dim, _cache.BITS[0], timed=timed).page_tokens
        pages = -(-max(self.new_tokens, 2 * NUM_RECENT) // of_page) + len(_cache.BITS)
        beside = _cache.unit_bytes(head_dim, self.recent_tokens)
        tables = table_bytes(1, len(_cache.BITS), pages)
        return self.num_requests * (beside + tables + pages * size) + (4 if timed else 0)

    def device_bytes(self, num_units: int, *, timed: bool = False) -> int:
        """Of each device, whatever units it has."""
        clock = clock_bytes(self.num_requests, 0, self.recent_tokens) if timed else 0
        return _cache.table_bytes_of(self.num_requests, num_units) + clock


class Levels(NamedTuple):
    """What a rule decided."""

    level: np.ndarray  # [U, S] index into the bits; their number where evicted
    price: np.ndarray | None  # [G] worth per byte, if it has prices
    certain: bool = False  # as `ladder` was told


class Room(NamedTuple):
    """What the devices hold in pages."""

    num_pages: np.ndarray  # [G]
    page_bytes: int
    device_of: np.ndarray  # [U]
    head_dim: int
    bits: tuple[int, ...]
    timed: bool = False  # whether layers have windows

    @property
    def page_tokens(self) -> tuple[int, ...]:
        """Tokens that a page holds at each level."""
        return tuple(
            PageLayout.within(self.page_bytes, self.head_dim, b, timed=self.timed).page_tokens
            for b in self.bits
        )

    def pages_of(self, level: np.ndarray) -> np.ndarray:
        """[U] pages of units whose tokens have these levels [U, S]."""
        counts = (level[..., None] == np.arange(len(self.bits))).sum(axis=1)
        return np.sum(-(-counts // np.array(self.page_tokens)), axis=1)


Rule = Callable[[Room], Levels]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Levels of all tokens of a context, and the devices of its units."""

    level: np.ndarray  # [L, K, S] int8, index into bits; their number where evicted
    room: Room
    price: np.ndarray | None  # [G] worth per byte, if the rule has prices
    evenness: Evenness | None  # of several devices
    windows: tuple[int | None, ...] | None = None  # of each layer, if any has one
    priced_pages: np.ndarray | None = None  # [1] of all at one price, or [G] at one for each
    certain: bool = False  # as `ladder` was told

    @property
    def bits(self) -> tuple[int, ...]:
        """Of each level."""
        return self.room.bits

    @property
    def kept(self) -> np.ndarray:
        """[L, K, S] bool."""
        return self.level < len(self.bits)

    @property
    def device_of(self) -> np.ndarray:
        """[L, K]."""
        return self.room.device_of.reshape(self.level.shape[:2])


def ladder(codes: np.ndarray, seen: np.ndarray | None = None, *, certain: bool = False) -> Rule:
    """The rule of one price over all units of a device.

    Args:
      codes: [U, S] uint8 codes of worth, `_price.PROTECTED` for tokens that always stay.
      seen: [U, S] bool, tokens in their layer's window: no others are kept; None for all.
      certain: whether the worth is learned (`Model.learned`) or measured, not sketched: where much is
        kept, the finest level then has more tokens.

    Raises:
      ValueError: codes that are none; the rule raises it for a room of other units, or budgets that do
        not hold the tokens that always stay.
    """
    codes = _codes(codes)
    seen = np.ones(codes.shape, bool) if seen is None else seen
    seen = np.asarray(checks.booleans("seen", seen, codes.shape, "[U, S]"))

    def rule(room: Room) -> Levels:
        if len(room.device_of) != len(codes):
            raise ValueError(
                f"codes has {len(codes)} rows: the context has {len(room.device_of)} units, a row [S] "
                f"for each layer and key/value head"
            )
        steps = _price.steps(room.head_dim, room.bits)
        level = np.full(codes.shape, len(room.bits), np.int8)
        prices = np.zeros(room.num_pages.size)
        for d, num_pages in enumerate(room.num_pages):
            own = room.device_of == d
            histogram = jnp.asarray(histogram_of(codes[own], seen[own], len(room.bits)))
            number = int(seen[own].sum())
            plenty = _price.plenty(room.page_tokens, num_pages, number) if certain else 0
            out = _price.price_of(histogram, steps, room.page_tokens, num_pages, plenty)
            if out.shortfall > 0:
                raise ValueError(
                    f"budgets_bytes[{d}] leaves {num_pages} pages of {room.page_bytes} bytes: the "
                    f"tokens of its units that always stay lack {out.shortfall}; give more"
                )
            reached = _price.levels_of(codes[own], out.least[:, None])
            level[own] = np.where(seen[own], reached, len(room.bits))
            least = float(_price.decode_worth(jnp.max(out.price)))
            prices[d] = least / token_bytes(room.head_dim, room.bits[-1])
        return Levels(level, prices, certain)

    return rule


def _codes(codes: np.ndarray) -> np.ndarray:
    """[U, S] uint8; ValueError for what is no codes."""
    checks.rank("codes", codes, 2, "[U, S]")
    checks.non_empty("codes", codes)
    return np.asarray(checks.int_in_range("codes", codes, 0, _price.PROTECTED)).astype(np.uint8)


def histogram_of(codes: np.ndarray, seen: np.ndarray, num_levels: int) -> np.ndarray:
    """[U, M, 256] of codes [U, S] that are seen [U, S], all of them new: at level 0."""
    histogram = np.zeros((len(codes), num_levels, _price.NUM_CODES), np.int32)
    unit = np.broadcast_to(np.arange(len(codes))[:, None], codes.shape)
    np.add.at(histogram[:, 0], (unit[seen], codes[seen]), 1)
    return histogram


def fit(
    rule: Rule,
    shape: tuple[int, int, int],
    head_dim: int,
    budgets_bytes: list[int],
    *,
    bits: tuple[int, ...] = _cache.BITS,
    reserve: Reserve | None = None,
    page_bytes: int | None = None,
    windows: tuple[int | None, ...] | None = None,
) -> Plan:
    """Levels of a context's tokens under the devices' budgets, and the placement of its units.

    Args:
      rule: who gets how much, such as `ladder` of the tokens' codes.
      shape: (L, K, S) of the context.
      head_dim: D.
      budgets_bytes: of each device [G], for all that `Context` holds there and what is beside it.
      bits: of each level, descending.
      reserve: what is left free for the requests that will read it; None for nothing.
      page_bytes: of one page; None for a size that fits the budget.
      windows: of each layer, if any has one.

    Returns:
      `Plan`.

    Raises:
      ValueError: a budget too small for what a device's units need at least, a rule of other units,
        sizes that are no whole numbers.
    """
    checks.function("rule", rule)
    budgets = np.asarray(budgets_of(budgets_bytes), np.int64)
    shape = _shape(shape)
    head_dim = checks.static_int("head_dim", head_dim, 1)
    bits = tuple(checks.items("bits", bits, "bits of each level"))
    if not bits:
        raise ValueError("bits is empty: give those of each level, descending")
    if reserve is not None:
        checks.instance("reserve", reserve, Reserve)
    if page_bytes is not None:
        page_bytes = checks.static_int("page_bytes", page_bytes, 1)
    windows = _cache.checked_windows(windows, shape[0])
    timed = windows is not None
    costs = _Costs.of(shape, head_dim, bits, int(budgets.sum()), reserve, page_bytes, timed)
    pool = costs.room(budgets.sum(keepdims=True), np.zeros(shape[0] * shape[1], np.int32))
    chosen, room = rule(pool), pool
    priced = pool.num_pages
    if budgets.size > 1:
        chosen, room, priced = _packed(rule, chosen, pool, costs, budgets)
    if np.shape(chosen.level) != (shape[0] * shape[1], shape[2]):
        raise ValueError(
            f"rule gives levels of shape {np.shape(chosen.level)}: shape is {shape}, which has "
            f"[U, S] = {(shape[0] * shape[1], shape[2])}"
        )
    tokens, size = costs.sizes(chosen.level, pool.pages_of(chosen.level))
    even = evenness(tokens, size, room.device_of, budgets)
    level = chosen.level.reshape(shape).astype(np.int8)
    return Plan(level, room, chosen.price, even, windows, priced, chosen.certain)


def _shape(shape: Any) -> tuple[int, int, int]:
    """(L, K, S); ValueError for others."""
    given = checks.items("shape", shape, "(L, K, S)")
    if len(given) != 3:
        raise ValueError(f"shape is {reprlib.repr(shape)}: it must be (L, K, S)")
    layers, heads, tokens = (checks.static_int(f"shape[{i}]", n, 1) for i, n in enumerate(given))
    return layers, heads, tokens


class _Costs(NamedTuple):
    """What pages, units and devices take."""

    shape: tuple[int, int]  # (L, K)
    head_dim: int
    bits: tuple[int, ...]
    page_bytes: int
    unit_bytes: int  # of each unit beside its pages
    device_bytes: int  # of each device beside its units
    timed: bool

    @classmethod
    def of(cls, shape, head_dim, bits, budget_bytes, reserve, page_bytes, timed) -> _Costs:
        """Those of a context and its reserve; pages of a given size, or one that fits the budget."""
        units = shape[0] * shape[1]
        unit, device = _cache.unit_bytes(head_dim, 0), _cache.table_bytes_of(1, units)
        if timed:
            unit, device = unit + 4, device + clock_bytes(1, 0, 0)
        if reserve is not None:
            unit += reserve.unit_bytes(head_dim, timed=timed)
            device += reserve.device_bytes(units, timed=timed)
            device += 4  # the last offset of an arena's table
        if page_bytes is None:
            left = max(budget_bytes - units * unit, 1)
            page_bytes = _cache.page_bytes_for(left, units, head_dim, bits, timed=timed)
        return cls(shape[:2], head_dim, bits, page_bytes, unit, device, timed)

    def room(self, budgets: np.ndarray, device_of: np.ndarray) -> Room:
        """The pages that devices with these bytes [G] hold beside what their units have besides."""
        number = np.maximum(np.bincount(device_of, minlength=budgets.size), 1)
        fits = [
            self._pages_within(int(size), int(n), d)
            for d, (size, n) in enumerate(zip(budgets, number, strict=True))
        ]
        return Room(
            np.array(fits), self.page_bytes, device_of, self.head_dim, self.bits, self.timed
        )

    def sizes(self, level: np.ndarray, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and bytes [L, K] of units with tokens at levels [U, S] in so many pages [U]."""
        tables = 8 * len(self.bits)  # a unit's part of them
        size = pages * (self.page_bytes + 4) + self.unit_bytes + tables
        tokens = (level < len(self.bits)).sum(axis=1)
        return tokens.reshape(self.shape), size.reshape(self.shape)

    def _pages_within(self, budget: int, units: int, device: int) -> int:
        beside = units * self.unit_bytes + self.device_bytes
        try:
            return _pages.pages_within(
                budget - beside, units, self.head_dim, self.bits, self.page_bytes, timed=self.timed
            )
        except ValueError as error:
            raise ValueError(
                f"budgets_bytes[{device}] is {budget}, of which mean keys, centroids and new tokens of "
                f"its {units} units take {beside}: {error}"
            ) from None


def _packed(
    rule: Rule, chosen: Levels, pool: Room, costs: _Costs, budgets: np.ndarray
) -> tuple[Levels, Room, np.ndarray]:
    """What was chosen for all bytes, packed into the devices at a rising price; else by device.

    Besides the levels and the room the pages that were priced: [1], or [G] by device.
    """
    for _ in range(_PACKINGS):
        pages = pool.pages_of(chosen.level)
        tokens, size = costs.sizes(chosen.level, pages)
        own = place_units(tokens, size, budgets - costs.device_bytes - 4)
        room = costs.room(budgets, own)
        need = np.bincount(own, pages, budgets.size)
        if (need <= room.num_pages).all():
            price = None if chosen.price is None else chosen.price.repeat(budgets.size)
            return chosen._replace(price=price), room, pool.num_pages
        pool = pool._replace(num_pages=np.minimum(room.num_pages.sum(), pool.num_pages - 1))
        chosen = rule(pool)
    return rule(room), room, room.num_pages
