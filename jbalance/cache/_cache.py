"""The cache of a decoder: bytes fixed once, any number of tokens, one price for all layers and heads.

The most recent tokens are kept unquantized in a buffer, where the attention that they receive is
measured; the arena holds older ones, each at the precision that it is worth; and a few centroids per
head stand for those that were evicted. Keys in arena and centroids are stored minus their head's mean
key; this shifts every logit by the same amount, which attention adds back to the log-sum-exp. Their
channels are in an order and in scales of their own (`_channels`), in which queries ask for them.

A unit is a layer and key/value head of a request. A cache may hold the units of some heads only, the
others being on other devices: `slots` says which.

    cache = cache.create(budget_bytes, num_layers=L, num_kv_heads=K, head_dim=D)
    y, cache = cache.prefill(cache, layer, q, k, v, frequencies=f)      # each layer of the prompts
    y, cache = cache.step(cache, layer, q, k, v)                        # each layer of each token
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance import checks
from jbalance._bits import in_32_bits
from jbalance.cache import _centroids, _pages, _price
from jbalance.cache._centroids import Centroids
from jbalance.cache._layout import TILE_BYTES, PageLayout, table_bytes, token_bytes
from jbalance.cache._pages import Arena
from jbalance.cache._sight import MOST_WINDOW, Clock, clock_bytes, create_clock
from jbalance.importance.token_worth import NUM_RECENT, NUM_SINKS

BITS = (8, 4, 3)
PAGES_PER_UNIT = 20  # about
LEAST_PAGE_BYTES, MOST_PAGE_BYTES = 512, 16384
MOST_PAGES = 1 << 17  # on accelerators: a TPU's scalar memory holds their tables
_ALIGN_BYTES = 64
_RECENT_SHARE, _LEAST_RECENT, _MOST_RECENT = 8, 4, 512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The cache of B requests on one device; U = B n units, n of each request."""

    arena: Arena
    centroids: Centroids  # of tokens that left the arena or did not enter it
    key_mean: jax.Array  # [U, D] bfloat16, subtracted from the keys in both
    key_channels: jax.Array  # [U, D] int8, `_channels.Basis` of both
    value_scale: jax.Array  # [U, D] int8, the same
    recent_keys: jax.Array  # [U, R, D] uint16, `bits_of`
    recent_values: jax.Array  # [U, R, D] uint16, the same
    # [U, R] float32, attention² by later queries of the group, summed; -1: not finite, not there
    recent_energy: jax.Array
    recent_start: jax.Array  # [B] int32, place of the oldest token
    recent_count: jax.Array  # [B] int32, below R between steps
    slots: jax.Array  # [L, K] int32, which of a request's n units a head is; -1 if not here
    layers_done: jax.Array  # [] int32, layers that have attended for the current token
    clock: Clock | None = None  # of a model whose layers have windows
    # Whether the worth of its prompts is learned (`_price`), not sketched.
    certain: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def num_requests(self) -> int:
        """B."""
        return self.recent_count.shape[0]

    @property
    def num_layers(self) -> int:
        """L."""
        return self.slots.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return self.slots.shape[1]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.arena.head_dim

    @property
    def units_per_request(self) -> int:
        """n, L K where all heads are here."""
        return self.key_mean.shape[0] // self.num_requests

    @property
    def recent_tokens(self) -> int:
        """R."""
        return self.recent_keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that stay resident: all of it."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    @property
    def held_pages(self) -> jax.Array:
        """[B] int32 pages that each request has."""
        return jnp.sum(self.arena.pages.reshape(self.num_requests, -1), axis=1)

    @property
    def floor_pages(self) -> int:
        """Pages of a request for the first and latest tokens of its prompt, which always stay.

        0 where there is no recent buffer: of an encoder's frames none must stay.
        """
        return self.pages_for(NUM_SINKS + NUM_RECENT)

    def pages_for(self, protected: int) -> int:
        """Pages of a request of which so many tokens always stay, in every head; 0 without a buffer."""
        if self.recent_tokens == 0:
            return 0
        return self.units_per_request * -(-protected // self.arena.page_tokens[0])

    @property
    def even_pages(self) -> int:
        """Pages of each request when all have alike: the allowance where none is given."""
        return self.arena.num_pages // self.num_requests

    def units(self, request: jax.Array | int, layer: jax.Array | int) -> jax.Array:
        """[K] int32 units of a request's heads in a layer; U for those of other devices."""
        slots = self.slots[layer]
        unit = request * self.units_per_request + slots
        return jnp.where(slots >= 0, unit, self.key_mean.shape[0]).astype(jnp.int32)


def page_bytes_for(
    budget_bytes: int, num_units: int, head_dim: int, bits: Sequence[int], *, timed: bool = False
) -> int:
    """A size of pages: about 20 per unit, within 512 bytes to 16 KiB, that wastes little at every level.

    On accelerators, from 4 KiB a page on, whole tiles of a TPU, whose kernel reads those, and larger
    ones for arenas of more than 2 GiB.

    >>> page_bytes_for(10**7, 90, 64, (8, 4, 3))
    6784

    Args:
      budget_bytes: of the arena.
      num_units: U.
      head_dim: D.
      bits: of each level.
      timed: whether tokens have positions.

    Returns:
      Bytes, a multiple of 64; on accelerators of 4,096, if pages are no smaller.
    """
    sizes = np.array([token_bytes(head_dim, b, timed=timed) for b in bits])
    accelerated = jax.default_backend() != "cpu"
    most = max(MOST_PAGE_BYTES, 4 * sizes.max(), accelerated * budget_bytes // MOST_PAGES)
    about = min(
        max(budget_bytes / (PAGES_PER_UNIT * num_units), LEAST_PAGE_BYTES, 4 * sizes.max()), most
    )
    if accelerated and about >= TILE_BYTES:
        page = np.arange(round(0.8 * about / TILE_BYTES), math.ceil(1.25 * about / TILE_BYTES) + 1)
        page = page * TILE_BYTES
    else:
        low = max(math.ceil(0.8 * about / _ALIGN_BYTES), LEAST_PAGE_BYTES // _ALIGN_BYTES)
        page = np.arange(low, math.floor(1.25 * about / _ALIGN_BYTES) + 1) * _ALIGN_BYTES
    page = page[page <= max(about, most)]
    held = np.array([[_held(int(p), head_dim, b, timed) for b in bits] for p in page])
    waste = np.mean(1 - held * sizes / page[:, None], axis=1)
    return int(page[np.argmin(waste)])


def _held(page_bytes, head_dim, bits, timed):
    """Tokens in a page."""
    return PageLayout.within(page_bytes, head_dim, bits, timed=timed).page_tokens


@in_32_bits
def create(
    budget_bytes: int,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    num_requests: int = 1,
    slots: np.ndarray | None = None,
    bits: Sequence[int] = BITS,
    page_bytes: int | None = None,
    recent_tokens: int | None = None,
    windows: Sequence[int | None] | None = None,
) -> KVCache:
    """An empty cache: recent buffers, centroids and tables, and an arena of what is left of the budget.

    Args:
      budget_bytes: never exceeded by `KVCache.nbytes`.
      num_layers: L.
      num_kv_heads: K.
      head_dim: D.
      num_requests: B.
      slots: [L, K] int, which of a request's units a head is, 0, 1, ..., or -1 for a head of another
        device; None where all heads are here.
      bits: per coordinate of each level, descending.
      page_bytes: of one page; None for `page_bytes_for`.
      recent_tokens: R, even; half of them enter the arena at a time. None for an eighth of the budget,
        4 to 512: the more enter at once, the less it costs. 0 for a cache that does not grow: an
        encoder's frames, by `write` and `attend`.
      windows: of each layer [L], tokens that a query sees, itself among them, or None for all; None if
        no layer has one. `decode` reads it; `prefill` and `step` are for layers that see all.

    Returns:
      `KVCache`.

    Raises:
      ValueError: values that do not fit, or a budget too small for the tokens that always stay, with
        what would fit.
    """
    sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "num_requests": num_requests}
    num_layers, num_kv_heads, num_requests, head_dim = (
        checks.static_int(name, x, 1) for name, x in (sizes | {"head_dim": head_dim}).items()
    )
    budget_bytes = checks.static_int("budget_bytes", budget_bytes, 0, None)
    slots = _checked_slots(slots, num_layers, num_kv_heads)
    units = num_requests * (int(slots.max()) + 1)
    bits = tuple(bits)
    _price.steps(head_dim, bits)
    if recent_tokens is None:
        share = int(budget_bytes) // (_RECENT_SHARE * units * (4 * head_dim + 4))
        recent_tokens = min(max(share - share % 2, _LEAST_RECENT), _MOST_RECENT)
    recent_tokens = checks.static_int("recent_tokens", recent_tokens, 0)
    if recent_tokens % 2:
        raise ValueError(f"recent_tokens is {recent_tokens}: it must be even")
    windows = checked_windows(windows, num_layers)
    timed = windows is not None
    if timed and recent_tokens == 0:
        raise ValueError("windows are given and recent_tokens is 0: an encoder's frames have none")
    fixed = units * unit_bytes(head_dim, recent_tokens) + table_bytes_of(num_requests, slots.size)
    if timed:
        fixed += clock_bytes(num_requests, units // num_requests, recent_tokens)
    left = int(budget_bytes) - fixed
    if page_bytes is None:
        page_bytes = page_bytes_for(max(left, 0), units, head_dim, bits, timed=timed)
    page_bytes = checks.static_int("page_bytes", page_bytes, 1)
    tokens = page_bytes // token_bytes(head_dim, bits[0], timed=timed)
    floor = (
        units * -(-(NUM_SINKS + NUM_RECENT) // max(tokens, 1)) if recent_tokens else num_requests
    )
    need = table_bytes(units, len(bits), floor) + floor * page_bytes
    if left < need:
        always = f"{NUM_SINKS} first and {NUM_RECENT} latest tokens of each, which always stay"
        raise ValueError(
            f"budget_bytes is {budget_bytes}: recent buffers of {recent_tokens} tokens, centroids and "
            f"tables of {units} units take {fixed}, and {floor} pages of {page_bytes} bytes for the "
            f"{always if recent_tokens else 'frames of each request'}, {need} more; give at least "
            f"{fixed + need}"
        )
    arena = _pages.create(left, units, head_dim, bits, page_bytes, timed=timed)
    return around(arena, slots, num_requests, recent_tokens, windows=windows)


def checked_windows(
    windows: Sequence[int | None] | None, num_layers: int
) -> tuple[int | None, ...] | None:
    """Windows of all layers, None if none has one; ValueError for those that cannot be kept."""
    if windows is None:
        return None
    windows = checks.items("windows", windows, "the window of each layer, or None")
    if len(windows) != num_layers:
        raise ValueError(f"windows has {len(windows)} entries for {num_layers} layers")
    for i, window in enumerate(windows):
        if window is not None:
            checks.static_int(f"windows[{i}]", window, 1, MOST_WINDOW)
    return None if all(w is None for w in windows) else tuple(windows)


def around(
    arena: Arena,
    slots: np.ndarray,
    num_requests: int,
    recent_tokens: int,
    *,
    windows: Sequence[int | None] | None = None,
) -> KVCache:
    """An empty cache with this arena; R = 0 for one that is only read."""
    return KVCache(
        arena=arena,
        slots=jnp.array(slots, jnp.int32),
        clock=None
        if windows is None
        else create_clock(windows, slots, num_requests, recent_tokens),
        **_nothing(arena.count.shape[0], arena.head_dim, num_requests, recent_tokens),
    )


@functools.partial(jax.jit, static_argnums=range(4))
def _nothing(units, head_dim, num_requests, recent_tokens):
    """The fields of a cache that are zero at first, by one program."""
    return {
        "centroids": _centroids.create(units, head_dim),
        "key_mean": jnp.zeros((units, head_dim), jnp.bfloat16),
        "key_channels": jnp.zeros((units, head_dim), jnp.int8),
        "value_scale": jnp.zeros((units, head_dim), jnp.int8),
        "recent_keys": jnp.zeros((units, recent_tokens, head_dim), jnp.uint16),
        "recent_values": jnp.zeros((units, recent_tokens, head_dim), jnp.uint16),
        "recent_energy": jnp.zeros((units, recent_tokens), jnp.float32),
        "recent_start": jnp.zeros(num_requests, jnp.int32),
        "recent_count": jnp.zeros(num_requests, jnp.int32),
        "layers_done": jnp.zeros((), jnp.int32),
    }


def bits_of(x: jax.Array) -> jax.Array:
    """x in bfloat16, as the 16 bits that a recent buffer holds: uint16, the same shape.

    A CPU puts a few rows into bfloat16 by converting the whole buffer to float32 and back.
    """
    return lax.bitcast_convert_type(jnp.asarray(x).astype(jnp.bfloat16), jnp.uint16)


def of_bits(bits: jax.Array) -> jax.Array:
    """The bfloat16 numbers of `bits_of`."""
    return lax.bitcast_convert_type(bits, jnp.bfloat16)


def unit_bytes(head_dim: int, recent_tokens: int) -> int:
    """Bytes of a unit beside its part of the arena: mean key, scales, recent buffer and centroids."""
    return 4 * head_dim + recent_tokens * (4 * head_dim + 4) + _centroids.unit_bytes(head_dim)


def table_bytes_of(num_requests: int, num_heads: int) -> int:
    """Bytes of a cache's own tables, of B requests and a model of L K heads."""
    return 8 * num_requests + 4 * num_heads + 4


def _checked_slots(slots, num_layers, num_kv_heads) -> np.ndarray:
    """[L, K] int32, all heads for None; ValueError unless 0, 1, ... occur once each."""
    if slots is None:
        return np.arange(num_layers * num_kv_heads, dtype=np.int32).reshape(num_layers, -1)
    slots = np.asarray(slots)
    own = np.sort(slots[slots >= 0])
    if slots.shape != (num_layers, num_kv_heads) or not np.array_equal(own, np.arange(own.size)):
        raise ValueError(
            f"slots has shape {slots.shape}: it must be [L, K] = {(num_layers, num_kv_heads)} and hold "
            f"0, 1, ... once each, and -1 for heads of other devices"
        )
    if own.size == 0:
        raise ValueError("slots holds only -1: the device has no head of the model")
    return slots.astype(np.int32)
