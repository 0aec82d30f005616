"""Attention of a serving engine over a cache of fixed bytes: many requests, their tokens in one row.

Engines hand a layer's queries, keys and values of all requests over as [tokens, heads, D], with a batch
that says whose they are, and keep a cache beside the model. This is that call. What joins, grows and
leaves, and the bytes that it has, is `jbalance.decode`'s.

    pool = backend.create(budget_bytes)
    pool, metadata = backend.init_forward_metadata(pool, batch)        # on the host, for each batch
    y, cache = backend(q, k, v, layer, metadata, pool.cache)           # in the model, in each layer
    pool = pool.after(cache)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance import _axes, attention, checks
from jbalance._bits import in_32_bits
from jbalance.adapters.forward_batch import BatchMetadata, rows_of
from jbalance.attention import Partial, merge
from jbalance.cache import KVCache, _cache, _codec, _prefill, _settle, _step
from jbalance.cache._channels import query_energy
from jbalance.decode import devices as over
from jbalance.decode.model import AttentionSpec, check_attention, windows_of
from jbalance.decode.prefill import CHUNK_TOKENS, Tokens, capacity_for, causal_chunk
from jbalance.decode.state import held_within, shares_of
from jbalance.importance.token_worth import NUM_QUERIES, worth_of


@dataclasses.dataclass(frozen=True)
class CachePool:
    """The cache of B requests, and what the host knows of them. The cache alone goes through jit."""

    cache: KVCache
    lengths: np.ndarray  # [B] int32 tokens that each request has had; 0 for places that are free
    allowances: np.ndarray  # [B] int32 pages

    @property
    def nbytes(self) -> int:
        """Bytes that stay resident, whatever is held: at most the budget."""
        return self.cache.nbytes

    def after(self, cache: KVCache) -> CachePool:
        """The pool after a forward pass, which returned this cache."""
        checks.instance("cache", cache, KVCache)
        return dataclasses.replace(self, cache=cache)


@dataclasses.dataclass(frozen=True)
class AttentionBackend:
    """Causal attention of a model's layers for an engine that batches continuously; static.

    The requests that are there share the memory evenly; who holds more gives it up when another joins.
    In each batch the engine calls all layers in their order, once. Tokens of a prompt see each other
    exactly; behind it they are kept at what they are worth, in each layer. A prompt may come in pieces,
    of which the later ones see the earlier as they are kept.

    Attributes:
      attention: of each layer, with the `frequencies` that the model rotates queries and keys by.
      num_requests: B, places; the engine's indices of requests are in 0..B-1.

    Raises:
      ValueError: no layers, or layers whose heads differ.
    """

    attention: tuple[AttentionSpec, ...]
    num_requests: int

    def __post_init__(self) -> None:
        given = checks.items("attention", self.attention, "the AttentionSpec of each layer")
        for i, spec in enumerate(given):
            checks.instance(f"attention[{i}]", spec, AttentionSpec)
        object.__setattr__(self, "attention", tuple(given))
        checks.static_fields(self, "num_requests")
        if not self.attention:
            raise ValueError("attention is empty: give the AttentionSpec of each layer")
        check_attention(self.attention)

    def create(self, budget_bytes: int, *, device: jax.Device | None = None) -> CachePool:
        """Free places for B requests, within so many bytes on a device; None for the first one.

        Raises:
          ValueError: a budget too small for the tokens that always stay, with what would do.
        """
        if device is not None:
            checks.instance("device", device, jax.Device)
        spec = self.attention[0]
        cache = _cache.create(
            budget_bytes,
            len(self.attention),
            spec.num_kv_heads,
            spec.head_dim,
            num_requests=self.num_requests,
            windows=windows_of(self.attention),
        )
        # Committed, or a forward pass's result would enter the next as an argument of another kind.
        cache = jax.device_put(cache, jax.devices()[0] if device is None else device)
        return _shared(cache, np.zeros(self.num_requests, np.int32))

    def init_forward_metadata(self, pool: CachePool, batch: Any) -> tuple[CachePool, BatchMetadata]:
        """What all layers need of a batch. A request whose prefix is 0 begins: its place is cleared.

        Args:
          pool: given up: the returned one takes its place.
          batch: `ForwardBatch`, or an engine's own with such attributes.

        Returns:
          The pool, in which the requests that begin have their share, and the metadata, for which a
          program compiles once for each mode, R and T.

        Raises:
          ValueError: another mode, more requests than places, two of one place, lengths that do not add
            up, or a prefix that is not what the place holds.
        """
        checks.instance("pool", pool, CachePool)
        rows = rows_of(batch, pool.lengths)
        lengths = pool.lengths.copy()
        lengths[rows.places[rows.real]] = (rows.prefixes + rows.lengths)[rows.real]
        cache = pool.cache
        if rows.begins.size:
            for place in rows.begins:
                if pool.lengths[place]:
                    cache = over.release(cache, int(place))
            pool = _shared(cache, lengths)
        pool = dataclasses.replace(pool, lengths=lengths)
        return pool, rows.metadata(self.num_requests, pool.allowances)

    def release(self, pool: CachePool, req_pool_indices: Iterable[int]) -> CachePool:
        """Requests leave: their places are free, and their memory is the others'.

        Args:
          pool: given up: the returned one takes its place.
          req_pool_indices: places of requests that are there.
        """
        checks.instance("pool", pool, CachePool)
        cache, lengths = pool.cache, pool.lengths.copy()
        for place in checks.items("req_pool_indices", req_pool_indices, "places of requests"):
            place = checks.static_int("req_pool_indices", place, 0, self.num_requests - 1)
            if lengths[place] == 0:
                raise ValueError(f"req_pool_indices has {place}: the place is free already")
            cache = over.release(cache, place)
            lengths[place] = 0
        return _shared(cache, lengths)

    @in_32_bits
    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        layer: Any,
        metadata: BatchMetadata,
        cache: KVCache,
        *,
        attention_mask: None = None,
    ) -> tuple[jax.Array, KVCache]:
        """One layer's attention of a batch, whose keys and values enter the cache.

        Args:
          q: [T, H, D] or [T, H D] queries after the rotary embedding, unscaled.
          k: [T, K, D] or [T, K D] keys after the rotary embedding.
          v: [T, K, D] or [T, K D] values.
          layer: its number, static, or an object with it as `layer_id`, whose heads and scale are those
            of `attention`.
          metadata: of the batch.
          cache: of the pool, or what the layer before returned; donate it to the program.
          attention_mask: None; attention is causal within each request.

        Returns:
          y, of q's shape and type, 0 for padding; and the cache.

        Raises:
          ValueError: a mask, shapes or heads that do not fit, concrete values that are not finite, or a
            layer that there is not.
        """
        checks.instance("metadata", metadata, BatchMetadata)
        checks.instance("cache", cache, KVCache)
        if attention_mask is not None:
            raise ValueError("attention_mask is given: attention is causal, and has no other mask")
        number = self._layer(layer)
        spec = self.attention[number]
        _axes.unsplit(q=q, k=k, v=v)
        heads = {"q": spec.num_heads, "k": spec.num_kv_heads, "v": spec.num_kv_heads}
        parts = [
            _by_head(name, x, (metadata.num_tokens, heads[name], spec.head_dim))
            for name, x in (("q", q), ("k", k), ("v", v))
        ]
        own = cache.num_layers, cache.num_kv_heads, cache.head_dim, cache.num_requests
        want = len(self.attention), spec.num_kv_heads, spec.head_dim, self.num_requests
        if own != want:
            raise ValueError(f"cache is of L, K, D, B = {own}: it must be of {want}, from `create`")
        _check_numbers(parts, metadata, self.num_requests)
        metadata = jax.tree.map(jnp.asarray, metadata)  # an eager caller's are NumPy's
        attend = _decode if metadata.decodes else _extend
        last = number + 1 == len(self.attention)
        y, cache = attend(spec, number, parts, metadata, cache, last)
        return y.reshape(q.shape).astype(q.dtype), cache

    def _layer(self, layer: Any) -> int:
        """The number of a layer; ValueError if it is none, or says otherwise of its attention."""
        number = getattr(layer, "layer_id", layer)
        number = checks.static_int("layer", number, 0, len(self.attention) - 1)
        spec = self.attention[number]
        scale = 1 / math.sqrt(spec.head_dim) if spec.scale is None else spec.scale
        for name, want in (
            ("q_head_num", spec.num_heads),
            ("kv_head_num", spec.num_kv_heads),
            ("head_dim", spec.head_dim),
            ("v_head_dim", spec.head_dim),
            ("scaling", scale),
        ):
            given = getattr(layer, name, None)
            if given is not None and not math.isclose(given, want, rel_tol=1e-6):
                raise ValueError(
                    f"layer {number} has {name} = {given}: its AttentionSpec has {want}"
                )
        kind = getattr(layer, "attn_type", None)
        if str(getattr(kind, "value", kind or "decoder")) != "decoder":
            raise ValueError(
                f"layer {number} has attn_type = {kind}: attention over the cache is a decoder's, "
                f"neither an encoder's nor across sequences"
            )
        return number


def _shared(cache: KVCache, lengths: np.ndarray) -> CachePool:
    """The pool in which all requests that are there have even shares."""
    weights = (lengths > 0).astype(np.float32)
    allowances = shares_of(cache, weights)
    return CachePool(held_within(cache, weights, allowances), lengths, allowances)


def _by_head(name: str, x: Any, shape: tuple[int, int, int]) -> jax.Array:
    """x [T, heads, D]; ValueError unless it is that, or its heads one after the other."""
    x = checks.floats(name, x, (2, 3), "[T, heads, D] or [T, heads D]")
    if x.shape not in (shape, (shape[0], shape[1] * shape[2])):
        raise ValueError(
            f"{name} has shape {x.shape}: it must be [T, heads, D] = {shape}, or heads and D in one "
            f"axis; keys and values are those of the queries' tokens"
        )
    return jnp.asarray(x).reshape(shape).astype(jnp.float32)


def _check_numbers(parts: list[jax.Array], metadata: BatchMetadata, num_requests: int) -> None:
    """ValueError for concrete queries, keys and values that are no numbers; padding may be anything."""
    if not checks.is_concrete(parts, metadata):
        return
    rows = np.asarray(metadata.places) < num_requests
    if not metadata.decodes:
        rows = np.arange(metadata.num_tokens) < np.sum(np.asarray(metadata.lengths))
    for name, x in zip("qkv", parts, strict=True):
        checks.largest_finite(name, x[rows], _codec.MOST)


@functools.partial(jax.jit, static_argnames=("spec", "last"))  # once for all eager calls
def _decode(spec, layer, qkv, metadata, cache, last):
    """A token of each active request; the rows lie in the order of the batch."""
    places = metadata.places
    q, k, v = (
        jnp.zeros((cache.num_requests, *x.shape[1:])).at[places].set(x, mode="drop") for x in qkv
    )
    active = metadata.active
    q = _step.scaled(q, spec.scale)
    y, cache = _step.attend_token(cache, layer, q, k, v, active, None, spec.limits)
    if last:
        cache = _settle.advanced(cache, active)
        cache, _ = _settle.settle(cache, metadata.allowances)
    return y.at[places].get(mode="fill", fill_value=0), cache


@functools.partial(jax.jit, static_argnames=("spec", "last"))
def _extend(spec, layer, qkv, metadata, cache, last):
    """The prompts, or pieces of them, one request after the other."""
    del last
    size = capacity_for(metadata.num_tokens)
    more = size - metadata.num_tokens
    qkv = [jnp.pad(x, ((0, more), (0, 0), (0, 0))) for x in qkv]

    def row(i, carry):
        y, cache = carry
        start = metadata.starts[i]
        there = (jnp.arange(size) < metadata.lengths[i])[:, None, None]
        own = [jnp.where(there, jnp.roll(x, -start, axis=0), 0) for x in qkv]
        out, cache = _read(spec, layer, own, metadata, i, cache)
        return y + jnp.roll(jnp.where(there, out, 0), start, axis=0), cache

    y, cache = lax.fori_loop(0, metadata.num_rows, row, (jnp.zeros_like(qkv[0]), cache))
    return y[: metadata.num_tokens], cache


def _read(spec, layer, qkv, metadata, i, cache):
    """Attention [S, H, D] of row i's tokens, 0 behind them, which enter the cache."""
    place, prefix, number = metadata.places[i], metadata.prefixes[i], metadata.lengths[i]
    q, k, v = qkv
    size = q.shape[0]
    tokens = Tokens(k, v, jnp.int32(0), number)
    if spec.window is not None:
        tokens = tokens.latest(spec.window)
    last = min(NUM_QUERIES, size)
    later = tokens.later(
        spec, lax.dynamic_slice_in_dim(q, jnp.clip(number - last, 0, size - last), last)
    )

    def chunk(i, carry):
        y, repeated = carry
        first = i * CHUNK_TOKENS
        part = lax.dynamic_slice_in_dim(q, first, CHUNK_TOKENS)
        queries = _step.scaled(part, spec.scale)
        plan = causal_chunk(first, size)
        rules: Any = spec.limits._asdict() | {"offset": first, "causal": True}
        own = attention.attend(queries[None], k[None], v[None], plan, **rules)
        own = Partial(*(_prefill.by_kv_head(x[0], spec.num_kv_heads) for x in own))

        def with_held():
            at = prefix + first
            held = over.held_here(cache, None, place, layer, queries, at, spec.limits)
            return merge(own, Partial(*held)).y

        out = lax.cond(prefix > 0, with_held, lambda: own.y)
        y = lax.dynamic_update_slice_in_dim(y, _prefill.by_token(out, CHUNK_TOKENS), first, axis=0)
        return y, repeated + tokens.repeated(spec, part, first)

    empty = jnp.zeros_like(q), jnp.zeros_like(later)
    y, repeated = lax.fori_loop(0, -(-number // CHUNK_TOKENS), chunk, empty)
    w = tokens.placed(worth_of(repeated, later), size)
    pages = metadata.allowances[place]
    rest = {
        "num_tokens": number,
        "start": prefix,
        "energy": query_energy(q, spec.num_kv_heads, number),
    }
    cache, _ = _prefill.admit(cache, place, layer, k, v, w, pages, **rest)
    return y, cache
