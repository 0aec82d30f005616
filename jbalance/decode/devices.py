"""One layer's attention over caches that lie on their own devices, of one process or of many.

Every process runs the layers themselves on its first device, all alike. Each device's output has
zeros for the heads that others hold, so that one sum over all devices puts the layer together: x + 0
is exact, and every process sees the same bits, however many devices there are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jbalance.attention import Partial, merge
from jbalance.cache import KVCache, _prefill, _requests, _settle, _step
from jbalance.cache._sight import Limits
from jbalance.cache._step import held_attention, recent_attention
from jbalance.decode.context import is_local
from jbalance.importance.knowledge import Knowledge

Caches = tuple[KVCache | None, ...]
"""What each device holds [G]; None of those of other processes."""


def main_device(devices: Sequence[jax.Device]) -> jax.Device:
    """Where this process runs the layers."""
    return next(filter(is_local, devices))


def attend_token(
    devices: Sequence[jax.Device],
    caches: Caches,
    contexts: Caches | None,
    layer: int,
    qkv: tuple[jax.Array, ...],
    active: Sequence[jax.Array | None],
    limits: Limits,
) -> tuple[jax.Array, Caches]:
    """`cache.step` of one layer over all devices, without its end: y [B, H, D], and the caches."""

    def on(d):
        cache = caches[d]
        if cache is None:
            return None
        new = jax.device_put(qkv, devices[d])
        context = None if contexts is None else contexts[d]
        return _attend_token(cache, np.int32(layer), *new, active[d], context, limits)

    done = _on_each(devices, on)
    outputs = [out[0] for out in done if out is not None]
    after = tuple(None if out is None else out[1] for out in done)
    return total(devices, outputs), after


def _on_each(devices, call):
    """`call` of each device's index: at once on CPUs, where the caller runs a small program itself."""
    if devices[0].platform != "cpu" or len(devices) == 1:
        return [call(d) for d in range(len(devices))]
    return list(_threads(sum(map(is_local, devices))).map(call, range(len(devices))))


@functools.cache
def _threads(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number, "jbalance")


@functools.partial(jax.jit, donate_argnums=0, static_argnums=7)
def _attend_token(cache, layer, q, k, v, active, context, limits):
    return _step.attend_token(cache, layer, q, k, v, active, context, limits)


def held(
    devices: Sequence[jax.Device],
    caches: Caches | None,
    contexts: Caches | None,
    request: int,
    layer: int,
    q: jax.Array,
    position: int,
    limits: Limits,
) -> Partial:
    """Attention of new tokens' queries [T, H, D] over all that the devices hold for a request.

    The first of them is at `position`.

    Returns:
      `Partial` of [K, T G, D] and [K, T G].
    """
    outputs = []
    for d, device in enumerate(devices):
        own = [None if x is None else x[d] for x in (caches, contexts)]
        if any(x is not None for x in own):
            outputs.append(
                held_here(*own, request, layer, jax.device_put(q, device), position, limits)
            )
    return Partial(*total(devices, outputs))


@functools.partial(jax.jit, static_argnums=6)
def held_here(cache, context, request, layer, q, position, limits):
    """`held` of one device; zeros for the heads of others, in the log-sum-exp too."""
    one = context if cache is None else cache
    heads = _prefill.by_kv_head(q.astype(jnp.float32), one.num_kv_heads)
    group = heads.shape[1] // q.shape[0]
    positions = jnp.repeat(position + jnp.arange(q.shape[0]), group)
    parts = []
    if context is not None:
        parts.append(held_attention(context, 0, layer, heads, positions, limits))
    if cache is not None:
        parts.append(held_attention(cache, request, layer, heads, positions, limits))
        parts.append(recent_attention(cache, request, layer, heads, positions, limits))
    part = functools.reduce(merge, parts)
    here = (one.slots[layer] >= 0)[:, None]
    return jnp.where(here[..., None], part.y, 0), jnp.where(here, part.lse, 0)


def admit(
    devices: Sequence[jax.Device],
    caches: Caches,
    request: int,
    layer: int,
    tokens: Any,
    number: int,
    allowances: Sequence[Any],
    start: int = 0,
    known: Knowledge | None = None,
) -> Caches:
    """One layer's tokens of a prompt enter; no allowance is below what always stays.

    They are (k, v, w), and the energy of their queries; the first is at position `start`. `known` has
    rules about them.
    """
    after = []
    for d, cache in enumerate(caches):
        if cache is not None:
            moved, rules = jax.device_put((tuple(tokens), known), devices[d])
            pages = jnp.int32(allowances[d][request])
            cache = _admit(cache, request, layer, *moved, pages, number, start, rules)
        after.append(cache)
    return tuple(after)


@functools.partial(jax.jit, donate_argnums=0)
def _admit(cache, request, layer, k, v, w, energy, pages, number, start, known):
    rest = {"num_tokens": number, "start": start, "energy": energy, "known": known}
    return _prefill.admit(cache, request, layer, k, v, w, pages, **rest)[0]


@functools.partial(jax.jit, donate_argnums=0)
def settle(cache: KVCache, allowance_pages: jax.Array) -> KVCache:
    """Full recent buffers let their older half enter the arena."""
    return _settle.settle(cache, allowance_pages)[0]


@functools.partial(jax.jit, donate_argnums=0)
def counted(cache: KVCache, active: jax.Array) -> tuple[KVCache, jax.Array]:
    """The token in the recent buffers counts now; and whether a buffer is full."""
    cache = _settle.advanced(cache, active)
    return cache, jnp.any(cache.recent_count >= cache.recent_tokens)


@functools.partial(jax.jit, donate_argnums=0)
def shrink(cache: KVCache, request: jax.Array, allowance_pages: jax.Array) -> KVCache:
    """A request's tokens weighed anew within fewer pages."""
    return _requests.shrink(cache, request, allowance_pages)[0]


release = jax.jit(_requests.release, donate_argnums=0)


def total(devices: Sequence[jax.Device], outputs: list[Any]) -> Any:
    """The sum of all devices' outputs, on this process's first device."""
    if jax.process_count() == 1 or len(devices) == len(outputs):
        main = main_device(devices)
        outputs = [jax.device_put(x, main) for x in outputs]
        return outputs[0] if len(outputs) == 1 else _sum(outputs)
    # The CPU's collectives wait in threads that attention may need: the one after the other.
    ready = devices[0].platform == "cpu"
    outputs = jax.block_until_ready(outputs) if ready else outputs
    mesh = Mesh(np.array(devices), ("devices",))
    sharding = NamedSharding(mesh, jax.P("devices"))

    def spread(*parts):
        shape = (len(devices), *parts[0].shape)
        own = [x[None] for x in parts]
        return jax.make_array_from_single_device_arrays(shape, sharding, own)

    summed = _over_devices(mesh)(jax.tree.map(spread, *outputs))
    summed = jax.tree.map(lambda x: x.addressable_data(0)[0], summed)
    return jax.block_until_ready(summed) if ready else summed


@jax.jit
def _sum(outputs):
    return jax.tree.map(lambda *x: sum(x[1:], x[0]), *outputs)


@functools.cache
def _over_devices(mesh: Mesh):
    """The sum over the devices of what each has, the same on all."""
    add = functools.partial(jax.lax.psum, axis_name="devices")
    spec = jax.P("devices")
    return jax.jit(
        jax.shard_map(lambda x: jax.tree.map(add, x), mesh=mesh, in_specs=spec, out_specs=jax.P())
    )
