"""The cache of a decoder on a mesh: one cache a device, of its requests or of its heads.

Every device has an arena, recent buffers and a price of its own, and nothing is exchanged: a request
lies whole on one device (data parallel), or every device has some key/value heads of all requests
(tensor parallel). Arrays over a mesh have one shape, so that the devices' bytes are equal;
`jbalance.decode` decodes over devices of unequal memory.

    cache = sharded.cache.create(budget_bytes, L, K, D, mesh=mesh, axis_name="x", split="heads")
    y, cache = sharded.cache.prefill(cache, layer, q, k, v, frequencies=f)
    y, cache = sharded.cache.step(cache, layer, q, k, v)                  # in a scan over layers
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jbalance import cache as kv_cache
from jbalance import checks
from jbalance.cache import KVCache
from jbalance.sharded._layout import axis_size, cut, lay_out, padded, padding

_SPLITS = ("requests", "heads")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeshCache:
    """A `KVCache` on every one of G devices; its arrays have a first axis of G."""

    parts: KVCache
    mesh: Mesh = dataclasses.field(metadata={"static": True})
    axis_name: str = dataclasses.field(metadata={"static": True})
    # "requests" or "heads"
    split: str = dataclasses.field(metadata={"static": True})
    # B and K of all devices together, without padding
    num_requests: int = dataclasses.field(metadata={"static": True})
    num_kv_heads: int = dataclasses.field(metadata={"static": True})

    @property
    def num_devices(self) -> int:
        """G."""
        return self.mesh.shape[self.axis_name]

    @property
    def device_bytes(self) -> int:
        """Bytes that stay resident on each device."""
        return sum(x.nbytes for x in jax.tree.leaves(self.parts)) // self.num_devices

    @property
    def waste(self) -> float:
        """The part of the requests' or heads' places that is padding."""
        number = self.num_requests if self.split == "requests" else self.num_kv_heads
        return padding(number, self.num_devices).waste


def create(
    budget_bytes: int,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    mesh: Mesh,
    axis_name: str,
    split: str,
    num_requests: int = 1,
    recent_tokens: int | None = None,
) -> MeshCache:
    """An empty cache on each device of a mesh axis.

    Args:
      budget_bytes: of each device.
      num_layers: L.
      num_kv_heads: K.
      head_dim: D.
      mesh: of the devices.
      axis_name: the mesh axis.
      split: "requests" or "heads": what the devices divide among them. Places for what does not divide
        stay empty (`MeshCache.waste`).
      num_requests: B.
      recent_tokens: as in `cache.create`.

    Returns:
      `MeshCache`.

    Raises:
      ValueError: those of `cache.create`; an unknown split or axis.
    """
    if split not in _SPLITS:
        raise ValueError(f"split is {split!r}: it must be one of {_SPLITS}")
    if recent_tokens is not None:
        recent_tokens = checks.static_int("recent_tokens", recent_tokens, 2)
    num_devices = axis_size(mesh, "axis_name", axis_name)
    by_requests = split == "requests"
    requests = padding(num_requests, num_devices).size // num_devices
    heads = padding(num_kv_heads, num_devices).size // num_devices

    def part(_):
        return kv_cache.create(
            budget_bytes,
            num_layers,
            num_kv_heads if by_requests else heads,
            head_dim,
            num_requests=requests if by_requests else num_requests,
            recent_tokens=recent_tokens,
        )

    parts = jax.jit(lambda: _on_each(part, mesh, axis_name)(jnp.arange(num_devices)))()
    return MeshCache(parts, mesh, axis_name, split, num_requests, num_kv_heads)


def prefill(
    cache: MeshCache,
    layer: jax.Array | int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    lengths: jax.Array | None = None,
    allowance_pages: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, MeshCache]:
    """`cache.prefill` on every device: prompts [B, S, ...] enter in one layer.

    Args:
      cache: before; donate it.
      layer: [] int32.
      q: [B, S, H, D].
      k: [B, S, K, D].
      v: [B, S, K, D].
      lengths: [B] int32, of each prompt; None for S.
      allowance_pages: [B] int32, for each request on each device that has a part of it; None for an
        even share.
      **options: frequencies and scale.

    Returns:
      y [B, S, H, D], and the cache.

    Raises:
      ValueError: those of `cache.prefill`.
    """
    size = jnp.shape(q)[1]
    lengths = jnp.full(cache.num_requests, size) if lengths is None else jnp.asarray(lengths)
    pages = _pages(cache, allowance_pages)

    def run(part, lengths, pages, q, k, v):
        return kv_cache.prefill(
            part, layer, q, k, v, lengths=lengths, allowance_pages=pages, **options
        )

    given = _of_requests(cache, lengths.astype(jnp.int32)), pages
    return _attention(cache, run, given, (q, k, v), 0 if cache.split == "requests" else 2)


def step(
    cache: MeshCache,
    layer: jax.Array | int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    active: jax.Array | None = None,
    allowance_pages: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, MeshCache]:
    """`cache.step` on every device: one layer's attention for one new token of each request.

    Args:
      cache: before; donate it.
      layer: [] int32.
      q: [B, H, D].
      k: [B, K, D].
      v: [B, K, D].
      active: [B] bool, requests that have a token now.
      allowance_pages: [B] int32, for each request on each device that has a part of it; None for an
        even share.
      **options: scale.

    Returns:
      y [B, H, D] float32, and the cache.

    Raises:
      ValueError: shapes that do not fit.
    """
    shape = (cache.num_requests, cache.num_kv_heads, cache.parts.arena.head_dim)
    for name, x in (("k", k), ("v", v)):
        if x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape}: it must be [B, K, D] = {shape}")

    def run(part, active, pages, q, k, v):
        return kv_cache.step(part, layer, q, k, v, active=active, allowance_pages=pages, **options)

    given = _active(cache, active), _pages(cache, allowance_pages)
    return _attention(cache, run, given, (q, k, v), 0 if cache.split == "requests" else 1)


def _attention(cache, run, given, qkv, axis):
    """`run` on every device's part of q, k, v, divided along an axis: y put together, and the cache."""
    parts = [_deal(cache, x, axis, cache.split) for x in qkv]
    on_each = _on_each(run, cache.mesh, cache.axis_name)
    y, after = on_each(cache.parts, *given, *parts)
    y = jnp.moveaxis(y, 0, axis)
    y = y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])
    spec = [cache.axis_name if i == axis else None for i in range(y.ndim)]
    y = cut(y, cache.mesh, spec, {axis: qkv[0].shape[axis]})
    return y, dataclasses.replace(cache, parts=after)


