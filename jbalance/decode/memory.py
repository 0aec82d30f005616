"""One memory for a model's weights and its cache: at one price the next byte goes where it saves most.

What fewer bits cost is measured: the divergence (KL, nats a token) of the model's predictions from those
of the model as it is, with one layer's weights in fewer bits, or with its cache in fewer bytes. Small
losses add up, so that a choice is worth the sum of its parts, and the best one within so many bytes is a
knapsack of many levels (`allocate.ladder`), whose price is nats per byte.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import allocate, checks
from jbalance._bits import in_32_bits
from jbalance.decode import extend, prefill
from jbalance.decode.context import read
from jbalance.decode.model import Model, check_model, token_ids
from jbalance.decode.plan import Reserve
from jbalance.decode.weights import BITS, check_plain, decoded, quantize_weights, quantized

PARTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of a dense cache of 16 bits
_BLOCK = 1024  # bytes in which costs are counted
_LEAST = 1e-9  # nats a token; less is rounding, and weights as they are lose nothing


class MemoryLosses(NamedTuple):
    """What predictions lose, in nats a token; L layers, M levels of weights, F of the cache."""

    bits: tuple[int | None, ...]  # [M] of weights, ascending; the last, None, are as they are
    layers: np.ndarray  # [L, M] of each layer's weights
    layer_bytes: np.ndarray  # [L, M] int64
    table: np.ndarray  # [M] of what embedding and logits use
    table_bytes: np.ndarray  # [M] int64
    parts: tuple[float, ...]  # [F] of the bytes of a dense cache of 16 bits, ascending
    cache: np.ndarray  # [F]


class Fit(NamedTuple):
    """How a memory is shared."""

    model: Model  # with weights of so many bits
    cache_bytes: int  # what they leave of the memory
    layer_bits: tuple[int | None, ...]  # [L]
    table_bits: int | None
    loss: float  # nats a token, predicted
    price: float  # nats a token that one more byte would save


@in_32_bits
def memory_losses(
    model: Model,
    tokens: np.ndarray,
    *,
    parts: Sequence[float] = PARTS,
    on_step: Callable[[int, int], object] = lambda done, steps: None,
) -> MemoryLosses:
    """Measure what fewer bits of each layer's weights, and fewer bytes of the cache, cost a model.

    The first half of the tokens is a context, the second is predicted from it and from itself. Weights
    are measured layer by layer at each of the bits with everything else as it is. What goes into each
    layer is in memory, and a layer's weights a second time.

    Args:
      model: the decoder, as it is.
      tokens: [S] ids of a text like those to come, S at least 128; 1,024 are enough.
      parts: of the bytes of a dense 16-bit cache, at which the cache is measured, ascending in (0, 1].
      on_step: called with how many measurements of how many are made.

    Returns:
      `MemoryLosses`, for `fit_memory`.

    Raises:
      ValueError: a model that is not supported or has quantized weights, too few tokens, parts that do
        not ascend, or that are too few bytes for the tokens of a cache that always stay.
    """
    check_model(model)
    check_plain(model)
    tokens = token_ids("tokens", tokens, model, 128)
    parts = tuple(
        checks.static_float(f"parts[{i}]", x, 0, 1, open_low=True)
        for i, x in enumerate(checks.items("parts", parts, "parts of a dense cache"))
    )
    if list(parts) != sorted(set(parts)) or not parts:
        raise ValueError(f"parts is {parts}: one or more, ascending")
    half, steps = len(tokens) // 2, len(parts) + (model.num_layers + 1) * len(BITS)
    done = 0

    def step():
        nonlocal done
        done += 1
        on_step(done, steps)

    run = _Run(model, tokens, half)
    layers = np.zeros((model.num_layers, len(BITS) + 1))
    layer_bytes, table, table_bytes = layers.astype(np.int64), np.zeros(len(BITS) + 1), []
    for m, bits in enumerate(BITS):
        few = quantized("model.params", model.params, bits, rows=True)
        table_bytes.append(_nbytes(few))
        table[m] = run.loss(dataclasses.replace(model, params=decoded(few)), 0)
        step()
        for i, own in enumerate(model.layers):
            few = quantized(f"model.layers[{i}]", own, bits)
            layer_bytes[i, m] = _nbytes(few)
            changed = (*model.layers[:i], decoded(few), *model.layers[i + 1 :])
            layers[i, m] = run.loss(dataclasses.replace(model, layers=changed), i)
            step()
    layer_bytes[:, -1] = [_nbytes(own) for own in model.layers]
    cache = []
    for i, part in enumerate(parts):
        try:
            cache.append(run.loss_of_cache(part))
        except ValueError as error:
            raise ValueError(
                f"parts[{i}] is {part:g}, for a context of {half} tokens: {error}; give a larger part "
                f"or more tokens"
            ) from None
        step()
    return MemoryLosses(
        (*BITS, None),
        layers,
        layer_bytes,
        table,
        np.array([*table_bytes, _nbytes(model.params)], np.int64),
        parts,
        np.array(cache),
    )


class _Run:
    """A model's predictions of the second half of a text, and what goes into each layer."""

    def __init__(self, model: Model, tokens: np.ndarray, half: int) -> None:
        self.model, self.tokens, self.half = model, tokens, half
        self.before = [prefill.embedded(model, tokens)]
        for x, _ in prefill.layers_of(model, tokens):
            self.before.append(jnp.array(x))  # the next layer's program takes the original
        self.wanted = _after(model, self.before[-1], tokens, half)

    def loss(self, model: Model, first: int) -> float:
        """Of a model that differs from the given one in a layer, or in what is none (`first` = 0)."""
        x = jnp.array(self.before[first]) if first else prefill.embedded(model, self.tokens)
        return self._divergence(_predicted(model, self.tokens, self.half, x, first))

    def loss_of_cache(self, part: float) -> float:
        """Over a cache of the first half in a part of the bytes."""
        model, half = self.model, self.half
        reserve = Reserve(1, 0)
        units = model.num_layers * model.num_kv_heads
        timed = model.windows is not None
        beside = units * reserve.unit_bytes(model.head_dim, timed=timed)
        beside += reserve.device_bytes(units, timed=timed)
        budget = int(part * model.dense_bytes(half)) + beside
        context = read(model, self.tokens[:half], [budget], reserve=reserve)
        device = jax.devices()[:1]
        given = self.tokens[half:-1]
        return self._divergence(extend.log_probs(model, device, None, context.caches, given, half))

    def _divergence(self, got: jax.Array) -> float:
        return max(float(_kl(self.wanted, got)), _LEAST)


