"""The prefill: keys, values, and what each policy needs to know of them, layer by layer."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.models.attention import PLAIN, attention_weights, causal_attention
from experiments.models.transformer import Transformer
from experiments.models.worth import decoder_of
from jbalance import decode, importance
from jbalance.cache._channels import query_energy
from jbalance.decode.prefill import LayerTokens, layers_of
from jbalance.importance import Knowledge
from jbalance.importance.token_worth import NUM_SINKS
from jbalance.types import TokenScorer

NUM_RECENT = 32
FEW_TOKENS = (8, 12, 18, 25)  # counts below the sinks and the recent tokens
PROBE_TOKENS = 128  # last queries that stand for those to come
SCORE_WEIGHTS = {"window": 1.0, "expected_attention": 1.0, "attention_mass": 1.0, "leverage": 0.2}
SKETCH, WORTH, REPETITION = "sketch", "worth", "repetition"
WORTHS = (SKETCH, WORTH, REPETITION)
REPEAT_TOKENS = 1024  # of the context, fed back at a time
REPEAT_BLOCK = 128  # of them, whose attention is measured at a time


class Measured(NamedTuple):
    """One context of S tokens after the prefill; K = key/value heads, M = counts."""

    k: jax.Array  # [L, S, K, D]
    v: jax.Array  # [L, S, K, D]
    w: dict[str, jax.Array]  # by scorer, [L, K, S] importance of the tokens
    error: dict[str, jax.Array]  # by scorer, [L, K, M] output error of keeping counts[m] tokens
    energy: jax.Array  # [L, K, D] of the queries, by channel
    known: Knowledge | None = None  # the user's rules about the tokens
    learned: np.ndarray | None = None  # [L] bool, whether the layer's worth is; None for none

    def certain(self, scorer: str) -> bool:
        """Whether what the scorer says is learned or measured worth, no sketch of it."""
        return scorer == REPETITION or (scorer == WORTH and bool(np.all(self.learned)))


def counts(num_tokens: int) -> tuple[int, ...]:
    """Numbers of tokens at which a head is measured: at most 32, in a geometric series to all."""
    rest = np.round(np.geomspace(NUM_SINKS + NUM_RECENT, num_tokens, 28)).astype(int)
    return tuple(sorted({*FEW_TOKENS, *rest.tolist()}))


def scorers(frequencies: jax.Array) -> dict[str, TokenScorer]:
    """The token scorers by name, and their combination."""
    table = dict(importance.TOKEN_SCORERS)
    for name, scorer in (
        ("expected_attention", importance.expected_attention),
        ("leverage", importance.leverage),
    ):
        table[name] = functools.partial(scorer, frequencies=frequencies)
    combined = importance.combined(SCORE_WEIGHTS, normalize={"leverage": "rank"}, scorers=table)
    return {"combined": combined, **table}


def check_length(name: str, num_tokens: int) -> None:
    """ValueError if a context is too short to be measured."""
    least = max(PROBE_TOKENS, NUM_SINKS + NUM_RECENT) + 1
    if num_tokens < least:
        raise ValueError(
            f"{name} has {num_tokens} tokens: at least {least} are needed, the {PROBE_TOKENS} last "
            f"queries being the window that the heads are measured on"
        )


def prefill(model: Transformer, tokens: np.ndarray, names: tuple[str, ...]) -> Measured:
    """Run the context through the model and measure every head on the way.

    Args:
      model: the decoder.
      tokens: [S] ids of the context.
      names: token scorers that order each head's tokens, sinks and recent ones above all; or of
        `WORTHS`, whose w are in one currency for all heads and precisions: "worth" what the library's
        own prefill finds, predicted where the model has learned to; "sketch" the same never predicted;
        "repetition" with the context really repeated.
    """
    check_length("context", len(tokens))
    parts, tokens = nnx.split(model), np.asarray(tokens)
    others = set(names) - {WORTH, REPETITION} | ({SKETCH} if REPETITION in names else set())
    if not others:
        return _layers(decoder_of(model), tokens)
    measured = _prefill(*parts, jnp.asarray(tokens), tuple(sorted(others)), counts(len(tokens)))
    if WORTH in names:
        own = _layers(decoder_of(model), tokens)
        measured.w[WORTH] = own.w[WORTH]
        measured = measured._replace(learned=own.learned)
    if REPETITION in names:
        energy = measured.w[SKETCH] ** 2 + _repeated(parts, tokens, measured)
        measured.w[REPETITION] = jnp.sqrt(energy)
    return measured


def _layers(decoder: decode.Model, tokens: np.ndarray) -> Measured:
    """What the library's own prefill leaves of a context, and what the tokens are worth by it."""
    layers = [held for _, held in layers_of(decoder, tokens)]
    whole: LayerTokens = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    k, v, w = whole.k[:, : len(tokens)], whole.v[:, : len(tokens)], whole.w[..., : len(tokens)]
    assert whole.energy is not None
    worth = [None] * len(layers) if decoder.worth is None else decoder.worth
    learned = np.array([x is not None for x in worth])
    return Measured(k, v, {WORTH: w}, {}, whole.energy, learned=learned)