def _pages(cache, pages):
    """[G, requests of a device] int32 pages; an even share for None and for places without a request."""
    each = cache.parts.recent_count.shape[-1]
    even = cache.parts.arena.data.shape[1] // each
    if pages is None:
        return jnp.full((cache.num_devices, each), even, jnp.int32)
    return _of_requests(cache, jnp.asarray(pages, jnp.int32), even)


def _active(cache, active):
    """[G, requests of a device] bool; places without a request are not active."""
    ones = jnp.ones(cache.num_requests, bool)
    return _of_requests(cache, ones if active is None else jnp.asarray(active))


def _of_requests(cache, x, fill=0):
    """x [B] for every device's requests, and `fill` for places without one."""
    if cache.split == "requests":
        size = padding(cache.num_requests, cache.num_devices).size
        x = jnp.pad(x, (0, size - cache.num_requests), constant_values=fill)
        return x.reshape(cache.num_devices, -1)
    return jnp.broadcast_to(x, (cache.num_devices, *x.shape))


def _deal(cache, x, axis, split):
    """x with an axis divided among the devices, which become its first axis.

    Query heads are filled up by as many as share a key/value head.
    """
    x = jnp.asarray(x)
    number = cache.num_requests if split == "requests" else cache.num_kv_heads
    size = padding(number, cache.num_devices).size * (x.shape[axis] // number)
    x = padded(x, {axis: size})
    x = x.reshape(*x.shape[:axis], cache.num_devices, -1, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _on_each(function: Callable[..., Any], mesh: Mesh, axis_name: str) -> Callable[..., Any]:
    """`function` of every device's part: all arrays have a first axis of G, and so have its results."""

    def part(args):
        out = function(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: x[None], out)

    spec = jax.P(axis_name)
    # Nothing is exchanged, so there is no replication to check.
    run = jax.shard_map(part, mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=False)

    def on_all(*args):
        return run(
            jax.tree.map(lambda x: lay_out(x, mesh, (axis_name, *[None] * (x.ndim - 1))), args)
        )

    return on_all
