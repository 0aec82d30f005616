"""The state of decoding: places for B requests within the devices' memories, and how they share them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jbalance import allocate, checks
from jbalance._bits import in_32_bits
from jbalance.cache import KVCache, _cache
from jbalance.decode import devices as over
from jbalance.decode._placement import place_units
from jbalance.decode.context import Context, devices_for, is_local, slots_of
from jbalance.decode.devices import Caches
from jbalance.decode.model import Model, budgets_of, check_model
from jbalance.decode.sampling import Samplers
from jbalance.importance.token_worth import NUM_RECENT, NUM_SINKS

ALWAYS = NUM_SINKS + NUM_RECENT  # tokens of a prompt that always stay, without rules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """B requests that are being decoded."""

    caches: Caches  # [G], the requests' own
    contexts: Caches | None  # [G], what all of them read besides
    tokens: jax.Array  # [B] int32, each request's latest token, which is not in its cache yet
    positions: jax.Array  # [B] int32, of those tokens
    active: jax.Array  # [B] bool
    samplers: Samplers
    weights: np.ndarray  # [B] float32 shares of the memory
    protected: np.ndarray  # [B] int32 tokens of each that always stay
    allowances: tuple[Any, ...]  # [G] of [B] int32 pages; None of other processes' devices
    devices: tuple[jax.Device, ...] = dataclasses.field(metadata={"static": True})
    context_tokens: int = dataclasses.field(metadata={"static": True})

    @property
    def num_requests(self) -> int:
        """B."""
        return self.tokens.shape[0]

    @property
    def nbytes(self) -> list[int]:
        """Bytes of caches that stay resident on each device; 0 for those of other processes."""
        contexts = [None] * len(self.caches) if self.contexts is None else self.contexts
        return [
            sum(0 if x is None else x.nbytes for x in pair)
            for pair in zip(self.caches, contexts, strict=True)
        ]


@in_32_bits
def create(
    model: Model,
    budgets_bytes: Sequence[int],
    *,
    num_requests: int = 1,
    context: Context | None = None,
    devices: Sequence[jax.Device] | None = None,
    recent_tokens: int | None = None,
) -> State:
    """Empty places for requests, within the devices' memories.

    Args:
      model: the decoder.
      budgets_bytes: of each device [G], for all caches there, the context's among them.
      num_requests: B.
      context: that all requests read, on the same devices.
      devices: [G]; None for the first ones.
      recent_tokens: of each request that are kept unquantized; None for a share of the budget.

    Raises:
      ValueError: a model that is not supported, too few devices, or budgets too small.
    """
    check_model(model)
    if recent_tokens is not None:
        recent_tokens = checks.static_int("recent_tokens", recent_tokens, 2)
    shape = (model.num_layers, model.num_kv_heads)
    budgets = budgets_of(budgets_bytes)
    num_requests = checks.static_int("num_requests", num_requests, 1)
    devices = devices_for(devices, len(budgets))
    page_bytes = None
    if context is not None:
        checks.instance("context", context, Context)
        if len(context.caches) != len(budgets):
            raise ValueError(
                f"context is on {len(context.caches)} devices: budgets_bytes has {len(budgets)} entries"
            )
    if context is None:
        even = np.full(shape, sum(budgets) // (shape[0] * shape[1]))
        device_of = place_units(np.ones(shape), even, np.array(budgets)).reshape(shape)
    else:
        device_of = context.plan.device_of
        budgets = [b - held for b, held in zip(budgets, context.nbytes, strict=True)]
        if context.reserve is not None:
            timed = model.windows is not None
            page_bytes = context.reserve.page_bytes(model.head_dim, timed=timed)
            recent_tokens = recent_tokens or context.reserve.recent_tokens
    caches: list[KVCache | None] = []
    for d, (budget, device) in enumerate(zip(budgets, devices, strict=True)):
        if not is_local(device):
            caches.append(None)
            continue
        try:
            cache = _cache.create(
                budget,
                *shape,
                model.head_dim,
                num_requests=num_requests,
                slots=slots_of(device_of, d),
                page_bytes=page_bytes,
                recent_tokens=recent_tokens,
                windows=model.windows,
            )
        except ValueError as error:
            raise ValueError(f"budgets_bytes[{d}]: {error}") from None
        caches.append(jax.device_put(cache, device))
    zeros = np.zeros(num_requests, np.int32)
    return around(
        caches,
        None if context is None else context.caches,
        Requests(zeros, zeros, zeros.astype(bool), Samplers.greedy(num_requests)),
        zeros.astype(np.float32),
        np.full(num_requests, ALWAYS, np.int32),
        devices,
        0 if context is None else context.num_tokens,
        learned=model.learned,
    )


class Requests(NamedTuple):
    """What is small in a state, of B requests."""

    tokens: Any
    positions: Any
    active: Any
    samplers: Samplers


def around(
    caches: Sequence[KVCache | None],
    contexts: Sequence[KVCache | None] | None,
    requests: Requests,
    weights: np.ndarray,
    protected: np.ndarray,
    devices: Sequence[jax.Device],
    context_tokens: int,
    *,
    learned: bool,
) -> State:
    """The state around its caches, of a model that has `learned`; small arrays on the first device."""
    # Beside a context prompts are pieces, whose worth is sketched.
    certain = learned and contexts is None
    caches = [None if x is None else dataclasses.replace(x, certain=certain) for x in caches]
    # Committed to it, or a step's results would enter the next step as arguments of another kind.
    requests = jax.device_put(jax.tree.map(np.array, requests), over.main_device(devices))
    return State(
        tuple(caches),
        None if contexts is None else tuple(contexts),
        *requests,
        weights,
        protected,
        tuple(None if x is None else np.full(x.num_requests, x.even_pages) for x in caches),
        tuple(devices),
        context_tokens,
    )


def shared(state: State) -> State:
    """Weighted max-min shares of every arena; who holds more than its own gives it up.

    Raises:
      ValueError: as `shares_of`, before anything is given up.
    """
    if not state.weights.any():
        return state
    allowances = tuple(
        None if x is None else shares_of(x, state.weights, state.protected) for x in state.caches
    )
    caches = tuple(
        None if x is None or pages is None else held_within(x, state.weights, pages)
        for x, pages in zip(state.caches, allowances, strict=True)
    )
    return dataclasses.replace(state, caches=caches, allowances=allowances)


def held_within(cache: KVCache, weights: np.ndarray, pages: np.ndarray) -> KVCache:
    """One cache, in which no request with a weight [B] holds more than its pages [B].

    The given cache is given up: the returned one takes its place.
    """
    held = np.asarray(cache.held_pages)
    for request in np.flatnonzero((held > pages) & (weights > 0)):
        cache = over.shrink(cache, int(request), int(pages[request]))
    return cache


def shares_of(
    cache: KVCache, weights: np.ndarray, protected: np.ndarray | int = ALWAYS
) -> np.ndarray:
    """[B] int32 pages of requests by weight [B], at least what `protected` [B] tokens of each need.

    Raises:
      ValueError: requests of which more tokens always stay than the arena has pages for.
    """
    floor = floors_of(cache, weights, protected)
    if floor.sum() > cache.arena.num_pages:
        raise ValueError(
            f"known.keep: the tokens of all requests that always stay need {floor.sum()} pages, the "
            f"device has {cache.arena.num_pages}; keep fewer, or give more memory"
        )
    cap = np.where(weights > 0, cache.arena.num_pages, 0)
    pages = np.asarray(allocate.whole(weights, cache.arena.num_pages, floor, cap).amount)
    return np.where(weights > 0, pages, cache.floor_pages).astype(np.int32)


def floors_of(cache: KVCache, weights: np.ndarray, protected: np.ndarray | int) -> np.ndarray:
    """[B] pages for the tokens that always stay, of requests with a weight [B]."""
    tokens = np.broadcast_to(protected, weights.shape)
    pages = np.array([cache.pages_for(int(number)) for number in tokens])
    return np.where(weights > 0, pages, 0)


def replaced(x: np.ndarray, index: int, value: float) -> np.ndarray:
    """A copy with one entry replaced."""
    x = np.array(x)
    x[index] = value
    return x


def check_request(state: State, request: int) -> int:
    """The place's number; ValueError for one that there is not."""
    checks.instance("state", state, State)
    return checks.static_int("request", request, 0, state.num_requests - 1)
