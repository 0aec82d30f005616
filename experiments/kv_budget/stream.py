"""A prompt, and a long decode after it, in constant bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.kv_budget.evaluate import rate_of
from experiments.models.transformer import Transformer
from experiments.models.worth import decoder_of
from jbalance import decode
from jbalance.decode import devices
from jbalance.resources import AttentionDims, kv_cache_bytes


def stream(
    model: Transformer,
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
      ValueError: memory too small for the tokens that always stay.
      RuntimeError: bytes above the budget.
    """
    decoder = decoder_of(model)
    state = decode.create(decoder, [memory_bytes], devices=jax.devices()[:1])
    start = time.perf_counter()
    state = decode.join(decoder, state, 0, context)
    tokens = [int(state.tokens[0])]
    prefill_s, largest = time.perf_counter() - start, max(state.nbytes)
    seconds: list[float] = []
    compiled: Any = (
        devices._attend_token
    )  # whose cache the type of jitted functions does not tell of
    before = compiled._cache_size()
    while len(tokens) < new_tokens:
        start = time.perf_counter()
        new, state = decode.step(decoder, state)
        tokens.append(int(new[0]))
        seconds.append(time.perf_counter() - start)
        largest = max(largest, *state.nbytes)
        step(1)
    (cache,) = state.caches
    assert cache is not None
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
        "recent_tokens": cache.recent_tokens,
        "prefill_s": prefill_s,
        "tokens_per_s": rate_of(seconds),
        "compilations": compiled._cache_size() - before,
        "tokens": tokens,
    }
