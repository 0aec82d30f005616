"""Flax models that decode over a cache of fixed bytes: any length, and nothing overwritten silently."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from jbalance import cache as kv_cache
from jbalance import checks
from jbalance.adapters.attention_fn import check_module, is_causal_mask, shows_all_before
from jbalance.adapters.modules import kv_heads_of, layer_by_layer
from jbalance.cache import KVCache
from jbalance.cache._step import step_in_order

COLLECTION = "cache"  # of linen's variables, as that of the stock modules


class CacheState(nnx.Variable):
    """The cache of an nnx model."""


class NnxCache(nnx.Module):
    """One cache of fixed bytes for all layers of an nnx model, whose attention it replaces in place.

    A call of the model with prompts [B, S, E], S > 1, lets them enter the cache, behind what it holds of
    their requests already; a call with one token [B, 1, E] attends to all that was kept and to itself.
    Tokens stay at the precision that they are worth; memory is the same for any length, and the oldest
    are not lost first. The stock `decode=True` overwrites its last slot when it is full: leave it False.

    Positions and where to stop are the model's own, as ever. Each of the model's attention layers is
    called once in a forward pass, with `is_causal=True` or a causal mask that is no tracer; prompts of
    different lengths are padded on the right, and `reset` is told their lengths.

    Args:
      model: an nnx module whose `nnx.MultiHeadAttention` layers have the same key/value heads.
      num_bytes: for all of it, never exceeded.
      batch: B.
      frequencies: [D/2] of the model's rotary embedding, radians per position of each pair of features;
        None for a model without.
      causal: True says that masks which are traced, and cannot be looked at, are causal ones.

    Raises:
      ValueError: layers that differ or are stacked in one module, or bytes that do not hold what is
        needed at least (`cache.create`).
    """

    def __init__(
        self,
        model: nnx.Module,
        num_bytes: int,
        batch: int = 1,
        *,
        frequencies: Any = None,
        causal: bool = False,
    ) -> None:
        layers = [layer for _, layer in layer_by_layer(model)]
        shapes = {(kv_heads_of(layer), layer.head_dim) for layer in layers}
        if len(shapes) != 1:
            raise ValueError(
                f"model has attention layers of (key/value heads, head_dim) {sorted(shapes)}: all must "
                f"have the same"
            )
        self.frequencies = (
            None if frequencies is None else tuple(np.asarray(frequencies, float).tolist())
        )
        self.state = CacheState(
            kv_cache.create(num_bytes, len(layers), *shapes.pop(), num_requests=batch)
        )
        self.causal = causal
        self.lengths = CacheState(jnp.full(batch, checks.INT32_MAX, jnp.int32))
        self.called: tuple[int, ...] = ()  # layers of the forward pass that is under way
        for i, layer in enumerate(layers):
            layer.attention_fn = nnx.data(_CachedAttention(self, i))

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return self.state.get_value().nbytes

    def reset(self, lengths: jax.Array | None = None) -> None:
        """Empty, for new prompts: of these lengths [B] before the padding, or without padding."""
        cache = self.state.get_value()
        for request in range(cache.num_requests):
            cache = kv_cache.release(cache, request)
        self.state.set_value(cache)
        most = jnp.full(cache.num_requests, checks.INT32_MAX, jnp.int32)
        if lengths is not None:
            checks.rank("lengths", lengths, 1, "[B]")
            checks.length("lengths", lengths, most.size, "B")
            lengths = checks.int_in_range("lengths", lengths, 0, checks.INT32_MAX - 1)
        self.lengths.set_value(most if lengths is None else jnp.asarray(lengths, jnp.int32))

    def attend(self, layer: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """Attention of one layer, whose keys and values enter."""
        if layer in self.called:
            raise ValueError(
                f"attention layer {layer} is called twice in a forward pass, or another one never: the "
                f"cache needs each of the {self.state.get_value().num_layers} once"
            )
        cache, lengths = self.state.get_value(), self.lengths.get_value()
        self.called = (*self.called, layer)
        last = len(self.called) == cache.num_layers
        y, cache = _attend(cache, layer, query, key, value, self.frequencies, lengths, last)
        self.state.set_value(cache)
        if last:
            self.called = ()
            if query.shape[1] > 1:  # what comes after a prompt is not padded
                self.lengths.set_value(jnp.full_like(lengths, checks.INT32_MAX))
        return y


class _CachedAttention(nnx.Module):
    """The `attention_fn` of one layer."""

    def __init__(self, cache: NnxCache, layer: int) -> None:
        self.cache, self.layer = cache, layer

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        is_causal: bool = False,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
        module: Any = None,
        **_: Any,
    ) -> jax.Array:
        check_module(module)
        check_call(query, key, bias, mask, is_causal, self.cache.causal)
        _check_dropout(dropout_rate, deterministic)
        return self.cache.attend(self.layer, query, key, value)


class LinenCachedAttention(linen.Module):
    """An `attention_fn` of one linen layer with a cache of fixed bytes of its own.

    The cache is a variable of the collection "cache", which calls apply as mutable; prompts or a token
    at a time as with `NnxCache`, and with a causal mask that is no tracer. Leave the layer's `decode`
    False.

    Attributes:
      num_bytes: for this layer.
      frequencies: [D/2] of the model's rotary embedding, a tuple; None for a model without.
      causal: True says that masks which are traced, and cannot be looked at, are causal ones.
    """

    num_bytes: int
    frequencies: tuple[float, ...] | None = None
    causal: bool = False

    @linen.compact
    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
        module: Any = None,
    ) -> jax.Array:
        check_module(module)
        check_call(query, key, bias, mask, False, self.causal)
        _check_dropout(dropout_rate, deterministic)
        batch, _, heads, head_dim = key.shape

        def empty() -> KVCache:
            return kv_cache.create(self.num_bytes, 1, heads, head_dim, num_requests=batch)

        state = self.variable(COLLECTION, "jbalance", empty)
        lengths = jnp.full(batch, checks.INT32_MAX, jnp.int32)
        y, state.value = _attend(state.value, 0, query, key, value, self.frequencies, lengths, True)
        return y


def _attend(cache, layer, query, key, value, frequencies, lengths, last):
    """Prompts [B, S, H, D] or a token [B, 1, H, D] of each request; `last` of a token's layers?"""
    if query.shape[0] != cache.num_requests:
        raise ValueError(
            f"query has {query.shape[0]} sequences: the cache is for {cache.num_requests}"
        )
    if query.shape[1] > 1:
        lengths = jnp.where(lengths == checks.INT32_MAX, query.shape[1], lengths)
        frequencies = None if frequencies is None else np.asarray(frequencies, np.float32)
        return kv_cache.prefill(
            cache, layer, query, key, value, frequencies=frequencies, lengths=lengths
        )
    y, cache = step_in_order(cache, layer, query[:, 0], key[:, 0], value[:, 0], last=last)
    return y[:, None].astype(query.dtype), cache


