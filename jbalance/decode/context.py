"""A context that many requests read: planned at one price, packed once, and never changed.

On each device it is a cache of one request without a recent buffer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import checks
from jbalance._bits import in_32_bits
from jbalance.cache import KVCache, _cache, _pages, _prefill
from jbalance.cache._memory import absent, write_layer
from jbalance.decode import prefill
from jbalance.decode.model import (
    Model,
    budgets_of,
    check_model,
    check_numbers,
    in_windows,
    token_ids,
)
from jbalance.decode.plan import Plan, Reserve, fit, ladder
from jbalance.decode.prefill import LayerTokens
from jbalance.importance.knowledge import Knowledge, padded


@dataclasses.dataclass(frozen=True)
class Context:
    """What each device holds of a context."""

    caches: tuple[KVCache | None, ...]  # [G]; None of the devices of other processes
    num_tokens: int
    plan: Plan
    reserve: Reserve | None = None
    codes: np.ndarray | None = None  # [L, K, S] uint8, the worth that the plan was made of

    @property
    def nbytes(self) -> list[int]:
        """Bytes that stay resident on each device; 0 for those of other processes."""
        return [0 if cache is None else cache.nbytes for cache in self.caches]


def slots_of(device_of: np.ndarray, device: int) -> np.ndarray:
    """[L, K]: which of a device's units a head is, by device_of [L, K]; -1 for heads of others."""
    mine = device_of == device
    return np.where(mine, np.cumsum(mine).reshape(mine.shape) - 1, -1).astype(np.int32)


def is_local(device: jax.Device) -> bool:
    """Whether the device is of this process."""
    return device.process_index == jax.process_index()


def devices_for(devices: Sequence[jax.Device] | None, number: int) -> list[jax.Device]:
    """The devices, one for each of so many budgets; ValueError if they are too few or too many."""
    given = jax.devices()[:number] if devices is None else devices
    devices = checks.items("devices", given, "devices")
    for d, device in enumerate(devices):
        checks.instance(f"devices[{d}]", device, jax.Device)
    if len(devices) != number:
        raise ValueError(
            f"budgets_bytes has {number} entries for {len(devices)} devices: give one for each"
        )
    return devices


@in_32_bits
def read(
    model: Model,
    tokens: np.ndarray,
    budgets_bytes: Sequence[int],
    *,
    reserve: Reserve | None = None,
    devices: Sequence[jax.Device] | None = None,
    known: Knowledge | None = None,
) -> Context:
    """Read a context into the devices' memories, at the precision that each token is worth.

    The prompt goes through the model twice: once to weigh all of its tokens, so that they are planned
    exactly, and once to write each layer's at their levels. So the context never exists in full.

    Args:
      model: the decoder.
      tokens: [S] ids.
      budgets_bytes: of each device, for the context and what is reserved beside it.
      reserve: for the requests that will read it; None for one of 64 new tokens.
      devices: [G]; None for the first ones.
      known: rules about the S tokens, of `importance.knowledge`: what is measured is blended with its
        prior, what it keeps stays at the finest precision in every head, and what stays in a head brings
        along what it implies there.

    Raises:
      ValueError: a model that is not supported, too few devices, budgets too small, or rules about
        another number of tokens, ids outside of the vocabulary, or a model that gives NaN.
    """
    check_model(model)
    budgets = budgets_of(budgets_bytes)
    devices = devices_for(devices, len(budgets))  # before the prompt is read
    tokens = token_ids("tokens", tokens, model)
    reserve = Reserve() if reserve is None else reserve
    checks.instance("reserve", reserve, Reserve)
    known = rules_of(known, len(tokens), prefill.capacity_for(len(tokens)))
    codes = []
    for layer, (_, held) in enumerate(prefill.layers_of(model, tokens)):
        check_numbers(f"in layer {layer}", held.w[:, : len(tokens)])
        code = first_prompt_codes(held.w, len(tokens), known)
        codes.append(np.asarray(code)[:, : len(tokens)])
    shape = (model.num_layers, model.num_kv_heads, len(tokens))
    plan = fit(
        ladder(
            np.concatenate(codes),
            in_windows(model.windows, *shape[1:]),
            certain=model.learned,
        ),
        shape,
        model.head_dim,
        budgets,
        reserve=reserve,
        windows=model.windows,
    )
    layers = (held for _, held in prefill.layers_of(model, tokens))
    context = write(plan, np.stack(codes), layers, devices)
    return dataclasses.replace(context, reserve=reserve)


