"""The model over reduced caches that lie on their own devices, of one process or of many.

Every process runs the layers themselves on its first device, all alike. The queries of a layer's
key/value heads go to the devices that hold them, and attention runs there. Each device's output has
zeros for the heads that others hold, so that one sum over all devices puts the layer together: x + 0
is exact, and every process sees the same bits, however many devices there are.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from experiments.kv_budget.measure import NUM_SINKS, Measured
from experiments.kv_budget.policies import Plan, Room
from experiments.models.llama import Llama
from jbalance import attention, cache
from jbalance.attention import Partial
from jbalance.cache import RaggedCache, paged_attention, pages, remainder, worth
from jbalance.cache.pages import Arena
from jbalance.cache.remainder import Remainder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedContext:
    """Kept entries at several precisions: keys less a mean per unit, which costs them fewer bits."""

    arena: Arena
    key_mean: jax.Array  # [U, D] bfloat16
    remainder: Remainder | None  # of the entries that were not kept, if the policy has one

    @property
    def num_entries(self) -> int:
        """Over all units."""
        return int(np.sum(self.arena.count))

    @property
    def nbytes(self) -> int:
        """Bytes that stay resident."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    def attend(self, q: jax.Array, slots: jax.Array) -> Partial:
        """Attention of queries [n, T, D] over their units; the mean shifts all logits of a query."""
        part = paged_attention.attend_pages(q, self.arena, slots)
        if self.remainder is not None:
            part = attention.merge(part, remainder.attend(q, self.remainder, slots))
        mean = self.key_mean[slots].astype(jnp.float32)
        shift = jnp.einsum("ntd,nd->nt", q.astype(jnp.float32), mean, precision="highest")
        return Partial(part.y, part.lse + shift / np.sqrt(q.shape[-1]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceCache:
    """What one device holds: kept entries of the context, and room for the tokens behind it."""

    context: RaggedCache | PagedContext
    tail_keys: jax.Array  # [U, R, D]
    tail_values: jax.Array  # [U, R, D]

    @property
    def nbytes(self) -> int:
        """Bytes that stay resident on the device."""
        return self.context.nbytes + self.tail_keys.nbytes + self.tail_values.nbytes


Caches = list[DeviceCache | None]
"""What each device holds [G]; None of those of other processes."""


def live_bytes(caches: Caches) -> np.ndarray:
    """Bytes that stay resident on each device [G]; 0 for those of other processes."""
    return np.array([0 if held is None else held.nbytes for held in caches], np.int64)


def is_local(device: jax.Device) -> bool:
    """Whether the device is of this process."""
    return device.process_index == jax.process_index()


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each layer's heads are: static, made once from the placement."""

    device_of: np.ndarray  # [L, K]
    slot_of: np.ndarray  # [L, K] index among the units of its device

    @classmethod
    def of(cls, device_of: np.ndarray, shape: tuple[int, int]) -> Layout:
        slot = np.zeros(device_of.size, np.int32)
        for d in range(device_of.max() + 1):
            slot[device_of == d] = np.arange((device_of == d).sum())
        return cls(device_of.reshape(shape), slot.reshape(shape))

    def heads(self, layer: int, device: int) -> np.ndarray:
        """Key/value heads [n] of this layer on this device."""
        return np.flatnonzero(self.device_of[layer] == device)


def place_caches(
    measured: Measured,
    plan: Plan,
    devices: Sequence[jax.Device],
    tail_tokens: int = 0,
    dtype: jnp.dtype = jnp.bfloat16,
) -> Caches:
    """Gather the kept entries of each device's units and move them there, with room for a tail.

    Every process has measured and planned alike, and fills its own devices.
    """
    caches: Caches = []
    for d, device in enumerate(devices):
        if not is_local(device):
            caches.append(None)
            continue
        units = np.flatnonzero(plan.device_of == d)
        shape = (units.size, tail_tokens, measured.k.shape[-1])
        tails = (jnp.zeros(shape, dtype, device=device) for _ in range(2))
        held: RaggedCache | PagedContext
        if plan.room is None:
            held = cache.pack(measured.k, measured.v, plan.kept, units, dtype=dtype)
        else:
            held = _pack_pages(measured, plan, plan.room, d)
        caches.append(DeviceCache(jax.device_put(held, device), *tails))
    return jax.block_until_ready(caches)


def _pack_pages(measured: Measured, plan: Plan, room: Room, device: int) -> PagedContext:
    """The tokens of a device's units, in its pages at their levels."""
    units = np.flatnonzero(plan.device_of == device)
    tokens, head_dim = measured.k.shape[1], measured.k.shape[-1]
    level = plan.level.reshape(-1, tokens)[units]
    count = np.stack([(level == m).sum(axis=1) for m in range(len(plan.bits))], axis=1)
    need = -(-count // np.array(room.page_tokens(plan.bits)))
    arena = pages.empty(room.num_pages[device], units.size, head_dim, plan.bits, room.page_bytes)
    arena, missing = pages.reallocate(arena, jnp.asarray(need))
    if missing:
        raise RuntimeError(f"device {device} lacks {missing} pages for what was planned")
    k, v = (jnp.moveaxis(x, 2, 1).reshape(-1, tokens, head_dim)[units] for x in measured[:2])
    key_mean = jnp.mean(k[:, NUM_SINKS:], axis=1).astype(jnp.bfloat16)
    k -= key_mean.astype(jnp.float32)[:, None]
    code = worth.encode_worth(measured.w).reshape(-1, tokens)[units]
    for m in range(len(plan.bits)):
        first = jnp.asarray(np.argsort(level != m, axis=1, kind="stable"))
        arena = _write_level(arena, m, first, k, v, code, jnp.asarray(count[:, m]))
    if not plan.remainder:
        return PagedContext(arena, key_mean, None)
    rest, w = remainder.create(units.size, head_dim), worth.decode_worth(code)
    evicted = jnp.asarray(level == len(plan.bits))
    rest = _absorb(rest, np.arange(units.size), k, v, w, evicted)
    return PagedContext(arena, key_mean, rest)


_absorb = jax.jit(remainder.absorb)


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def _write_level(arena: Arena, m: int, first, k, v, code, number) -> Arena:
    """The first `number` [U] tokens in the order `first` [U, S] fill the groups of level m."""
    k, v, code = (
        jnp.take_along_axis(x, first.reshape(first.shape + (1,) * (x.ndim - 2)), axis=1)
        for x in (k, v, code)
    )
    units, start = jnp.arange(len(first)), jnp.zeros(len(first), jnp.int32)
    return pages.write(arena, units, m, start, k, v, code, number)[0]


class Decoder:
    """The model cut into the pieces that run between the devices' attentions."""

    def __init__(self, model: Llama, devices: Sequence[jax.Device]) -> None:
        self.config = model.config
        self.devices = list(devices)
        self._mesh = Mesh(np.array(self.devices), ("devices",))
        graph, state = nnx.split(model)
        layers = [nnx.split(model.layer(i)) for i in range(model.config.num_layers)]
        self._layers = [layer_state for _, layer_state in layers]
        self._state = state
        self._embed = functools.partial(_embed, graph)
        self._logits = functools.partial(_logits, graph)
        self._qkv = functools.partial(_qkv, layers[0][0])
        self._finish = functools.partial(_finish, layers[0][0])

    def alone(self) -> Decoder:
        """The same model on this process's first device alone."""
        one = copy.copy(self)
        one.devices = [next(filter(is_local, self.devices))]
        return one

    def forward(
        self,
        tokens: np.ndarray,
        position: int,
        caches: Caches,
        layout: Layout,
        tail: int,
    ) -> tuple[jax.Array, Caches]:
        """Logits [T, V] of new tokens [T] at position, position + 1, ..., after `tail` earlier new ones.

        The new tokens see the kept context, the tail and each other causally. Where the caches have
        room (R > 0) they are added to it; the returned caches take the place of the given ones. All
        processes call it alike.

        Raises:
          ValueError: if the room is used but too small for them.
        """
        room = next(held for held in caches if held is not None).tail_keys.shape[1]
        if room and tail + len(tokens) > room:
            raise ValueError(
                f"tokens: {tail + len(tokens)} new tokens exceed the {room} that room was kept for"
            )
        positions = position + jnp.arange(len(tokens))
        x = self._embed(self._state, jnp.asarray(tokens))
        for layer in range(self.config.num_layers):
            q, k, v = self._qkv(self._layers[layer], x, positions)
            parts, caches = self._attend_devices(layer, q, k, v, caches, layout, tail)
            y = _with_new(q, k, v, parts)
            x = self._finish(self._layers[layer], x, y)
        return self._logits(self._state, x), caches

    def _attend_devices(self, layer, q, k, v, caches, layout, tail):
        """Attention [K, ...] over what the devices hold, and the caches with the new tokens added."""
        outputs, updated = [], []
        for d, (device, held) in enumerate(zip(self.devices, caches, strict=True)):
            if held is not None:
                heads = layout.heads(layer, d)
                output, held = _attend_device(
                    q, k, v, heads, device, layout.slot_of[layer], held, tail
                )
                outputs.append(output)
            updated.append(held)
        return self._sum(outputs), updated

    def _sum(self, outputs: list[jax.Array]) -> Partial:
        """One collective: the sum of all devices' outputs [1, K, ...], on this process's first."""
        if len(self.devices) > 1:
            shape = (len(self.devices), *outputs[0].shape[1:])
            sharding = NamedSharding(self._mesh, jax.P("devices"))
            # The CPU's collectives wait in threads that attention may need: the one after the other.
            outputs = self._ready(outputs)
            spread = jax.make_array_from_single_device_arrays(shape, sharding, outputs)
            outputs = self._ready([_over_devices(self._mesh)(spread).addressable_data(0)])
        return _apart(outputs[0])

    def _ready(self, x):
        return jax.block_until_ready(x) if self.devices[0].platform == "cpu" else x


def _attend_device(q, k, v, heads, device, slot_of, held, tail) -> tuple[jax.Array, DeviceCache]:
    """Attention [1, K, ...] of the heads that a device holds, zeros for others; and its cache."""
    tokens, kv_heads, group, dim = q.shape
    if heads.size == 0:
        shape = (1, kv_heads, tokens * group, dim + 1)
        return jnp.zeros(shape, jnp.float32, device=device), held
    local = jax.device_put(_of_heads(q, k, v, heads), device)
    part, held = _attend_held(*local, slots=slot_of[heads], held=held, tail=tail)
    return _among_all(part, heads, kv_heads), held


@functools.partial(jax.jit, static_argnums=2)
def _among_all(part: Partial, heads, kv_heads: int) -> jax.Array:
    """[1, K, ..., D + 1]: y and lse of some heads in one array, zeros for those of other devices."""
    both = jnp.concatenate([part.y, part.lse[..., None]], axis=-1)
    return jnp.zeros((1, kv_heads, *both.shape[1:]), both.dtype).at[0, heads].set(both)


@jax.jit
def _apart(both: jax.Array) -> Partial:
    """y and lse of all heads, from their sum over the devices or from the only one."""
    both = both.reshape(both.shape[-3:])
    return Partial(both[..., :-1], both[..., -1])


@functools.cache
def _over_devices(mesh: Mesh):
    """The sum over the devices of what each has, the same on all."""
    total = functools.partial(jax.lax.psum, axis_name="devices")
    return jax.jit(jax.shard_map(total, mesh=mesh, in_specs=jax.P("devices"), out_specs=jax.P()))


@jax.jit
def _of_heads(q, k, v, heads):
    """[n, T, ...] of some key/value heads, from [T, K, ...]."""
    return tuple(jnp.moveaxis(x[:, heads], 0, 1) for x in (q, k, v))


def _attend_held(q, k, v, *, slots, held: DeviceCache, tail) -> tuple[Partial, DeviceCache]:
    """Attention over all that the device holds; k and v join its tail if there is room for one.

    The tails are donated: the returned cache takes the place of the given one.
    """
    part = _attend_context(q, slots, held.context)
    if not held.tail_keys.shape[1]:
        return part, held
    tails = held.tail_keys, held.tail_values
    part, keys, values = _attend_tail(part, q, k, v, *tails, slots, tail)
    return part, DeviceCache(held.context, keys, values)


@jax.jit
def _attend_context(q, slots, context: RaggedCache | PagedContext) -> Partial:
    """Queries [n, T, G, D] over the kept entries of their units."""
    q = q.reshape(q.shape[0], -1, q.shape[-1])
    if isinstance(context, PagedContext):
        return context.attend(q, slots)
    return cache.attend(q, context, slots)


@functools.partial(jax.jit, donate_argnums=(4, 5))
def _attend_tail(part: Partial, q, k, v, keys, values, slots, tail):
    """`part` merged with attention over the first `tail` tokens of [U, R, D]; k, v put behind them."""
    flat = q.reshape(q.shape[0], -1, q.shape[-1])
    visible = jnp.arange(keys.shape[1])[None] < tail
    behind = [x[slots].astype(jnp.float32) for x in (keys, values)]
    part = attention.merge(part, _dense(flat, behind[0], behind[1], visible))
    at = slots[:, None], tail + jnp.arange(q.shape[1])
    keys, values = (x.at[at].set(new.astype(x.dtype)) for x, new in ((keys, k), (values, v)))
    return part, keys, values


def _dense(q, k, v, visible) -> Partial:
    """Attention of queries [n, T, D] over keys [n, S, D] where visible [T or 1, S]."""
    logits = jnp.einsum("ntd,nsd->nts", q, k) / np.sqrt(q.shape[-1])
    logits = jnp.where(visible, logits, -1e30)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weight = jnp.where(visible, jnp.exp(logits - lse[..., None]), 0.0)
    return Partial(jnp.einsum("nts,nsd->ntd", weight, v), lse)


@jax.jit
def _with_new(q, k, v, parts: Partial) -> jax.Array:
    """y [T, H, D]: attention over what is cached, merged with that among the new tokens."""
    tokens, heads, group, dim = q.shape
    flat = jnp.moveaxis(q, 0, 1).reshape(heads, tokens * group, dim)
    causal = jnp.arange(tokens) <= jnp.arange(tokens).repeat(group)[:, None]
    new = _dense(flat, jnp.moveaxis(k, 0, 1), jnp.moveaxis(v, 0, 1), causal)
    y = attention.merge(parts, new).y.reshape(heads, tokens, group, dim)
    return jnp.moveaxis(y, 0, 1).reshape(tokens, heads * group, dim)


@functools.partial(jax.jit, static_argnums=0)
def _embed(graph, state, tokens):
    return nnx.merge(graph, state).embed(tokens[None])


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph, state, x):
    return nnx.merge(graph, state).logits(x)[0]


@functools.partial(jax.jit, static_argnums=0)
def _qkv(graph, state, x, positions):
    """q [T, K, G, D], k and v [T, K, D]."""
    q, k, v = nnx.merge(graph, state).qkv(x, positions)
    return q[0].reshape(*k.shape[1:3], -1, k.shape[-1]), k[0], v[0]


@functools.partial(jax.jit, static_argnums=0)
def _finish(graph, state, x, y):
    return nnx.merge(graph, state).finish(x, y[None])
