"""The cache of a decoder on a mesh: one cache a device, of its requests or of its heads.

Every device has an arena, rings and a price of its own, and nothing is exchanged: a request lies whole
on one device (data parallel), or every device has some key/value heads of all requests (tensor
parallel). Arrays over a mesh have one shape, so that the devices' bytes are equal; devices of unequal
memory take a cache each, as `experiments.kv_budget` has them.

    cache = sharded.cache.create(budget_bytes, L, K, D, mesh=mesh, axis_name="x", split="heads")
    cache, report = sharded.cache.admit_layer(cache, request, layer, k, v, w, pages)
    y, ring = sharded.cache.attend_step(cache, ring, layer, q, k, v)      # in a scan over layers
    cache, report = sharded.cache.end_step(cache, rings, pages)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from jbalance import checks
from jbalance.cache import KVCache, live
from jbalance.cache.live import Ring
from jbalance.cache.rebalance import Report
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

    @property
    def rings(self) -> Ring:
        """[L, G, ...], the rings of all layers, to scan over."""
        rings = jax.vmap(lambda part: part.rings)(self.parts)
        return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), rings)


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
    ring_tokens: int | None = None,
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
      ring_tokens: as in `live.create`.

    Returns:
      `MeshCache`.

    Raises:
      ValueError: those of `live.create`; an unknown split or axis.
    """
    if split not in _SPLITS:
        raise ValueError(f"split is {split!r}: it must be one of {_SPLITS}")
    num_devices = axis_size(mesh, "axis_name", axis_name)
    by_requests = split == "requests"
    requests = padding(num_requests, num_devices).size // num_devices
    heads = padding(num_kv_heads, num_devices).size // num_devices

    def part(_):
        return live.create(
            budget_bytes,
            num_layers,
            num_kv_heads if by_requests else heads,
            head_dim,
            num_requests=requests if by_requests else num_requests,
            ring_tokens=ring_tokens,
        )

    parts = jax.jit(lambda: _on_each(part, mesh, axis_name)(jnp.arange(num_devices)))()
    return MeshCache(parts, mesh, axis_name, split, num_requests, num_kv_heads)


def admit_layer(
    cache: MeshCache,
    request: jax.Array | int,
    layer: jax.Array | int,
    k: jax.Array,
    v: jax.Array,
    w: jax.Array,
    allowance_pages: jax.Array | int,
    **options: Any,
) -> tuple[MeshCache, Report]:
    """`live.admit_layer`: a request's keys and values of one layer enter on their devices.

    Args:
      cache: before; donate it.
      request: [] int32 in 0..B-1.
      layer: [] int32.
      k: [S, K, D].
      v: [S, K, D].
      w: [K, S] worth.
      allowance_pages: [] int32, for the request on each device that has a part of it.
      **options: num_sinks, num_recent, num_tokens.

    Returns:
      The cache, and the `Report` of each device: a first axis of G, zeros where nothing entered.

    Raises:
      ValueError: those of `live.admit_layer`.
    """
    checks.in_range("request", request, 0, cache.num_requests - 1)
    if cache.split == "heads":

        def admit(part, k, v, w):
            return live.admit_layer(part, request, layer, k, v, w, allowance_pages, **options)

        dealt = [_deal(cache, x, axis, "heads") for x, axis in ((k, 1), (v, 1), (w, 0))]
        parts, report = _on_each(admit, cache.mesh, cache.axis_name)(cache.parts, *dealt)
        return dataclasses.replace(cache, parts=parts), report
    each = padding(cache.num_requests, cache.num_devices).size // cache.num_devices

    def admit_own(part, device):
        def admit(part):
            own = request % each
            return live.admit_layer(part, own, layer, k, v, w, allowance_pages, **options)

        nothing = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(admit, part)[1]
        )
        return lax.cond(request // each == device, admit, lambda part: (part, nothing), part)

    run = _on_each(admit_own, cache.mesh, cache.axis_name)
    parts, report = run(cache.parts, jnp.arange(cache.num_devices))
    return dataclasses.replace(cache, parts=parts), report


def attend_step(
    cache: MeshCache,
    ring: Ring,
    layer: jax.Array | int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    active: jax.Array | None = None,
) -> tuple[jax.Array, Ring]:
    """`live.attend_step` on every device: one layer's attention for one new token of each request.

    Args:
      cache: as it was before the token.
      ring: [G, ...], this layer's part of `cache.rings`.
      layer: [] int32.
      q: [B, H, D].
      k: [B, K, D].
      v: [B, K, D].
      active: [B] bool, requests that have a token now.

    Returns:
      y [B, H, D] float32, and the layer's ring with the token in it.

    Raises:
      ValueError: shapes that do not fit.
    """
    shape = (cache.num_requests, cache.num_kv_heads, cache.parts.arena.head_dim)
    for name, x in (("k", k), ("v", v)):
        if x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape}: it must be [B, K, D] = {shape}")
    checks.rank("q", q, 3, "[B, H, D]")
    axis = _SPLITS.index(cache.split)
    parts = [_deal(cache, x, axis, cache.split) for x in (q, k, v)]

    def step(part, ring, active, q, k, v):
        return live.attend_step(part, ring, layer, q, k, v, active=active)

    run = _on_each(step, cache.mesh, cache.axis_name)
    y, ring = run(cache.parts, ring, _active(cache, active), *parts)
    y = jnp.moveaxis(y, 0, axis)
    y = y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])
    spec = [cache.axis_name if i == axis else None for i in range(y.ndim)]
    return cut(y, cache.mesh, spec, {axis: q.shape[axis]}), ring


def end_step(
    cache: MeshCache,
    rings: Ring,
    allowance_pages: jax.Array,
    *,
    active: jax.Array | None = None,
) -> tuple[MeshCache, Report]:
    """`live.end_step` on every device.

    Args:
      cache: before; donate it.
      rings: [L, G, ...] as `attend_step` returned them for each layer.
      allowance_pages: [B] int32, for each request on each device that has a part of it.
      active: [B] bool, requests that had a token in this step.

    Returns:
      The cache, and the `Report` of each device: a first axis of G.

    Raises:
      ValueError: shapes that do not fit.
    """
    if jnp.shape(allowance_pages) != (cache.num_requests,):
        raise ValueError(
            f"allowance_pages has shape {jnp.shape(allowance_pages)}: it must be [B] = "
            f"({cache.num_requests},)"
        )

    def step(part, rings, allowance, active):
        return live.end_step(part, rings, allowance, active=active)

    rings = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), rings)
    allowance = _of_requests(cache, jnp.asarray(allowance_pages, jnp.int32))
    run = _on_each(step, cache.mesh, cache.axis_name)
    parts, report = run(cache.parts, rings, allowance, _active(cache, active))
    return dataclasses.replace(cache, parts=parts), report


def _active(cache, active):
    """[G, requests of a device] bool; places without a request are not active."""
    ones = jnp.ones(cache.num_requests, bool)
    return _of_requests(cache, ones if active is None else jnp.asarray(active))


def _of_requests(cache, x):
    """x [B] for every device's requests."""
    if cache.split == "requests":
        return _deal(cache, x, 0, "requests")
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