def _check_dropout(rate: float, deterministic: bool) -> None:
    if rate > 0 and not deterministic:
        raise ValueError(
            f"dropout_rate is {rate}: a cache is for inference; call the model with deterministic=True "
            f"(nnx: model.eval())"
        )


def _check_mask_of_one(mask: Any, causal: bool) -> None:
    """ValueError for a mask that hides something of what was kept from one token, which sees all."""
    if mask is None:
        return
    if checks.is_concrete(mask):
        if not np.all(np.asarray(mask).astype(bool)):
            raise ValueError(
                "mask hides keys from a single token, which sees all that was kept: pad prompts on the "
                "right and give their lengths to the cache, or leave the mask out"
            )
    elif np.shape(mask)[-1:] not in ((), (1,)) and not causal:
        raise ValueError(
            f"mask is traced and of {np.shape(mask)[-1]} keys for a single token, so that it cannot be "
            f"looked at: leave it out, or tell the cache causal=True if it hides nothing"
        )


def check_call(
    query: jax.Array, key: jax.Array, bias: Any, mask: Any, is_causal: bool, causal: bool
) -> None:
    """ValueError for attention that a cache of causal self-attention would compute otherwise."""
    size = query.shape[1]
    if key.shape[1] != size:
        raise ValueError(
            f"query has {size} tokens and key {key.shape[1]}: the cache is for self-attention, not for "
            f"cross-attention, which cache.write and cache.attend are for"
        )
    if bias is not None:
        raise ValueError("bias is given: attention over the cache has none")
    if size == 1:
        return _check_mask_of_one(mask, causal)
    if mask is None and not is_causal:
        raise ValueError(
            "attention is called without is_causal=True or a causal mask: each token would see those "
            "behind it, as in an encoder; the cache is for decoders"
        )
    if mask is None:
        return
    if checks.is_concrete(mask):
        if not (is_causal or is_causal_mask(mask, size, size)) or not shows_all_before(
            mask, size, size
        ):
            raise ValueError(
                "mask is not the causal one: pad prompts on the right and give their lengths to the "
                "cache, and windows and prefixes are not supported"
            )
    elif not causal:
        raise ValueError(
            "mask is traced, so that it cannot be looked at: give is_causal=True in its place, or tell "
            "the cache causal=True if it is a causal one"
        )
