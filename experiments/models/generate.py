"""Greedy decoding with a dense cache: prefill once, then one scan of single-token steps."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from experiments.models.attention import decode_attention, prefill_attention
from experiments.models.transformer import Transformer


def greedy(
    model: Transformer, tokens: ArrayLike, steps: int, *, lengths: ArrayLike | None = None
) -> Array:
    """The `steps` most likely next tokens, one after the other, past any end-of-text token.

    Args:
      model: the decoder.
      tokens: prompts [B, T] on the host, padded on the right with any token.
      steps: tokens to generate.
      lengths: tokens of each prompt without its padding [B]; None means T. Lengths are data: only
        another T or another `steps` compiles again.

    Returns:
      Continuations [B, steps].
    """
    config, tokens = model.config, np.asarray(tokens)
    if tokens.ndim != 2 or not ((tokens >= 0) & (tokens < config.vocab_size)).all():
        raise ValueError(
            f"tokens must be [B, T] with values in [0, {config.vocab_size}), "
            f"got {list(tokens.shape)} with values in {_range(tokens)}"
        )
    prompt = tokens.shape[1]
    lengths = np.full(tokens.shape[0], prompt) if lengths is None else np.asarray(lengths)
    if lengths.shape != tokens.shape[:1] or not ((lengths >= 1) & (lengths <= prompt)).all():
        raise ValueError(
            f"lengths must be [B] = [{tokens.shape[0]}] with values in [1, T={prompt}], "
            f"got {list(lengths.shape)} with values in {_range(lengths)}"
        )
    if steps < 1 or prompt + steps > config.max_positions:
        raise ValueError(
            f"steps must be at least 1 and T + steps at most max_positions={config.max_positions}, "
            f"got T={prompt}, steps={steps}; load the model with max_positions for longer contexts than "
            f"those of its training"
        )
    return _greedy(*nnx.split(model), jnp.asarray(tokens), jnp.asarray(lengths), steps)


def _range(values: np.ndarray) -> str:
    return f"[{values.min()}, {values.max()}]" if values.size else "an empty array"


@functools.partial(jax.jit, static_argnums=(0, 4))
def _greedy(
    graphdef: nnx.GraphDef[Transformer],
    parameters: nnx.State,
    tokens: Array,
    lengths: Array,
    steps: int,
) -> Array:
    model = nnx.merge(graphdef, parameters)
    h, cache = model.hidden(tokens, attention=prefill_attention)
    # Padded prompt tokens leave stale entries after each prompt's end. They are never read: step i
    # overwrites entry length + i before it becomes visible.
    room = ((0, 0), (0, 0), (0, steps), (0, 0), (0, 0))
    cache = jax.tree.map(lambda leaf: jnp.pad(leaf, room), cache)
    last = jnp.take_along_axis(h, (lengths - 1)[:, None, None], axis=1)
    first = jnp.argmax(model.logits(last)[:, 0], axis=-1)

    def step(carry: tuple[Array, Any], position: Array) -> tuple[tuple[Array, Any], Array]:
        token, cache = carry
        attention = decode_attention(position)
        h, cache = model.hidden(token[:, None], position[:, None], attention, cache)
        return (jnp.argmax(model.logits(h)[:, 0], axis=-1), cache), token

    positions = lengths + jnp.arange(steps)[:, None]
    return jax.lax.scan(step, (first, cache), positions)[1].T
