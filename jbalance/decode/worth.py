"""From texts, what a model's later queries will ask of a token: `Model.worth`, fitted once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import checks, importance
from jbalance.cache import _step
from jbalance.decode import prefill
from jbalance.decode.model import Functions, Model, check_model, token_ids
from jbalance.importance.predicted_worth import (
    WorthWeights,
    fit_predicted_worth,
    followed_worth,
    normalized,
    worth_features,
)
from jbalance.importance.token_worth import NUM_QUERIES, later_energy

NUM_FOLLOWING = 512  # tokens of a text that follow its context


def fit_worth(
    model: Model,
    texts: Sequence[np.ndarray],
    *,
    on_layer: Callable[[int], object] = lambda layer: None,
) -> tuple[WorthWeights | None, ...]:
    """Poisson regression of what a model's own later queries ask of the tokens of some texts.

    All but the last 512 tokens of a text are its context. What each key/value head's tokens receive in
    squared attention is measured twice: from the 512 tokens that follow, and from a repetition of the
    context in their place, which stands for questions about any part of it. A log-linear map of the
    residual stream, the last queries' attention and the position is fitted to both. With it a prompt's
    tokens are weighed better than by a sketch of their repetition, for a thousandth of the products:

        worth = decode.fit_worth(model, texts)
        model = dataclasses.replace(model, worth=worth)

    Some 50,000 tokens of contexts, of the kinds and lengths that will be decoded, are enough for the
    numbers of a head: one for each of the residual stream, and a dozen. It takes as long as reading
    three times as many tokens. All texts' residual streams are in memory.

    Args:
      model: the decoder; its own `worth` is not used.
      texts: [S + 512] ids each, S at least 64.
      on_layer: called with each layer's index when it is fitted.

    Returns:
      The weights of each layer; None for those with a window, whose tokens are all kept.

    Raises:
      ValueError: a model that is not supported, no text, or one that is too short or no ids, by its
        index.

    Reference: Jégou et al., KVzap, arXiv 2601.07891, which fits the repetition alone.
    """
    check_model(model)
    given = checks.items("texts", texts, "token ids of each text")
    if not given:
        raise ValueError("texts is empty: give some 50,000 tokens")
    least = NUM_QUERIES + NUM_FOLLOWING
    runs = [
        _Run(model, token_ids(f"texts[{i}]", text, model, least)) for i, text in enumerate(given)
    ]
    worth: list[WorthWeights | None] = []
    for layer, spec in enumerate(model.attention):
        rows = [run.rows(layer, measured=spec.window is None) for run in runs]
        if spec.window is not None:
            worth.append(None)
        else:
            parts = [np.concatenate(part) for part in zip(*rows, strict=True)]
            worth.append(fit_predicted_worth(*map(jnp.asarray, parts)))
        on_layer(layer)
    return tuple(worth)


class _Run:
    """A text and its context repeated, which go through the model side by side, layer by layer."""

    def __init__(self, model: Model, text: np.ndarray) -> None:
        self.model, self.size = model, len(text) - NUM_FOLLOWING
        context = text[: self.size]
        self.tokens = [text, np.concatenate([context, context])]
        self.layers = [prefill.layers_of(model, tokens) for tokens in self.tokens]
        self.x = [prefill.embedded(model, tokens) for tokens in self.tokens]

    def rows(self, layer: int, *, measured: bool) -> Any:
        """x [S, E], features [S, C] and worth [S, K] of a layer, on the host; goes on to the next."""
        f, weights = self.model.functions(layer), self.model.layers[layer]
        energies, first = [], None
        for i, (tokens, run) in enumerate(zip(self.tokens, self.layers, strict=True)):
            before = self.x[i]
            after, held = next(run)
            self.x[i] = jnp.array(after)  # the next layer's program takes the original
            if not measured:
                continue
            number = jnp.int32(len(tokens))
            at = f, weights, before, held.k, held.v, number
            energies.append(_received(*at, len(tokens) - self.size)[:, : self.size])
            if first is None:
                first = _known(*at[:5], self.size)
        if first is None:
            return None
        worth = followed_worth(*energies).T
        return tuple(np.asarray(part) for part in (*first, worth))


@functools.partial(jax.jit, static_argnums=(0, 6))
def _received(f: Functions, weights, x, k, v, number, following: int) -> jax.Array:
    """Energies [K, capacity] from the last of the tokens."""
    q = _queries(f, weights, x, number - following, following)
    return importance.attention_energy(
        q, k, v, queries=following, min_distance=0, num_tokens=number
    )


@functools.partial(jax.jit, static_argnums=(0, 5))
def _known(f: Functions, weights, x, k, v, size: int) -> tuple[jax.Array, jax.Array]:
    """What is known of the first tokens when they have been read: `normalized` x, features."""
    q = _queries(f, weights, x, size - NUM_QUERIES, NUM_QUERIES)
    later = later_energy(q, k[:size], v[:size])
    return normalized(x[0, :size]).astype(jnp.float16), worth_features(later)


def _queries(f: Functions, weights, x, first, count: int) -> jax.Array:
    """[count, H, D] of the tokens from `first` on, scaled."""
    part = jax.lax.dynamic_slice_in_dim(x, first, count, axis=1)
    q = f.qkv(weights, part, (first + jnp.arange(count))[None])[0][0]
    return _step.scaled(q, f.spec.scale)