def dense_log_probs(model: Model, tokens: np.ndarray, context_tokens: int) -> jax.Array:
    """[T, V] after each of the tokens behind the context but the last, over a dense cache."""
    return _predicted(model, tokens, context_tokens, prefill.embedded(model, tokens), 0)


def _predicted(model: Model, tokens, context_tokens: int, x: jax.Array, first: int) -> jax.Array:
    """`dense_log_probs` by x [1, S, E] before layer `first`."""
    after = deque(prefill.layers_from(model, x, len(tokens), first), maxlen=1)
    return _after(model, after[0][0], tokens, context_tokens)


def _after(model: Model, x: jax.Array, tokens, context_tokens: int) -> jax.Array:
    """`dense_log_probs` by x [1, S, E] behind the last layer."""
    return jax.nn.log_softmax(extend.logits_of(model, x[:, context_tokens : len(tokens) - 1]))


@jax.jit
def _kl(wanted: jax.Array, got: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - got), axis=-1))


def _nbytes(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def fit_memory(
    model: Model,
    losses: MemoryLosses,
    budget_bytes: int,
    num_tokens: int,
    *,
    num_requests: int = 1,
) -> Fit:
    """Share a memory between a model's weights and its cache at one price.

    Args:
      model: the decoder, as it was measured.
      losses: of `memory_losses`.
      budget_bytes: for weights and cache together.
      num_tokens: of each request, its answer among them.
      num_requests: at once.

    Returns:
      `Fit`: `decode.create(fit.model, [fit.cache_bytes])` decodes within the memory.

    Raises:
      ValueError: losses of another model; a memory that does not hold the fewest bits of all.
    """
    check_model(model)
    checks.instance("losses", losses, MemoryLosses)
    if len(losses.layers) != model.num_layers:
        raise ValueError(
            f"losses has {len(losses.layers)} layers: the model has {model.num_layers}"
        )
    budget = checks.static_int("budget_bytes", budget_bytes, 0, 2**40)
    num_tokens = checks.static_int("num_tokens", num_tokens, 1)
    num_requests = checks.static_int("num_requests", num_requests, 1)
    dense = num_requests * model.dense_bytes(num_tokens)
    cost = [*losses.layer_bytes, losses.table_bytes, np.array(losses.parts) * dense]
    loss = [*losses.layers, losses.table, losses.cache]
    size = max(map(len, cost))
    costs = np.stack([_rising(np.ceil(x / _BLOCK), size) for x in cost])
    values = np.stack([-np.pad(x, (0, size - len(x)), mode="edge") for x in loss])
    least = int(costs[:, 0].sum()) * _BLOCK
    if least > budget:
        raise ValueError(
            f"budget_bytes is {budget}: the fewest bits of weights and cache take {least}"
        )
    found = allocate.ladder(values, costs, budget // _BLOCK)
    level = np.asarray(found.level)
    *layer_bits, table_bits = (losses.bits[m] for m in level[:-1])
    small = quantize_weights(model, layer_bits, table_bits)
    return Fit(
        small,
        budget - small.nbytes,
        tuple(layer_bits),
        table_bits,
        -float(np.take_along_axis(values, level[:, None], axis=1).sum()),
        float(np.ravel(found.price)[0]) / _BLOCK,
    )


def _rising(blocks: np.ndarray, size: int) -> np.ndarray:
    """Whole blocks [size] that rise; levels of a unit that has fewer cost more, for nothing."""
    out = np.pad(blocks.astype(np.int64), (0, size - len(blocks)), mode="edge")
    for i in range(1, size):
        out[i] = max(out[i], out[i - 1] + 1)
    return out
