"""The model over one live cache: prompts enter layer by layer, tokens follow, the bytes stay.

At no time does the cache of the whole prompt exist. A prompt goes through the model one layer at a
time; the layer's keys and values are weighed and enter the arena at the precision that they are worth
so far, and what came from earlier layers gives way as the price rises.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.kv_budget import measure
from experiments.models import causal_attention
from experiments.models.llama import Llama
from jbalance import importance
from jbalance.cache import live
from jbalance.cache.live import KVCache
from jbalance.importance.token_worth import NUM_RECENT as LADDER_RECENT
from jbalance.resources import AttentionDims, kv_cache_bytes

PIECE_STEPS = 64  # tokens decoded between two looks at the clock


@dataclasses.dataclass(frozen=True)
class Streamer:
    """A model split once, so that its steps compile once."""

    config: Any
    layers: list[nnx.State]
    layer_graph: Any
    graph: Any
    state: nnx.State

    @classmethod
    def of(cls, model: Llama) -> Streamer:
        graph, state = nnx.split(model)
        layers = [nnx.split(model.layer(i)) for i in range(model.config.num_layers)]
        return cls(model.config, [s for _, s in layers], layers[0][0], graph, state)

    def create(
        self, budget_bytes: int, *, num_requests: int = 1, ring_tokens: int | None = None
    ) -> KVCache:
        """An empty cache for this model; errors as `live.create`."""
        c = self.config
        return live.create(
            budget_bytes,
            c.num_layers,
            c.num_kv_heads,
            c.head_dim,
            num_requests=num_requests,
            ring_tokens=ring_tokens,
        )

    def prefill(
        self, cache: KVCache, tokens: np.ndarray, *, request: int = 0, allowance_pages: int
    ) -> tuple[jax.Array, KVCache]:
        """A prompt [S] enters the empty place of a request.

        Args:
          cache: given up: the returned one takes its place.
          tokens: ids.
          request: which.
          allowance_pages: for this request.

        Returns:
          Logits [V] after the last token, and the cache.

        Raises:
          ValueError: a prompt too short to be weighed.
          RuntimeError: if the pages do not even hold the sinks and the latest tokens.
        """
        measure.check_length("tokens", len(tokens))
        x = _embed(self.graph, self.state, jnp.asarray(tokens))
        for layer, state in enumerate(self.layers):
            x, cache, lacking = _admit_layer(
                self.layer_graph, state, cache, x, request, layer, allowance_pages
            )
            if lacking:
                raise RuntimeError(
                    f"request {request} lacks {lacking} pages at layer {layer} for its sinks and its "
                    f"{LADDER_RECENT} latest tokens; give it more than {allowance_pages}"
                )
        return _logits(self.graph, self.state, x[:, -1:])[0], cache

    def step(
        self,
        cache: KVCache,
        tokens: jax.Array,
        positions: jax.Array,
        allowance_pages: jax.Array,
        active: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """One token [B] of each active request: logits [B, V] and the cache, which takes its place."""
        active = jnp.ones(len(tokens), bool) if active is None else active
        return _step(self.graph, self.state, cache, tokens, positions, allowance_pages, active)

    def generate(
        self,
        cache: KVCache,
        token: jax.Array,
        position: int,
        steps: int,
        allowance_pages: jax.Array,
    ) -> tuple[jax.Array, KVCache]:
        """Greedy tokens [steps, B] after one token [B] of each request, without leaving the device."""
        positions = jnp.full(token.shape, position)
        return _generate(self.graph, self.state, cache, token, positions, allowance_pages, steps)


@functools.partial(jax.jit, static_argnums=0)
def _embed(graph, state, tokens):
    return nnx.merge(graph, state).embed(tokens[None])


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph, state, x):
    return nnx.merge(graph, state).logits(x)[:, -1]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _admit_layer(graph, state, cache, x, request, layer, allowance_pages):
    """x [1, S, E] through one layer, whose keys and values enter the cache."""
    model = nnx.merge(graph, state)
    q, k, v = model.qkv(x, jnp.arange(x.shape[1]))
    y, _ = causal_attention(q, k, v)
    w = importance.token_worth(q[0], k[0], v[0], frequencies=model.config.frequencies)
    cache, report = live.admit_layer(
        cache,
        request,
        layer,
        k[0],
        v[0],
        w,
        allowance_pages,
        num_sinks=measure.NUM_SINKS,
        num_recent=LADDER_RECENT,
    )
    return model.finish(x, y), cache, report.shortfall


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=2)
def _generate(graph, state, cache, token, positions, allowance_pages, steps):
    active = jnp.ones(token.shape, bool)

    def step(carry, _):
        cache, token, positions = carry
        logits, cache = _step(graph, state, cache, token, positions, allowance_pages, active)
        token = jnp.argmax(logits, axis=-1).astype(token.dtype)
        return (cache, token, positions + 1), token

    carry, tokens = jax.lax.scan(step, (cache, token, positions), length=steps)
    return tokens, carry[0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(graph, state, cache, tokens, positions, allowance_pages, active):
    model = nnx.merge(graph, state)

    def attention(q, k, v, layer_state):
        layer, ring = layer_state
        y, ring = live.attend_step(cache, ring, layer, q[:, 0], k[:, 0], v[:, 0], active=active)
        return y[:, None], ring

    layers = jnp.arange(model.config.num_layers), cache.rings
    h, rings = model.hidden(tokens[:, None], positions[:, None], attention, layers)
    logits = model.logits(h)[:, 0]
    cache, _ = live.end_step(cache, rings, allowance_pages, active=active)
    return logits, cache


def stream(
    model: Llama,
    context: np.ndarray,
    *,
    memory_bytes: int,
    new_tokens: int,
    step: Callable[[int], Any],
) -> dict[str, Any]:
    """A prompt, and many greedy tokens after it, within given bytes.

    Args:
      model: the decoder.
      context: [S] ids.
      memory_bytes: the budget.
      new_tokens: how many to decode, >= 1.
      step: called with the number of new tokens now and then, for progress.

    Returns:
      What the command prints: bytes, speed, compilations, and the new tokens.

    Raises:
      ValueError: a context too short, memory too small for the rings and a page.
      RuntimeError: memory too small for the protected tokens; or bytes above the budget.
    """
    streamer = Streamer.of(model)
    cache = streamer.create(memory_bytes)
    allowance = jnp.array([cache.arena.num_pages])
    start = time.perf_counter()
    logits, cache = streamer.prefill(cache, context, allowance_pages=cache.arena.num_pages)
    token = jnp.argmax(logits)[None]
    jax.block_until_ready(token)
    prefill_s, found, largest = time.perf_counter() - start, [token[None]], cache.nbytes
    compiled: Any = _generate  # whose cache the type of jitted functions does not tell of
    before, decode_s = compiled._cache_size(), 0.0
    done, rest = 1, (new_tokens - 1) % PIECE_STEPS
    pieces = [rest] * (rest > 0) + [PIECE_STEPS] * ((new_tokens - 1) // PIECE_STEPS)
    for i, steps in enumerate(pieces):
        start = time.perf_counter()
        tokens, cache = streamer.generate(
            cache, found[-1][-1], len(context) + done - 1, steps, allowance
        )
        jax.block_until_ready(tokens)
        decode_s += (time.perf_counter() - start) * (i > 1)  # the first two compile
        found.append(tokens)
        done += steps
        largest = max(largest, cache.nbytes)
        step(steps)
    if largest > memory_bytes:
        raise RuntimeError(f"the cache took {largest} of {memory_bytes} bytes")
    config = model.config
    dims = AttentionDims(config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim)
    held = np.asarray(cache.arena.count).sum(axis=0)
    return {
        "budget_bytes": memory_bytes,
        "largest_resident_bytes": largest,
        "full_cache_bytes": kv_cache_bytes(dims, len(context) + new_tokens),
        "tokens_seen": len(context) + new_tokens - 1,
        "trained_positions": config.max_positions,
        "tokens_held_per_head": {
            str(bits): float(n / (dims.num_layers * dims.num_kv_heads))
            for bits, n in zip(cache.arena.bits, held, strict=True)
        },
        "ring_tokens": cache.ring_tokens,
        "prefill_s": prefill_s,
        "tokens_per_s": PIECE_STEPS * (len(pieces) - 2) / decode_s if decode_s else None,
        "compilations": compiled._cache_size() - before,
        "tokens": np.concatenate([np.asarray(x)[:, 0] for x in found]).tolist(),
    }
