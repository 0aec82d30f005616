"""The model over one live cache: prompts enter layer by layer, tokens follow, the bytes stay.

At no time does the cache of the whole prompt exist. A prompt goes through the model one layer at a
time; the layer's keys and values are weighed and enter the arena at the precision that they are worth
so far, and what came from earlier layers gives way as the price rises.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.kv_budget import measure
from experiments.models import causal_attention
from experiments.models.llama import Llama
from jbalance.cache import live
from jbalance.cache.live import KVCache


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

    def create(self, budget_bytes: int, *, num_requests: int = 1, ring_tokens: int = 32) -> KVCache:
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
                    f"{measure.LADDER_RECENT} latest tokens; give it more than {allowance_pages}"
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
    w = measure.worth(q[0], k[0], v[0], model.config.rope_base)
    cache, report = live.admit_layer(
        cache,
        request,
        layer,
        k[0],
        v[0],
        w,
        allowance_pages,
        num_sinks=measure.NUM_SINKS,
        num_recent=measure.LADDER_RECENT,
    )
    return model.finish(x, y), cache, report.shortfall


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