@functools.partial(jax.jit, static_argnames=("graph", "names", "counts"))
def _prefill(graph, state, tokens, names, counts) -> Measured:
    model = nnx.merge(graph, state)

    def attention(q, k, v, frequencies, scoring=PLAIN):
        y, _ = causal_attention(q, k, v, scoring=scoring)
        q, k, v = q[0], k[0], v[0]
        if scoring.scale is not None:
            q = q * (scoring.scale * q.shape[-1] ** 0.5)
        table = scorers(frequencies)
        w, error = {}, {}
        for name in names:
            if name == SKETCH:
                w[name] = importance.token_worth(q, k, v, frequencies=frequencies)
                continue
            w[name] = table[name](q, k, v)
            if name != "sinks_recent":  # an order by position needs no protection of positions
                w[name] = importance.protected(w[name], num_sinks=NUM_SINKS, num_recent=NUM_RECENT)
            last = q[-PROBE_TOKENS:]
            error[name] = importance.output_error(last, k, v, w[name], counts, num_local=NUM_RECENT)
        return y, Measured(k, v, w, error, query_energy(q, k.shape[1]))

    frequencies = jnp.asarray([spec.frequencies for spec in model.attention_specs], jnp.float32)
    return model.hidden(tokens[None], None, attention, frequencies)[1]


def _repeated(parts, tokens: np.ndarray, measured: Measured) -> jax.Array:
    """Energies [L, K, S] received while the context is fed back in pieces of one size."""
    number = -(-len(tokens) // REPEAT_TOKENS)
    size = -(-len(tokens) // number)
    total = jnp.zeros((*measured.k.shape[::2], len(tokens)))
    for start in np.minimum(np.arange(number) * size, len(tokens) - size):
        piece = jnp.asarray(tokens[start : start + size])
        total += _repeat_piece(*parts, piece, measured.k, measured.v)
    return total


@functools.partial(jax.jit, static_argnames="graph")
def _repeat_piece(graph, state, tokens, k, v) -> jax.Array:
    model, size = nnx.merge(graph, state), k.shape[1]

    def attention(q, new_k, new_v, context, scoring=PLAIN):
        keys, values = (
            jnp.concatenate([x, new[0]]) for x, new in zip(context, (new_k, new_v), strict=True)
        )
        y, energy = _attend_after(q[0], keys, values, scoring)
        return y[None], energy[:, :size]

    positions = size + jnp.arange(tokens.shape[0])
    return model.hidden(tokens[None], positions, attention, (k, v))[1]


def _attend_after(q, k, v, scoring=PLAIN) -> tuple[jax.Array, jax.Array]:
    """The last queries [T, H, D] of the keys' sequence [S, K, D], causally: y [T, H, D], energy [K, S].

    The energy is `importance.attention_energy`, from the same logits as y.
    """
    size, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    k, v = jnp.moveaxis(k, 1, 0), jnp.moveaxis(v, 1, 0)
    blocks = -(-size // REPEAT_BLOCK)
    q = jnp.pad(q, ((0, blocks * REPEAT_BLOCK - size), (0, 0), (0, 0)))
    q = q.reshape(blocks, REPEAT_BLOCK, kv_heads, -1, head_dim)
    first = k.shape[1] - size + jnp.arange(blocks) * REPEAT_BLOCK

    def block(energy, at):
        first, q = at
        position = first + jnp.arange(REPEAT_BLOCK)[:, None]
        logits = jnp.einsum("tkgd,ksd->kgts", q, k)
        weights = attention_weights(logits, position - jnp.arange(k.shape[1]), scoring, head_dim)
        squared = (jnp.where(position < k.shape[1], weights, 0) ** 2).reshape(
            kv_heads, -1, k.shape[1]
        )
        y = jnp.einsum("kgts,ksd->tkgd", weights, v)
        # A product with ones: XLA's reduction over a middle axis takes three times as long.
        return energy + jnp.einsum("n,kns->ks", jnp.ones(squared.shape[1]), squared), y

    energy, y = jax.lax.scan(block, jnp.zeros(k.shape[:2]), (first, q))
    return y.reshape(-1, heads, head_dim)[:size], energy