def rules_of(known: Knowledge | None, number: int, capacity: int) -> Knowledge | None:
    """Rules about so many tokens, padded to a capacity; ValueError for those about another number."""
    if known is None:
        return None
    checks.instance("known", known, Knowledge)
    checks.length("known.keep", known.keep, number, "the number of tokens")
    return padded(known, capacity)


@jax.jit
def first_prompt_codes(
    w: jax.Array, number: jax.Array | int, known: Knowledge | None = None
) -> jax.Array:
    """[K, S] codes of a request's first prompt, of which `number` tokens are there, by rules."""
    return _prefill.prompt_codes(w, number, jnp.ones(w.shape[0], bool), known)


def write(
    plan: Plan,
    codes: np.ndarray,
    layers: Iterable[LayerTokens],
    devices: Sequence[jax.Device] | None = None,
    *,
    centroids: bool = True,
) -> Context:
    """Pack a context as it was planned, one layer after the other.

    Args:
      plan: of all tokens.
      codes: [L, K, S] uint8 codes of their worth.
      layers: the keys and values of each layer, S tokens or more.
      devices: [G]; None for the first ones.
      centroids: whether evicted tokens join centroids, or are lost.
    """
    devices = devices_for(devices, plan.room.num_pages.size)
    caches = [
        _empty(plan, d, device) if is_local(device) else None for d, device in enumerate(devices)
    ]
    number = plan.level.shape[2]
    for layer, held in enumerate(layers):
        tokens = held.k.shape[0]
        level = np.full((plan.level.shape[1], tokens), absent(plan.bits), np.int8)
        level[:, :number] = plan.level[layer]
        code = np.zeros(level.shape, np.uint8)
        code[:, :number] = codes[layer]
        lasting = centroids and (plan.windows is None or plan.windows[layer] is None)
        for d, cache in enumerate(caches):
            if cache is not None:
                moved = jax.device_put(tuple(held), devices[d])
                caches[d] = _write_layer(
                    cache, layer, moved, level, code, number, centroids=lasting
                )
    return Context(tuple(caches), number, plan, codes=codes)


def _empty(plan: Plan, device: int, where: jax.Device) -> KVCache:
    """A device's cache with the pages that its units will need, and no tokens."""
    slots = slots_of(plan.device_of, device)
    mine = np.flatnonzero(plan.room.device_of == device)
    tokens = plan.level.reshape(len(plan.room.device_of), -1)[mine]
    count = np.stack([(tokens == m).sum(axis=1) for m in range(len(plan.bits))], axis=1)
    need = -(-count // np.array(plan.room.page_tokens)).reshape(len(mine), -1)
    if not mine.size:  # a table of one unit that no head has
        need = np.zeros((1, len(plan.bits)), int)
    room = plan.room
    # A context does not grow: of a budget that holds more, nothing is taken.
    arena = _pages.empty(
        min(int(room.num_pages[device]), _in_steps(int(need.sum()))),
        len(need),
        room.head_dim,
        plan.bits,
        room.page_bytes,
        timed=room.timed,
    )
    arena, missing = _pages.reallocate(arena, jnp.asarray(need.astype(np.int32)))
    if missing:
        raise RuntimeError(f"device {device} lacks {missing} pages for what was planned")
    cache = _cache.around(arena, slots, 1, 0, windows=plan.windows)
    if cache.clock is not None:
        behind = jnp.full(1, plan.level.shape[2], jnp.int32)
        cache = dataclasses.replace(cache, clock=dataclasses.replace(cache.clock, next=behind))
    return jax.device_put(cache, where)


def _in_steps(pages: int) -> int:
    """No fewer than so many, of eight numbers an octave: contexts of about one size share programs."""
    step = 2 ** max(0, pages.bit_length() - 4)
    return max(1, -(-pages // step) * step)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="centroids")
def _write_layer(cache, layer, tokens, level, code, number, centroids):
    """`write_layer` of the one request, compiled for all layers."""
    return write_layer(cache, 0, layer, tokens, level, code, number, centroids=centroids)
