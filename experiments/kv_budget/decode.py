"""The model over reduced caches that lie on their own devices.

Each layer runs on the first device; the queries of its key/value heads go to the devices that hold
them, attention runs there, and only its output comes back.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

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
) -> list[DeviceCache]:
    """Gather the kept entries of each device's units and move them there, with room for a tail."""
    caches = []
    for d, device in enumerate(devices):
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
        graph, state = nnx.split(model)
        layers = [nnx.split(model.layer(i)) for i in range(model.config.num_layers)]
        self._layers = [layer_state for _, layer_state in layers]
        self._state = state
        self._embed = functools.partial(_embed, graph)
        self._logits = functools.partial(_logits, graph)
        self._qkv = functools.partial(_qkv, layers[0][0])
        self._finish = functools.partial(_finish, layers[0][0])

    def forward(
        self,
        tokens: np.ndarray,
        position: int,
        caches: list[DeviceCache],
        layout: Layout,
        tail: int,
    ) -> tuple[jax.Array, list[DeviceCache]]:
        """Logits [T, V] of new tokens [T] at position, position + 1, ..., after `tail` earlier new ones.

        The new tokens see the kept context, the tail and each other causally. Where the caches have
        room (R > 0) they are added to it; the returned caches take the place of the given ones.

        Raises:
          ValueError: if the room is used but too small for them.
        """
        room = caches[0].tail_keys.shape[1]
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
        outputs, order, updated = [], [], []
        for d, device in enumerate(self.devices):
            heads = layout.heads(layer, d)
            if heads.size == 0:
                updated.append(caches[d])
                continue
            slots = layout.slot_of[layer, heads]
            local = jax.device_put(_of_heads(q, k, v, heads), device)
            part, kept = _attend_held(*local, slots=slots, held=caches[d], tail=tail)
            updated.append(kept)
            outputs.append(jax.device_put(part, self.devices[0]))
            order.append(heads)
        back = np.argsort(np.concatenate(order))
        return _join(outputs, back), updated


@jax.jit
def _of_heads(q, k, v, heads):
    """[n, T, ...] of some key/value heads, from [T, K, ...]."""
    return tuple(jnp.moveaxis(x[:, heads], 0, 1) for x in (q, k, v))


@jax.jit
def _join(parts: list[Partial], back) -> Partial:
    """[K, ...] in the order of the heads, from the parts of the devices."""
    return jax.tree.map(lambda *x: jnp.concatenate(x)[back], *parts)


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
